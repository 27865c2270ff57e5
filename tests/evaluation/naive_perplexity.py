"""The protocols once more, as short and slow as their definitions: one window at a time, loss after loss."""

import math

import torch


@torch.no_grad()
def loss_of(model, ids, i):
    """Return the negative log-likelihood of the token at i, in nats, after all tokens before it."""
    return -float(model(torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1)[ids[i]])


@torch.no_grad()
def losses_in(model, ids, places):
    """Return the negative log-likelihoods at places of one window, from one call of the model."""
    logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(logs[i - 1, ids[i]]) for i in places]


def gptq(model, tokenizer, documents, window, joint="\n\n"):
    """Return mean loss and number of tokens: joined text, whole windows, all tokens but the first."""
    ids = tokenizer(joint.join(documents)).input_ids
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        losses += losses_in(model, ids[start : start + window], range(1, window))
    return math.fsum(losses) / len(losses), len(losses)


def fairy2i(model, tokenizer, documents, window):
    """Return mean loss and number of tokens: whole documents in BOS and EOS, none scored right after an EOS."""
    windows = [[]]
    for document in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(ids) <= window:
            if len(windows[-1]) + len(ids) > window:
                windows.append([])
            windows[-1] += ids
    losses = []
    for ids in windows:
        losses += losses_in(model, ids, [i for i in range(1, len(ids)) if ids[i - 1] != tokenizer.eos_token_id])
    return math.fsum(losses) / len(losses), len(losses)


def strided(model, tokenizer, documents, window, stride):
    """Return mean loss and number of tokens: each token in the first window that has it."""
    ids = tokenizer("\n\n".join(documents)).input_ids
    starts = range(0, len(ids), stride)
    losses = []
    for i in range(1, len(ids)):
        start = next(s for s in starts if s <= i < s + window)
        losses.append(loss_of(model, ids[start:], i - start))
    return math.fsum(losses) / len(losses), len(losses)
