"""What happens around the steps of training: a clean end on a signal."""

import logging
import signal
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


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
