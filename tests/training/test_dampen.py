"""Dampened oscillation: how far weights are pulled, that a resumed run has the same, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_goes_on, inputs, straight  # noqa: F401  # fixtures
from torch import nn
from transformers import TrainerState

from fairy2i import PhaseScheme, replace_modules_for_qat
from fairy2i.training.dampen import Dampen
from fairy2i.training.trainer import QATTrainingArguments


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(("rate", "share"), [(0.04, 0.1), (8.0, 1.0)])
def test_weights_are_pulled_by_the_rate_and_the_steps_done(fan_in_fan_out, rate, share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    replace_modules_for_qat(model, PhaseScheme(granularity="row", scales="learned"))
    for layer in model:
        layer.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            layer.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    model[1].weight.requires_grad_(False)
    before = [layer.matrix.detach().clone() for layer in model]
    quantized = model[0].quantized_weight()
    dampen = Dampen(model, 5.0)
    optimizer = SimpleNamespace(param_groups=[{"lr": rate}])
    dampen.on_optimizer_step(None, TrainerState(global_step=3, max_steps=8), None, optimizer=optimizer)
    torch.testing.assert_close(model[0].matrix, before[0] + share * (quantized - before[0]))
    assert torch.equal(model[1].matrix, before[1]), "frozen"


@pytest.mark.parametrize("method", ["learned", pytest.param("v2", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(inputs, straight, tmp_path, method):  # noqa: F811
    kind = {"method": method, "accumulation": 2, "world": 1, "dampen": 5.0}
    whole = assert_goes_on(inputs, straight, tmp_path / "out", kind, 5)
    plain, _ = straight(**{**kind, "dampen": 0.0})
    one, other = (load_file(path / "model.safetensors") for path in (whole, plain))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="would push weights away"):
            QATTrainingArguments(dampen=strength, **settings)
    with pytest.raises(ValueError, match="leave it out with FSDP"):
        QATTrainingArguments(dampen=5.0, fsdp="full_shard", **settings)
