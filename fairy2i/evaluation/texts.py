"""Texts to measure perplexity on: documents, and how a data set's protocol joins them."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec

from ..loading import read_documents

C4_SHARD = "en/c4-validation.00000-of-00008.json.gz"


@dataclass(frozen=True)
class EvalText:
    """A text to measure on.

    Attributes:
        name: what it was asked for as.
        documents: the texts it is made of; empty ones may be among them.
        joint: what stands between documents where they are joined to one text.
        joined: how many documents, from the first, make up the joined text; None for all.
        most_windows: how many windows of the joined text count at most, where the data set fixes it.
    """

    name: str
    documents: tuple[str, ...]
    joint: str = "\n\n"
    joined: int | None = None
    most_windows: int | None = None

    @property
    def text(self) -> str:
        """The documents joined to one text."""
        return self.joint.join(self.documents[: self.joined])

    @property
    def sha256(self) -> str:
        """Hash of the joined text, in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def documents_sha256(self) -> str:
        """Hash of the hashes of all documents: where one ends and the next begins counts too."""
        whole = hashlib.sha256()
        for document in self.documents:
            whole.update(hashlib.sha256(document.encode()).digest())
        return whole.hexdigest()


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """Call datasets.load_dataset, which is imported here: it takes seconds and local plain text does without.

    Raises:
        ImportError: the package is missing; the message says what to install.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"texts from the Hub need the package datasets ({error}): pip install datasets") from error
    return datasets.load_dataset(*args, **kwargs)


def _wikitext2(path: str | None) -> EvalText:
    """Return one document for each line: blank lines are empty documents, as in the Hub's copy."""
    if path is None:
        lines = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    else:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            lines = [line if line.strip() else "" for line in file]
    return EvalText("wikitext2", tuple(lines))


def _c4(path: str | None) -> EvalText:
    """Return the documents of the first validation shard; GPTQ's script joins 1,100 and takes 256 windows of them."""
    if path is None:
        documents = load_dataset("allenai/c4", data_files={"validation": C4_SHARD}, split="validation")["text"]
    else:
        documents = read_documents(path)["text"]
    return EvalText("c4", tuple(documents), joint=" ", joined=1100, most_windows=256)


NAMED_TEXTS: dict[str, Callable[[str | None], EvalText]] = {"wikitext2": _wikitext2, "c4": _c4}


def load_eval_text(source: str, text_column: str = "text") -> EvalText:
    """Load a text to measure on.

    Args:
        source: "wikitext2" (WikiText-2 raw test) or "c4" (C4 validation, first shard), both from the Hub, or from a
            local copy of that very file as "wikitext2=wiki.test.raw", "c4=c4-validation.00000-of-00008.json.gz"; or
            what :func:`fairy2i.loading.read_documents` takes, whose documents are joined by a blank line.
        text_column: the column that holds the text.

    Raises:
        ConnectionError: a named text could not be fetched; the message says how to give a local file.
        FileNotFoundError, ValueError: as read_documents; or no document has any text.
    """
    name, equals, path = source.partition("=")
    if name not in NAMED_TEXTS:
        found = EvalText(source, tuple(read_documents(source, split="test", text_column=text_column)["text"]))
    elif equals:
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path} to read {name} from")
        found = NAMED_TEXTS[name](path)
    else:
        try:
            found = NAMED_TEXTS[name](None)
        except ImportError:
            raise
        except Exception as error:  # datasets raises many kinds, for no network, no cache and no such file alike
            raise ConnectionError(
                f"{name} could not be fetched from the Hub ({type(error).__name__}); give a local file instead: "
                f"a copy of the same data as {name}=FILE, or any text"
            ) from error
    if not any(document.strip() for document in found.documents):
        raise ValueError(f"{source} has no text in it: all of its {len(found.documents)} documents are empty")
    return found
