"""The distillation loss against its formula."""

import pytest
import torch
import torch.nn.functional as F

from fairy2i.training.loss import distillation_loss


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
