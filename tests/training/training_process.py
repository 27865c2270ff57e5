"""Training in processes of its own, that can be killed: what test_resume.py starts.

One server process imports everything once; the others fork from it, so that a run takes a second and not ten.
"""

import json
import multiprocessing
import os
import resource
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
    """Write the loss of each step to a file, as JSON, which keeps every bit; meet an accident in a step."""

    def __init__(self, path, accident, step):
        self.path, self.accident, self.step = path, accident, step

    def on_step_begin(self, args, state, control, **kwargs):
        if self.accident and state.global_step == self.step - 1:
            self.accident(args, **kwargs)

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


def lose_a_weight(args, model, **kwargs):
    """Make the embedding of the last process not a number."""
    if args.process_index == args.world_size - 1:
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)


def no_room_for(name):
    """Return an accident: from here on, no file may become as large as this one of the first checkpoint is."""

    def fill(args, **kwargs):
        size = os.path.getsize(f"{args.output_dir}/checkpoint-3/{name}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))

    return fill


ACCIDENTS = {
    "step": lambda args, **kwargs: die(),
    "nan": lose_a_weight,
    "no room for the model": no_room_for("model.safetensors"),
    "no room for the optimizer": no_room_for("optimizer.pt"),
}


def run(qat, args, record, death, rank, world, port):
    """Train in this process; ``death`` is (where, step) or None. An error is written to a file beside the record."""
    torch.set_num_threads(1)
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    where, step = death or (None, None)
    original = module.QATTrainer

    def with_recorder(**kwargs):
        trainer = original(**kwargs)
        trainer.add_callback(Recorder(record, ACCIDENTS.get(where), step))
        return trainer

    module.QATTrainer = with_recorder
    if where in DEATHS:
        DEATHS[where](step)
    try:
        run_training(QATArguments(**qat), QATTrainingArguments(**args))
    except Exception as error:
        with open(f"{record}.error-{rank}", "w", encoding="utf-8") as file:
            file.write(f"{type(error).__name__}: {error}")
        raise


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
