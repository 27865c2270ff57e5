"""The main job in a few minutes on a CPU: quantize a real model, see it fail, train it, see it recover.

    python examples/demo.py                                       # the committed one-million-parameter model
    python examples/demo.py --model MODEL_OR_ID --data TEXT       # your own
    make demo ARGS="--model MODEL_OR_ID --data TEXT"

Shows the baseline's perplexity on held-out text, what one and two bits do to it without training, and what a few
hundred steps of quantization-aware training bring back, beside binary and ternary weights at equal steps.
"""

import argparse
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from stdlib_text import help_topics
from transformers import PreTrainedTokenizerBase, default_data_collator, set_seed
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from fairy2i import METHODS, replace_modules_for_qat
from fairy2i.evaluation.table import markdown_table, number
from fairy2i.loading import load_model_and_tokenizer, read_documents
from fairy2i.training.data import TokenBlocks, tokenize_documents
from fairy2i.training.loss import IGNORE_INDEX
from fairy2i.training.trainer import QATTrainer, QATTrainingArguments

HERE = Path(__file__).parent
ROWS = [  # method, its name in the table
    ("complex_phase_v2", "Fairy2i-W2 (complex_phase_v2)"),
    ("complex_phase_v1", "Fairy2i-W1 (complex_phase_v1)"),
    ("bitnet_1_58", "Real-Ternary (bitnet_1_58)"),
    ("bitnet", "Real-Binary (bitnet)"),
]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "demo_model"), help="folder or Hub id (default: the demo model)")
    parser.add_argument("--data", help="text file, JSONL, folder or Hub data set (default: Python's help topics)")
    parser.add_argument("--held_out", help="text to measure on (default: every tenth document of --data)")
    parser.add_argument("--steps", type=int, default=250, help="training steps of each method (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks a step (default %(default)s)")
    parser.add_argument("--block_size", type=int, default=128, help="tokens in a block (default %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak (default %(default)s)")
    parser.add_argument("--prompt", default="The expression", help="what to continue (default %(default)r)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_texts(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Return (train, held out) documents."""
    if args.data is None:
        train, held_out = help_topics()
        return Dataset.from_dict({"text": train}), Dataset.from_dict({"text": held_out})
    documents = read_documents(args.data)
    if args.held_out:
        return documents, read_documents(args.held_out)
    if len(documents) < 10:
        raise ValueError(f"{args.data} has {len(documents)} documents, too few to hold some out; give --held_out TEXT")
    held = list(range(9, len(documents), 10))
    return documents.select(sorted(set(range(len(documents))) - set(held))), documents.select(held)


@torch.inference_mode()
def block_perplexity(model: Any, blocks: TokenBlocks, limit: int = 200) -> float:
    """Perplexity over the first blocks of held-out text, each predicted on its own."""
    model.eval()
    first = [blocks[i] for i in range(min(len(blocks), limit))]
    losses, scored = 0.0, 0
    for start in range(0, len(first), 16):
        batch = default_data_collator(first[start : start + 16])
        count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        losses += count * float(model(**{name: value.to(model.device) for name, value in batch.items()}).loss)
        scored += count
    return math.exp(min(losses / scored, 700))


@torch.inference_mode()
def continue_text(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Continue a prompt greedily by 32 tokens, on one line."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    out = model.generate(**ids, max_new_tokens=32, do_sample=False, repetition_penalty=1.1, pad_token_id=0)
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


def main(args: argparse.Namespace) -> None:
    start = time.time()
    train_documents, held_out_documents = load_texts(args)
    model, tokenizer = load_model_and_tokenizer(args.model)

    def blocks(documents: Dataset) -> TokenBlocks:
        tokens = tokenize_documents(documents, tokenizer)
        return TokenBlocks(tokens, args.block_size, tokenizer.eos_token_id)

    train, held_out = blocks(train_documents), blocks(held_out_documents)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    baseline = block_perplexity(model, held_out)
    sentences = [("baseline, 16 or 32 bits", continue_text(model, tokenizer, args.prompt))]
    print(f"\nModel: {args.model}, {model.num_parameters():,} parameters. Held-out perplexity: {baseline:.2f}")
    print(f"Text: {len(train.tokens):,} tokens to train on, {len(held_out.tokens):,} held out.\n")

    rows: list[list[object]] = [["baseline", "16", number(baseline), "-", "1.00x"]]
    for method, title in ROWS:
        set_seed(args.seed)
        model = load_model_and_tokenizer(args.model)[0].to(device)
        report = replace_modules_for_qat(model, METHODS[method])
        if method == ROWS[0][0]:
            print(f"{report}\n")
        before = block_perplexity(model, held_out)
        if method == ROWS[0][0]:
            sentences.append(("W2, not trained", continue_text(model, tokenizer, args.prompt)))
        print(f"{title}: {number(before)} without training; {args.steps} steps of {args.batch_size}x{args.block_size}")
        settings = QATTrainingArguments(
            output_dir="outputs/demo",
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            logging_strategy="no",
            save_strategy="no",
            seed=args.seed,
        )
        QATTrainer(model=model, args=settings, train_dataset=train, processing_class=tokenizer).train()
        after = block_perplexity(model, held_out)
        rows.append([title, f"{report.bits_per_weight:.2f}", number(before), number(after), f"{after / baseline:.2f}x"])
        if method == ROWS[0][0]:
            sentences.append(("W2, trained", continue_text(model, tokenizer, args.prompt)))

    header = ["weights", "bits", "not trained", f"after {args.steps} steps", "of baseline"]
    print("\nHeld-out perplexity\n\n" + markdown_table(header, rows) + "\n")
    for title, text in sentences:
        print(f"{title}:\n  {text}")
    print(f"\nDone in {time.time() - start:.0f} s.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    set_verbosity_error()
    disable_progress_bar()
    try:
        main(parse_args(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
