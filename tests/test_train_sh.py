"""train/train.sh: what it starts for which environment, and two machines, played by two processes of one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import folder  # noqa: F401  (a fixture)
from tiny_text import tiny_text
from training.training_process import free_port

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "ACCELERATE_CONFIG", "DRY_RUN")


def environment(python=sys.executable, **values):
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    return {**clean, "PYTHON": str(python), "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in values.items()}}


def call(*flags, **values):
    command = ["bash", str(ROOT / "train/train.sh"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(**values))


@pytest.fixture
def python_with(tmp_path):
    """Return a function that makes an interpreter which says that there are so many GPUs."""

    def make(gpus):
        path = tmp_path / f"python{gpus}"
        path.write_text(f"#!/bin/sh\necho {gpus}\n")
        path.chmod(0o755)
        return path

    return make


def command_of(python, *flags, **values):
    done = call(*flags, python=python, DRY_RUN=1, **values)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1:]


SCRIPT = str(ROOT / "train/train.py")


def test_help_names_every_variable():
    done = call("--help", python="no-python-is-needed-for-it")
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in (*NAMES, "PYTHON"))


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_process_is_started_as_it_is(python_with, gpus):
    assert command_of(python_with(gpus), "--config", "x.yaml") == [SCRIPT, "--config", "x.yaml"]


def test_all_gpus_of_one_machine_are_used(python_with):
    command = " ".join(command_of(python_with(8)))
    assert "-m accelerate.commands.launch --num_machines 1 --num_processes 8 --machine_rank 0" in command
    assert "--multi_gpu" in command and "--cpu" not in command


def test_machines_find_each_other(python_with):
    values = {"NNODES": 4, "NODE_RANK": 2, "MASTER_ADDR": "first", "MASTER_PORT": 1234, "NPROC_PER_NODE": 2}
    command = " ".join(command_of(python_with(8), **values))
    assert "--num_machines 4 --num_processes 8 --machine_rank 2" in command
    assert "--main_process_ip first --main_process_port 1234" in command


def test_a_file_for_accelerate_is_handed_on(python_with):
    command = " ".join(command_of(python_with(2), ACCELERATE_CONFIG="fsdp.yaml"))
    assert "--num_processes 2" in command and "--config_file fsdp.yaml" in command
    assert "--multi_gpu" not in command and "--mixed_precision" not in command


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"NNODES": 2}, "MASTER_ADDR is missing"),
        ({"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "x"}, "NODE_RANK is 2, but the machines are numbered 0 to 1"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(values, message):
    done = call(**values)
    assert done.returncode == 2
    assert message in done.stderr


def flags(folder, output, **more):  # noqa: F811
    values = {"model": folder / "model", "data": folder / "text.txt", "output_dir": output, "block_size": 32}
    values |= {"use_cpu": True, "num_proc": 1, "save_strategy": "no", **more}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


@pytest.mark.slow
def test_two_machines_train_one_model(folder, tmp_path):  # noqa: F811
    """Twice the processes, half the batch: the weights are those of one process, but for the order of sums."""
    (tmp_path / "text.txt").write_text(tiny_text(3000), encoding="utf-8")
    shared = {"max_steps": 3, "learning_rate": 1e-3, "data": tmp_path / "text.txt"}
    one = call(*flags(folder, tmp_path / "one", per_device_train_batch_size=4, **shared), NPROC_PER_NODE=1)
    assert one.returncode == 0, one.stderr
    port = free_port()
    script = ["bash", str(ROOT / "train/train.sh"), *flags(folder, tmp_path / "two", **shared)]
    script += ["--per_device_train_batch_size", "2"]
    machines = [
        subprocess.Popen(script, env=environment(NNODES=2, NODE_RANK=i, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
        for i in range(2)
    ]
    assert [machine.wait(timeout=240) for machine in machines] == [0, 0]
    start, a, b = (
        load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "one", tmp_path / "two")
    )
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=2e-4) for name in a)
    assert all((a[name] - start[name]).abs().max() > 1e-3 for name in a), "moved by more than the tolerance"


@pytest.mark.slow
def test_sigterm_to_the_script_leaves_a_checkpoint_and_ends_well(folder, tmp_path):  # noqa: F811
    run = subprocess.Popen(
        ["bash", str(ROOT / "train/train.sh"), *flags(folder, tmp_path / "out", max_steps=100_000, logging_steps=1)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in run.stderr:
        if "step 3/100000" in line:
            run.send_signal(signal.SIGTERM)
            break
    begun = time.monotonic()
    rest = run.communicate(timeout=120)[1]
    assert run.returncode == 0, rest
    assert time.monotonic() - begun < 60
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert f"stopped at step {checkpoint.name.split('-')[1]} of 100000; --resume goes on" in rest
