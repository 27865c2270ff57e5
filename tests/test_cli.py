"""The fairy2i command on a tiny model with a tokenizer."""

import json

import pytest
import torch
from tiny_text import save_tiny_model
from transformers import AutoModelForCausalLM

from fairy2i import PackedLinear, QATLinear, __version__, replace_modules_for_qat
from fairy2i.cli import main


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def qat(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("qat")
    save_tiny_model(path)
    model = AutoModelForCausalLM.from_pretrained(plain)
    replace_modules_for_qat(model, "complex_phase_v2")
    model.save_pretrained(path)
    return str(path)


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 35)[None]).logits, {type(module) for module in model.modules()}


def test_quantize_packs_a_qat_checkpoint_without_changing_a_bit(qat, tmp_path, capsys):
    out = str(tmp_path / "packed")
    assert main(["quantize", qat, out]) == 0
    assert "MB of weights" in capsys.readouterr().out
    before, after = logits(qat), logits(out)
    assert torch.equal(before[0], after[0])
    assert QATLinear in before[1]
    assert PackedLinear in after[1]


def test_quantize_with_a_method_is_the_same_as_converting_by_hand(plain, qat, tmp_path):
    assert main(["quantize", plain, str(tmp_path / "out"), "--method", "complex_phase_v2"]) == 0
    assert torch.equal(logits(tmp_path / "out")[0], logits(qat)[0])


def test_dequantized_output_is_plain_and_the_same(qat, tmp_path):
    assert main(["quantize", qat, str(tmp_path / "out"), "--dequantized"]) == 0
    after, kinds = logits(tmp_path / "out")
    assert torch.equal(after, logits(qat)[0])
    assert not {QATLinear, PackedLinear} & kinds


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("plain",), "give a method"),
        (("plain", "--method", "complex_phase_v22"), "Did you mean"),
        (("qat", "--method", "bitnet"), "leave out method"),
        (("nowhere/at/all",), "no model folder"),
    ],
)
def test_quantize_says_what_is_wrong_and_writes_nothing(plain, qat, tmp_path, capsys, case, message):
    model, *rest = case
    model = {"plain": plain, "qat": qat}.get(model, model)
    assert main(["quantize", model, str(tmp_path / "out"), *rest]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quantize_does_not_write_into_a_folder_with_files(qat, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["quantize", qat, str(tmp_path)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_inspect_json_agrees_with_the_table(plain, qat, capsys):
    assert main(["inspect", qat, "--original", plain, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["inspect", qat, "--original", plain]) == 0
    table = capsys.readouterr().out
    assert told["layers"] == len(told["per_layer"]) == sum("complex_phase_v2" in line for line in table.splitlines())
    for layer in told["per_layer"]:
        row = next(line for line in table.splitlines() if f" {layer['name']} " in line)
        assert f"{layer['error']:.4f}" in row
        assert f"{layer['bits_per_weight']:.4f}" in row


def test_inspect_needs_quantized_layers(plain, capsys):
    assert main(["inspect", plain]) == 1
    assert "no quantized layers" in capsys.readouterr().err


def test_generate_streams_what_the_model_would_generate(qat, capsys):
    assert main(["generate", qat, "the quick brown", "--max_new_tokens", "8", "--device", "cpu"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("<s>the quick brown")
    sample = ["generate", qat, "the quick brown", "--max_new_tokens", "8", "--temperature", "1", "--device", "cpu"]
    assert main([*sample, "--seed", "1"]) == main([*sample, "--seed", "1"]) == main([*sample, "--seed", "2"]) == 0
    text = capsys.readouterr().out
    one, same, other = ["<s>" + part for part in text.split("<s>")[1:]]
    assert one == same != other


def test_doctor_shows_versions(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"fairy2i {__version__}" in out
    assert torch.__version__ in out


@pytest.mark.parametrize("wrong", [[], ["pack"], ["generate"]])
def test_a_wrong_command_line_exits_with_2(wrong):
    with pytest.raises(SystemExit) as exit:
        main(wrong)
    assert exit.value.code == 2
