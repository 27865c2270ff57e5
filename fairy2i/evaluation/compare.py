"""Several models or methods in one table: eval/compare.py.

Each measurement is one JSON file in the output folder. Its key says what the number depends on: the hash of the model's
files, method, protocol, hash of the data, settings. A measurement whose key is there already is read instead of made,
so a run that was stopped goes on, and a new model costs only its own measurements. Batch size and device are no part of
the key: they do not change a result beyond rounding.
"""

import argparse
import fnmatch
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..loading import parse_method
from ..plotting import check_plot_file
from ..streaming import find_model
from . import tasks as task_module
from .command import DATA, add_perplexity_arguments, data_sha256, measure_text, settings, write_json
from .models import FULL_BITS, OpenModel, add_model_arguments, fingerprint, open_model, weight_files
from .plot import draw_comparison
from .table import markdown_table, number
from .texts import EvalText, load_eval_text

logger = logging.getLogger(__name__)

KEY_VERSION = 1  # raise it when a protocol changes what it measures

DESCRIPTION = """Compare models or methods in one table, against the first one or --baseline.

  fairy2i eval compare --models MODEL v2=outputs/v2-packed w2=outputs/w2 --data wikitext2 c4 --output_folder out
  fairy2i eval compare --models MODEL --quant_method none complex_phase_v1 complex_phase_v2 --output_folder out
  fairy2i eval compare --models base=FOLDER/model.gguf v2=outputs/v2 --data text.jsonl --protocol gptq fairy2i \\
      --tasks arc_easy piqa --data_folder eval_data --plot out/quality.png --output_folder out
  fairy2i eval compare --measured MODEL v2 w2 --columns "wikitext2*" arc_easy --output_folder out    # no model is read

What --output_folder has already is not measured again. MB: the weights as a packed checkpoint, all that is not
quantized in 16 bits. In brackets: perplexity as a multiple of the baseline's, the average as a difference."""


@dataclass
class Row:
    """A model in the table: what it is, and what was measured, by column."""

    label: str
    about: dict[str, Any] = field(default_factory=dict)
    perplexities: dict[str, float] = field(default_factory=dict)
    tasks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bits(self) -> float:
        """Bits per weight of the quantized layers, scales counted; 16 of a model without any."""
        return self.about["bits_per_weight"] or FULL_BITS

    def average(self) -> float | None:
        """Return the average of the paper's five tasks in percent, if all five were measured."""
        found = task_module.average(self.tasks)
        return None if found is None else 100 * found[0]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="fairy2i eval compare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--models", nargs="+", help="folders, Hub ids or FOLDER/FILE.gguf, each also as LABEL=MODEL")
    which.add_argument(
        "--measured",
        nargs="+",
        metavar="LABEL",
        help="table and picture of what --output_folder has under these labels, without the models",
    )
    parser.add_argument("--columns", nargs="+", metavar="PATTERN", help="with --measured: only columns like these")
    parser.add_argument("--quant_method", nargs="+", default=["none"], help="methods for each model, 'none': as it is")
    parser.add_argument("--baseline", help="label of the row to compare with (default: the first)")
    parser.add_argument("--output_folder", required=True, help="measurements, table.md and results.json go here")
    parser.add_argument("--plot", metavar="FILE", help="draw quality against bits (.png, .pdf, .svg)")
    add_model_arguments(parser)
    add_perplexity_arguments(parser, None, f"{' '.join(DATA)}, or no text where there are --tasks")
    parser.add_argument("--batch_size", type=int, default=1, help="windows at a time (default %(default)s)")
    task_module.add_task_arguments(parser, [])
    return parser.parse_args(argv)


def split_model(text: str) -> tuple[str, str, str | None]:
    """Return label, model and GGUF file of an entry of --models."""
    label, equals, source = text.partition("=")
    if not equals:
        label, source = "", text
    gguf = None
    if source.endswith(".gguf"):
        source, gguf = os.path.split(source)
        if not os.path.isfile(os.path.join(os.path.expanduser(source), gguf)):
            raise FileNotFoundError(f"there is no GGUF file {text.partition('=')[2] or text}")
    find_model(source)  # raises where a folder is not there
    return label or os.path.basename(source.rstrip("/")), source, gguf


class Measurements:
    """The JSON files of an output folder: read what is there, make and write what is not."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder) / "measurements"
        self.made = 0

    def get(self, name: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the measurement with a key; ``make`` is called if there is none, or its file is damaged.

        Args:
            name: what the file is called, before a hash of the key.
            key: JSON-able, all that the result depends on.
            make: returns what is measured, JSON-able.
        """
        key = json.loads(json.dumps(key))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        for path in self.folder.glob(f"*-{digest}.json"):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["key"] == key:
                    return found["result"]
            except (ValueError, KeyError, TypeError):
                logger.warning("%s is damaged and measured again", path)
        result = make()
        self.made += 1
        safe = re.sub(r"[^\w.]+", "-", name)
        write_json(str(self.folder / f"{safe}-{digest}.json"), {"key": key, "result": result})
        return result


def _column(text: str, protocol: str, window: int) -> str:
    return f"{os.path.basename(text)} {protocol}@{window}"


def measure_model(
    label: str, source: str, method: str, args: argparse.Namespace, texts: Sequence[EvalText], store: Measurements
) -> Row:
    """Return the row of one model; it is loaded only if something has to be measured.

    Raises:
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    opened: list[OpenModel] = []

    def model() -> OpenModel:
        if not opened:
            opened.append(open_model(source, method, args))
        return opened[0]

    def measured(make: Callable[[OpenModel], dict[str, Any]]) -> dict[str, Any]:
        result = make(model())
        return {"label": label, "model": source, "settings": settings(args), "about": model().about(), **result}

    base = {
        "version": KEY_VERSION,
        "model_sha256": fingerprint(source, args.gguf_file, args.tokenizer),
        "method": method,
        "skip_lm_head": args.skip_lm_head,
        "dtype": args.dtype,
    }
    row = Row(label)
    for text in texts:
        for protocol in args.protocol:
            stride = (args.stride or args.window // 2) if protocol == "strided" else None
            window = {"window": args.window, "stride": stride, "max_windows": args.max_windows}
            key = {**base, "protocol": protocol, "data_sha256": data_sha256(text, protocol), **window}
            column = _column(text.name, protocol, args.window)
            found = store.get(
                f"{label}-{column}",
                key,
                lambda text=text, protocol=protocol: measured(  # type: ignore[misc]
                    lambda opened: measure_text(opened, text, protocol, args)
                ),
            )
            row.perplexities[column] = found["perplexity"]
            row.about = found["about"]
    for name in args.tasks:
        key = {**base, "task": name, **task_module.task_key(name, args)}
        found = store.get(
            f"{label}-{name}",
            key,
            lambda name=name: measured(  # type: ignore[misc]
                lambda opened: task_module.measure_task(opened, name, args)
            ),
        )
        row.tasks.append(found)
        row.about = found["about"]
    files = weight_files(source, args.gguf_file) if method == "none" else []
    row.about = {**row.about, "file_bytes": sum(os.path.getsize(file) for file in files) or None}
    return row


OF_THE_MODEL = ("model_sha256", "method", "skip_lm_head")  # parts of a key in which the rows of a column differ


def read_rows(folder: str, labels: Sequence[str], patterns: Sequence[str] | None) -> list[Row]:
    """Return rows of what an output folder has, without the models.

    Args:
        folder: the output folder.
        labels: of the rows, in their order.
        patterns: shell patterns of columns and tasks to read, perplexities in this order, or None for all.

    Raises:
        FileNotFoundError: nothing there has such a label.
        ValueError: measurements that do not belong in one column, or two for one cell.
    """
    rows = {label: Row(label) for label in labels}
    origin: dict[tuple[str, str], Path] = {}
    settings_of: dict[str, tuple[dict[str, Any], Path]] = {}
    known, wanted = set(), patterns or ["*"]

    def place(column: str) -> int:
        return next((i for i, pattern in enumerate(wanted) if fnmatch.fnmatch(column, pattern)), len(wanted))

    for path in sorted((Path(folder) / "measurements").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        key, found = content["key"], content["result"]
        known.add(found["label"])
        column = found.get("task") or _column(found["data"], found["protocol"], found["window"])
        row = rows.get(found["label"])
        if row is None or place(column) == len(wanted):
            continue
        if first := origin.get((row.label, column)):
            raise ValueError(f"{row.label} has two measurements of {column}: {first} and {path}; delete one")
        origin[row.label, column] = path
        how = {name: value for name, value in key.items() if name not in OF_THE_MODEL}
        like, other = settings_of.setdefault(column, (how, path))
        if how != like:
            differ = ", ".join(sorted(name for name in {*how, *like} if how.get(name) != like.get(name)))
            raise ValueError(f"{other} and {path} do not compare: their {differ} differ")
        row.about = found["about"]
        if "task" in found:
            row.tasks.append(found)
        else:
            row.perplexities[column] = found["perplexity"]
    if missing := [label for label in labels if not (rows[label].tasks or rows[label].perplexities)]:
        raise FileNotFoundError(
            f"{folder} has no measurement of {', '.join(missing)}; there are {', '.join(sorted(known)) or 'none'}"
        )
    order = list(task_module.TASKS)
    for row in rows.values():
        row.perplexities = dict(sorted(row.perplexities.items(), key=lambda item: place(item[0])))
        row.tasks.sort(key=lambda result: order.index(result["task"]) if result["task"] in order else len(order))
    return list(rows.values())


def comparison_table(rows: Sequence[Row], baseline: Row) -> str:
    """Return the table in the paper's form: bits, size, perplexities, tasks in percent, average."""
    columns = list(dict.fromkeys(column for row in rows for column in row.perplexities))
    names = list(dict.fromkeys(result["task"] for row in rows for result in row.tasks))
    has_average = baseline.average() is not None
    header = ["model", "bits", "MB", *columns, *names, *(["average of five"] if has_average else [])]
    body = []
    for row in rows:
        cells = [row.label, f"{row.bits:.2f}", f"{row.about['packed_bytes'] / 1e6:.1f}"]
        for column in columns:
            value, reference = row.perplexities.get(column), baseline.perplexities.get(column)
            ratio = f" ({number(value / reference)}x)" if value and reference and row is not baseline else ""
            cells.append("-" if value is None else number(value) + ratio)
        accuracies = {result["task"]: result["acc"] for result in row.tasks}
        cells += [f"{100 * accuracies[name]:.2f}" if name in accuracies else "-" for name in names]
        mean, reference_mean = row.average(), baseline.average()
        if reference_mean is not None:
            difference = "" if mean is None or row is baseline else f" ({mean - reference_mean:+.2f})"
            cells.append("-" if mean is None else f"{mean:.2f}{difference}")
        body.append(cells)
    return markdown_table(header, body)


def measure_models(args: argparse.Namespace) -> list[Row]:
    """Return the rows of --models, with what had to be measured.

    Raises:
        ImportError: lm-eval is missing and needed.
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    if args.columns:
        raise ValueError("--columns goes with --measured; with --models give --data, --protocol and --tasks")
    entries = [split_model(text) for text in args.models]  # errors first, then the work
    for method in args.quant_method:
        parse_method(method)
    if args.data is None:
        args.data = [] if args.tasks else DATA
    if not (args.data or args.tasks):
        raise ValueError("there is nothing to measure: give --data or --tasks")
    if args.tasks:
        task_module.prepare(args.tasks, args)
    labels = [
        label if method == "none" else f"{label} {method}" for label, _, _ in entries for method in args.quant_method
    ]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two rows have the same label ({', '.join(labels)}); name models as LABEL=MODEL")
    if args.baseline and args.baseline not in labels:
        raise ValueError(f"no row is called {args.baseline!r}; there are {', '.join(labels)}")
    texts = [load_eval_text(source) for source in args.data]
    store = Measurements(args.output_folder)
    rows = []
    pairs = [(entry, method) for entry in entries for method in args.quant_method]
    for label, ((_, source, gguf), method) in zip(labels, pairs, strict=True):
        own = argparse.Namespace(**{**vars(args), "gguf_file": gguf or args.gguf_file})
        rows.append(measure_model(label, source, method, own, texts, store))
    total = len(rows) * (len(texts) * len(args.protocol) + len(args.tasks))
    logger.info("%d of %d measurements were there already", total - store.made, total)
    return rows


def main(argv: Sequence[str]) -> str:
    """Measure what is missing as the command line says, write table, JSON and picture; return the table to show.

    Raises:
        ImportError: lm-eval or matplotlib is missing and needed.
        ValueError, OSError: an argument is wrong; the message says what to give instead.
    """
    args = parse_args(argv)
    if args.plot:
        check_plot_file(args.plot)
    rows = read_rows(args.output_folder, args.measured, args.columns) if args.measured else measure_models(args)
    labels = [row.label for row in rows]
    if args.baseline and args.baseline not in labels:
        raise ValueError(f"no row is called {args.baseline!r}; there are {', '.join(labels)}")
    baseline = next(row for row in rows if row.label == (args.baseline or labels[0]))
    table = comparison_table(rows, baseline)
    content = [{"label": r.label, **r.about, "perplexities": r.perplexities, "tasks": r.tasks} for r in rows]
    write_json(os.path.join(args.output_folder, "results.json"), content)
    Path(args.output_folder, "table.md").write_text(table + "\n", encoding="utf-8")
    if args.plot:
        os.makedirs(os.path.dirname(args.plot) or ".", exist_ok=True)
        draw_comparison(rows, baseline).savefig(args.plot)
    return table
