"""The loss of whole models: chunks of tokens against whole logits, models that cannot, teachers, and the memory."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model, token_batch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fairy2i import PhaseScheme, replace_modules_for_qat
from fairy2i.training.objective import Objective
from fairy2i.training.sharding import place_teacher

LEARNED = PhaseScheme(stages=2, granularity="row", scales="learned")
LOSSES = {
    "cross-entropy": {},
    "divergence": {"distill": 1.0},
    "mixture": {"distill": 0.5, "temperature": 1.5, "hidden": 0.3},
}


def batch():
    ids = token_batch(3, 12)
    labels = ids.clone()
    labels[0, 3] = labels[2, 7] = -100
    return {"input_ids": ids, "labels": labels}


def student_and_teacher(family="llama", skip_lm_head=None, **settings):
    model = tiny_model(family, **settings)
    with torch.no_grad():  # far enough from the student for gradients that rounding does not swamp
        teacher = copy.deepcopy(model)
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    replace_modules_for_qat(model, LEARNED, skip_lm_head)
    return model.train(), place_teacher(teacher, torch.device("cpu"))


def test_a_teacher_keeps_no_keys_and_values():
    _, teacher = student_and_teacher()
    assert teacher(**batch()).past_key_values is None
    assert tiny_model("llama").eval()(input_ids=batch()["input_ids"]).past_key_values is not None


def run(model, teacher, chunk, count=None, autocast=False, **loss):
    """Return the loss, all gradients in one vector, and whether it was made in chunks."""
    objective = Objective(model, teacher if loss else None, chunk=chunk, **loss)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, _ = objective(model, batch(), count)
    value.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return value.detach(), gradients.clone(), objective.chunked


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", ["plain", "tied", "quantized", "tied and quantized"])
def test_chunks_equal_whole_logits(head, loss):
    pair = student_and_teacher(tied="tied" in head, skip_lm_head="quantized" not in head)
    whole, whole_gradients, _ = run(*pair, 0, **LOSSES[loss])
    chunks, gradients, chunked = run(*pair, 7, **LOSSES[loss])
    assert chunked
    assert float(chunks) == pytest.approx(float(whole), rel=1e-6)
    assert distance(gradients, whole_gradients) < 1e-6


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "opt", "gpt_neox", "gpt2", "phi3"])
def test_the_loss_is_the_one_that_the_model_makes(family):
    model, _ = student_and_teacher(family)
    model.eval()  # no dropout, so that both see the same
    expected = model(**batch()).loss
    assert float(run(model, None, 7)[0]) == pytest.approx(expected.item(), rel=1e-6)


def test_accumulated_batches_equal_one():
    model, teacher = student_and_teacher()
    loss = Objective(model, teacher, distill=0.5, chunk=5)
    whole = batch()
    count = int((whole["labels"][:, 1:] != -100).sum())
    model.zero_grad()
    total = 0.0
    for row in range(3):
        value, _ = loss(model, {name: rows[row : row + 1] for name, rows in whole.items()}, torch.tensor(count))
        value.backward()
        total += float(value)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected, at_once, _ = run(model, teacher, 5, distill=0.5)
    assert total == pytest.approx(float(expected), rel=1e-6)
    assert distance(gradients, at_once) < 1e-6


def test_autocast_is_as_exact_in_chunks():
    pair = student_and_teacher()
    exact, exact_gradients, _ = run(*pair, 0, distill=0.5)
    whole, whole_gradients, _ = run(*pair, 0, autocast=True, distill=0.5)
    chunks, gradients, chunked = run(*pair, 7, autocast=True, distill=0.5)
    assert chunked
    assert abs(chunks - exact) <= 2 * abs(whole - exact) + 1e-6 * exact
    assert 0 < distance(gradients, exact_gradients) <= 2 * distance(whole_gradients, exact_gradients)


def capped(**settings):
    small = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return {**small, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, **settings}


@pytest.mark.parametrize(
    ("make", "chunked"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**capped(head_dim=8, final_logit_softcapping=3.0))), False),
        (lambda: CohereForCausalLM(CohereConfig(**capped(logit_scale=0.5))), False),
        (lambda: CohereForCausalLM(CohereConfig(**capped(logit_scale=1.0))), True),
    ],
)
def test_models_that_do_more_to_their_logits_take_them_whole(make, chunked, caplog):
    torch.manual_seed(0)
    model = make().eval()
    with caplog.at_level(logging.WARNING):
        loss, _, in_chunks = run(model, None, 7)
    assert float(loss) == pytest.approx(float(model(**batch()).loss), rel=1e-6)
    assert in_chunks == chunked
    assert ("more to its logits" in caplog.text) == (not chunked)


def test_a_teacher_that_caps_its_logits_is_learned_from_as_it_is():
    torch.manual_seed(0)
    teacher = Gemma2ForCausalLM(Gemma2Config(**capped(head_dim=8, final_logit_softcapping=0.1)))
    model, _ = student_and_teacher()
    place_teacher(teacher, torch.device("cpu"))
    chunks, whole = (run(model, teacher, chunk, distill=1.0)[0] for chunk in (7, 0))
    assert float(chunks) == float(whole)


def test_the_model_answers_as_before_once_the_loss_is_made():
    model, teacher = student_and_teacher()
    expected = model(token_batch()).logits
    run(model, teacher, 7, distill=0.5)
    assert torch.equal(model(token_batch()).logits, expected)


def test_an_offloaded_teacher_teaches_the_same():
    model, teacher = student_and_teacher()
    here = run(model, teacher, 7, **LOSSES["mixture"])
    away = place_teacher(copy.deepcopy(student_and_teacher()[1]), torch.device("cpu"), offload=True)
    assert all(parameter.is_meta for parameter in away.parameters())
    there = run(model, away, 7, **LOSSES["mixture"])
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])


def test_the_teacher_computes_in_its_own_dtype_under_autocast():
    model, teacher = student_and_teacher()
    exact, lower = (
        run(model, place_teacher(copy.deepcopy(teacher), torch.device("cpu"), dtype), 7, autocast=True, distill=1.0)[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert float(exact) != float(lower)
    assert float(lower) == pytest.approx(float(exact), rel=0.05)


@pytest.mark.parametrize("settings", [{"distill": 0.5}, {"hidden": 1.0}, {"chunk": -1}, {"distill": 2.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"needs a teacher|negative|must be in"):
        Objective(tiny_model(), **settings)


MEASURE = """
import copy, resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from fairy2i.training.objective import Objective
torch.manual_seed(0)
config = LlamaConfig(vocab_size=150_000, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, max_position_embeddings=2048)
model = LlamaForCausalLM(config).train()
teacher = copy.deepcopy(model).requires_grad_(False).eval()
objective = Objective(model, teacher, distill=0.5, chunk=int(sys.argv[1]))
ids = torch.randint(150_000, (1, 2048))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
objective(model, {"input_ids": ids, "labels": ids})[0].backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


def gib_of_a_step(chunk):
    command = [sys.executable, "-c", MEASURE, str(chunk)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_chunks_keep_the_logits_of_a_large_vocabulary_out_of_memory():
    """2048 tokens of 150,000 logits are 1.14 GiB in float32, and whole logits are held several times over."""
    whole, chunks = gib_of_a_step(0), gib_of_a_step(128)
    assert whole > 4
    assert chunks < 1.14 * 0.75  # less than the logits once
