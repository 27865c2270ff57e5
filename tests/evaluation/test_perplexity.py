"""Perplexity by protocol `gptq`, against the definition."""

import json
import math

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, token_batch
from tiny_text import BOS, EOS, tiny_tokenizer

from fairy2i.evaluation.perplexity import perplexity, tokenize_text

WINDOW = 24
TOKENS = token_batch(1, 10 * WINDOW + 7)[0]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", attention_dropout=0.3)


@torch.no_grad()
def naive_losses(model, tokens, window):
    """Return the mean negative log-likelihood of each window, in nats, one token at a time."""
    means = []
    for start in range(0, len(tokens) - window + 1, window):
        ids = tokens[start : start + window]
        losses = []
        for i in range(1, window):
            probabilities = model(ids[None, :i]).logits[0, -1].double().softmax(-1)
            losses.append(-math.log(probabilities[ids[i]]))
        means.append(sum(losses) / len(losses))
    return torch.tensor(means, dtype=torch.float64)


def measure(model, tokens=TOKENS, window=WINDOW, **kwargs):
    return perplexity(model, tokens, window, progress=False, **kwargs)


def test_perplexity_is_the_definition(model):
    losses = naive_losses(model, TOKENS, WINDOW)
    result = measure(model)
    assert result.nll == pytest.approx(float(losses.mean()), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert result.standard_error == pytest.approx(float(losses.std() / math.sqrt(10)), rel=1e-4)
    assert (result.tokens, result.windows, result.window) == (10 * (WINDOW - 1), 10, WINDOW)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(model):
    blank = tiny_model("llama")
    torch.nn.init.zeros_(blank.lm_head.weight)
    result = measure(blank)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.standard_error < 1e-6


@pytest.mark.parametrize("batch_size", [2, 3, 10, 64])
def test_the_batch_size_does_not_change_the_result(model, batch_size):
    assert measure(model, batch_size=batch_size).nll == pytest.approx(measure(model).nll, rel=1e-6)


def test_tokens_behind_the_last_window_do_not_count(model):
    assert measure(model) == measure(model, TOKENS[: 10 * WINDOW])


def test_max_windows_takes_the_first(model):
    assert measure(model, max_windows=3) == measure(model, TOKENS[: 3 * WINDOW])
    assert measure(model, max_windows=99) == measure(model)


def test_a_single_window_has_no_standard_error(model):
    assert measure(model, max_windows=1).standard_error is None


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_dropout_is_off_meanwhile(model, training):
    expected = measure(model.eval())
    assert measure(model.train(training)) == expected
    assert {part.training for part in model.modules()} == {training}
    model.eval()


def test_a_window_of_the_whole_context_is_measured_and_one_more_token_is_refused(model):
    assert measure(model, window=64).window == 64
    with pytest.raises(ValueError, match=r"window of 65 tokens is longer than the model's context of 64"):
        measure(model, window=65)


def test_a_text_of_one_window_is_measured_and_one_token_less_is_refused(model):
    assert measure(model, TOKENS[:WINDOW]).windows == 1
    with pytest.raises(ValueError, match=r"has 23 tokens, less than one window of 24"):
        measure(model, TOKENS[: WINDOW - 1])


def test_a_window_has_something_to_predict(model):
    with pytest.raises(ValueError, match=r"window must be at least 2"):
        measure(model, window=1)


def test_a_result_goes_through_json(model):
    result = measure(model)
    assert type(result)(**json.loads(json.dumps(result.to_dict()))) == result
    assert result.protocol == "gptq"


# Texts


def test_a_text_is_tokenized_as_a_whole_with_bos_and_without_eos():
    tokens = tokenize_text("the quick</s> fox", tiny_tokenizer())
    assert (tokens.dtype, tokens.dim()) == (torch.int64, 1)
    assert tokens[0] == BOS
    assert tokens[-1] != EOS
    assert tiny_tokenizer().decode(tokens) == "<s>the quick</s> fox"
