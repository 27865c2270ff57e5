"""Blocks that are streamed from the sources: what is in them, in what order, by what weights; training and resuming."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import EOS, save_tiny_model, tiny_text, tiny_tokenizer
from torch.utils.data import DataLoader

from fairy2i.training.loss import IGNORE_INDEX
from fairy2i.training.shards import prepare
from fairy2i.training.sources import find_subset
from fairy2i.training.stream import stream_blocks
from fairy2i.training.trainer import QATArguments, QATTrainingArguments, run_training

BLOCK = 16


def subset(path, texts, name="all", **settings):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return find_subset(name, str(path), **settings)


def ids(blocks):
    return [block["input_ids"].tolist() for block in blocks]


def test_each_block_is_cut_from_whole_batches_of_documents(tmp_path):
    texts = [f"number {i} {tiny_text(5, i)}" for i in range(40)]
    blocks = list(stream_blocks([subset(tmp_path / "a.jsonl", texts)], tiny_tokenizer(), BLOCK, batch=10))
    lengths = {text: len(tiny_tokenizer()(text, add_special_tokens=False).input_ids) + 1 for text in texts}
    assert sum(lengths.values()) - 4 * (BLOCK - 1) <= len(blocks) * BLOCK <= sum(lengths.values())
    text = tiny_tokenizer().decode([token for block in ids(blocks) for token in block])
    whole = [part for part in text.split("</s>") if part in lengths]
    assert len(set(whole)) == len(whole) >= 40 - 2 * 4, "at most the documents at the seams of batches are cut"
    for block in blocks:
        assert {name: (tensor.dtype, len(tensor)) for name, tensor in block.items()} == dict.fromkeys(
            ("input_ids", "labels"), (torch.int64, BLOCK)
        )
        expected = block["input_ids"].clone()
        expected[1:][block["input_ids"][:-1] == EOS] = IGNORE_INDEX
        assert torch.equal(block["labels"], expected)


def test_the_order_depends_on_the_seed(tmp_path):
    source = subset(tmp_path / "a.jsonl", [tiny_text(20, i) for i in range(30)])
    orders = [ids(stream_blocks([source], tiny_tokenizer(), BLOCK, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_workers_share_the_files(tmp_path):
    for i in range(4):
        subset(tmp_path / f"{i}.jsonl", [" ".join(f"{i}{j}{k:02}" for k in range(20)) for j in range(10)])
    stream = stream_blocks([find_subset("all", str(tmp_path))], tiny_tokenizer(), BLOCK, batch=10)
    alone, shared = (
        [tuple(block.tolist()) for batch in DataLoader(stream, num_workers=n) for block in batch["input_ids"]]
        for n in (0, 2)
    )
    assert len(set(shared)) == len(shared) > 0, "no block comes from two workers"
    assert abs(len(shared) - len(alone)) <= 4


def test_subsets_are_mixed_by_weight(tmp_path):
    sources = [
        subset(tmp_path / f"{name}.jsonl", [f"{name} " * length] * 200, name, weight=weight)
        for name, length, weight in (("a", 20, 3), ("b", 60, 1))
    ]
    blocks = itertools.islice(stream_blocks(sources, tiny_tokenizer(), BLOCK), 400)
    texts = [tiny_tokenizer().decode(block) for block in ids(blocks)]
    share = sum(text.count("a") > text.count("b") for text in texts) / len(texts)
    assert 0.69 < share < 0.81, "in blocks, however long the documents are"


# Training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    save_tiny_model(path / "model", attention_dropout=0.2)
    subset(path / "text.jsonl", [tiny_text(40, i) for i in range(30)])
    return path


def train(folder, output, data="text.jsonl", *, streaming=False, resume=False, **settings):
    qat = QATArguments(str(folder / "model"), data=str(folder / data), block_size=BLOCK, resume=resume)
    qat.streaming = streaming
    fixed = {"output_dir": str(output), "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_steps": 2}
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    run_training(qat, QATTrainingArguments(**{**defaults, **fixed, **settings}))
    return load_file(output / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_on_shards_is_training_on_their_text(folder, tmp_path, own_cache):
    shards = folder / "shards"
    prepare([find_subset("all", str(folder / "text.jsonl"))], tiny_tokenizer(), str(shards), shard_tokens=100)
    expected = train(folder, tmp_path / "text")
    assert same(train(folder, tmp_path / "shards", "shards"), expected)
    assert not same(train(folder, tmp_path / "seed", "shards", seed=1), expected)


def test_streamed_training_resumes_as_if_it_had_not_stopped(folder, tmp_path):
    expected = train(folder, tmp_path / "straight", streaming=True)
    train(folder, tmp_path / "stopped", streaming=True, max_steps=2, lr_scheduler_type="constant")
    straight = train(folder, tmp_path / "constant", streaming=True, lr_scheduler_type="constant")
    resumed = train(folder, tmp_path / "stopped", streaming=True, resume=True, lr_scheduler_type="constant")
    assert same(resumed, straight)
    assert not same(expected, straight)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("text.jsonl", {"streaming": True, "max_steps": -1}, "--streaming needs --max_steps"),
        ("finished", {"streaming": True}, "finished is prepared already; leave out --streaming"),
        ("table.yaml", {}, r"table.yaml is a table of subsets; `fairy2i prepare` it first, or add --streaming"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, tmp_path, data, settings, message):
    (folder / "finished").mkdir(exist_ok=True)
    (folder / "finished" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        train(folder, tmp_path, data, **settings)
