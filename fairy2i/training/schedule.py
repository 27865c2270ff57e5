"""Learning-rate schedules as data: a list of segments, each a last step, a factor of the peak rate, and a shape.

    [[300, 1.0, "linear"], [8000, 1.0], [10000, 0.1667, "cosine"], [19000, 0.1667], [20000, 0.0333, "cosine"]]

A segment leads from where the one before ended (the first from 0) to its own factor, which it reaches at its last step:
"linear" or "cosine". Without a shape it holds its factor all along. The last factor holds for ever.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SHAPES = ("hold", "linear", "cosine")


class Segment(NamedTuple):
    """A stretch of the schedule up to a step."""

    until: int
    factor: float
    shape: str = "hold"


def parse_schedule(schedule: str | Sequence[Any]) -> tuple[Segment, ...]:
    """Read a schedule, from JSON or as lists.

    Raises:
        ValueError: it is no list of segments, its steps do not grow, or a factor or shape is impossible.
    """
    try:
        rows = json.loads(schedule) if isinstance(schedule, str) else schedule
        segments = tuple(Segment(*row) for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f'lr_schedule must be a list like [[300, 1.0, "linear"], [8000, 1.0]]: {error}') from None
    if not segments:
        raise ValueError("lr_schedule has no segments")
    before = 0
    for segment in segments:
        until, factor, shape = segment
        if not isinstance(until, int) or until <= before:
            raise ValueError(f"lr_schedule: the last step of {list(segment)} must be a whole number above {before}")
        if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise ValueError(f"lr_schedule: the factor of {list(segment)} must be 0 or more")
        if shape not in SHAPES:
            raise ValueError(f"lr_schedule: the shape of {list(segment)} must be one of {', '.join(SHAPES)}")
        before = until
    return segments


def schedule_factor(step: int, *, segments: Sequence[Segment]) -> float:
    """Return the factor of the peak learning rate after so many optimizer steps."""
    begin, start = 0, 0.0
    for until, factor, shape in segments:
        if step < until:
            share = (step - begin) / (until - begin)
            if shape == "linear":
                return start + (factor - start) * share
            if shape == "cosine":
                return factor + (start - factor) * 0.5 * (1 + math.cos(math.pi * share))
            return factor
        begin, start = until, factor
    return start


def segment_scheduler(optimizer: Optimizer, segments: Sequence[Segment]) -> LambdaLR:
    """Return the scheduler that gives each parameter group its own peak rate times the factor of the step.

    A resumed run follows the segments it is given now, not those of the checkpoint.
    """
    return LambdaLR(optimizer, functools.partial(schedule_factor, segments=tuple(segments)))
