"""Token shards hold the tokens of the sources, whatever happened while they were written, and training reads them."""

import hashlib
import itertools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import EOS, tiny_text, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import Trainer

from fairy2i import saving
from fairy2i.cli import main
from fairy2i.loading import read_documents
from fairy2i.training import shards as module
from fairy2i.training.data import TokenBlocks, tokenize_documents
from fairy2i.training.shards import ShardedTokens, is_prepared, prepare, prepared_blocks
from fairy2i.training.sources import Subset, draw, find_subset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """Do not wait for the disk: no test here cuts the power."""
    monkeypatch.setattr(saving, "sync", lambda path: None)


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def expected_tokens(texts):
    return [t for text in texts for t in [*tiny_tokenizer()(text, add_special_tokens=False).input_ids, EOS]]


def all_tokens(folder):
    tokens = ShardedTokens(str(folder))
    return tokens[0 : len(tokens)].tolist()


def contents(folder):
    """Return the bytes of each file of a folder."""
    return {entry.name: Path(entry.path).read_bytes() for entry in os.scandir(folder)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a folder of three files with ten documents each."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(3):
        write_jsonl(folder / f"part-{i}.jsonl", [f"{i} {j} {tiny_text(5 + 3 * j, i)}" for j in range(10)])
    return folder


def texts_of(corpus, i):
    return [json.loads(line)["text"] for line in (corpus / f"part-{i}.jsonl").read_text().splitlines()]


def prepare_folder(corpus, folder, **settings):
    return prepare([find_subset("all", str(corpus))], tiny_tokenizer(), str(folder), **{"shard_tokens": 64} | settings)


# What the shards hold


texts = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12), max_size=6)


@given(st.lists(texts, min_size=1, max_size=4).filter(any), st.integers(1, 40), st.integers(1, 30))
def test_the_shards_hold_exactly_the_tokens_of_the_sources(tmp_path_factory, files, shard_tokens, characters):
    folder = tmp_path_factory.mktemp("case")
    paths = [write_jsonl(folder / "in" / f"{i}.jsonl", texts) for i, texts in enumerate(files)]
    with pytest.MonkeyPatch.context() as patch:  # batches of different sizes
        patch.setattr(module, "BATCH_DOCUMENTS", 2)
        patch.setattr(module, "BATCH_CHARACTERS", characters)
        manifest = prepare(
            [find_subset("all", paths)], tiny_tokenizer(), str(folder / "out"), shard_tokens=shard_tokens
        )
    expected = expected_tokens(itertools.chain(*files))
    assert all_tokens(folder / "out") == expected
    assert (manifest["tokens"], manifest["documents"]) == (len(expected), sum(map(len, files)))
    sizes = [len(data) // 2 for name, data in sorted(contents(folder / "out").items()) if name.endswith(".bin")]
    assert sizes == [min(shard_tokens, len(expected) - i) for i in range(0, len(expected), shard_tokens)]


@given(st.data())
def test_any_slice_reads_what_an_array_would(corpus_shards, data):
    tokens = ShardedTokens(corpus_shards)
    whole = np.array(all_tokens(corpus_shards))
    place = st.integers(0, len(whole) + 5)
    start, stop = data.draw(place), data.draw(place)
    assert tokens[start:stop].tolist() == whole[start:stop].tolist()


@pytest.fixture(scope="module")
def corpus_shards(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "out"
    prepare_folder(corpus, folder)
    return str(folder)


def test_blocks_of_shards_are_those_of_the_same_text_unprepared(corpus, corpus_shards, own_cache):
    tokens = tokenize_documents(read_documents(str(corpus)), tiny_tokenizer())
    expected = TokenBlocks(tokens, 24, EOS)
    blocks = prepared_blocks(corpus_shards, 24, tiny_tokenizer())
    assert len(blocks) == len(expected)
    assert len(ShardedTokens(corpus_shards).manifest["shards"]) > 10, "blocks must span shards"
    for a, b in zip(blocks, expected, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])


def test_a_vocabulary_above_16_bits_is_stored_in_32(tmp_path):
    class Large:
        eos_token_id = 70_000

        def get_vocab(self):
            return {"a": 65_536, "</s>": 70_000}

        def __call__(self, texts, **kwargs):
            return {"input_ids": [[65_536] * len(text) for text in texts]}

    source = find_subset("all", write_jsonl(tmp_path / "a.jsonl", ["aa", "a"]))
    manifest = prepare([source], Large(), str(tmp_path / "out"))
    assert all_tokens(tmp_path / "out") == [65_536, 65_536, 70_000, 65_536, 70_000]
    assert (manifest["dtype"], manifest["largest_token"]) == ("uint32", 70_000)


def test_the_checksums_are_those_of_the_files(corpus_shards):
    manifest = json.loads(Path(corpus_shards, "manifest.json").read_text())
    for shard in manifest["shards"]:
        assert hashlib.sha256(Path(corpus_shards, shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


# Budgets, weights, seeds


def subsets(corpus, weights=(1, 1, 2)):
    return [Subset(f"s{i}", (str(corpus / f"part-{i}.jsonl"),), weight=weight) for i, weight in enumerate(weights)]


def test_a_budget_is_shared_by_weight_up_to_the_end_of_a_document(corpus, tmp_path):
    manifest = prepare(subsets(corpus), tiny_tokenizer(), str(tmp_path / "out"), tokens=200, shard_tokens=64)
    expected = []
    for i, budget in enumerate([50, 50, 100]):
        lengths = np.cumsum([len(expected_tokens([text])) for text in texts_of(corpus, i)])
        used = int(np.searchsorted(lengths, budget)) + 1
        assert used < 10
        assert manifest["tokens_of_sources"][i] == lengths[used - 1] >= budget
        assert manifest["documents_of_sources"][i] == used
        expected += texts_of(corpus, i)[:used]
    assert all_tokens(tmp_path / "out") == expected_tokens(expected)


def test_a_subset_that_runs_out_is_told(corpus, tmp_path, caplog):
    manifest = prepare(subsets(corpus, [1]), tiny_tokenizer(), str(tmp_path / "out"), tokens=10**6)
    assert f"s0 has only {manifest['tokens']:,} tokens of the 1,000,000" in caplog.text
    assert all_tokens(tmp_path / "out") == expected_tokens(texts_of(corpus, 0))


def test_with_a_budget_the_seed_draws_the_files(corpus, tmp_path):
    found = set()
    for seed in range(12):
        prepare_folder(corpus, tmp_path / f"{seed}", tokens=60, seed=seed)
        found.add(tuple(all_tokens(tmp_path / f"{seed}")[:10]))
    prepare_folder(corpus, tmp_path / "again", tokens=60, seed=11)
    assert contents(tmp_path / "again") == contents(tmp_path / "11")
    assert found == {tuple(expected_tokens(texts_of(corpus, i))[:10]) for i in range(3)}


def test_keep_draws_documents_by_the_seed(tmp_path):
    texts = [f"number {i}" for i in range(1000)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    kept = []
    for seed in (0, 1):
        prepare([find_subset("all", path, keep=0.3)], tiny_tokenizer(), str(tmp_path / f"{seed}"), seed=seed)
        kept.append(tiny_tokenizer().decode(all_tokens(tmp_path / f"{seed}")).split("</s>")[:-1])
        assert 250 < len(kept[-1]) < 350
        assert set(kept[-1]) < set(texts)
    assert kept[0] != kept[1]


def test_draws_are_the_same_on_every_machine():
    assert draw(0, "github", "a.jsonl") == 0.8641300307023488


# Interruptions


class Killed(BaseException):
    """Stands for a kill: nobody catches it."""


@pytest.mark.parametrize("tokens", [None, 700])
@pytest.mark.parametrize("call", [1, 2, 7, 16, 25])
def test_a_run_that_breaks_off_anywhere_goes_on_to_the_same_bytes(corpus, tmp_path, monkeypatch, call, tokens):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 3)
    sources = [
        find_subset("a", str(corpus / "part-[01].jsonl"), keep=0.8),
        find_subset("b", str(corpus / "part-2.jsonl")),
    ]
    arrange = partial(prepare, sources, tiny_tokenizer(), shard_tokens=40, tokens=tokens)
    arrange(str(tmp_path / "straight"))
    original, count = module._Stream.take, itertools.count(1)

    def take(self, *args):
        if next(count) == call:
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(module._Stream, "take", take)
    with pytest.raises(Killed):
        arrange(str(tmp_path / "broken"))
    assert not (tmp_path / "broken" / "manifest.json").exists()
    arrange(str(tmp_path / "broken"))
    assert contents(tmp_path / "broken") == contents(tmp_path / "straight")


def command(folder, output, *more):
    flags = {"data": folder / "text.jsonl", "tokenizer": folder / "tokenizer", "output": output, "shard_tokens": 20_000}
    return [sys.executable, "-m", "fairy2i", "prepare", *(f"--{k}={v}" for k, v in flags.items()), *more]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return a folder with a tokenizer, a text of some seconds, and its shards as a run makes them undisturbed."""
    folder = tmp_path_factory.mktemp("large")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "text.jsonl", (f"{i} {tiny_text(60, i)}" for i in range(10_000)))
    assert main(command(folder, folder / "straight")[3:]) == 0
    return folder


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, "it was done before it could be stopped"
        time.sleep(0.005)


def test_killed_for_good_and_run_again_with_one_thread_the_bytes_are_the_same(large, tmp_path):
    process = subprocess.Popen(command(large, tmp_path / "out"), stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "out" / "shard-00005.bin", process)
    process.kill()
    process.wait()
    before = contents_names(tmp_path / "out")
    assert "progress.json" in before
    assert "manifest.json" not in before
    kept = (tmp_path / "out" / "shard-00004.bin").stat().st_mtime_ns
    subprocess.run(command(large, tmp_path / "out", "--num_proc=1"), check=True, timeout=300)
    assert contents(tmp_path / "out") == contents(large / "straight")
    assert (tmp_path / "out" / "shard-00004.bin").stat().st_mtime_ns == kept, "a finished shard was written again"


def contents_names(folder):
    return sorted(os.listdir(folder))


def test_ctrl_c_ends_cleanly(large, tmp_path):
    process = subprocess.Popen(command(large, tmp_path / "out"), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "out" / "shard-00002.bin", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in error
    *shards, progress = sorted(contents_names(tmp_path / "out"), key=lambda name: name == "progress.json")
    assert progress == "progress.json"
    entries = json.loads((tmp_path / "out" / progress).read_text())["shards"]
    assert [entry["file"] for entry in entries] == shards


def test_a_full_disk_loses_nothing_that_was_written(corpus, tmp_path):
    """A limit on the size of a file stands for the disk; the second shard, which is longer, does not fit."""
    prepare_folder(corpus, tmp_path / "straight", shard_tokens=400)
    folder = tmp_path / "out"
    original, limits = module._Stream.take, resource.getrlimit(resource.RLIMIT_FSIZE)
    taken = []

    def take(self, count):
        tokens = original(self, count)
        taken.append(len(tokens))
        if 800 > sum(taken) > 400:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        return tokens

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module._Stream, "take", take)
            with pytest.raises(OSError, match=r"too large in .*; 1 finished shards are kept; make room and run"):
                prepare_folder(corpus, folder, shard_tokens=400)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents_names(folder) == ["progress.json", "shard-00000.bin"]
    prepare_folder(corpus, folder, shard_tokens=400)
    assert contents(folder) == contents(tmp_path / "straight")


def test_two_runs_at_once_in_one_folder_are_refused(corpus, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with module._only_one(str(folder)), pytest.raises(ValueError, match="another process is preparing"):
        prepare_folder(corpus, folder)


# Damage, and things that do not belong together


@pytest.fixture
def shards_copy(corpus, tmp_path):
    prepare_folder(corpus, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_running_again_mends_a_damaged_shard_and_touches_no_other(corpus, shards_copy, damage):
    before, path = contents(shards_copy), shards_copy / "shard-00003.bin"
    times = {name: (shards_copy / name).stat().st_mtime_ns for name in before}
    if damage == "cut":
        os.truncate(path, 10)
    elif damage == "flip":
        path.write_bytes(bytes([before[path.name][0] ^ 1]) + before[path.name][1:])
    else:
        path.unlink()
    prepare_folder(corpus, shards_copy)
    assert contents(shards_copy) == before
    assert {n for n in before if (shards_copy / n).stat().st_mtime_ns != times[n]} == {path.name}


def test_a_shard_that_is_cut_or_missing_is_not_read(shards_copy):
    os.truncate(shards_copy / "shard-00003.bin", 10)
    with pytest.raises(ValueError, match=r"shard-00003.bin has 10 bytes instead of 128; run the command that prepared"):
        ShardedTokens(str(shards_copy))
    (shards_copy / "shard-00003.bin").unlink()
    with pytest.raises(ValueError, match=r"shard-00003.bin is missing"):
        ShardedTokens(str(shards_copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "{", "manifest.json is damaged, it is not JSON"),
        (lambda m: "[]", r"manifest.json does not describe token shards .* its format is None"),
        (lambda m: json.dumps({**m, "format": "2"}), r"manifest.json does not describe .* its format is '2'"),
        (lambda m: json.dumps({**m, "tokens": m["tokens"] + 1}), "its shards and its totals do not agree"),
        (lambda m: json.dumps({**m, "shards": m["shards"][1:]}), "its shards and its totals do not agree"),
        (lambda m: json.dumps({k: v for k, v in m.items() if k != "dtype"}), "is damaged: KeyError 'dtype'"),
    ],
)
def test_a_wrong_manifest_is_an_error(shards_copy, change, message):
    path = shards_copy / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        ShardedTokens(str(shards_copy))


def test_an_unfinished_folder_is_known_and_not_read(shards_copy):
    (shards_copy / "manifest.json").unlink()
    assert is_prepared(str(shards_copy))
    with pytest.raises(ValueError, match=r"has no manifest.json: it was not prepared to the end; run"):
        ShardedTokens(str(shards_copy))


def test_a_folder_of_text_is_not_taken_for_shards(corpus):
    assert not is_prepared(str(corpus))


def test_another_tokenizer_than_that_of_the_shards_is_refused(corpus_shards):
    other = pickle.loads(pickle.dumps(tiny_tokenizer()))
    ShardedTokens(corpus_shards).check_tokenizer(other)
    other.add_tokens("new")
    with pytest.raises(
        ValueError, match=r"with another tokenizer: .*280 tokens, EOS 2.*this one has 281 tokens and EOS 2"
    ):
        ShardedTokens(corpus_shards).check_tokenizer(other)


def test_a_model_with_too_few_embeddings_is_refused(corpus_shards):
    largest = max(all_tokens(corpus_shards))
    prepared_blocks(corpus_shards, 16, tiny_tokenizer(), largest + 1)
    with pytest.raises(ValueError, match=rf"has the token {largest}, but the model knows {largest} tokens only"):
        prepared_blocks(corpus_shards, 16, tiny_tokenizer(), largest)


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("shard_tokens", 63), ("tokens", 10**6)])
def test_other_arguments_do_not_go_on_with_a_folder(corpus, shards_copy, name, value):
    with pytest.raises(ValueError, match=r"was prepared with another .*; give the same arguments to go on"):
        prepare_folder(corpus, shards_copy, **{name: value})


def test_a_source_that_changed_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    prepare([find_subset("all", path)], tiny_tokenizer(), str(tmp_path / "out"))
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    with pytest.raises(ValueError, match="was prepared with another sources"):
        prepare([find_subset("all", path)], tiny_tokenizer(), str(tmp_path / "out"))


def test_a_folder_with_other_files_is_left_alone(corpus, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="has other files in it; choose another folder"):
        prepare_folder(corpus, tmp_path)
    assert contents(tmp_path) == {"precious.txt": b"mine"}


def test_sources_without_text_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(ValueError, match="no text"):
        prepare([find_subset("all", path)], tiny_tokenizer(), str(tmp_path / "out"))


def test_a_tokenizer_without_eos_is_refused(corpus, tmp_path):
    tokenizer = type(tiny_tokenizer())(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="no EOS token"):
        prepare([find_subset("all", str(corpus))], tokenizer, str(tmp_path / "out"))


# Training reads them


class Numbered(torch.utils.data.Dataset):
    """Blocks with their number, to see who gets which."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        return {"index": index, "first": self.blocks[index]["input_ids"][0]}


def order(blocks, workers=0, rank=0, ranks=1, seed=0):
    """Return the blocks that a process gets in an epoch, as the Trainer and accelerate deal them."""
    args = SimpleNamespace(train_sampling_strategy="random", world_size=ranks)
    trainer = SimpleNamespace(train_dataset=blocks, args=args)
    torch.manual_seed(seed)
    sampler = Trainer._get_train_sampler(trainer, blocks)
    loader = DataLoader(Numbered(blocks), 2, sampler=sampler, num_workers=workers)
    loader = prepare_data_loader(
        loader, num_processes=ranks, process_index=rank, use_seedable_sampler=True, data_seed=seed, put_on_device=False
    )
    return [int(index) for batch in loader for index in batch["index"]]


def test_ranks_get_disjoint_blocks_and_together_all(corpus_shards):
    blocks = prepared_blocks(corpus_shards, 16, tiny_tokenizer())
    blocks = torch.utils.data.Subset(blocks, range(len(blocks) // 4 * 4))  # else the last batch is filled up
    mine, other = (order(blocks, rank=rank, ranks=2) for rank in (0, 1))
    assert not set(mine) & set(other)
    assert sorted(mine + other) == list(range(len(blocks)))
    alone = order(blocks)
    assert [i for pair in zip(alone[0::4], alone[1::4], strict=True) for i in pair] == mine


def test_the_order_depends_on_the_seed_and_not_on_the_workers(corpus_shards):
    blocks = prepared_blocks(corpus_shards, 16, tiny_tokenizer())
    first = order(blocks)
    assert first == order(blocks, workers=1) == order(blocks, workers=2)
    assert first != order(blocks, seed=1)
    assert first != sorted(first)


def test_an_opened_folder_goes_to_another_process_without_its_tokens(corpus_shards):
    blocks = prepared_blocks(corpus_shards, 16, tiny_tokenizer())
    expected = blocks[3]["input_ids"]
    data = pickle.dumps(blocks.tokens)
    assert len(data) < 20_000
    copy = TokenBlocks(pickle.loads(data), 16, EOS)
    assert torch.equal(copy[3]["input_ids"], expected)
