"""The training loss: cross-entropy, and distillation from the unquantized model.

    loss = (1 - a) CE(labels, student) + a t^2 KL(softmax(teacher / t) || softmax(student / t))

with mixing weight a and temperature t (arXiv 1503.02531), averaged over the predicted tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .data import IGNORE_INDEX


def _chunk_loss(student: Tensor, teacher: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """Summed loss of some tokens: (tokens, vocabulary) logits, (tokens,) labels."""
    student, teacher = student.float(), teacher.float()
    scored = labels != IGNORE_INDEX
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    loss = weight * temperature**2 * torch.where(scored, divergence, 0).sum()
    if weight < 1:
        loss = loss + (1 - weight) * F.cross_entropy(student, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    weight: float,
    temperature: float = 1.0,
    count: Tensor | int | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Return the mixed loss of next-token prediction, a float32 scalar.

    Args:
        student, teacher: logits (batch, length, vocabulary); position t predicts label t + 1.
        labels: int64 (batch, length), -100 where nothing is to be predicted.
        weight: share of the divergence, 0 to 1; the rest is cross-entropy.
        temperature: softens both distributions.
        count: what to divide the sum by; the number of predicted tokens if None.
        chunk: tokens at a time; their softmaxes are made again in the backward, so that a large vocabulary fits.

    Raises:
        ValueError: the vocabularies differ, or weight or temperature is out of range.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher logits differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    if not 0 <= weight <= 1 or temperature <= 0:
        raise ValueError(f"weight must be in [0, 1] and temperature positive, got {weight} and {temperature}")
    targets = labels[:, 1:].flatten()
    parts = zip(
        student[:, :-1].flatten(0, 1).split(chunk),
        teacher[:, :-1].flatten(0, 1).split(chunk),
        targets.split(chunk),
        strict=True,
    )
    losses = [checkpoint(_chunk_loss, *part, weight, temperature, use_reentrant=False) for part in parts]
    total = torch.stack(losses).sum()
    return total / ((targets != IGNORE_INDEX).sum() if count is None else count)
