"""Several models in one table: the numbers of the single commands, measured once, packed and QAT alike."""

import json

import pytest
from tiny_text import save_tiny_model, tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM

import fairy2i
from fairy2i.cli import main
from fairy2i.evaluation import compare as module
from fairy2i.evaluation.compare import Measurements, Row, comparison_table
from fairy2i.evaluation.models import file_sha256, fingerprint, open_model

V2 = "complex_phase_v2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain model, a QAT model whose head is quantized too, and the same one packed; two documents and a task."""
    path = tmp_path_factory.mktemp("models")
    save_tiny_model(path / "plain", max_position_embeddings=512)
    model = AutoModelForCausalLM.from_pretrained(path / "plain")
    fairy2i.replace_modules_for_qat(model, fairy2i.PhaseScheme(stages=2, granularity="row", scales="learned"))
    for kind in ("qat", "packed"):
        if kind == "packed":
            fairy2i.convert_to_inference_mode(model)
        model.save_pretrained(path / kind)
        tiny_tokenizer().save_pretrained(path / kind)
    rows = [{"text": tiny_text(40 + i, offset=i)} for i in range(12)]
    (path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    questions = [{"goal": tiny_text(4, i), "sol1": tiny_text(2, i), "sol2": "x", "label": i % 2} for i in range(9)]
    (path / "piqa.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    return path


@pytest.fixture
def compare(folder, tmp_path, own_cache):
    """Run the command in the folder of models, its output in a folder of this test."""

    def run(*models, tasks=("piqa",), more=()):
        names = [text if "=" in text else f"{text}={folder / text}" for text in models]
        argv = ["--models", *names, "--data", str(folder / "text.jsonl"), "--protocol", "gptq", "fairy2i"]
        argv += ["--window", "128", "--device", "cpu", "--output_folder", str(tmp_path / "out")]
        argv += ["--tasks", *tasks, "--data_folder", str(folder), "--task_batch_size", "2", *more]
        return main(["eval", "compare", *argv])

    return run


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0] == "|"]


def columns_of(text):
    header, _, *rows = rows_of(text)
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def test_packed_and_qat_checkpoints_of_a_model_have_the_same_line(compare, tmp_path, capsys):
    assert compare("plain", "qat", "packed") == 0
    header, _, plain, qat, packed = rows_of(capsys.readouterr().out)
    assert header == ["model", "bits", "MB", "text.jsonl gptq@128", "text.jsonl fairy2i@128", "piqa"]
    assert qat[1:] == packed[1:]
    assert qat[3:] != plain[3:]
    exact = {row["label"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())}
    for column, value in exact["qat"]["perplexities"].items():
        assert exact["packed"]["perplexities"][column] == pytest.approx(value, rel=1e-4)
    assert rows_of((tmp_path / "out" / "table.md").read_text())[2] == plain


def test_the_table_has_the_numbers_of_the_single_commands(compare, folder, tmp_path):
    compare("plain")
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    out = tmp_path / "single.json"
    own = ("--model", str(folder / "plain"), "--device", "cpu", "--output", str(out))
    data = ("--data", str(folder / "text.jsonl"), "--protocol", "gptq", "fairy2i", "--window", "128")
    assert main(["eval", *own, *data, "--batch_size", "3"]) == 0
    single = {r["protocol"]: r["perplexity"] for r in json.loads(out.read_text())["results"]}
    assert list(row["perplexities"].values()) == pytest.approx([single["gptq"], single["fairy2i"]], rel=1e-6)
    assert main(["eval", "tasks", *own, "--data_folder", str(folder), "--tasks", "piqa"]) == 0
    assert row["tasks"][0]["acc"] == json.loads(out.read_text())["results"][0]["acc"]


def test_what_was_measured_is_not_measured_again(compare, tmp_path, monkeypatch, capsys):
    compare("plain", "packed")
    first = capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "measurements").iterdir()}
    assert len(files) == 2 * 3
    loaded = []
    monkeypatch.setattr(module, "open_model", lambda source, *args: loaded.append(source) or open_model(source, *args))
    assert compare("plain", "packed") == 0
    assert capsys.readouterr().out == first and loaded == []

    assert compare("plain", "qat", "packed") == 0  # a new model costs its own measurements
    assert len(loaded) == 1 and loaded[0].endswith("qat")
    assert {path: path.stat().st_mtime_ns for path in files} == files

    gone = next(path for path in files if "gptq" in path.name and "packed" in path.name)
    gone.write_text(gone.read_text()[:-20])  # as after a full disk
    assert compare("plain", "packed") == 0
    assert len(loaded) == 2 and loaded[1].endswith("packed")
    assert capsys.readouterr().out.endswith(first)


@pytest.mark.parametrize(
    "more", [("--window", "120"), ("--max_windows", "1"), ("--dtype", "bfloat16"), ("--quant_method", "bitnet")]
)
def test_other_settings_are_measured_anew(compare, tmp_path, more):
    compare("plain", tasks=())
    compare("plain", tasks=(), more=more)
    assert len(list((tmp_path / "out" / "measurements").iterdir())) == 4


def test_a_picture_has_a_mark_for_each_model_and_a_line_for_the_baseline(compare, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert compare("plain", more=("--quant_method", "none", "bitnet", V2, "--plot", str(tmp_path / "q.png"))) == 0
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    rows = [
        Row("base", {"bits_per_weight": None}, {"text gptq@8": 10.0}, [{"task": "piqa", "acc": 0.5}]),
        Row("v2", {"bits_per_weight": 2.0}, {"text gptq@8": 20.0}, [{"task": "piqa", "acc": 0.25}]),
        Row("trained", {"bits_per_weight": None}, {"text gptq@8": 9.0}, []),  # a line too, and not in each panel
    ]
    figure = module.draw_comparison(rows, rows[0])
    perplexities, accuracy = figure.axes
    assert perplexities.get_yscale() == "log" and perplexities.get_title() == "text gptq@8"
    for axes, line, mark in ((perplexities, 10.0, 20.0), (accuracy, 50.0, 25.0)):
        assert list(axes.lines[0].get_ydata()) == [line, line]
        assert [points.get_offsets().tolist() for points in axes.collections] == [[[2.0, mark]]]
    assert [list(line.get_ydata()) for line in perplexities.lines[1:]] == [[9.0, 9.0]] and len(accuracy.lines) == 1
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["base", "v2", "trained"]


def test_the_same_table_and_picture_come_from_the_measurements_alone(compare, tmp_path, monkeypatch, capsys):
    compare("plain", "qat", more=("--plot", str(tmp_path / "one.png")))
    whole = capsys.readouterr().out
    monkeypatch.setattr(module, "open_model", lambda *args: pytest.fail("opened a model"))
    again = ["eval", "compare", "--output_folder", str(tmp_path / "out"), "--measured"]
    assert main([*again, "plain", "qat", "--plot", str(tmp_path / "two.png")]) == 0
    assert columns_of(capsys.readouterr().out) == columns_of(whole)
    assert (tmp_path / "one.png").stat().st_size and (tmp_path / "two.png").stat().st_size
    assert main([*again, "qat", "--columns", "*gptq*", "*fairy2i*"]) == 0
    header, _, row = rows_of(capsys.readouterr().out)
    assert header == ["model", "bits", "MB", "text.jsonl gptq@128", "text.jsonl fairy2i@128"]
    assert row[0] == "qat"
    assert row[3] in whole


def test_a_row_that_lacks_a_measurement_has_a_dash(compare, tmp_path, capsys):
    compare("plain", "qat")
    next((tmp_path / "out" / "measurements").glob("qat-piqa-*.json")).unlink()
    capsys.readouterr()
    arguments = ["eval", "compare", "--output_folder", str(tmp_path / "out"), "--measured", "plain", "qat"]
    assert main([*arguments, "--plot", str(tmp_path / "out.png")]) == 0
    assert rows_of(capsys.readouterr().out)[3][-1] == "-"


def test_measurements_that_do_not_belong_together_are_refused(compare, tmp_path, capsys):
    compare("plain")
    compare("qat", more=("--max_windows", "2"))
    again = ["eval", "compare", "--output_folder", str(tmp_path / "out"), "--measured", "plain"]
    assert main([*again, "qat"]) == 1
    assert "do not compare: their max_windows differ" in capsys.readouterr().err
    assert main([*again, "base"]) == 1
    assert "has no measurement of base; there are plain, qat" in capsys.readouterr().err
    compare("plain", more=("--max_windows", "2"))
    assert main(again) == 1
    assert "plain has two measurements of text.jsonl" in capsys.readouterr().err
    assert main([*again[:-2], "--models", "x", "--columns", "y"]) == 1
    assert "--columns goes with --measured" in capsys.readouterr().err


def test_the_table_is_the_papers_with_what_changes_against_the_baseline():
    five = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")

    def row(label, bits, perplexity, *accuracies):
        tasks = [{"task": t, "acc": a / 100, "acc_stderr": 0.01} for t, a in zip(five, accuracies, strict=True)]
        return Row(label, {"bits_per_weight": bits, "packed_bytes": 12_340_000}, {"c4 gptq@4096": perplexity}, tasks)

    rows = [
        row("FP16", None, 6.63, 75.59, 43.17, 57.06, 77.91, 69.85),
        row("W2", 2, 7.85, 72.73, 39.76, 53.33, 76.17, 68.03),
    ]
    header, _, first, second = rows_of(comparison_table(rows, rows[0]))
    assert header == ["model", "bits", "MB", "c4 gptq@4096", *five, "average of five"]
    assert first == ["FP16", "16.00", "12.3", "6.63", "75.59", "43.17", "57.06", "77.91", "69.85", "64.72"]
    assert second == [
        *("W2", "2.00", "12.3", "7.85 (1.18x)", "72.73", "39.76", "53.33", "76.17", "68.03", "62.00 (-2.71)")
    ]


def test_sizes_are_those_of_a_packed_checkpoint_in_16_bits(folder, tmp_path, compare):
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype="bfloat16")
    fairy2i.replace_modules_for_qat(model, V2)
    fairy2i.convert_to_inference_mode(model).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    compare(f"small={tmp_path / 'small'}", "plain", tasks=())
    small, plain = json.loads((tmp_path / "out" / "results.json").read_text())
    with open(tmp_path / "small" / "model.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert small["file_bytes"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert small["packed_bytes"] == small["file_bytes"] - 8 - header
    assert plain["packed_bytes"] == 2 * AutoModelForCausalLM.from_pretrained(folder / "plain").num_parameters()


def test_a_fingerprint_changes_with_weights_config_and_tokenizer_and_nothing_else(folder, tmp_path):
    save_tiny_model(tmp_path / "m")
    first = fingerprint(str(tmp_path / "m"))
    (tmp_path / "m" / "README.md").write_text("hello")
    assert fingerprint(str(tmp_path / "m")) == first
    seen = {first}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = tmp_path / "m" / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        seen.add(fingerprint(str(tmp_path / "m")))
        path.write_bytes(before)
    assert len(seen) == 4
    assert fingerprint(str(tmp_path / "m")) == first
    assert file_sha256(str(tmp_path / "m" / "README.md")).startswith("2cf24dba5fb0a30e26e83b2ac5b9e29e")


def test_a_measurement_is_found_by_its_key_alone(tmp_path):
    store = Measurements(str(tmp_path))
    assert store.get("one", {"a": 1, "b": None}, lambda: {"x": 1}) == {"x": 1}
    assert store.get("other name", {"b": None, "a": 1}, lambda: pytest.fail("measured again")) == {"x": 1}
    assert store.get("one", {"a": 2, "b": None}, lambda: {"x": 2}) == {"x": 2}
    assert store.made == 2


@pytest.mark.parametrize(("tasks", "texts"), [(["--tasks", "piqa"], []), ([], ["wikitext2", "c4"])])
def test_texts_that_nobody_named_are_not_measured_beside_tasks(folder, tmp_path, monkeypatch, tasks, texts):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module.task_module, "prepare", lambda *args: None)
    asked = []
    monkeypatch.setattr(module, "load_eval_text", lambda source: asked.append(source))
    monkeypatch.setattr(module, "measure_model", lambda label, *args: module.Row(label, {"bits": 16.0}, {}, []))
    arguments = module.parse_args(["--models", "plain", *tasks, "--output_folder", str(tmp_path / "out")])
    assert len(module.measure_models(arguments)) == 1
    assert asked == texts


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "plain", "plain"], "two rows have the same label"),
        (["--models", "./no"], "no model folder ./no"),
        (["--models", "a=plain/no.gguf"], "there is no GGUF file plain/no.gguf"),
        (["--models", "plain", "--baseline", "base"], "no row is called 'base'; there are plain"),
        (["--models", "plain", "--data"], "nothing to measure: give --data or --tasks"),
        (["--models", "plain", "--data", "./no.txt"], "no file or folder ./no.txt"),
        (["--models", "plain", "--tasks", "piqq", "--data_folder", "."], "Did you mean 'piqa'"),
        (["--models", "plain", "--plot", "a.abc"], "cannot draw a.abc"),
        (["--models", "plain", "--quant_method", "bitnett"], "Did you mean 'bitnet'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(folder, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(module, "measure_model", lambda *args: pytest.fail("measured first"))
    monkeypatch.chdir(folder)
    data = [] if "--data" in argv else ["--data", "text.jsonl"]
    assert main(["eval", "compare", *argv, *data, "--output_folder", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
