"""A run that was killed goes on as if nothing had been: the same loss in each step, the same weights in the end."""

import functools
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import save_tiny_model, tiny_text
from training_process import train_in_processes

from fairy2i import PhaseScheme

STEPS, SAVE = 8, 3  # checkpoints after steps 3, 6 and, as the last, 8
KILLED = [-signal.SIGKILL]
METHODS = {
    "v2": {"quant_method": "complex_phase_v2"},
    "learned": {
        "quant_method": json.dumps(PhaseScheme(granularity="row", scales="learned").to_dict()),
        "distill": 0.5,
    },
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Return a folder with a model, with dropout, so that the random state counts, and a text of 33 blocks."""
    path = tmp_path_factory.mktemp("inputs")
    save_tiny_model(path / "model", attention_dropout=0.2)
    (path / "train.txt").write_text("<|endoftext|>".join(tiny_text(40, i) for i in range(8)), encoding="utf-8")
    return path


def train(inputs, output, method="v2", accumulation=1, world=1, death=None, resume=False, **more):
    """Run in processes of its own; return exit codes and what was recorded: (step, loss, gradient norm)."""
    qat = {
        "model": str(inputs / "model"),
        "data": str(inputs / "train.txt"),
        "block_size": 16,
        "num_proc": 1,
        "resume": resume,
        **METHODS[method],
    }
    args = {
        "output_dir": str(output),
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": STEPS,
        "save_steps": SAVE,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_schedule": '[[2, 1.0, "linear"], [5, 1.0], [8, 0.1, "cosine"]]',
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        **more,
    }
    record = output.with_name(f"{output.name}-{'resumed' if resume else 'first'}.jsonl")
    codes = train_in_processes(qat, args, str(record), world, death)
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    return codes, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """Return a function that trains without an interruption, once for each kind of run."""

    @functools.cache
    def at_once(**kind):
        output = tmp_path_factory.mktemp("straight") / "out"
        codes, record = train(inputs, output, **kind)
        assert codes == [0] * kind.get("world", 1)
        assert [step for step, *_ in record] == list(range(1, STEPS + 1))
        return output, record

    return at_once


def assert_same_end(one, two):
    """Check that weights and optimizer states are the same to the last bit."""
    for name in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    a, b = (torch.load(path / f"checkpoint-{STEPS}/optimizer.pt")["state"] for path in (one, two))
    assert a.keys() == b.keys()
    assert [(i, key) for i in a for key in a[i] if not torch.equal(a[i][key], b[i][key])] == []
    a, b = (json.loads((path / "train_results.json").read_text())["train_tokens"] for path in (one, two))
    assert a == b > 0


def folders(output):
    return sorted(path.name for path in output.iterdir() if path.is_dir())


def assert_goes_on(inputs, straight, output, kind, death):
    """Check that a run that is killed behind a step is resumed from that of step 3 as if nothing had been."""
    whole, losses = straight(**kind)
    codes, first = train(inputs, output, **kind, death=("step", death))  # the last checkpoint is that of step 3
    assert codes == KILLED * kind["world"]
    assert first == losses[: death - 1]
    codes, second = train(inputs, output, **kind, resume=True)
    assert codes == [0] * kind["world"]
    assert second == losses[3:]
    assert_same_end(whole, output)
    return whole


KINDS = [(method, accumulation, world) for world in (1, 2) for accumulation in (1, 2) for method in METHODS]
QUICK = [("v2", 2, 1), ("learned", 1, 2)]


@pytest.mark.parametrize(
    ("method", "accumulation", "world"),
    [pytest.param(*kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(inputs, straight, tmp_path, method, accumulation, world):
    kind = {"method": method, "accumulation": accumulation, "world": world}
    assert_goes_on(inputs, straight, tmp_path / "out", kind, 6)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(inputs, straight, tmp_path, world):
    kind = {"method": "learned", "accumulation": 1, "world": world}
    whole, losses = straight(**kind)
    output = tmp_path / "out"
    codes, first = train(inputs, output, **kind, death=("saving", 6))
    assert codes[0] == KILLED[0]
    assert 0 not in codes  # the other process may see its peer vanish before it is killed too
    assert first == losses[:6]
    assert folders(output) == [".saving", "checkpoint-3"]
    if world == 1:
        assert (output / ".saving/checkpoint-6/optimizer.pt").exists(), "killed before there was anything to tear"
    codes, second = train(inputs, output, **kind, resume=True)
    assert codes == [0] * world
    assert second == losses[3:]
    assert folders(output) == ["checkpoint-6", "checkpoint-8"]
    assert_same_end(whole, output)


def test_a_run_killed_while_it_removes_an_old_checkpoint_goes_on_from_the_new_one(inputs, straight, tmp_path):
    whole, losses = straight(method="v2", accumulation=1, world=1)
    output = tmp_path / "out"
    codes, _ = train(inputs, output, death=("removing", 3), save_total_limit=1)
    assert codes == KILLED
    assert folders(output) == [".saving", "checkpoint-6"]
    codes, second = train(inputs, output, resume=True, save_total_limit=1)
    assert (codes, second) == ([0], losses[6:])
    assert folders(output) == ["checkpoint-8"]
    assert_same_end(whole, output)


@pytest.mark.slow
def test_runs_of_another_seed_or_kind_differ(inputs, straight, tmp_path):
    """What the tests above compare is not the same for all runs."""
    records = [straight(method=m, accumulation=a, world=w)[1] for m, a, w in KINDS if w == 1]
    records.append(train(inputs, tmp_path / "out", seed=1)[1])
    assert len({json.dumps(record[-1]) for record in records}) == len(records)


# Other ends than being killed: what is left, and what is said


def error_of(output, rank=0, run="first"):
    return output.with_name(f"{output.name}-{run}.jsonl.error-{rank}").read_text(encoding="utf-8")


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(inputs, straight, tmp_path, what):
    kind = {"method": "learned", "accumulation": 1, "world": 1}
    whole, losses = straight(**kind)
    output = tmp_path / "out"
    codes, first = train(inputs, output, **kind, death=(f"no room for the {what}", 5))
    assert (codes, first) == ([1], losses[:6])
    assert error_of(output).startswith("OSError: ")
    assert "no room to write checkpoint-6 to " in error_of(output)
    assert error_of(output).endswith("checkpoint-3 is complete, --resume goes on from it")
    assert not any(path.is_file() for path in (output / ".saving").rglob("*"))
    codes, second = train(inputs, output, **kind, resume=True)
    assert (codes, second) == ([0], losses[3:])
    assert_same_end(whole, output)


def test_a_loss_that_is_no_number_in_one_process_ends_all_of_them(inputs, straight, tmp_path):
    _, losses = straight(method="v2", accumulation=2, world=2)
    output = tmp_path / "out"
    codes, first = train(inputs, output, accumulation=2, world=2, death=("nan", 5), save_steps=1)
    assert codes == [1, 1]
    assert first == losses[:4]
    assert folders(output) == ["checkpoint-3", "checkpoint-4"]
    assert "not finite: step 5, process 1, batch 1 of 2, which begins '" in error_of(output, 1)
    assert "not finite: step 5, process 0; losses" in error_of(output, 0)
    assert "checkpoint-4 is the last checkpoint" in error_of(output, 0)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [[log["step"], log["loss"], log["grad_norm"]] for log in history] == losses[:4]
    record = json.loads((output / "diverged-1.json").read_text())
    assert (record["step"], len(record["input_ids"]), len(record["input_ids"][0][0])) == (5, 2, 16)


def test_a_checkpoint_that_another_program_tore_is_passed_over(inputs, straight, tmp_path):
    whole, losses = straight(method="v2", accumulation=1, world=1)
    output = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-6", output / "checkpoint-6")
    shutil.copytree(whole / "checkpoint-8", output / "checkpoint-8")
    (output / "checkpoint-8/trainer_state.json").unlink()
    codes, second = train(inputs, output, resume=True)
    assert (codes, second) == ([0], losses[6:])
    assert_same_end(whole, output)
