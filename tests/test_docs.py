"""docs/format.md says what the code does: its NumPy reader, its worked example and its config.json are run."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from fairy2i import PackedLinear, PhaseScheme, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.packing import pack_codes

FORMAT = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", FORMAT, re.DOTALL).group(1)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_numpy_reader_gives_the_dense_weight_bit_for_bit(stages, tmp_path, monkeypatch):
    model = tiny_model("llama", hidden_size=36, head_dim=8)  # 18 complex columns: padding in each row
    replace_modules_for_qat(model, PhaseScheme(stages=stages, scales="joint"))
    convert_to_inference_mode(model).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        layer = model.get_submodule(name)
        scope = {"name": name, "m": layer.in_features // 2}
        exec(block("python"), scope)
        assert torch.equal(torch.from_numpy(scope["weight"]), layer.dense_weight())


def test_the_example_by_hand_is_what_a_packed_layer_computes():
    layer = PackedLinear(8, 2, bias=False, scheme=PhaseScheme(stages=1))
    layer.codes.copy_(pack_codes(torch.tensor([[[[2, 1, 0, 3]], [[1, 1, 1, 1]]]], dtype=torch.uint8), 2))
    layer.scales.copy_(torch.tensor([[[0.5, 0.25], [0.125, 0.0625]]]))
    assert [f"{byte:02X}" for byte in layer.codes.flatten().tolist()] == ["C6", "55"]
    rows = re.search(r"weight = \[(\[.*?\]),\s*(\[.*?\])\]", FORMAT, re.DOTALL).groups()
    assert layer.dense_weight().tolist() == [json.loads(row) for row in rows]


def test_the_config_is_the_one_that_is_written(tmp_path):
    model = tiny_model("llama", tied=True)
    replace_modules_for_qat(model, "complex_phase_v2", skip_lm_head=False)
    convert_to_inference_mode(model).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    documented = json.loads(block("json"))
    assert {key: written[key] for key in documented} == documented


def test_the_size_is_what_the_scheme_says():
    documented = re.search(r"scales: ([\d.]+) bits per weight", FORMAT).group(1)
    assert documented == f"{PhaseScheme(stages=2).bits_per_weight(1024, 1024):.5f}"
