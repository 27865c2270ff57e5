"""The training loss against its formula: from whole logits, and in chunks of tokens."""

import pytest
import torch
import torch.nn.functional as F

from fairy2i.training.loss import Head, chunked_loss, distillation_loss, hidden_loss


@pytest.fixture
def batch():
    student = torch.randn(2, 7, 11, requires_grad=True)
    labels = torch.randint(11, (2, 7))
    labels[0, 3] = labels[1, 1] = -100
    return student, torch.randn(2, 7, 11), labels


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_is_the_mean_of_the_formula_over_predicted_tokens(batch, weight, temperature):
    student, teacher, labels = batch
    terms = []
    for row in range(2):
        for t in range(6):
            if (target := int(labels[row, t + 1])) != -100:
                p, q = ((x[row, t].double() / temperature).softmax(-1) for x in (teacher, student))
                kl = (p * (p / q).log()).sum()
                ce = -student[row, t].double().softmax(-1)[target].log()
                terms.append((1 - weight) * ce + weight * temperature**2 * kl)
    loss = distillation_loss(student, teacher, labels, weight=weight, temperature=temperature)
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean(), rtol=1e-6, atol=1e-7)


def test_weight_zero_is_cross_entropy(batch):
    student, teacher, labels = batch
    expected = F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(distillation_loss(student, teacher, labels, weight=0.0), expected, rtol=1e-6, atol=0)


def test_chunks_change_neither_loss_nor_gradient(batch):
    student, teacher, labels = batch
    results = []
    for chunk in (1, 5, 4096):
        loss = distillation_loss(student, teacher, labels, weight=0.5, chunk=chunk)
        results.append((loss, *torch.autograd.grad(loss, student)))
    for loss, grad in results[:2]:
        torch.testing.assert_close(loss, results[2][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, results[2][1], rtol=1e-5, atol=1e-8)


def test_a_count_replaces_the_number_of_tokens(batch):
    mean = distillation_loss(*batch, weight=0.5)
    torch.testing.assert_close(distillation_loss(*batch, weight=0.5, count=20), mean * 10 / 20, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [{"weight": -0.1}, {"weight": 1.1}, {"weight": 0.5, "temperature": 0.0}])
def test_impossible_settings_are_refused(batch, bad):
    with pytest.raises(ValueError, match="must be in"):
        distillation_loss(*batch, **bad)


def test_another_vocabulary_is_refused(batch):
    with pytest.raises(ValueError, match="differ in shape"):
        distillation_loss(batch[0], torch.randn(2, 7, 12), batch[2], weight=0.5)


# In chunks, from what goes into the head


def head(rows, vocabulary=37, features=8, bias=False, dtype=torch.float32, spread=2.0):
    make = lambda *shape: (spread * torch.randn(*shape, dtype=torch.float64) / features**0.25).to(dtype)  # noqa: E731
    return Head(make(rows, features), make(vocabulary, features), make(vocabulary) if bias else None)


def leaves(of, dtype=None):
    return Head(*(None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in of))


def plain(student, targets, teacher, weight, temperature, count):
    """The loss from whole logits, by the formula."""
    logits, logits_t = (F.linear(h.hidden, h.weight, h.bias) for h in (student, teacher))
    q, p = ((x / temperature).log_softmax(-1) for x in (logits, logits_t))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[targets != -100].sum()
    ce = F.cross_entropy(logits, targets, reduction="sum")
    return ((1 - weight) * ce + weight * temperature**2 * kl) / count


def loss_and_gradients(function, student, *args, **kwargs):
    loss = function(student, *args, **kwargs)
    loss.backward()
    return [loss.detach(), *(t.grad for t in student if t is not None)]


def relative_errors(values, exact):
    return [float((v.double() - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True)]


@pytest.mark.parametrize("count", [None, 50])
@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.4, 1.0), (0.4, 2.5)])
def test_chunked_loss_and_gradients_are_those_of_whole_logits(weight, temperature, bias, chunk, count):
    torch.manual_seed(3)
    rows = 23
    student, teacher = head(rows, bias=bias), head(rows, bias=bias)
    targets = torch.randint(37, (rows,))
    targets[4:9] = -100
    settings = (weight, temperature, count or int((targets != -100).sum()))
    doubled = Head(*(None if t is None else t.double() for t in teacher))
    exact = loss_and_gradients(plain, leaves(student, torch.float64), targets, doubled, *settings)
    chunked = loss_and_gradients(
        chunked_loss,
        leaves(student),
        targets,
        teacher if weight else None,
        weight=weight,
        temperature=temperature,
        count=count,
        chunk=chunk,
    )
    assert max(relative_errors(chunked, exact)) < 1e-6


def test_chunked_loss_in_bfloat16_is_as_exact_as_whole_logits():
    torch.manual_seed(3)
    student, teacher = head(64, dtype=torch.bfloat16), head(64, dtype=torch.bfloat16)
    targets = torch.randint(37, (64,))

    def whole(student):
        logits, logits_t = (F.linear(h.hidden, h.weight)[None] for h in (student, teacher))
        # distillation_loss shifts: give it one row more
        pad = lambda x: F.pad(x, (0, 0, 0, 1))  # noqa: E731
        return distillation_loss(pad(logits), pad(logits_t), F.pad(targets, (1, 0))[None], weight=0.5)

    doubled = Head(*(None if t is None else t.double() for t in teacher))
    exact = loss_and_gradients(plain, leaves(student, torch.float64), targets, doubled, 0.5, 1.0, 64)
    of_whole = relative_errors(loss_and_gradients(whole, leaves(student)), exact)
    of_chunks = loss_and_gradients(chunked_loss, leaves(student), targets, teacher, weight=0.5, chunk=7)
    assert all(c <= 2 * w + 1e-6 for c, w in zip(relative_errors(of_chunks, exact), of_whole, strict=True))
    assert of_chunks[0].dtype == torch.float32 and of_chunks[1].dtype == torch.bfloat16


def test_chunked_loss_has_no_gradient_for_what_is_frozen_or_teaches():
    student, teacher = head(5), leaves(head(5))
    student.hidden.requires_grad_()
    chunked_loss(student, torch.arange(5), teacher, weight=0.5).backward()
    assert student.hidden.grad is not None
    assert student.weight.grad is None and teacher.weight.grad is None and teacher.hidden.grad is None


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (None, {"weight": 0.5}, "needs a teacher"),
        ("other", {"weight": 0.5}, "differ in vocabulary: 37, 38"),
        (None, {"weight": -1}, "must be in"),
    ],
)
def test_impossible_chunked_losses_are_refused(teacher, settings, message):
    with pytest.raises(ValueError, match=message):
        chunked_loss(head(5), torch.arange(5), head(5, 38) if teacher else None, **settings)


def test_hidden_loss_is_the_mean_relative_square_over_predicted_tokens():
    student, teacher = torch.randn(2, 6, 8).unbind()
    targets = torch.tensor([1, -100, 2, 3, -100, 4])
    terms = [float(((student[t] - teacher[t]) ** 2).sum() / (teacher[t] ** 2).sum()) for t in (0, 2, 3, 5)]
    assert float(hidden_loss(student, teacher, targets)) == pytest.approx(sum(terms) / 4, rel=1e-6)
    with pytest.raises(ValueError, match="same width: 8, 7"):
        hidden_loss(student, teacher[:, :7], targets)
