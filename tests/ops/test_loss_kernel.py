"""The kernel of the training loss against PyTorch in float64: the loss of each token, and the gradient of its logits.

On the processor Triton's interpreter runs it, in float32; tests marked gpu run it for what it is.
"""

import pytest
import torch
from layers import NEEDS_TRITON, on_both, on_gpu

from fairy2i.ops import training as ops
from fairy2i.training.loss import IGNORE_INDEX, Head, _loss_and_gradient, chunked_loss

pytestmark = NEEDS_TRITON
MIXTURES = [(0.0, 1.0), (1.0, 1.0), (0.4, 1.0), (0.4, 2.5)]


def batch(tokens, vocabulary, device, dtype=torch.float32):
    student, teacher = (3 * torch.randn(2, tokens, vocabulary, device=device)).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    labels[1::3] = IGNORE_INDEX
    return student, teacher, labels


def exact(student, teacher, labels, weight, temperature):
    """Gradient and losses of each token in float64."""
    rows = zip(student.double().split(1), teacher.double().split(1), labels.split(1), strict=True)
    parts = [_loss_and_gradient(s, t if weight else None, label, weight, temperature) for s, t, label in rows]
    return torch.cat([grad for grad, _ in parts]), torch.stack([loss for _, loss in parts])


def relative(value, exact):
    return float((value.double() - exact).norm() / exact.norm())


@on_both
@pytest.mark.parametrize("vocabulary", [1, 11, 4096, 8192, 8197, 20000])
@pytest.mark.parametrize(("weight", "temperature"), MIXTURES)
def test_loss_and_gradient_are_those_of_the_formula(device, vocabulary, weight, temperature):
    from fairy2i.ops.triton.loss import loss_over_logits

    student, teacher, labels = batch(5, vocabulary, device)
    grad, losses = exact(student, teacher, labels, weight, temperature)
    count = torch.tensor(3.0, device=device)
    taught = teacher if weight else None
    found = loss_over_logits(student, taught, labels, weight, temperature, count, IGNORE_INDEX)
    if vocabulary == 1:  # nothing to choose
        assert found.abs().max() < 1e-6 and student.abs().max() < 1e-6
        return
    assert relative(found, losses) < 1e-6
    assert relative(student * 3, grad) < 1e-6
    assert not student[1::3].any() and not found[1::3].any()


@on_both
def test_rows_may_lie_apart_and_logits_be_infinitely_small(device):
    from fairy2i.ops.triton.loss import loss_over_logits

    student, teacher, labels = batch(4, 9000, device)
    labels[0] = 8999
    student[:, :8500] = -torch.inf  # a whole block of what cannot be
    grad, losses = exact(student, teacher, labels, 0.0, 1.0)
    wide = torch.full((4, 9100), 7.0, device=device)
    wide[:, :9000] = student
    one = torch.ones((), device=device)
    found = loss_over_logits(wide[:, :9000], None, labels, 0.0, 1.0, one, IGNORE_INDEX)
    finite = losses.isfinite()
    assert finite[0] and relative(found[finite], losses[finite]) < 1e-6
    assert bool((found.isinf() == losses.isinf()).all())
    assert relative(wide[:, :9000], grad) < 1e-6
    assert bool((wide[:, 9000:] == 7).all())


@on_both
def test_chunked_loss_takes_the_kernel_and_changes_by_rounding_alone(device, monkeypatch):
    torch.manual_seed(3)
    leaves = [torch.randn(9, 8, device=device), torch.randn(37, 8, device=device)]
    teacher = Head(torch.randn(9, 8, device=device), torch.randn(37, 8, device=device), None)
    targets = torch.randint(37, (9,), device=device)
    targets[2] = IGNORE_INDEX
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(ops, "_backend", backend)
        mine = [leaf.clone().requires_grad_() for leaf in leaves]
        loss = chunked_loss(Head(*mine, None), targets, teacher, weight=0.3, temperature=1.5, chunk=4)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in mine)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("weight", "temperature"), MIXTURES)
def test_low_precision_is_as_exact_as_pytorch_in_float32(device, weight, temperature, dtype):
    from fairy2i.ops.triton.loss import loss_over_logits

    student, teacher, labels = batch(64, 49152, device, dtype)
    grad, losses = exact(student, teacher, labels, weight, temperature)
    rounded = relative(grad.float().to(dtype), grad)
    one = torch.ones((), device=device)
    copies = student.clone(), student.clone()
    found = [
        loss_over_logits(s, teacher if weight else None, labels, weight, temperature, one, IGNORE_INDEX) for s in copies
    ]
    assert torch.equal(*copies) and torch.equal(*found)  # the same bits in each run
    assert relative(found[0], losses) < 1e-6
    assert relative(copies[0], grad) <= 2 * rounded
