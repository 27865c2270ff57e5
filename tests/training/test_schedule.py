"""Learning-rate schedules: the paper's point by point, all parameter groups, resuming, and what is refused."""

# ruff: noqa: F401, F811  (fixtures of another test file)

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from test_trainer import LEARNED, folder, train

from fairy2i.training.schedule import parse_schedule, schedule_factor, segment_scheduler
from fairy2i.training.trainer import QATTrainingArguments

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
PAPER_CONFIGS = ["llama2_7b_w1.yaml", "llama2_7b_w2.yaml"]
PEAK = 3e-5


def paper_rate(step):
    """The schedule as the paper words it, written out by hand."""
    if step < 300:
        return PEAK * step / 300
    if step < 8_000:
        return PEAK
    if step < 10_000:
        return PEAK * (0.1667 + (1 - 0.1667) * (1 + math.cos(math.pi * (step - 8_000) / 2_000)) / 2)
    if step < 19_000:
        return PEAK * 0.1667
    if step < 20_000:
        return PEAK * (0.0333 + (0.1667 - 0.0333) * (1 + math.cos(math.pi * (step - 19_000) / 1_000)) / 2)
    return PEAK * 0.0333


def optimizer_of(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates_of(scheduler, steps):
    """Return the rates of all groups in each of the steps."""
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", PAPER_CONFIGS)
def test_the_recipe_is_the_papers_at_each_of_its_steps(name):
    settings = yaml.safe_load((CONFIGS / name).read_text())
    scheduler = segment_scheduler(optimizer_of(settings["learning_rate"]), parse_schedule(settings["lr_schedule"]))
    rates = rates_of(scheduler, 30_000)
    assert settings["max_steps"] == 30_000
    assert [rate for (rate,) in rates] == pytest.approx([paper_rate(step) for step in range(30_000)], rel=1e-12)


@pytest.mark.parametrize("name", PAPER_CONFIGS)
def test_the_recipe_has_the_papers_other_settings(name):
    settings = yaml.safe_load((CONFIGS / name).read_text())
    assert settings["block_size"] == 2048
    # on eight devices, as the comment in the file says
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * 8 == 512
    assert (settings["adam_beta1"], settings["adam_beta2"], settings["weight_decay"]) == (0.9, 0.95, 0.0)
    assert (settings["max_grad_norm"], settings["skip_lm_head"]) == (2.0, False)
    assert settings["bf16"] and settings["gradient_checkpointing"] and "distill" not in settings


def test_the_corners_of_a_schedule_are_exact():
    segments = parse_schedule('[[300, 1.0, "linear"], [8000, 1.0], [10000, 0.1667, "cosine"], [10010, 0.5]]')
    points = {0: 0.0, 150: 0.5, 300: 1.0, 7999: 1.0, 8000: 1.0, 9000: (1 + 0.1667) / 2, 10000: 0.5, 99999: 0.5}
    assert {step: schedule_factor(step, segments=segments) for step in points} == pytest.approx(points, abs=1e-15)
    assert schedule_factor(9999, segments=segments) == pytest.approx(0.1667, abs=1e-5), "a hold may jump, only then"


def test_a_segment_may_go_up_or_start_high():
    segments = parse_schedule([[4, 0.5], [8, 1.0, "cosine"], [10, 0.0, "linear"]])
    rates = [schedule_factor(step, segments=segments) for step in range(12)]
    bend = math.cos(math.pi / 4) / 4
    assert rates == pytest.approx([*[0.5] * 5, 0.75 - bend, 0.75, 0.75 + bend, 1.0, 0.5, 0.0, 0.0])


def test_each_group_follows_from_its_own_peak_and_a_resumed_one_goes_on_exactly():
    segments = parse_schedule([[3, 1.0, "linear"], [5, 1.0], [9, 0.25, "cosine"]])
    straight = rates_of(segment_scheduler(optimizer_of(0.1, 0.02), segments), 12)
    factors = [schedule_factor(step, segments=segments) for step in range(12)]
    assert straight == [[0.1 * factor, 0.02 * factor] for factor in factors]
    first = segment_scheduler(optimizer_of(0.1, 0.02), segments)
    begun = rates_of(first, 7)
    second = segment_scheduler(optimizer_of(0.1, 0.02), segments)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert begun + rates_of(second, 5) == straight


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[]", "no segments"),
        ("[[300, 1.0", "must be a list like"),
        ("7", "must be a list like"),
        ("[[300]]", "must be a list like"),
        ('[[300, 1.0, "linear", 3]]', "must be a list like"),
        ("[[300, 1.0], [300, 0.5]]", r"last step of \[300, 0.5, 'hold'\] must be a whole number above 300"),
        ("[[0.5, 1.0]]", "whole number above 0"),
        ("[[300, -1.0]]", "factor of .* must be 0 or more"),
        ('[[300, "1.0"]]', "factor of .* must be 0 or more"),
        ('[[300, 1.0, "line"]]', "must be one of hold, linear, cosine"),
    ],
)
def test_an_impossible_schedule_is_refused_with_the_arguments(schedule, message):
    with pytest.raises(ValueError, match=message):
        QATTrainingArguments(use_cpu=True, lr_schedule=schedule)


def test_a_warm_up_beside_a_schedule_is_refused():
    with pytest.raises(ValueError, match="leave out --warmup_steps"):
        QATTrainingArguments(use_cpu=True, lr_schedule="[[300, 1.0]]", warmup_steps=10)


def test_training_follows_the_schedule(folder, tmp_path):
    schedule = '[[2, 1.0, "linear"], [4, 0.5, "cosine"]]'
    train(folder, tmp_path, json.dumps(LEARNED.to_dict()), lr_schedule=schedule)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [log["learning_rate"] for log in history if "learning_rate" in log]
    assert rates == pytest.approx([0.0, 0.5e-2, 1e-2, 0.75e-2], rel=1e-12)
