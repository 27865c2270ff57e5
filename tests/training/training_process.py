"""Training in processes of its own, that can be killed: what test_resume.py starts.

One server process imports everything once; the others fork from it, so that a run takes a second and not ten.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time

import torch
from transformers import TrainerCallback

from fairy2i.training import trainer as module
from fairy2i.training.trainer import QATArguments, QATTrainingArguments, run_training

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fairy2i.training.trainer", "datasets", "transformers.models.llama.modeling_llama"])


def die():
    """End as the out-of-memory killer ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


class Recorder(TrainerCallback):
    """Write the loss of each step to a file, as JSON, which keeps every bit; die at the beginning of a step."""

    def __init__(self, path, die_in_step):
        self.path, self.die_in_step = path, die_in_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == (self.die_in_step or 0) - 1:
            die()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs and state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([state.global_step, logs["loss"], logs["grad_norm"]]) + "\n")


def die_while_saving(step):
    """Die in the middle of the optimizer's file of a checkpoint: half of its bytes are on disk."""
    save = torch.save

    def half(data, path, *args, **kwargs):
        save(data, path, *args, **kwargs)
        if path.endswith(f"checkpoint-{step}/optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half


def die_while_removing(step):
    """Die in the middle of the removal of an older checkpoint, its state file gone and the rest still there."""
    rmtree = shutil.rmtree

    def half(path, *args, **kwargs):
        if str(path).endswith(f"checkpoint-{step}"):
            os.remove(os.path.join(path, "model.safetensors"))
            die()
        rmtree(path, *args, **kwargs)

    shutil.rmtree = half


DEATHS = {"saving": die_while_saving, "removing": die_while_removing}


def run(qat, args, record, death, rank, world, port):
    """Train in this process; ``death`` is (where, step) or None."""
    torch.set_num_threads(1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    where, step = death or (None, None)
    original = module.QATTrainer

    def with_recorder(**kwargs):
        trainer = original(**kwargs)
        trainer.add_callback(Recorder(record, step if where == "step" else None))
        return trainer

    module.QATTrainer = with_recorder
    if where in DEATHS:
        DEATHS[where](step)
    run_training(QATArguments(**qat), QATTrainingArguments(**args))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def train_in_processes(qat, args, record, world=1, death=None, timeout=120):
    """Train in so many processes; return their exit codes. When one dies the others are killed, as launchers do."""
    port = free_port()
    workers = [CONTEXT.Process(target=run, args=(qat, args, record, death, r, world, port)) for r in range(world)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + timeout
    while any(worker.is_alive() for worker in workers):
        if any(worker.exitcode for worker in workers) or time.monotonic() > end:
            for worker in workers:
                worker.kill()
        time.sleep(0.02)
    return [worker.exitcode for worker in workers]
