"""`fairy2i train` and `fairy2i eval`, and their scripts: settings from YAML and flags, results in files, errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_text import save_tiny_model, tiny_text
from transformers import AutoModelForCausalLM

from fairy2i import METHODS, QATLinear
from fairy2i.cli import main
from fairy2i.evaluation import command as eval_command
from fairy2i.evaluation.perplexity import perplexity, tokenize_text
from fairy2i.loading import load_model_and_tokenizer
from fairy2i.training import command as train_command

ROOT = Path(__file__).resolve().parents[1]
V2 = "complex_phase_v2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    save_tiny_model(path / "model")
    (path / "text.txt").write_text(tiny_text(300), encoding="utf-8")
    return path


def settings(folder, output, **more):
    base = {"model": folder / "model", "data": folder / "text.txt", "output_dir": output}
    values = {key: str(value) for key, value in base.items()}
    return {**values, "block_size": 32, "use_cpu": True, "max_steps": 1, "report_to": "none", **more}


def flags(values):
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def write_yaml(path, values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def parsed(monkeypatch, argv):
    """Return the two argument objects that training would run with."""
    calls = []
    monkeypatch.setattr(train_command, "run_training", lambda *args: calls.append(args))
    assert main(["train", *argv]) == 0
    return calls[0]


def error_of(capsys, *argv):
    assert main(argv) == 1
    return capsys.readouterr().err.rstrip("\n")


# Settings


def test_flags_win_over_the_config_file(tmp_path, monkeypatch):
    config = write_yaml(tmp_path / "c.yaml", {"model": "from_file", "max_steps": 7, "skip_modules": ["a", "b"]})
    qat, args = parsed(monkeypatch, ["--max_steps", "2", "--config", config, "--skip_modules", "c", "--use_cpu"])
    assert (qat.model, args.max_steps, qat.skip_modules) == ("from_file", 2, ["c"])


def test_yaml_values_of_each_type_arrive(tmp_path, monkeypatch):
    values = {
        "skip_lm_head": True,
        "resume": False,
        "learning_rate": 4.0e-4,
        "max_steps": -1,
        "skip_modules": ["a", "b"],
        "quant_method": {"*_proj": V2, "lm_head": None},
        "tokenizer": None,
        "use_cpu": True,
    }
    qat, args = parsed(monkeypatch, ["--config", write_yaml(tmp_path / "c.yaml", values)])
    assert (qat.skip_lm_head, qat.resume, qat.skip_modules, qat.tokenizer) == (True, False, ["a", "b"], None)
    assert (args.learning_rate, args.max_steps, args.use_cpu) == (4e-4, -1, True)
    assert json.loads(qat.quant_method) == values["quant_method"]


@pytest.mark.parametrize(
    ("argv", "bf16", "precision"),
    [([], False, "bf16"), (["--bf16", "false"], False, "no"), (["--bf16"], True, "bf16")],
)
def test_a_precision_that_is_given_wins_over_that_of_accelerate_launch(monkeypatch, argv, bf16, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    _, args = parsed(monkeypatch, [*argv, "--use_cpu"])
    assert (args.bf16, args.mixed_precision) == (bf16, precision)


@pytest.mark.parametrize("values", [{}, {"skip_modules": []}])
def test_an_empty_file_or_list_leaves_the_defaults(tmp_path, monkeypatch, values):
    qat, _ = parsed(monkeypatch, ["--config", write_yaml(tmp_path / "c.yaml", values), "--use_cpu"])
    assert (qat.skip_modules, qat.skip_lm_head, qat.quant_method) == ([], None, V2)


@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "train").rglob("*.yaml")), ids=lambda path: path.name)
def test_the_shipped_configs_are_accepted_as_they_are_written(monkeypatch, config):
    qat, args = parsed(monkeypatch, ["--config", str(config), "--use_cpu"])
    for name, value in yaml.safe_load(config.read_text()).items():
        arrived = getattr(qat, name) if hasattr(qat, name) else getattr(args, name)
        nested = isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], list))
        assert (json.loads(arrived) if nested else arrived) == value, name


@pytest.mark.parametrize("text", ["save_strategy: no", 'save_strategy: "no"'])
def test_a_strategy_of_no_needs_no_quotes(tmp_path, monkeypatch, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    _, args = parsed(monkeypatch, ["--config", str(tmp_path / "c.yaml"), "--use_cpu"])
    assert args.save_strategy == "no"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rat", "unknown setting 'learning_rat'. Did you mean 'learning_rate'?"),
        ("quant_metod", "unknown setting 'quant_metod'. Did you mean 'quant_method'?"),
        ("zzz", "unknown setting 'zzz'."),
        ("config", "unknown setting 'config'."),
    ],
)
def test_an_unknown_setting_is_refused_with_a_suggestion(tmp_path, capsys, name, message):
    error = error_of(capsys, "train", "--config", write_yaml(tmp_path / "c.yaml", {name: 1}))
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "--learning_rat"),
        (["--config", "no.yaml"], "no.yaml"),
        ([], "--model is missing"),
        (["--model", "./no", "--data", "x"], "no model folder ./no"),
        (["--model", "./no", "--data", "x", "--quant_method", "bitnett"], "Did you mean 'bitnet'"),
    ],
)
def test_a_wrong_argument_is_an_error_of_one_line(capsys, argv, message):
    error = error_of(capsys, "train", *argv, "--use_cpu")
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_a_config_that_is_no_mapping_is_refused(tmp_path, capsys):
    assert "must be a mapping" in error_of(capsys, "train", "--config", write_yaml(tmp_path / "c.yaml", ["model"]))


def test_a_broken_config_is_an_error_of_one_line_that_says_where(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("model: x\nskip_modules: [a, b\nmax_steps: 1\n", encoding="utf-8")
    error = error_of(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert error.startswith(f"error: {tmp_path / 'c.yaml'} is not valid YAML: ") and "line 3" in error
    assert "\n" not in error


def test_an_error_shows_its_origin_where_the_environment_asks_for_it(monkeypatch):
    monkeypatch.setenv("FAIRY2I_DEBUG", "1")
    with pytest.raises(ValueError, match="--model is missing"):
        main(["train", "--use_cpu"])


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", ["--quant_method", "--learning_rate", "--config", "accelerate launch train/train.py"]),
        ("eval", ["--quant_method", "--window", "--output"]),
    ],
)
def test_the_help_is_that_of_what_the_command_runs(capsys, command, flags):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert out.startswith(f"usage: fairy2i {command} ")
    assert [flag for flag in flags if flag not in out] == []


# Train, then measure


def test_what_the_training_script_writes_the_perplexity_script_measures(folder, tmp_path, capsys):
    out, results = tmp_path / "out", tmp_path / "new" / "results.json"
    config = write_yaml(tmp_path / "c.yaml", settings(folder, out, max_steps=5, quant_method=V2))
    assert main(["train", "--config", config, "--max_steps", "2"]) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2

    text = str(folder / "text.txt")
    argv = ["--model", str(out), "--data", text, "--window", "32", "--max_windows", "5", "--device", "cpu"]
    capsys.readouterr()
    assert main(["eval", *argv, "--batch_size", "2", "--output", str(results)]) == 0
    (result,) = json.loads(results.read_text())["results"]
    model, tokenizer = load_model_and_tokenizer(str(out))
    expected = perplexity(model, tokenize_text(Path(text).read_text(), tokenizer), 32, max_windows=5, batch_size=2)
    assert expected.perplexity < 1000
    assert {key: result[key] for key in expected.to_dict()} == expected.to_dict()
    assert (result["method"], result["data"]) == (f"trained: {V2}", text)
    assert f"{expected.perplexity:.2f}" in capsys.readouterr().out


def test_methods_are_measured_one_by_one_on_the_untouched_model(folder, tmp_path, capsys):
    results = tmp_path / "results.json"
    argv = ["--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--window", "64", "--device", "cpu"]
    assert main(["eval", *argv, "--quant_method", V2, "none", "bitnet", "--output", str(results)]) == 0
    rows = json.loads(results.read_text())["results"]
    assert [row["method"] for row in rows] == [V2, "none", "bitnet"]
    assert len({row["perplexity"] for row in rows}) == 3
    assert rows[1]["bits_per_weight"] is None
    assert 1 < rows[2]["bits_per_weight"] < 2 < rows[0]["bits_per_weight"] < 3
    model, tokenizer = load_model_and_tokenizer(str(folder / "model"))
    plain = perplexity(model, tokenize_text((folder / "text.txt").read_text(), tokenizer), 64)
    assert rows[1]["perplexity"] == plain.perplexity
    assert capsys.readouterr().out.count("\n") == 2 + 3


def test_an_unknown_method_is_refused_before_anything_is_measured(folder, capsys, monkeypatch):
    monkeypatch.setattr(eval_command, "open_model", lambda *args, **kwargs: pytest.fail("loaded first"))
    argv = ["--model", "x", "--data", str(folder / "text.txt"), "--quant_method", "none", "bitnett"]
    assert "Did you mean 'bitnet'" in error_of(capsys, "eval", *argv)


# In processes of their own


def start(*command):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_accelerate_launches_the_training_script(folder, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = start(*launch, str(ROOT / "train/train.py"), *flags(settings(folder, tmp_path / "out")))
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {layer.scheme for layer in model.modules() if isinstance(layer, QATLinear)} == {METHODS[V2]}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_shell_script_hands_its_arguments_on(folder):
    done = start(
        *("bash", str(ROOT / "eval/eval_ppl.sh"), str(folder / "model"), "--data", str(folder / "text.txt")),
        *("--window", "64", "--max_windows", "2", "--quant_method", "none", "bitnet"),
    )
    assert done.returncode == 0, done.stderr
    header, _, *rows = done.stdout.splitlines()
    assert header.startswith("| model | method |")
    assert [row.split("|")[2].strip() for row in rows] == ["none", "bitnet"]
