"""The fairy2i command on a tiny model with a tokenizer."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_text import save_tiny_model, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fairy2i import PackedLinear, QATLinear, __version__, cli, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.calibrate import calibrate_layer
from fairy2i.cli import main
from fairy2i.loading import load_model_and_tokenizer


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


@pytest.fixture(scope="module")
def packed(qat, tmp_path_factory):
    path = str(shutil.copytree(qat, tmp_path_factory.mktemp("packed") / "model"))
    convert_to_inference_mode(AutoModelForCausalLM.from_pretrained(qat)).save_pretrained(path)
    return path


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


def test_quantize_calibrates_on_a_text(plain, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(tiny_text(400))
    learned = json.dumps({"kind": "phase", "stages": 2, "granularity": "row", "scales": "learned"})
    for name, extra in [("rounded", []), ("fitted", ["--calibrate", str(tmp_path / "text.txt")])]:
        lengths = ["--calibrate_tokens", "400", "--calibrate_length", "32"] if extra else []
        assert main(["quantize", plain, str(tmp_path / name), "--method", learned, *extra, *lengths]) == 0
    before, after = re.search(r"outputs: ([\d.]+) rounded, ([\d.]+) calibrated", capsys.readouterr().out).groups()
    assert float(after) < float(before)
    ids = tiny_tokenizer()(tiny_text(40, offset=7), return_tensors="pt").input_ids
    target, rounded, fitted = (
        AutoModelForCausalLM.from_pretrained(path)(ids).logits
        for path in (plain, tmp_path / "rounded", tmp_path / "fitted")
    )
    assert (fitted - target).norm() < (rounded - target).norm()


LEARNED = ["--method", '{"kind": "phase", "stages": 2, "granularity": "row", "scales": "learned"}']


def refused(capsys, model, folder, *extra, text="text.txt"):
    """Return the error of a calibration that writes nothing."""
    (folder / "text.txt").write_text(tiny_text(100))
    assert main(["quantize", model, str(folder / "out"), "--calibrate", str(folder / text), *extra]) == 1
    assert not (folder / "out").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "give a method"),
        (["--method", "complex_phase_v2"], "needs learned row scales"),
        (["--method", '{"*_proj": "bitnet", "lm_head": null}'], "needs learned row scales"),
        ([*LEARNED, "--calibrate_length", "0"], "--calibrate_length must be at least 1, got 0"),
        ([*LEARNED, "--calibrate_length", "65"], "--calibrate_length 65 is longer than the model's context of 64"),
        (
            [*LEARNED, "--calibrate_length", "32", "--calibrate_tokens", "31"],
            "--calibrate_tokens 31 is less than one sequence of 32",
        ),
    ],
)
def test_calibration_says_what_is_wrong_before_the_model_is_loaded(
    plain, tmp_path, capsys, monkeypatch, extra, message
):
    monkeypatch.setattr(cli, "_load", lambda args: pytest.fail("loaded first"))
    assert message in refused(capsys, plain, tmp_path, *extra)


def test_calibration_of_a_qat_checkpoint_or_on_no_text_is_refused_before_it_is_loaded(
    plain, qat, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cli, "_load", lambda args: pytest.fail("loaded first"))
    assert "is packed as it was trained; leave out --calibrate" in refused(capsys, qat, tmp_path)
    assert "there is no file or folder" in refused(capsys, plain, tmp_path, *LEARNED, text="no.txt")


def test_calibration_says_what_is_wrong_with_text_and_device(plain, tmp_path, capsys):
    assert "the model cannot go to nowhere" in refused(capsys, plain, tmp_path, *LEARNED, "--device", "nowhere")
    (tmp_path / "short.txt").write_text("the quick fox")
    error = refused(capsys, plain, tmp_path, *LEARNED, text="short.txt")
    assert re.search(r"has \d+ tokens, less than one sequence of 64; give more text or a smaller --calib", error)


def test_a_sequence_of_calibration_is_as_long_as_the_context_where_that_is_short(plain, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def look(model, tokens, keep):
        assert tokens.shape == (4, 64)
        raise Enough

    monkeypatch.setattr(cli, "calibrate", look)
    (tmp_path / "text.txt").write_text(tiny_text(400))
    command = ["quantize", plain, str(tmp_path / "out"), *LEARNED, "--calibrate", str(tmp_path / "text.txt")]
    with pytest.raises(Enough):
        main([*command, "--calibrate_tokens", "300"])


def test_a_calibration_that_was_stopped_goes_on_with_the_same_command(plain, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(tiny_text(200), encoding="utf-8")
    command = [*LEARNED, "--calibrate", str(tmp_path / "text.txt"), "--calibrate_tokens", "400"]
    assert main(["quantize", plain, str(tmp_path / "whole"), *command]) == 0
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return calibrate_layer(*args, **kwargs)

    monkeypatch.setattr("fairy2i.calibrate.calibrate_layer", stopping)
    assert main(["quantize", plain, str(tmp_path / "out"), *command]) == 130
    assert [path.name for path in (tmp_path / "out.calibration").iterdir()] == ["block-0000.safetensors"]
    capsys.readouterr()
    assert main(["quantize", plain, str(tmp_path / "out"), *command]) == 0
    assert "going on with the blocks" in capsys.readouterr().err
    assert len(calls) == 10 + 7
    assert not (tmp_path / "out.calibration").exists()
    names = ["out", "whole"]
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1


@pytest.mark.parametrize("flag", ["--calibrate_tokens", "--calibrate_length", "--device"])
def test_what_only_calibration_uses_is_refused_without_it(plain, tmp_path, capsys, flag):
    value = "cpu" if flag == "--device" else "32"
    assert main(["quantize", plain, str(tmp_path / "out"), "--method", "complex_phase_v2", flag, value]) == 1
    assert f"{flag} is for calibration only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_tells_the_defaults_of_calibration(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default 131,072)" in out and "(default 1,024, or the model's context" in out


def test_calibration_says_what_to_do_about_a_tokenizer_without_eos(plain, tmp_path, capsys):
    no_eos = type(tiny_tokenizer())(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    no_eos.save_pretrained(tmp_path / "tokenizer")
    error = refused(capsys, plain, tmp_path, *LEARNED, "--tokenizer", str(tmp_path / "tokenizer"))
    assert "the tokenizer has no EOS token, which parts documents; set tokenizer.eos_token" in error


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
    last = table.splitlines()[-1]
    assert f"{told['weights']:,} weights at {told['bits_per_weight']:.4f} bits" in last
    assert f"error of all {told['error']:.4f} against the original" in last
    assert f"{told['bytes_in_memory'] / 1e6:.1f} MB" in last


def test_inspect_knows_the_error_of_a_qat_checkpoint_but_not_of_a_packed_one(qat, packed, capsys):
    assert main(["inspect", qat]) == 0
    assert "against the master weight" in capsys.readouterr().out
    assert main(["inspect", packed, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["error"], {layer["error"] for layer in told["per_layer"]}) == (None, {None})


def test_inspect_draws_a_picture_beside_its_output(qat, tmp_path, capsys):
    picture = tmp_path / "new" / "picture.png"
    assert main(["inspect", qat, "--json", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(capsys.readouterr().out)["model"] == qat


def test_inspect_refuses_a_picture_before_it_loads_a_model(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", lambda args: pytest.fail("loaded first"))
    assert main(["inspect", "model", "--plot", "picture.txt"]) == 1
    assert "cannot draw picture.txt" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["inspect", "model", "--plot", "picture.png"]) == 1
    assert capsys.readouterr().err == "error: pictures need matplotlib: pip install 'fairy2i[plot]'\n"


def test_inspect_loads_the_original_in_the_dtype_of_the_model(plain, qat, monkeypatch, capsys):
    seen = []
    inspect_layers = cli.inspect_layers

    def look(model, original, **kwargs):
        seen.append((model.dtype, original.dtype))
        return inspect_layers(model, original, **kwargs)

    monkeypatch.setattr(cli, "inspect_layers", look)
    for dtype in ("auto", "bfloat16"):
        assert main(["inspect", qat, "--original", plain, "--dtype", dtype]) == 0
    assert seen == [(torch.float32,) * 2, (torch.bfloat16,) * 2]


def test_inspect_refuses_a_file_of_no_original_before_it_loads_a_model(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", lambda args: pytest.fail("loaded first"))
    assert main(["inspect", "model", "--original_gguf_file", "a.gguf"]) == 1
    assert "--original_gguf_file is a file in the folder of --original; give that too" in capsys.readouterr().err


def test_inspect_needs_quantized_layers(plain, capsys):
    assert main(["inspect", plain]) == 1
    assert "no quantized layers" in capsys.readouterr().err


def generated(path, ids):
    """Return the text of the eight likeliest tokens that follow."""
    model, tokenizer = load_model_and_tokenizer(path, dtype="auto")
    out = model.generate(ids, max_new_tokens=8, do_sample=False)[0]
    return tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)


EIGHT = ["--max_new_tokens", "8", "--device", "cpu"]


@pytest.mark.parametrize("kind", ["qat", "packed"])
def test_generate_prints_the_prompt_and_what_the_model_generates(kind, request, capsys):
    path = request.getfixturevalue(kind)
    ids = tiny_tokenizer()("the quick brown", return_tensors="pt").input_ids
    assert main(["generate", path, "the quick brown", *EIGHT]) == 0
    assert capsys.readouterr().out == f"the quick brown{generated(path, ids)}\n"


def test_generate_reads_standard_input_and_samples_by_seed(qat, monkeypatch, capsys):
    def sample(seed):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the quick brown"))
        assert main(["generate", qat, "-", *EIGHT, "--temperature", "1", "--seed", seed]) == 0
        return capsys.readouterr().out

    first = sample("1")
    assert first.startswith("the quick brown")
    assert first == sample("1") != sample("2")


def test_generate_prints_while_it_generates(qat, monkeypatch, capsys):
    seen = []
    forward = LlamaForCausalLM.forward

    def spy(self, *args, **kwargs):
        seen.append(capsys.readouterr().out)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    assert main(["generate", qat, "the quick brown fox", *EIGHT]) == 0
    assert "the quick brown" in "".join(seen[:2])


def test_chat_frames_the_prompt_and_prints_the_answer_alone(qat, tmp_path, capsys):
    path = str(shutil.copytree(qat, tmp_path / "chat"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "<s>fox{{ messages[0]['content'] }}{% if add_generation_prompt %}dog{% endif %}"
    tokenizer.save_pretrained(path)
    ids = tokenizer("fox sing dog", return_tensors="pt").input_ids
    assert main(["generate", path, " sing ", "--chat", *EIGHT]) == 0
    assert capsys.readouterr().out == generated(path, ids) + "\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--chat"], "has no chat template"),
        (["--device", "nowhere"], "cannot go to nowhere"),
        (["--top_p", "7"], "--top_p"),
        (["--temperature", "-1"], "--temperature"),
        (["--max_new_tokens", "0"], "max_new_tokens"),
    ],
)
def test_generate_says_what_is_wrong(qat, capsys, argv, message):
    assert main(["generate", qat, "the", *EIGHT, *argv]) == 1
    assert message in capsys.readouterr().err


def test_doctor_shows_versions_and_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(cli.PACKAGES, "not-a-package", "nothing at all")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"fairy2i {__version__}" in out
    assert torch.__version__ in out
    assert "not installed (nothing at all)" in out


@pytest.mark.parametrize("taken", [False, True])
def test_generate_names_the_backend_that_auto_is(taken, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(cli.gpu, "auto_takes", lambda device: taken and device.type == "cuda")
    monkeypatch.setattr(cli.cpu, "why_off", lambda: None)
    assert [cli.named_backend("auto", device) for device in (cpu, cuda)] == ["auto", "auto"]  # as tests are run
    monkeypatch.setattr(cli, "PACKED_DEFAULT", "auto")
    assert [cli.named_backend("auto", device) for device in (cpu, cuda)] == ["cpu_exact", "gpu" if taken else "auto"]
    assert cli.named_backend("reference", cuda) == "reference"
    monkeypatch.setattr(cli.cpu, "why_off", lambda: "no library")
    assert cli.named_backend("auto", cpu) == "auto"


def test_what_the_doctor_says_to_install_is_an_extra_of_the_package():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"fairy2i\[(\w+)\]", " ".join(cli.PACKAGES.values())))
    assert len(extras) > 1
    assert [extra for extra in extras if f"\n{extra} = [" not in project] == []


def test_doctor_shows_instruction_sets_and_why_a_backend_is_off(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_int8": True, "avx_vnni": False}, raising=False)
    monkeypatch.setitem(cli.BACKENDS, "quick", lambda: "too slow")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "amx_int8" in out and "avx_vnni" not in out
    assert "quick: off, too slow" in out and "PyTorch): on" in out
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert main(["doctor"]) == 0
    assert "instruction sets unknown" in capsys.readouterr().out


def test_help_and_doctor_import_neither_trainer_nor_matplotlib():
    code = (
        "import sys; from fairy2i.cli import build_parser, main; build_parser().format_help(); main(['doctor']);"
        "sys.exit(str([m for m in ('fairy2i.training.trainer', 'transformers.trainer', 'matplotlib', 'lm_eval')"
        " if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        pipe.reconfigure(line_buffering=True)
        assert main(["doctor"]) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "tip"),
    [
        (["train"], "; try a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, "),
        (["inspect", "model"], ""),
    ],
)
def test_a_full_gpu_is_an_error_of_one_line_that_says_what_to_try(monkeypatch, capsys, argv, tip):
    def fill(_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB\nof which all"
        )

    monkeypatch.setitem(cli.FORWARDED, "train", (fill, ""))
    monkeypatch.setattr(cli, "_load", fill)
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: CUDA out of memory. Tried to allocate 2.00 GiB{tip}")
    assert error.count("\n") == 1 and "capacity" not in error
    monkeypatch.setenv("FAIRY2I_DEBUG", "1")
    with pytest.raises(torch.OutOfMemoryError):
        main(argv)


def test_what_to_try_on_a_full_gpu_are_flags_of_the_command(capsys):
    for command, text in cli.SAVES_MEMORY.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert [flag for flag in re.findall(r"--\w+", text) if flag not in out] == []


@pytest.mark.parametrize("wrong", [[], ["pack"], ["generate"], ["eval"], ["train", "--max_steps", "many"]])
def test_a_wrong_command_line_exits_with_2(wrong):
    with pytest.raises(SystemExit) as exit:
        main(wrong)
    assert exit.value.code == 2
