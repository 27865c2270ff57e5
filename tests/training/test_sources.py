"""Documents are read from every kind of source, alike from any row on; tables mix subsets; errors say what to do."""

import bz2
import gzip
import json
import lzma
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from datasets import Dataset
from tiny_text import tiny_tokenizer

from fairy2i.training.shards import ShardedTokens, prepare
from fairy2i.training.sources import Subset, find_subset, read_sources

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["one", "two\nlines", "  ", "four \u2028 and \x85", "five"]


def jsonl(texts):
    """Return lines whose metadata change their form, as those of real collections do."""
    meta = [{"url": "a"}, "a string", {"other": 1, "deep": {"x": []}}, None, 3]
    rows = [{"meta": meta[i % 5], "text": text} for i, text in enumerate(texts)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read(subset, start=0):
    (piece,) = subset.pieces
    return list(subset.documents(piece, start))


@pytest.mark.parametrize("start", [0, 3, 5])
@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open)])
def test_jsonl_is_read_from_any_row(tmp_path, suffix, opener, start):
    path = tmp_path / f"a.jsonl{suffix}"
    with opener(path, "wb") as file:
        file.write(jsonl(TEXTS))
    assert read(find_subset("a", str(path)), start) == TEXTS[start:]


@pytest.mark.parametrize("start", [0, 2])
def test_parquet_json_and_text_are_read_from_any_row(tmp_path, start):
    Dataset.from_dict({"body": TEXTS}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([{"body": text} for text in TEXTS]))
    for name in ("a.parquet", "b.json"):
        assert read(find_subset("a", str(tmp_path / name), text_column="body"), start) == TEXTS[start:]
    (tmp_path / "c.txt").write_text("one<|endoftext|>\ntwo\n<|endoftext|>  <|endoftext|>three")
    assert read(find_subset("a", str(tmp_path / "c.txt")), start) == ["one", "\ntwo\n", "three"][start:]


def test_a_hub_data_set_is_read_shard_by_shard(tmp_path):
    """A folder of parquet files stands for the Hub, of which datasets makes the same."""
    for i in range(3):
        Dataset.from_dict({"id": range(5), "body": [f"{i} {j}" for j in range(5)]}).to_parquet(
            tmp_path / f"{i}.parquet"
        )
    subset = Subset("all", (0, 1, 2), hub=str(tmp_path), text_column="body")
    assert [list(subset.documents(piece, 3)) for piece in (2, 0, 1)] == [[f"{i} 3", f"{i} 4"] for i in (2, 0, 1)]
    with pytest.raises(ValueError, match="shard 1 has no column 'text'; it has id, body"):
        list(replace(subset, text_column="text").documents(1))


def test_rows_without_text_keep_their_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": null}\n{"text": "b"}\n')
    subset = find_subset("a", str(tmp_path / "a.jsonl"))
    assert read(subset) == ["a", None, None, "b"]
    assert read(subset, 2) == [None, "b"]


def test_a_folder_gives_its_files_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name]))
    subset = find_subset("all", str(tmp_path))
    assert [text for piece in subset.pieces for text in subset.documents(piece)] == ["a", "b", "c"]
    assert sorted(subset.shuffled(1).pieces) == sorted(subset.pieces)
    assert len({subset.shuffled(seed).pieces for seed in range(20)}) == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"a\.jsonl, line 2: not valid JSON"),
        ('{"body": "b", "id": 1}', r"a\.jsonl, line 2: no column 'text'; it has body, id"),
        ("[1]", r"a\.jsonl, line 2: no column 'text'; it has list"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(find_subset("a", str(tmp_path / "a.jsonl")))


def test_a_path_that_is_not_there_is_an_error(tmp_path):
    for name in ("a.jsonl", "*.txt", "folder"):
        with pytest.raises(FileNotFoundError, match="there is no file or folder"):
            find_subset("a", str(tmp_path / name))


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.ZSTANDARD_AVAILABLE", False)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst needs the package zstandard: pip install zstandard"):
        read(find_subset("a", str(tmp_path / "a.jsonl.zst")))


# Tables


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """Serve a small collection that is laid out as RedPajama: a list of URLs, files in a folder for each subset."""
    root = tmp_path / "server"
    names = ["arxiv/a.jsonl", "c4/a.jsonl.gz", "c4/b.jsonl", "common_crawl/2019/x.jsonl", "github/g.jsonl"]
    names += ["stackexchange/s.jsonl", "wikipedia/wiki.jsonl"]
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    base = f"http://127.0.0.1:{http.server_address[1]}/v1"
    for name in names:
        path = root / "v1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = jsonl(f"{name} number {i}" for i in range(50))
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (root / "v1" / "urls.txt").write_text("\n".join(f"{base}/{name}" for name in names) + "\n")
    Thread(target=http.serve_forever, daemon=True).start()
    yield base
    http.shutdown()
    http.server_close()


def redpajama(tmp_path, server):
    """Return the table of the repository, with the local server in the place of the real one."""
    text = (ROOT / "configs" / "data" / "redpajama_1t.yaml").read_text()
    real = "https://data.together.xyz/redpajama-data-1T/v1.0.0"
    assert text.count(real) == 1
    path = tmp_path / "table.yaml"
    path.write_text(text.replace(real, server))
    return str(path)


def test_the_table_of_redpajama_mixes_seven_subsets_by_weight(tmp_path, server):
    subsets, tokens, missing = read_sources(redpajama(tmp_path, server))
    assert tokens == 100_000_000_000
    assert missing == ["book"], "the list does not have it any more"
    assert [subset.name for subset in subsets] == "common_crawl c4 github arxiv wikipedia stackexchange".split()
    assert [len(subset.pieces) for subset in subsets] == [1, 2, 1, 1, 1, 1]
    manifest = prepare(subsets, tiny_tokenizer(), str(tmp_path / "out"), tokens=1000, shard_tokens=300)
    shares = [found / 1000 for found in manifest["tokens_of_sources"]]
    expected = [subset.weight / 1184 for subset in subsets]
    assert all(0 <= a - b < 0.06 for a, b in zip(shares, expected, strict=True)), "up to the end of one document more"
    tokens = ShardedTokens(str(tmp_path / "out"))
    found = tiny_tokenizer().decode(tokens[0 : len(tokens)]).split("</s>")[:-1]
    assert [text.split("/")[0] for text in found] == sorted(
        (text.split("/")[0] for text in found), key=[subset.name for subset in subsets].index
    )
    assert len(set(found)) == len(found) == manifest["documents"]


def test_a_subset_that_is_gone_is_an_error_unless_it_is_optional_or_skipped(tmp_path, server):
    path = redpajama(tmp_path, server)
    Path(path).write_text(Path(path).read_text().replace(", optional: true", ""))
    message = r"urls.txt has no file of the subset 'book' \(\*/book/\*\); --skip book leaves it out"
    with pytest.raises(ValueError, match=message):
        read_sources(path)
    subsets, _, missing = read_sources(path, skip=["book", "c4"])
    assert missing == []
    assert [subset.name for subset in subsets] == "common_crawl github arxiv wikipedia stackexchange".split()


def test_what_the_server_does_not_have_is_named(tmp_path, server):
    gone = f"{server}/c4/gone.jsonl"
    with pytest.raises(OSError, match=r"c4/gone\.jsonl cannot be read: FileNotFoundError"):
        read(find_subset("a", gone))
    path = redpajama(tmp_path, f"{server}/nowhere")
    with pytest.raises(OSError, match=r"the list http.*/nowhere/urls\.txt cannot be read: FileNotFoundError"):
        read_sources(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "must have a mapping 'subsets'"),
        ({"subsets": {"a": {"data": "x"}}, "budget": 1}, "unknown setting 'budget'"),
        ({"subsets": {"a": {"data": "x", "share": 1}}}, "subset 'a' has the unknown setting 'share'"),
        ({"subsets": {"a": {"weight": 1}}}, "subset 'a' needs either 'data' or 'list'"),
        ({"subsets": {"a": {"data": "x", "weight": 0}}}, "subset 'a': weight must be above 0"),
        ({"subsets": {"a": {"data": "x", "keep": 1.5}}}, "subset 'a': .* keep above 0 and at most 1"),
    ],
)
def test_a_wrong_table_is_an_error(tmp_path, table, message):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match=message):
        read_sources(str(tmp_path / "t.yaml"))


def test_a_table_that_is_no_yaml_is_named_with_the_line(tmp_path):
    (tmp_path / "t.yaml").write_text("subsets:\n  a: {data: x\n")
    with pytest.raises(ValueError, match=r"t\.yaml is not valid YAML: .* line 3"):
        read_sources(str(tmp_path / "t.yaml"))


def test_there_must_be_something_to_skip(tmp_path):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"subsets": {"a": {"data": "x"}}}))
    with pytest.raises(ValueError, match="has no subset 'b'; it has a"):
        read_sources(str(tmp_path / "t.yaml"), skip=["b"])
    with pytest.raises(ValueError, match="only a table of subsets has something to skip"):
        read_sources("a.txt", skip=["b"])
