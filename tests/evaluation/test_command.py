"""`fairy2i eval`: protocols in one run, what the JSON says, packed and QAT alike, and errors that say what to do."""

import json

import pytest
import transformers
from tiny_text import save_tiny_model, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import fairy2i
from fairy2i.cli import main
from fairy2i.evaluation.perplexity import make_windows, measure
from fairy2i.evaluation.texts import load_eval_text

V2 = "complex_phase_v2"
WINDOW = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    save_tiny_model(path / "plain")
    model = AutoModelForCausalLM.from_pretrained(path / "plain")
    fairy2i.replace_modules_for_qat(model, V2)
    for kind in ("qat", "packed"):
        if kind == "packed":
            fairy2i.convert_to_inference_mode(model)
        model.save_pretrained(path / kind)
        tiny_tokenizer().save_pretrained(path / kind)
    rows = [{"text": tiny_text(5 + 5 * i, offset=i)} for i in range(8)]
    (path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder, model, *more, data="text.jsonl"):
    out = folder / "out.json"
    own = ["--model", str(folder / model), "--data", str(folder / data), "--window", str(WINDOW), "--device", "cpu"]
    assert main(["eval", *own, "--output", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_each_protocol_is_measured_and_told_in_full(folder, own_cache, capsys):
    found = run(folder, "packed", "--protocol", "gptq", "fairy2i", "strided", "--stride", "48", "--batch_size", "2")
    model = AutoModelForCausalLM.from_pretrained(folder / "packed")
    tokenizer, text = AutoTokenizer.from_pretrained(folder / "packed"), load_eval_text(str(folder / "text.jsonl"))
    for result, protocol in zip(found["results"], ("gptq", "fairy2i", "strided"), strict=True):
        windows = make_windows(protocol, text, tokenizer, WINDOW, stride=48)
        expected = measure(model, windows, progress=False)
        assert result["protocol"] == protocol
        assert result["nll"] == pytest.approx(expected.nll, rel=1e-6)
        assert result["tokens"] == expected.tokens
        assert result["bits_per_byte"] == pytest.approx(expected.bits_per_byte(windows), rel=1e-6)
        assert (result["method"], result["scheme"][0]["layers"]) == (f"trained: {V2}", 15)
        assert len(result["model_sha256"]) == len(result["data_sha256"]) == 64
    gptq, packed, strided = found["results"]
    assert strided["stride"] == 48 and "documents" not in gptq
    assert packed["documents"] + packed["dropped_documents"] == 8 and packed["dropped_documents"] > 0
    assert gptq["data_sha256"] == strided["data_sha256"] != packed["data_sha256"]
    assert found["settings"]["transformers"] == transformers.__version__
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 + 3 + 1
    assert told[-1].startswith(f"text.jsonl: {packed['dropped_documents']} of 8 documents (")


def test_packed_and_qat_checkpoints_have_the_same_perplexities(folder, own_cache):
    protocols = ("--protocol", "gptq", "fairy2i", "strided")
    qat, packed = (run(folder, kind, *protocols)["results"] for kind in ("qat", "packed"))
    for one, other in zip(qat, packed, strict=True):
        assert other["nll"] == pytest.approx(one["nll"], rel=1e-6)
        assert {key: one[key] for key in ("method", "scheme", "bits_per_weight", "packed_bytes")} == {
            key: other[key] for key in ("method", "scheme", "bits_per_weight", "packed_bytes")
        }


@pytest.mark.parametrize("more", [("--device_map", "cpu"), ("--device_map", "auto"), ("--no-keep_dense",)])
def test_where_weights_lie_does_not_change_the_result(folder, own_cache, more):
    (expected,), (result,) = run(folder, "packed")["results"], run(folder, "packed", *more)["results"]
    assert result["nll"] == expected["nll"]


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_a_dtype_is_that_of_the_measurement(folder, own_cache, dtype):
    (exact,), (result,) = run(folder, "plain")["results"], run(folder, "plain", "--dtype", dtype)["results"]
    assert (result["nll"] == exact["nll"]) == (dtype == "auto")  # the checkpoint is in float32
    assert result["nll"] == pytest.approx(exact["nll"], rel=1e-2)


def no_bos(path):
    save_tiny_model(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("bos_token")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "no.jsonl"], "there is no file or folder no.jsonl"),
        (["--data", "wikitext2=no.raw"], "there is no file no.raw to read wikitext2 from"),
        (["--data"], "--data names no text"),
        (["--data", "empty.jsonl"], "all of its 2 documents are empty"),
        (["--window", "65"], "a window of 65 tokens is longer than the model's context of 64; use --window"),
        (["--window", "8", "--protocol", "fairy2i"], "none of 8 documents fits a window of 8 tokens"),
        (["--protocol", "strided", "--stride", "64"], "--stride must be at least 1 and less than the window of 64"),
        (["--batch_size", "0"], "the batch size must be at least 1"),
        (["--model", "packed", "--quant_method", "none", "bitnet"], f"is quantized already (trained: {V2})"),
        (["--device", "nowhere"], "the model cannot go to nowhere"),
    ],
)
def test_errors_say_what_to_do(folder, own_cache, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    base = ["--model", "plain", "--data", "text.jsonl", "--window", str(WINDOW), "--device", "cpu"]
    assert main(["eval", *base, *argv]) == 1
    error = capsys.readouterr().err
    assert message in error


def test_a_tokenizer_without_bos_is_told_of_the_other_protocol(folder, own_cache, tmp_path, capsys):
    own = ["--model", no_bos(tmp_path / "m"), "--data", str(folder / "text.jsonl"), "--device", "cpu"]
    assert main(["eval", *own, "--window", "64", "--protocol", "fairy2i"]) == 1
    assert "the tokenizer has no BOS token; use --protocol gptq" in capsys.readouterr().err
