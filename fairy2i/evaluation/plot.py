"""A picture of a comparison: quality against bits, a panel for each perplexity and one for the accuracy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..plotting import COLOURS, MARKERS, check_plot_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .compare import Row


QUANTIZED = 8  # bits per weight, at most


def mean_accuracy(row: "Row") -> float | None:
    """Return the mean of all tasks that were measured, in percent."""
    return 100 * sum(result["acc"] for result in row.tasks) / len(row.tasks) if row.tasks else None


def draw_comparison(rows: Sequence["Row"], baseline: "Row") -> "Figure":
    """Draw quality against bits per weight; the baseline, and what else is unquantized, is a line across.

    Args:
        rows: what a row lacks is left out.
        baseline: one of the rows.

    Raises:
        ImportError: matplotlib is missing; the message says what to install.
    """
    check_plot_file("picture.png")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    panels: list[tuple[str, str, list[Any]]] = [
        (column, "perplexity", [row.perplexities.get(column) for row in rows]) for column in baseline.perplexities
    ]
    averages = [row.average() for row in rows]
    if baseline.average() is not None:
        panels.append(("average of five tasks", "accuracy in %", averages))
    elif baseline.tasks:
        panels.append((f"mean of {len(baseline.tasks)} tasks", "accuracy in %", [mean_accuracy(row) for row in rows]))
    figure = Figure(figsize=(1.5 + 4.2 * len(panels), 4.2), layout="constrained")
    for index, (title, unit, values) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            if value is None:
                continue
            if row is baseline:
                axes.axhline(value, color="#7f7f7f", linestyle="--", linewidth=1, label=row.label)
            elif row.bits > QUANTIZED:
                axes.axhline(value, color=colour, linestyle=":", linewidth=1.5, label=row.label)
            else:
                axes.scatter([row.bits], [value], color=colour, marker=marker, s=40, label=row.label, zorder=3)
        if unit == "perplexity":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title.replace("$", r"\$"))
        axes.set_xlabel("bits per weight, scales counted")
        axes.set_ylabel(unit)
        axes.grid(color="#e5e5e5", linewidth=0.8)
    shown = {label: mark for axes in figure.axes for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [row.label for row in rows if row.label in shown]  # a row need not be in every panel
    marks = [shown[label] for label in labels]
    figure.axes[-1].legend(marks, labels, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=9)
    return figure
