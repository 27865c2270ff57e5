"""Token shards: texts tokenized once, written so that they can be read at any place without loading them.

A folder of shards is one long row of tokens, all documents one after the other, each with EOS behind it:

    shard-00000.bin ...   raw little-endian uint16, or uint32 where the vocabulary needs it, one size but for the last
    manifest.json         sources, seed, tokenizer, counts, SHA-256 of each shard; written when all is done
    progress.json         the same for the shards so far, while it is not

The row depends on the sources, the tokenizer, the budget and the seed, not on threads or interruptions. Each shard is
written beside its place, synced and renamed, and its entry says at which document the next one starts. So a run that
was killed loses one shard at most, and whoever runs it again gets the same bytes as if nothing had happened.

Where there is a token budget, each subset gives its share, in files drawn by the seed, up to the end of the document
that reaches it. Tokenizing is done by the threads of the tokenizer itself, while the main thread reads on.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import saving
from .data import TokenBlocks, encode_documents, require_eos
from .sources import Subset

logger = logging.getLogger(__name__)

FORMAT = "fairy2i token shards, version 1"
MANIFEST, PROGRESS = "manifest.json", "progress.json"
SHARD_TOKENS = 2**28  # 512 MiB at two bytes; a multiple of every usual block size
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1000, 4_000_000  # what is tokenized at once

State = dict[str, Any]  # JSON: where in the sources, and how many documents and tokens were before


def is_prepared(folder: str) -> bool:
    """Return whether a folder holds shards, finished or not."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (MANIFEST, PROGRESS, _name(0)))


def vocabulary(tokenizer: PreTrainedTokenizerBase, name: str = "") -> dict[str, Any]:
    """Return what tells one tokenizer from another: size, EOS, and a SHA-256 of all tokens with their numbers."""
    tokens = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    size = max((number for _, number in tokens), default=-1) + 1
    return {"name": name, "tokens": size, "eos_token_id": tokenizer.eos_token_id, "sha256": digest}


class ShardedTokens:
    """The tokens of a folder of shards as one row, of which slices are read from disk.

    Args:
        folder: what :func:`prepare` has made.

    Raises:
        ValueError: the folder is unfinished, its manifest is none, or a shard is missing or not of its length.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        sizes = [shard["tokens"] for shard in self.manifest["shards"]]
        self.starts = np.cumsum([0, *sizes])
        for shard in self.manifest["shards"]:
            path, expected = os.path.join(folder, shard["file"]), shard["tokens"] * self.dtype.itemsize
            if not os.path.isfile(path):
                raise ValueError(f"{path} is missing; run the command that prepared {folder} again, or copy it anew")
            if os.path.getsize(path) != expected:
                raise ValueError(
                    f"{path} has {os.path.getsize(path)} bytes instead of {expected}; run the command that prepared "
                    f"{folder} again, which writes only damaged shards anew, or copy it anew"
                )
        self.maps: dict[int, NDArray[np.integer]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, where: slice) -> NDArray[np.integer]:
        """Return the tokens from ``where.start`` to ``where.stop``."""
        start, stop, _ = where.indices(len(self))
        parts = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[shard + 1]))
            parts.append(self._map(shard)[start - self.starts[shard] : end - self.starts[shard]])
            start, shard = end, shard + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": {}}  # another process opens the files itself

    def _map(self, shard: int) -> NDArray[np.integer]:
        if shard not in self.maps:
            path = os.path.join(self.folder, self.manifest["shards"][shard]["file"])
            self.maps[shard] = np.memmap(path, self.dtype, "r")
        return self.maps[shard]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> None:
        """Refuse another tokenizer than that of the shards, or a model without an embedding for each token.

        Args:
            tokenizer: that of the model.
            rows: rows of the model's embedding.

        Raises:
            ValueError: they do not belong together.
        """
        made, given = self.manifest["tokenizer"], vocabulary(tokenizer)
        if (made["sha256"], made["eos_token_id"]) != (given["sha256"], given["eos_token_id"]):
            raise ValueError(
                f"{self.folder} was prepared with another tokenizer: {made['name']} ({made['tokens']} tokens, EOS "
                f"{made['eos_token_id']}), this one has {given['tokens']} tokens and EOS {given['eos_token_id']}; "
                "prepare the text again with the tokenizer of this model"
            )
        if rows is not None and self.manifest["largest_token"] >= rows:
            raise ValueError(
                f"{self.folder} has the token {self.manifest['largest_token']}, but the model knows {rows} tokens only"
            )


def prepared_blocks(
    folder: str, block_size: int, tokenizer: PreTrainedTokenizerBase, rows: int | None = None
) -> TokenBlocks:
    """Return the blocks of a folder of shards, after a look whether they belong to this tokenizer and model.

    Raises:
        ValueError: see :class:`ShardedTokens` and :meth:`ShardedTokens.check_tokenizer`.
    """
    tokens = ShardedTokens(folder)
    tokens.check_tokenizer(tokenizer, rows)
    return TokenBlocks(tokens, block_size, tokens.manifest["tokenizer"]["eos_token_id"])


def prepare(
    subsets: Sequence[Subset],
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
    *,
    tokens: int | None = None,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    tokenizer_name: str = "",
) -> dict[str, Any]:
    """Tokenize documents into a folder of shards, or go on with a folder that is not finished.

    What is there already is checked against its checksum; only what is missing or damaged is written.

    Args:
        subsets: sources; with a budget, their weights share it.
        tokenizer: must have an EOS token.
        folder: new, or left by a run with the same arguments.
        tokens: the budget; None takes every document once, file by file in the order of the subsets.
        seed: draws the files of each subset where there is a budget, and documents where ``keep`` is below 1.
        shard_tokens: tokens in a shard.
        tokenizer_name: what the manifest calls the tokenizer.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder belongs to other arguments or has other files; nothing to tokenize; no EOS token.
        OSError: a source cannot be read, or the disk is full. Finished shards stay.
    """
    require_eos(tokenizer)
    if shard_tokens < 1 or (tokens is not None and tokens < 1):
        raise ValueError("the tokens in all and in a shard must be positive")
    if tokens is not None:
        subsets = [subset.shuffled(seed) for subset in subsets]
    total = sum(subset.weight for subset in subsets)
    budgets = [None if tokens is None else round(tokens * subset.weight / total) for subset in subsets]
    vocab = vocabulary(tokenizer, tokenizer_name)
    header: dict[str, Any] = {
        "format": FORMAT,
        "dtype": "uint16" if vocab["tokens"] <= 2**16 else "uint32",
        "shard_tokens": shard_tokens,
        "seed": seed,
        "tokenizer": vocab,
        "budget": tokens,
        "sources": [subset.describe() for subset in subsets],
    }
    folder = os.path.realpath(os.path.expanduser(folder))
    os.makedirs(folder, exist_ok=True)
    with _only_one(folder):
        finished, shards = _what_is_there(folder, header)
        _warn_of_a_full_disk(folder, header, shards)
        stream = _Stream(subsets, budgets, tokenizer, np.dtype(header["dtype"]), seed)
        # closed here, also after ctrl-C: as garbage its own thread might close it, which cannot wait for itself
        shown = tqdm(total=tokens, unit=" tokens", unit_scale=True, desc="Preparing", disable=None)
        with closing(stream), shown as bar:
            number, state = 0, stream.state
            while finished is None or number < len(finished["shards"]):
                if number < len(shards) and _intact(folder, shards[number], header["dtype"]):
                    state = shards[number]["next"]
                    bar.update(shards[number]["tokens"])
                else:
                    stream.go_to(state)
                    shard = _write_shard(folder, number, stream, header, shards, bar)
                    if shard is None:
                        break
                    state = shard["next"]
                number += 1
            if finished is None:
                stream.go_to(state)
                finished = _finish(folder, header, shards, stream)
    return finished


class _Stream:
    """All tokens of the sources in order, from any state on.

    A state is {"subset", "piece", "row"}: where the batch that comes next starts; "skip": how many of its tokens were
    taken already; "documents", "tokens": of each subset, before that batch.
    """

    def __init__(
        self,
        subsets: Sequence[Subset],
        budgets: Sequence[int | None],
        tokenizer: PreTrainedTokenizerBase,
        dtype: np.dtype[Any],
        seed: int,
    ) -> None:
        self.subsets, self.budgets, self.tokenizer, self.dtype, self.seed = subsets, budgets, tokenizer, dtype, seed
        none = [0] * len(subsets)
        self.state: State = dict(subset=0, piece=0, row=0, skip=0, documents=none, tokens=none)
        self.batches: Iterator[tuple[State, NDArray[np.integer]]] = self._encoded(self.state)
        self.rest = np.empty(0, dtype)

    def go_to(self, state: State) -> None:
        """Continue at a state, which may be where the stream is."""
        if state != self.state:
            self.close()
            self.batches = self._encoded(state)
            self.rest = np.empty(0, self.dtype)
            self.state = {**state, "skip": 0}
            if state["skip"]:
                self.take(state["skip"])

    def close(self) -> None:
        """Stop reading ahead."""
        self.batches.close()  # type: ignore[attr-defined]

    def take(self, count: int) -> NDArray[np.integer]:
        """Return up to ``count`` tokens that lie in one batch; none: this is the end."""
        while not len(self.rest):
            batch = next(self.batches, None)
            if batch is None:
                return self.rest
            self.state, self.rest = batch
        taken, self.rest = self.rest[:count], self.rest[count:]
        self.state = {**self.state, "skip": self.state["skip"] + len(taken)}
        return taken

    def _encoded(self, state: State) -> Iterator[tuple[State, NDArray[np.integer]]]:
        documents, tokens = list(state["documents"]), list(state["tokens"])
        full = {i for i, budget in enumerate(self.budgets) if budget is not None and tokens[i] >= budget}
        with ThreadPoolExecutor(1) as pool:  # one: a tokenizer is not to be called twice at once, and has its threads
            waiting: deque[tuple[int, int, int, Future[list[list[int]]]]] = deque()
            source = self._read(state, full)
            try:
                while True:
                    while len(waiting) < 3 and (batch := next(source, None)) is not None:
                        *place, texts = batch
                        waiting.append((*place, pool.submit(encode_documents, self.tokenizer, texts)))  # type: ignore[arg-type]
                    if not waiting:
                        break
                    subset, piece, row, future = waiting.popleft()
                    if subset in full:
                        continue
                    counts = {"documents": list(documents), "tokens": list(tokens)}
                    before: State = dict(subset=subset, piece=piece, row=row, skip=0, **counts)
                    encoded = future.result()
                    budget = self.budgets[subset]
                    if budget is not None:
                        sums = tokens[subset] + np.cumsum([len(ids) for ids in encoded])
                        encoded = encoded[: int(np.searchsorted(sums, budget)) + 1]
                    ids = np.fromiter(chain.from_iterable(encoded), self.dtype)
                    documents[subset] += len(encoded)
                    tokens[subset] += len(ids)
                    if budget is not None and tokens[subset] >= budget:
                        full.add(subset)
                    yield before, ids
            finally:
                pool.shutdown(cancel_futures=True)
        self.documents, self.tokens = documents, tokens  # of all, for the manifest

    def _read(self, state: State, full: set[int]) -> Iterator[tuple[int, int, int, list[str]]]:
        """Yield subset, piece, first row and texts of each batch; leave a subset that is full."""
        for number in range(state["subset"], len(self.subsets)):
            subset, here = self.subsets[number], number == state["subset"]
            for place in range(state["piece"] if here else 0, len(subset.pieces)):
                row = state["row"] if here and place == state["piece"] else 0
                if number in full:
                    break
                piece = subset.pieces[place]
                first, texts, size = row, [], 0
                for text in subset.documents(piece, row):
                    row += 1
                    if text is None or not subset.keeps(self.seed, piece, row - 1):
                        continue
                    texts.append(text)
                    size += len(text)
                    if len(texts) >= BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
                        yield number, place, first, texts
                        first, texts, size = row, [], 0
                        if number in full:
                            break
                if texts:
                    yield number, place, first, texts


def _name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _load_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(f"{path} does not describe token shards that this version can read: its format is {found!r}")
    return content


def _read_manifest(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {MANIFEST}: it was not prepared to the end; run the same command again")
    manifest = _load_json(path)
    try:
        sizes = [(shard["file"], shard["tokens"]) for shard in manifest["shards"]]
        sums = {manifest["tokens"], sum(size for _, size in sizes), sum(manifest["tokens_of_sources"])}
        _ = [manifest["tokenizer"][key] for key in ("name", "tokens", "eos_token_id", "sha256")]
        _ = manifest["largest_token"]
        names = all(file == _name(number) for number, (file, _) in enumerate(sizes))
        right = len(sums) == 1 and names and manifest["dtype"] in ("uint16", "uint32")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from None
    if not right:
        raise ValueError(f"{path} is damaged: its shards and its totals do not agree")
    return manifest


def _what_is_there(folder: str, header: dict[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the manifest of a finished folder or None, and the entries of its shards.

    Raises:
        ValueError: the folder was begun with other arguments, or holds something else.
    """
    manifest, progress = (os.path.join(folder, name) for name in (MANIFEST, PROGRESS))
    found = _read_manifest(folder) if os.path.isfile(manifest) else None
    begun = found or (_load_json(progress) if os.path.isfile(progress) else None)
    if begun is None:
        others = [name for name in os.listdir(folder) if not name.startswith(".partial-")]
        if others and others != [_name(0)]:  # a kill may come between the first shard and its entry
            raise ValueError(f"{folder} has other files in it; choose another folder")
        return None, []
    for key, value in json.loads(json.dumps(header)).items():
        if begun.get(key) != value:
            what = "" if isinstance(value, list | dict) else f": {begun.get(key)!r}, now {value!r}"
            raise ValueError(
                f"{folder} was prepared with another {key}{what}; give the same arguments to go on, or another folder"
            )
    return found, begun["shards"]


def _intact(folder: str, shard: dict[str, Any], dtype: str) -> bool:
    path = os.path.join(folder, shard["file"])
    if not os.path.isfile(path):
        return False
    right = os.path.getsize(path) == shard["tokens"] * np.dtype(dtype).itemsize
    if right:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 24):
                digest.update(block)
            right = digest.hexdigest() == shard["sha256"]
    if not right:
        logger.warning("%s is damaged and is written anew", path)
    return right


def _write_shard(
    folder: str, number: int, stream: _Stream, header: dict[str, Any], shards: list[dict[str, Any]], bar: Any
) -> dict[str, Any] | None:
    """Write the next shard and the list of all; return its entry, or None at the end of the text.

    Raises:
        OSError: as the system says; a full disk tells what to do.
    """
    digest, largest, missing = hashlib.sha256(), -1, header["shard_tokens"]
    little = np.dtype(header["dtype"]).newbyteorder("<")
    with _writing(folder, number) as partial:
        with open(os.path.join(partial, _name(number)), "wb") as file:
            while missing and len(tokens := stream.take(missing)):
                data = tokens.astype(little).tobytes()
                file.write(data)
                digest.update(data)
                largest = max(largest, int(tokens.max()))
                missing -= len(tokens)
                bar.update(len(tokens))
        if largest < 0:
            os.remove(file.name)
            return None
        shard = {
            "file": _name(number),
            "tokens": header["shard_tokens"] - missing,
            "sha256": digest.hexdigest(),
            "largest_token": largest,
            "next": stream.state,
        }
        if number == len(shards):
            shards.append(shard)
            _dump_json(os.path.join(partial, PROGRESS), {**header, "shards": shards})
        elif shards[number] != shard:
            raise ValueError(f"{shard['file']} does not come out as it was: the text or the tokenizer has changed")
    return shard


@contextmanager
def _writing(folder: str, number: int) -> Iterator[str]:
    """Yield a temporary folder whose files move to ``folder`` at the end; let a full disk tell what to do."""
    try:
        with saving.atomic_files(folder) as partial:
            yield partial
    except OSError as error:
        if error.errno not in saving.NO_ROOM:
            raise
        kept = f"{number} finished shards are kept; make room and run the same command again"
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)} in {folder}; {kept}") from error


def _finish(folder: str, header: dict[str, Any], shards: list[dict[str, Any]], stream: _Stream) -> dict[str, Any]:
    """Write the manifest in place of the list of shards so far; return it."""
    if len(stream.take(1)):
        raise RuntimeError("the text is not at its end")
    if not shards:
        raise ValueError("the sources have no text in them")
    counts = {"tokens_of_sources": stream.tokens, "documents_of_sources": stream.documents}
    totals = {"tokens": sum(stream.tokens), "documents": sum(stream.documents)}
    largest = {"largest_token": max(shard["largest_token"] for shard in shards)}
    manifest = {**header, **totals, **counts, **largest, "shards": shards}
    for subset, budget, found in zip(stream.subsets, stream.budgets, stream.tokens, strict=True):
        if budget is not None and found < budget:
            logger.warning("%s has only %s tokens of the %s it should give", subset.name, f"{found:,}", f"{budget:,}")
    with _writing(folder, len(shards)) as partial:
        _dump_json(os.path.join(partial, MANIFEST), manifest)
    if os.path.isfile(progress := os.path.join(folder, PROGRESS)):
        os.remove(progress)
    return manifest


def _dump_json(path: str, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def _warn_of_a_full_disk(folder: str, header: dict[str, Any], shards: Sequence[dict[str, Any]]) -> None:
    if header["budget"] is not None:
        missing = header["budget"] - sum(shard["tokens"] for shard in shards)
        needed, free = missing * np.dtype(header["dtype"]).itemsize, shutil.disk_usage(folder).free
        if needed > free:
            logger.warning("%s needs %.1f GB, and %.1f GB are free", folder, needed / 1e9, free / 1e9)


@contextmanager
def _only_one(folder: str) -> Iterator[None]:
    """Hold the lock of a folder, which a killed process lets go of.

    Raises:
        ValueError: another process holds it.
    """
    lock = saving.lock_folder(folder)
    if lock is None and saving.fcntl is not None:
        raise ValueError(f"another process is preparing {folder}")
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
