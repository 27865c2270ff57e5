"""What happens around the steps of training: log lines for people, and a clean end on a signal."""

import logging
import signal
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds) // 3600, int(seconds) // 60 % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"


class LogLines(TrainerCallback):
    """Write what is logged as lines that a person can read, in a terminal and in a file alike."""

    shapes = (  # name in the log, what it looks like
        ("loss", "loss {:.4f}"),
        ("loss_max", "(max {:.3f})"),
        ("eval_loss", "held-out loss {:.4f}"),
        ("eval_perplexity", "perplexity {:.3f}"),
        ("grad_norm", "grad {:.3g}"),
        ("learning_rate", "lr {:.3g}"),
        ("tokens_per_s", "{:,} tokens/s"),
        ("mfu", "MFU {:.1%}"),
        ("flipped", "flipped {:.3%}"),
        ("scale_mean", "scale {:.4g}"),
        ("scale_min", "(min {:.4g})"),
    )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of what is left."""
        self.begun, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line; the summary at the end of training is not one of a step."""
        parts = [shape.format(logs[name]) for name, shape in self.shapes if name in logs]
        if not state.is_world_process_zero or not parts:
            return
        done = state.global_step - self.first
        if "loss" in logs and 0 < done and state.global_step < state.max_steps:
            left = (time.monotonic() - self.begun) / done * (state.max_steps - state.global_step)
            parts.append(f"{_duration(left)} left")
        logger.info("step %d/%d  %s", state.global_step, state.max_steps, "  ".join(parts))


class StopAndSave(TrainerCallback):
    """Turn the first ctrl-C or SIGTERM into a checkpoint and a clean end; a second one stops at once."""

    signals = (signal.SIGINT, signal.SIGTERM)
    echo_s = 3.0  # a launcher forwards what the terminal has sent already: that is not a second wish

    def __init__(self) -> None:
        self.stopped = False
        self.since = 0.0
        self.previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.since and time.monotonic() - self.since > self.echo_s:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
        elif not self.since:
            self.since, self.stopped = time.monotonic(), True
            logger.warning("stopping after this step with a checkpoint; once more stops at once and loses it")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the handlers; a signal that was ignored, as ctrl-C is in a background job, stays ignored."""
        heard = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._handle) for number in heard}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if a signal came, to any of the processes."""
        if args.world_size > 1:  # all stop after the same step, or some would wait for the others for ever
            stopped = torch.tensor(int(self.stopped), device=args.device)
            torch.distributed.all_reduce(stopped, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(stopped)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the old handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
