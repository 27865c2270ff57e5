"""English text that every Python installation carries: the help topics of the language and the library's docstrings.

The help topics (`pydoc_data.topics`, about 460 KB) are the text of the demo: five of them are held out to measure on,
the others train. Topics repeat each other, so a paragraph counts once, and never on both sides. Docstrings are used to
pretrain the demo model only.
"""

import ast
import inspect
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = ("calls", "comparisons", "import", "objects", "raise")


def _new_paragraphs(documents: Iterable[str], seen: set[str]) -> list[str]:
    """Drop the paragraphs that were seen before, and note the others as seen."""
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.strip().split("\n\n"):
            if paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                paragraphs.append(paragraph)
        if paragraphs:
            kept.append("\n\n".join(paragraphs))
    return kept


def help_topics() -> tuple[list[str], list[str]]:
    """Return (train, held out) help topics, one string each, with no paragraph in common."""
    seen: set[str] = set()
    held_out = _new_paragraphs((topics[name] for name in HELD_OUT), seen)
    return _new_paragraphs((topics[name] for name in sorted(topics) if name not in HELD_OUT), seen), held_out


def docstrings() -> list[str]:
    """Return the docstrings of the standard library, those of one module joined, none of them from a held-out topic."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        documents.append("\n\n".join(inspect.cleandoc(docstring) for docstring in found if docstring))
    _, held_out = help_topics()
    return _new_paragraphs(documents, {p.strip() for text in held_out for p in text.split("\n\n")})
