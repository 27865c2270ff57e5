"""Annealed quantization: what the forward multiplies with, where gradients go, and that it ends."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_resume import assert_goes_on, inputs, straight  # noqa: F401  # fixtures
from torch import nn
from transformers import TrainerControl, TrainerState

from fairy2i import PhaseScheme, replace_modules_for_qat
from fairy2i.training.anneal import Anneal
from fairy2i.training.trainer import QATTrainingArguments

LEARNED = PhaseScheme(granularity="row", scales="learned")


def at(anneal, step, steps=8):
    anneal.on_step_begin(None, TrainerState(global_step=step, max_steps=steps), TrainerControl())


@pytest.mark.parametrize("bias", [True, False])
def test_a_step_multiplies_with_its_share_of_the_quantized_weight(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias))
    replace_modules_for_qat(model, LEARNED)
    layer, x, up = model[0], torch.randn(3, 16), torch.randn(3, 8)
    layer(x).backward(up)
    whole = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    anneal = Anneal(model, 0.5)
    at(anneal, 0)
    y = layer(x)
    mixed = 0.75 * layer.weight + 0.25 * layer.quantized_weight()
    torch.testing.assert_close(layer.trained_weight(), mixed)
    torch.testing.assert_close(y, F.linear(x, mixed, layer.bias))
    y.backward(up)
    torch.testing.assert_close(layer.weight.grad, whole["weight"])
    torch.testing.assert_close(layer.scales.grad, 0.25 * whole["scales"])
    quantized = F.linear(x, layer.quantized_weight(), layer.bias)
    assert torch.equal(model.eval()(x), quantized)
    model.train()
    at(anneal, 2)
    mixed = 0.25 * layer.weight + 0.75 * layer.quantized_weight()
    torch.testing.assert_close(layer(x), F.linear(x, mixed, layer.bias))
    at(anneal, 3)
    assert torch.equal(layer(x), quantized)


def test_it_is_active_before_the_share_is_one_and_while_training_lasts():
    anneal = Anneal(nn.Sequential(), 0.5)
    for step in range(8):
        at(anneal, step)
        assert anneal.active == (step < 3)
    at(anneal, 0)
    anneal.on_train_end(None, None, None)
    assert not anneal.active


@pytest.mark.parametrize("method", ["learned", pytest.param("v2", marks=pytest.mark.slow)])
def test_a_run_killed_while_it_anneals_goes_on_as_if_nothing_had_been(inputs, straight, tmp_path, method):  # noqa: F811
    kind = {"method": method, "accumulation": 2, "world": 1, "anneal": 0.75}
    whole = assert_goes_on(inputs, straight, tmp_path / "out", kind, 5)
    plain, _ = straight(**{**kind, "anneal": 0.0})
    one, other = (load_file(path / "model.safetensors") for path in (whole, plain))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_part_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--anneal 25\.0 is no part of the steps"):
        QATTrainingArguments(output_dir=str(tmp_path), anneal=25.0, use_cpu=True, report_to="none")
