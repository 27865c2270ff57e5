"""Train the small model of the demo from scratch: a LLaMA of a million parameters, on Python's own documentation.

    python examples/make_demo_model.py            # writes examples/demo_model, about 10 minutes on two cores

The text is the standard library's docstrings and the help topics that are not held out (examples/stdlib_text.py); the
tokenizer is a byte-level BPE trained on the same text.
"""

import argparse
import logging
from pathlib import Path

import torch
from datasets import Dataset
from stdlib_text import docstrings, help_topics
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from fairy2i.training.data import TokenBlocks, tokenize_documents
from fairy2i.training.trainer import QATTrainer, QATTrainingArguments

HERE = Path(__file__).parent
VOCABULARY, CONTEXT = 1024, 256


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with BOS and EOS."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(HERE / "demo_model"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(0)

    train, held_out = help_topics()
    documents = docstrings() + train * 2
    tokenizer = train_tokenizer(documents)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    logging.info("%s parameters", f"{model.num_parameters():,}")

    def blocks(texts: list[str]) -> TokenBlocks:
        tokens = tokenize_documents(Dataset.from_dict({"text": texts}), tokenizer)
        return TokenBlocks(tokens, CONTEXT, tokenizer.eos_token_id)

    settings = QATTrainingArguments(
        output_dir="outputs/demo_model",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        max_grad_norm=1.0,
        logging_steps=100,
        eval_strategy="steps",
        eval_steps=500,
        save_strategy="no",
        seed=0,
    )
    trainer = QATTrainer(
        model=model,
        args=settings,
        train_dataset=blocks(documents),
        eval_dataset=blocks(held_out),
        processing_class=tokenizer,
    )
    trainer.train()
    logging.info("%s", trainer.evaluate())
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
