"""Log lines: speed, codes that flip, held-out perplexity; and runs that have no future."""

# ruff: noqa: F401, F811  (fixtures of another test file)

import json
import math
import os
import re

import pytest
import torch
from test_trainer import ACCUMULATION, BATCH, BLOCK, LEARNED, V2, folder, in_step, train
from tiny_models import VOCABULARY, tiny_model
from transformers import Trainer

from fairy2i import QATLinear, replace_modules_for_qat
from fairy2i.cli import main
from fairy2i.training import monitor
from fairy2i.training.monitor import CodeWatch, flops_per_token, peak_flops
from fairy2i.training.trainer import QATTrainer, QATTrainingArguments


def history(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def lines(output):
    return [log for log in history(output) if "loss" in log]


# Speed


def test_operations_are_counted_as_the_trainer_does_without_counting_parameters_each_time(tmp_path, monkeypatch):
    model = tiny_model()
    trainer = QATTrainer(model=model, args=QATTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    batches = [{"input_ids": torch.zeros(2, length, dtype=torch.long)} for length in (7, 7, 31)]
    expected = [Trainer.floating_point_ops(trainer, batch) for batch in batches]
    counts, original = [], type(model).num_parameters
    monkeypatch.setattr(type(model), "num_parameters", lambda *a, **k: counts.append(1) or original(*a, **k))
    assert [trainer.floating_point_ops(batch) for batch in batches] == expected and min(expected) > 0
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some GPU of tomorrow", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name_or_not_at_all(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


@pytest.mark.parametrize("tied", [True, False])
def test_the_operations_of_a_token_are_those_counted_by_hand(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    config = model.config
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    dim = hidden // config.num_attention_heads
    attention = 2 * hidden * hidden + 2 * hidden * config.num_key_value_heads * dim
    weights = layers * (attention + 3 * hidden * wide + 2 * hidden) + hidden + VOCABULARY * hidden
    assert flops_per_token(model, 10) == 6 * weights + 12 * layers * hidden * 10


def test_tokens_per_second_leave_out_evaluations_and_checkpoints(folder, tmp_path, monkeypatch, in_step):
    clock = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])

    def wait(seconds):
        clock[0] += seconds

    evaluate, save = monitor.Trainer.evaluate, monitor.Trainer._save_checkpoint
    monkeypatch.setattr(monitor.Trainer, "evaluate", lambda *args, **kwargs: [evaluate(*args, **kwargs), wait(50)][0])
    monkeypatch.setattr(monitor.Trainer, "_save_checkpoint", lambda *args: [save(*args), wait(70)][0])
    step = monitor.Trainer.training_step
    monkeypatch.setattr(monitor.Trainer, "training_step", lambda *args, **kw: [step(*args, **kw), wait(0.25)][0])
    train(
        folder,
        tmp_path,
        eval_data=str(folder / "held_out.txt"),
        eval_steps=1,
        save_steps=1,
        logging_steps=2,
        peak_tflops=1e-6,
    )
    logs = lines(tmp_path)
    assert [log["tokens_per_s"] for log in logs] == [BATCH * BLOCK * 4] * 2, "four micro-batches a second"
    flops = flops_per_token(tiny_model("llama", vocab_size=280), BLOCK)
    assert [log["mfu"] for log in logs] == pytest.approx([BATCH * BLOCK * 4 * flops / 1e6] * 2, rel=1e-9)
    assert all("eval_perplexity" in log for log in history(tmp_path) if "eval_loss" in log)
    assert ACCUMULATION == 2


def test_on_an_unknown_device_there_is_no_utilization(folder, tmp_path):
    train(folder, tmp_path, max_steps=1)
    assert "mfu" not in lines(tmp_path)[0]
    assert lines(tmp_path)[0]["tokens_per_s"] > 0


# Codes and scales


@pytest.mark.parametrize("method", [V2, "bitnet", "bitnet_1_58", LEARNED])
def test_flipped_codes_are_counted(method):
    model = tiny_model("llama")
    replace_modules_for_qat(model, method)
    layers = [module for module in model.modules() if isinstance(module, QATLinear)]
    watch = CodeWatch(model, -1)
    first = watch.look()
    assert set(first) == {"scale_mean", "scale_min"}
    scales = [layer.codes_and_scales()[1] for layer in layers]
    assert first["scale_min"] == min(scale.min().item() for scale in scales)
    assert first["scale_mean"] == pytest.approx(sum(scale.mean().item() for scale in scales) / len(scales))
    assert watch.look()["flipped"] == 0.0
    before = [layer.codes_and_scales()[0] for layer in layers]
    with torch.no_grad():
        layers[0].weight.neg_()
        layers[3].weight[:, :4] *= -1
    after = [layer.codes_and_scales()[0] for layer in layers]
    changed = sum((a != b).sum().item() for a, b in zip(before, after, strict=True))
    assert changed > 0
    assert watch.look()["flipped"] == changed / sum(codes.numel() for codes in before)
    assert watch.look()["flipped"] == 0.0


@pytest.mark.parametrize(("count", "chosen"), [(0, []), (1, [0]), (3, [0, 7, 14]), (15, range(15)), (99, range(15))])
def test_watched_layers_are_spread_over_the_model(count, chosen):
    model = tiny_model("llama")
    replace_modules_for_qat(model, V2)
    layers = [module for module in model.modules() if isinstance(module, QATLinear)]
    assert [layers.index(layer) for layer in CodeWatch(model, count).layers] == list(chosen)


def test_weights_out_of_reach_are_not_looked_at():
    model = tiny_model("llama")
    replace_modules_for_qat(model, V2)
    next(module for module in model.modules() if isinstance(module, QATLinear)).weight.data = torch.empty(0)
    assert CodeWatch(model, 8).look() == {}


def test_the_log_lines_tell_of_flips_and_scales(folder, tmp_path):
    train(folder, tmp_path / "on", json.dumps(LEARNED.to_dict()), logging_steps=2)
    train(folder, tmp_path / "off", json.dumps(LEARNED.to_dict()), logging_steps=2, watch_layers=0)
    on, off = lines(tmp_path / "on"), lines(tmp_path / "off")
    assert all(0 < log["flipped"] < 1 and 0 < log["scale_min"] < log["scale_mean"] for log in on)
    assert all(not {"flipped", "scale_mean", "scale_min"} & set(log) for log in off)
    assert [log["loss"] for log in on] == [log["loss"] for log in off], "looking changes nothing"
    assert all(log["loss_max"] >= log["loss"] for log in on)


def test_a_model_that_is_not_quantized_has_no_codes_to_tell_of(folder, tmp_path):
    train(folder, tmp_path, "none", max_steps=1)
    assert "scale_mean" not in lines(tmp_path)[0]


# Held-out text


def test_held_out_perplexity_on_the_way_does_not_depend_on_the_batch(folder, tmp_path):
    """Masked labels differ from block to block, so a mean of batch means would."""
    losses = {}
    for size in (1, 3, 8):
        data = str(folder / "held_out.txt")
        train(folder, tmp_path / str(size), eval_data=data, eval_steps=2, per_device_eval_batch_size=size)
        logs = [log for log in history(tmp_path / str(size)) if "eval_loss" in log]
        assert [log["step"] for log in logs] == [2, 4, 4], "on the way and at the end"
        assert all(log["eval_perplexity"] == math.exp(log["eval_loss"]) for log in logs)
        losses[size] = [log["eval_loss"] for log in logs]
    assert losses[1] == pytest.approx(losses[8], rel=1e-6)
    assert losses[3] == pytest.approx(losses[8], rel=1e-6)
    assert losses[8][0] != pytest.approx(losses[8][1], rel=1e-6)


def test_evaluation_on_the_way_needs_a_held_out_text(folder, tmp_path):
    with pytest.raises(ValueError, match="need --eval_data"):
        train(folder, tmp_path, eval_steps=2)


# Divergence


def grow(factor):
    """Return a hook that scales a gradient."""
    return lambda grad: grad * factor


def break_gradient(model):
    next(model.parameters()).register_hook(grow(math.inf))


def test_an_infinite_gradient_ends_the_run_before_it_reaches_a_checkpoint(
    folder,
    tmp_path,
    monkeypatch,
    in_step,
):
    models = []
    build = monitor.MonitoredTrainer.__init__
    monkeypatch.setattr(
        monitor.MonitoredTrainer,
        "__init__",
        lambda self, **kwargs: [build(self, **kwargs), models.append(self.model)][0],
    )
    in_step(3, lambda: break_gradient(models[0]))
    with pytest.raises(FloatingPointError, match=r"not finite: step 3, process 0; .* gradient norm (inf|nan)"):
        train(folder, tmp_path, save_steps=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("rise", [0.2, 0])
def test_a_loss_that_climbs_ends_the_run_unless_that_is_switched_off(folder, tmp_path, rise):
    settings = {"learning_rate": 1.0, "max_steps": 20, "max_loss_rise": rise, "save_strategy": "no"}
    if rise == 0:
        train(folder, tmp_path, **settings)
        return
    with pytest.raises(
        FloatingPointError, match=r"has climbed from .* to .*, more than --max_loss_rise 0.2: step \d+,"
    ):
        train(folder, tmp_path, **settings)
    losses = [log["loss"] for log in lines(tmp_path)]
    smoothed = [losses[0]]
    for loss in losses[1:]:
        smoothed.append(0.9 * smoothed[-1] + 0.1 * loss)
    assert max(s - min(smoothed[: i + 1]) for i, s in enumerate(smoothed)) < 0.2, "not a step too late"


def test_a_diverged_run_is_an_error_of_one_line_on_the_command_line(folder, tmp_path, capsys):
    argv = ["--model", str(folder / "model"), "--data", str(folder / "train.txt"), "--output_dir", str(tmp_path)]
    settings = ["--block_size", "16", "--max_steps", "20", "--learning_rate", "1", "--max_loss_rise", "0.2"]
    assert main(["train", *argv, *settings, "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss has climbed from")
    assert os.path.exists(tmp_path / "diverged-0.json")


# Reports


@pytest.mark.parametrize(
    ("name", "message"), [("wandb", "not installed; pip install wandb"), ("wandbb", "unknown. There are none, all, ")]
)
def test_a_report_that_cannot_be_is_refused_with_the_arguments(monkeypatch, name, message):
    monkeypatch.setattr("fairy2i.training.trainer.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=f"--report_to {name}: (the package is )?{message}"):
        QATTrainingArguments(use_cpu=True, report_to=name)


def test_reports_are_off_unless_asked_for():
    assert QATTrainingArguments(use_cpu=True).report_to == []


# Lines


def test_log_lines_are_readable(folder, tmp_path, caplog):
    with caplog.at_level("INFO", logger="fairy2i"):
        data = str(folder / "held_out.txt")
        train(folder, tmp_path, eval_data=data, eval_steps=2, logging_steps=2, peak_tflops=1)
    steps = [message for message in caplog.messages if message.startswith("step ")]
    number = r"\d[\d.e+-]*"
    training = (
        rf"loss {number}  \(max {number}\)  grad {number}  lr {number}  [\d,]+ tokens/s  MFU {number}%  "
        rf"flipped {number}%  scale {number}  \(min {number}\)"
    )
    held_out = rf"held-out loss {number}  perplexity {number}"
    patterns = [
        rf"step 2/4  {training}  0 min \d\d s left",
        rf"step 2/4  {held_out}",
        rf"step 4/4  {training}",
        rf"step 4/4  {held_out}",
        rf"step 4/4  {held_out}",
    ]
    assert len(steps) == len(patterns)
    for step, pattern in zip(steps, patterns, strict=True):
        assert re.fullmatch(pattern, step), step
