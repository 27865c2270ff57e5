"""Documents become token blocks by the rule of the paper."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_text import BOS, EOS, tiny_tokenizer

from fairy2i.training.data import TokenBlocks, tokenize_documents
from fairy2i.training.loss import IGNORE_INDEX


def documents(*texts):
    return Dataset.from_dict({"text": list(texts)})


# Tokens


def test_each_document_gets_eos_and_no_bos(own_cache):
    texts = ["the quick fox", "", "a dog </s> x"]
    tokenizer = tiny_tokenizer()
    expected = [t for text in texts for t in [*tokenizer(text, add_special_tokens=False).input_ids, EOS]]
    assert tokenizer(texts[0]).input_ids[0] == BOS, "this tokenizer adds BOS when it is not told otherwise"
    tokens = tokenize_documents(documents(*texts), tokenizer)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == expected


def test_a_thousand_documents_keep_their_order_in_two_processes(own_cache):
    texts = [f"number {i}" for i in range(1001)]
    tokens = tokenize_documents(documents(*texts), tiny_tokenizer(), num_proc=2)
    assert tiny_tokenizer().decode(tokens).split("</s>") == [*texts, ""]


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = type(tiny_tokenizer())(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"no EOS token"):
        tokenize_documents(documents("text"), tokenizer)


# Blocks


def blocks(tokens, size=4):
    return TokenBlocks(np.array(tokens, dtype=np.int32), size, EOS)


@pytest.mark.parametrize(("total", "count"), [(4, 1), (7, 1), (8, 2), (11, 2)])
def test_blocks_are_consecutive_and_the_rest_is_dropped(total, count):
    data = blocks(range(10, 10 + total))
    assert len(data) == count
    assert torch.cat([block["input_ids"] for block in data]).tolist() == list(range(10, 10 + 4 * count))


def test_only_the_label_right_after_eos_is_masked():
    block = blocks([5, EOS, 6, 7, EOS, EOS, 8, EOS], 8)[0]
    assert block["input_ids"].tolist() == [5, EOS, 6, 7, EOS, EOS, 8, EOS]
    assert block["labels"].tolist() == [5, EOS, IGNORE_INDEX, 7, EOS, IGNORE_INDEX, IGNORE_INDEX, EOS]


def test_eos_at_the_end_of_a_block_masks_nothing_in_the_next():
    data = blocks([5, 6, 7, EOS, 8, 9, 10, 11])
    assert data[1]["labels"].tolist() == [8, 9, 10, 11]


def test_blocks_are_int64_and_copies():
    data = blocks([5, EOS, 6, 7])
    assert {tensor.dtype for tensor in data[0].values()} == {torch.int64}
    data[0]["input_ids"].zero_()
    assert data[0]["input_ids"].tolist() == [5, EOS, 6, 7]


@pytest.mark.parametrize("index", [-1, 2])
def test_there_are_no_blocks_outside(index):
    with pytest.raises(IndexError, match=r"of 2"):
        blocks(range(8))[index]


def test_a_text_shorter_than_a_block_is_refused():
    with pytest.raises(ValueError, match=r"has 3 tokens, less than one block of 4"):
        blocks(range(3))


def test_a_block_has_something_to_predict():
    with pytest.raises(ValueError, match=r"at least 2, got 1"):
        blocks(range(8), size=1)
