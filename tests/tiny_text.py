"""A tiny tokenizer, and a tiny model saved with it, for all that starts from a folder and a text."""

import functools

from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over a lazy dog while seven small birds sing in tall green trees".split()
BOS, EOS = 1, 2


@functools.cache
def tiny_tokenizer():
    """Return a byte-level BPE tokenizer of 280 tokens that, as LLaMA's, adds BOS by default and no EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text(200)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=10_000
    )


def tiny_text(words, offset=0):
    """Return so many words, the same ones each time, in an order that does not repeat soon."""
    return " ".join(WORDS[(i * i + 3 * i // 2 + offset) % len(WORDS)] for i in range(words))


def save_tiny_model(path, **overrides):
    """Save a tiny random LLaMA and the tiny tokenizer in one folder; return the folder as text."""
    tiny_model("llama", vocab_size=280, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)
