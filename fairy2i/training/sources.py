"""Where documents come from: files, URLs and Hub data sets, one by one or mixed by weight, read in a fixed order.

A `Subset` is a row of pieces (files, or the shards of a Hub data set), a piece is a row of documents, so a position in
all the text is three numbers. Whoever stopped at one goes on there, without opening the pieces before it.

Lines of JSONL are read here, one by one. The JSON builder of ``datasets`` takes the columns of the first lines for
those of all, and raises where later metadata have another form, as they have in mixed collections.
"""

import fnmatch
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any

import datasets
from datasets.utils.file_utils import xopen  # opens files and URLs, and reads on after a broken connection

from ..loading import DOCUMENT_SEPARATOR, TABLES, file_suffix, local_files, read_yaml

logger = logging.getLogger(__name__)

_REMOTE = ("http://", "https://", "hf://", "s3://", "gs://", "ftp://")
_SETTINGS = {"data", "list", "match", "weight", "keep", "split", "text_column", "optional"}


@dataclass(frozen=True)
class Subset:
    """One source of documents.

    Args:
        name: what it is called in tables and errors.
        pieces: files, URLs, or numbers of shards of the Hub data set.
        hub: ``id`` or ``id:config`` of a Hub data set, or None.
        weight: share of the tokens that it gives, relative to the other subsets.
        keep: share of its documents that are used, drawn one by one by the seed.
        split: split of a Hub data set.
        text_column: column or field that holds the text.
    """

    name: str
    pieces: tuple[str | int, ...]
    hub: str | None = None
    weight: float = 1.0
    keep: float = 1.0
    split: str = "train"
    text_column: str = "text"

    def describe(self) -> dict[str, Any]:
        """Return what it is as JSON; local files with their sizes, so that others are not taken for them."""
        files = [[p, os.path.getsize(p)] if os.path.isfile(str(p)) else [p] for p in self.pieces]
        mine = {"name": self.name, "hub": self.hub, "weight": self.weight, "keep": self.keep}
        return {**mine, "split": self.split, "text_column": self.text_column, "files": files}

    def shuffled(self, seed: int) -> "Subset":
        """Return the subset with its pieces in the order of the seed, the same on every machine and in every folder."""
        order = sorted(range(len(self.pieces)), key=lambda place: draw(seed, self.name, place))
        return replace(self, pieces=tuple(self.pieces[place] for place in order))

    def keeps(self, seed: int, piece: str | int, row: int) -> bool:
        """Return whether a document is among those that the seed draws."""
        return self.keep >= 1 or draw(seed, self.name, os.path.basename(str(piece)), row) < self.keep

    def documents(self, piece: str | int, start: int = 0) -> Iterator[str | None]:
        """Yield the texts of a piece from number ``start`` on, None for a row without one.

        Raises:
            ValueError: a line is no JSON, or has no such column; names file and line.
            OSError: the piece cannot be read; names it.
        """
        try:
            yield from self._documents(piece, start)
        except (ValueError, ImportError):
            raise
        except Exception as error:  # each kind of connection has its own
            name = f"{self.hub}, shard {piece}" if isinstance(piece, int) else piece
            raise OSError(f"{name} cannot be read: {type(error).__name__} {error}") from error

    def _documents(self, piece: str | int, start: int) -> Iterator[str | None]:
        if isinstance(piece, int):
            rows = _hub_rows(self.hub or "", self.split).shard(self._count, piece)
            yield from self._column(rows.skip(start), f"{self.hub}, shard {piece}")
        elif file_suffix(piece) == ".jsonl":
            yield from self._lines(piece, start)
        elif kind := TABLES.get(file_suffix(piece)):
            rows = datasets.load_dataset(kind, data_files=[piece], split="train", streaming=True)
            yield from self._column(rows.skip(start), piece)
        else:
            with _open(piece) as file:
                texts = io.TextIOWrapper(file, encoding="utf-8").read().split(DOCUMENT_SEPARATOR)
            yield from islice((text for text in texts if text.strip()), start, None)

    @property
    def _count(self) -> int:
        return _hub_rows(self.hub or "", self.split).num_shards

    def _lines(self, path: str, start: int) -> Iterator[str | None]:
        with _open(path) as file:
            for number, line in enumerate(io.BufferedReader(file, 1 << 20)):
                if number < start:
                    continue
                if not line.strip():
                    yield None
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number + 1}: not valid JSON: {error}") from None
                if not isinstance(row, dict) or self.text_column not in row:
                    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise ValueError(f"{path}, line {number + 1}: no column {self.text_column!r}; it has {found}")
                yield row[self.text_column]

    def _column(self, rows: datasets.IterableDataset, name: str) -> Iterator[str | None]:
        for row in rows:
            if self.text_column not in row:
                raise ValueError(f"{name} has no column {self.text_column!r}; it has {', '.join(row)}")
            yield row[self.text_column]


def draw(*parts: object) -> float:
    """Return a number in [0, 1) that depends on the parts alone, never on a version or a machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _open(path: str) -> Any:
    """Open a file or URL for reading bytes, decompressed."""
    try:
        return xopen(datasets.StreamingDownloadManager().extract(path), "rb")
    except ValueError as error:
        if "zstd" in str(error):
            raise ImportError(f"{path} needs the package zstandard: pip install zstandard") from error
        raise


@cache
def _hub_rows(hub: str, split: str) -> datasets.IterableDataset:
    name, _, config = hub.partition(":")
    return datasets.load_dataset(name, config or None, split=split, streaming=True)


@cache
def _listed(path: str) -> tuple[str, ...]:
    try:
        with _open(path) as file:
            lines = file.read().decode().splitlines()
    except Exception as error:
        raise OSError(f"the list {path} cannot be read: {type(error).__name__} {error}") from error
    return tuple(line.strip() for line in lines if line.strip())


def find_subset(name: str, data: str | Sequence[str], **settings: Any) -> Subset:
    """Return the subset that is made of a file, folder, glob, URL or Hub data set, or of several files and URLs.

    Raises:
        FileNotFoundError: something that looks like a path is not there.
        ValueError: a Hub data set and something else in one subset.
    """
    sources = [data] if isinstance(data, str) else list(data)
    pieces: list[str] = []
    for source in sources:
        local = [] if source.startswith(_REMOTE) else local_files(source)
        if local or source.startswith(_REMOTE):
            pieces += local or [source]
        elif len(sources) > 1:
            raise ValueError(f"{name}: {source} is no file, and a Hub data set must be a subset of its own")
        else:
            shards = _hub_rows(source, settings.get("split", "train")).num_shards
            return Subset(name, tuple(range(shards)), hub=source, **settings)
    return Subset(name, tuple(pieces), **settings)


def is_table(data: str) -> bool:
    """Return whether a source is a table of subsets."""
    return data.endswith((".yaml", ".yml"))


def read_sources(
    data: str, *, split: str = "train", text_column: str = "text", skip: Sequence[str] = ()
) -> tuple[list[Subset], int | None, list[str]]:
    """Find the documents that a source names.

    Args:
        data: a file, folder, glob, URL or Hub data set; or a YAML table of subsets as configs/data/redpajama_1t.yaml.
        split, text_column: as for :class:`Subset`, where the table does not say otherwise.
        skip: names of subsets to leave out.

    Returns:
        The subsets; the token budget of the table, if it has one; the names of optional subsets that are not there.

    Raises:
        FileNotFoundError, ValueError: a source is not there, or the table is wrong; the message says what to do.
    """
    if not is_table(data):
        if skip:
            raise ValueError(f"only a table of subsets has something to skip, {data} is not one")
        return [find_subset("all", data, split=split, text_column=text_column)], None, []
    table = read_yaml(data)
    if not isinstance(table, dict) or not isinstance(table.get("subsets"), dict) or not table["subsets"]:
        raise ValueError(f"{data} must have a mapping 'subsets' of names to sources")
    if unknown := set(table) - {"subsets", "tokens", "split", "text_column"}:
        raise ValueError(f"{data}: unknown setting {sorted(unknown)[0]!r}")
    if unknown := set(skip) - set(table["subsets"]):
        raise ValueError(f"{data} has no subset {sorted(unknown)[0]!r}; it has {', '.join(table['subsets'])}")
    defaults = {"split": table.get("split", split), "text_column": table.get("text_column", text_column)}
    subsets, missing = [], []
    for name, entry in table["subsets"].items():
        if name in skip:
            continue
        make = partial(_subset_of_table, data, name, entry, defaults)
        try:
            subsets.append(make())
        except _NotListed as error:
            if not entry.get("optional"):
                raise ValueError(f"{error}; --skip {name} leaves it out, and the others fill the budget") from None
            missing.append(name)
            logger.warning("%s; the others fill the budget", error)
    if not subsets:
        raise ValueError(f"{data}: no subset is left")
    tokens = table.get("tokens")
    return subsets, None if tokens is None else int(tokens), missing


class _NotListed(ValueError):
    """No file of the list belongs to the subset."""


def _subset_of_table(table: str, name: str, entry: dict[str, Any], defaults: dict[str, str]) -> Subset:
    if not isinstance(entry, dict) or ("data" in entry) == ("list" in entry):
        raise ValueError(f"{table}: subset {name!r} needs either 'data' or 'list' (and 'match')")
    if unknown := set(entry) - _SETTINGS:
        raise ValueError(f"{table}: subset {name!r} has the unknown setting {sorted(unknown)[0]!r}")
    settings = {key: str(entry.get(key, default)) for key, default in defaults.items()}
    weight, keep = float(entry.get("weight", 1)), float(entry.get("keep", 1))
    if weight <= 0 or not 0 < keep <= 1:
        raise ValueError(f"{table}: subset {name!r}: weight must be above 0, keep above 0 and at most 1")
    data = entry.get("data")
    if data is None:
        data = fnmatch.filter(_listed(entry["list"]), entry.get("match", "*"))
        if not data:
            raise _NotListed(f"{entry['list']} has no file of the subset {name!r} ({entry.get('match', '*')})")
    return find_subset(name, data, weight=weight, keep=keep, **settings)
