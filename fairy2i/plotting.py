"""A picture of a quantized model: its weights before and after quantization, and error, codes and bits by layer.

Phases and the complex plane show the entries of U and W (:mod:`fairy2i.widely_linear`), those of each matrix divided by
their root mean square, so that large and small layers can share one picture; real methods have a histogram of plain
weights instead. matplotlib is imported when a picture is drawn, without pyplot: no display, no global state.
"""

import itertools
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .inspection import LayerInfo, inspect_layers, summarize
from .schemes import PhaseScheme, Scheme
from .widely_linear import to_widely_linear

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AFTER = "#d55e00"
BEFORE_AND_AFTER: dict[str, dict[str, Any]] = {
    "before": {"color": "#b5b5b5"},
    "after": {"color": AFTER, "alpha": 0.75},
}
# Okabe and Ito's colours, which colour-blind people tell apart; the markers differ as well
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000")
MARKERS = "osD^vPX*"
SHORT_LEGEND = {"handlelength": 1.0, "handletextpad": 0.5, "columnspacing": 1.2}
CODES = {  # by their number
    2: ("binary", ("-1", "+1")),
    3: ("ternary", ("-1", "0", "+1")),
    4: ("complex", ("-1", "+1", "-i", "+i")),
}
CODE_COLOURS = {"-1": "#5a9bc7", "+1": "#a9d3ec", "0": "#e3e3e3", "-i": "#e08a4f", "+i": "#f3cf85"}
MOST_IN_LEGEND = 16


def check_plot_file(path: str) -> None:
    """Raise at once what saving a picture would raise after all the work.

    Raises:
        ImportError: matplotlib is missing; the message says what to install.
        ValueError: matplotlib cannot write this kind of file.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'fairy2i[plot]'") from None
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    suffix = os.path.splitext(path)[1].lstrip(".").lower()
    if suffix not in known:
        raise ValueError(f"cannot draw {path}: give a name that ends in one of {', '.join(known)}")


class WeightHistograms:
    """Counts of weights over all layers, before and after quantization; its `add` is a ``look`` of inspect_layers.

    Attributes: counts by "before" and "after".
        phases: {(when, "U" or "W"): (PHASES,)}, bin k around 360k/PHASES degrees, each code in the middle of a bin.
        plane: {when: (PLANE, PLANE)}, rows imaginary, columns real, from -REACH to REACH.
        values: {when: (VALUES,)}, real methods only, from -REACH to REACH.
    """

    PHASES = 100  # 25 to a sector: no bin lies across a border
    PLANE = 101
    VALUES = 101
    REACH = 3.0

    def __init__(self) -> None:
        self.phases: dict[tuple[str, str], Tensor] = {}
        self.plane: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}

    def add(self, scheme: Scheme, before: Tensor | None, after: Tensor) -> None:
        """Count the weights of one layer, real (out, in); ``before`` is None where nobody has it."""
        weights = {"after": after} if before is None else {"before": before, "after": after}
        if isinstance(scheme, PhaseScheme):
            parts = {when: to_widely_linear(weight) for when, weight in weights.items()}
            for index, letter in enumerate("UW"):
                size = _root_mean_square(next(iter(parts.values()))[index])
                for when, both in parts.items():
                    self._add_complex(when, letter, both[index].flatten() / size)
        else:
            size = _root_mean_square(next(iter(weights.values())))
            for when, weight in weights.items():
                bins = self._bins(weight.flatten() / size, self.VALUES)
                _count(self.values, when, bins[bins >= 0], self.VALUES)

    def _add_complex(self, when: str, letter: str, z: Tensor) -> None:
        turns = z[z != 0].angle() / (2 * math.pi)
        bins = (turns * self.PHASES).round().long() % self.PHASES
        _count(self.phases, (when, letter), bins, self.PHASES)
        column, row = self._bins(z.real, self.PLANE), self._bins(z.imag, self.PLANE)
        inside = (row >= 0) & (column >= 0)
        _count(self.plane, when, (row * self.PLANE + column)[inside], self.PLANE**2)

    def _bins(self, x: Tensor, count: int) -> Tensor:
        """Return the bin of each number, -1 outside."""
        bins = ((x / self.REACH + 1) / 2 * count).floor().long()
        return torch.where((bins >= 0) & (bins < count), bins, -1)


def _root_mean_square(x: Tensor) -> Tensor:
    return x.abs().square().mean().sqrt().clamp(min=1e-12)


def _count(counts: dict[Any, Tensor], key: Any, bins: Tensor, length: int) -> None:
    counts[key] = counts.get(key, 0) + torch.bincount(bins, minlength=length).cpu()


def _shares(counts: Tensor) -> Any:
    return (counts.double() / counts.sum().clamp(min=1) * 100).numpy()


def layer_kinds(names: Sequence[str]) -> list[tuple[int, str]]:
    """Return (block, kind) of each layer: the first number in its name, and the rest in as few words as tell it apart.

    Layers without a number come after all blocks, each in a place of its own.
    """
    split = [name.split(".") for name in names]
    numbers = [next((int(part) for part in parts if part.isdigit()), None) for parts in split]
    kinds = [tuple("*" if part.isdigit() else part for part in parts) for parts in split]
    distinct = set(kinds)
    longest = max(map(len, distinct), default=0)
    words = next((k for k in range(1, longest) if len({kind[-k:] for kind in distinct}) == len(distinct)), longest)
    places = itertools.count(1 + max((number for number in numbers if number is not None), default=-1))
    short = [".".join(kind[-words:]).removeprefix("*.") for kind in kinds]
    return [
        (next(places) if number is None else number, "layers" if kind == "*" else kind)
        for number, kind in zip(numbers, short, strict=True)
    ]


def _draw_phases(axes: Any, histograms: WeightHistograms, letter: str, before: str) -> None:
    first = histograms.PHASES // 8  # bins of half a sector: the picture starts at -45 degrees
    width = 360 / histograms.PHASES
    degrees = (torch.arange(histograms.PHASES) - first).numpy() * width
    shares = {when: _shares(counts.roll(first)) for (when, of), counts in histograms.phases.items() if of == letter}
    _draw_bars(axes, degrees, shares, width, before)
    for border in (45, 135, 225):
        axes.axvline(border, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlim(-45, 315)
    axes.set_xticks([0, 90, 180, 270], ["0°\n$+1$", "90°\n$+i$", "180°\n$-1$", "270°\n$-i$"])
    axes.set_title(f"Phases of {letter}")
    axes.set_xlabel("phase")
    axes.set_ylabel(f"% of {letter} in each {width:g}°,\nsquare-root axis")


def _draw_bars(axes: Any, x: Any, shares: dict[str, Any], width: float, before: str) -> None:
    """Draw the bars before and after; with the square root as scale the low ones are seen beside the high ones."""
    labels = {"before": before, "after": "quantized"}
    for when, share in shares.items():
        axes.bar(x, share, width=width, label=labels[when], **BEFORE_AND_AFTER[when])
    axes.set_yscale("function", functions=(lambda y: y.clip(0) ** 0.5, lambda root: root**2))
    axes.set_ylim(0, max(share.max() for share in shares.values()) * 1.3)
    axes.legend(frameon=False, ncols=2, loc="upper center", borderaxespad=0.2, fontsize=9, **SHORT_LEGEND)


def _draw_plane(axes: Any, histograms: WeightHistograms) -> None:
    reach = histograms.REACH
    if (before := histograms.plane.get("before")) is not None:
        image = before.view(histograms.PLANE, histograms.PLANE).numpy()
        axes.imshow(image**0.5, origin="lower", extent=(-reach, reach, -reach, reach), cmap="Greys")
    after = histograms.plane["after"].view(histograms.PLANE, histograms.PLANE)
    share = after / after.sum()
    row, column = torch.nonzero(share > 1e-5, as_tuple=True)
    x, y = (((index + 0.5) / histograms.PLANE * 2 - 1) * reach for index in (column, row))
    area = (share[row, column] * 800).clamp(min=0.2)  # in square points
    axes.scatter(x.numpy(), y.numpy(), s=area.numpy(), color=AFTER, alpha=0.85, linewidths=0)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.set_title("U and W in the complex plane")
    axes.set_xlabel("real part / RMS of the matrix")
    axes.set_ylabel("imaginary part / RMS")


def _draw_values(axes: Any, histograms: WeightHistograms, before: str) -> None:
    width = 2 * histograms.REACH / histograms.VALUES
    centres = (torch.arange(histograms.VALUES).numpy() + 0.5) * width - histograms.REACH
    _draw_bars(axes, centres, {when: _shares(counts) for when, counts in histograms.values.items()}, width, before)
    axes.set_title("Real weights")
    axes.set_xlabel("weight / RMS of the matrix")
    axes.set_ylabel(f"% of the weights in each {width:.2g},\nsquare-root axis")


def _draw_by_layer(axes: Any, places: Sequence[tuple[int, str]], values: Sequence[Any], legend: bool) -> None:
    """One line for each kind of layer over the blocks: the mean where a block has several, and a mark for each."""
    kinds = list(dict.fromkeys(kind for _, kind in places))
    for index, kind in enumerate(kinds):
        points = [
            (block, value)
            for (block, of), value in zip(places, values, strict=True)
            if of == kind and value is not None
        ]
        by_block: dict[int, list[float]] = {}
        for block, value in points:
            by_block.setdefault(block, []).append(value)
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[(index + 2 * (index // len(COLOURS))) % len(MARKERS)]  # no pair twice in 56 kinds
        blocks = sorted(by_block)
        axes.plot(blocks, [sum(by_block[b]) / len(by_block[b]) for b in blocks], color=colour, linewidth=0.9, alpha=0.6)
        label = kind if index < MOST_IN_LEGEND else None
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.scatter(x, y, s=16, color=colour, marker=marker, label=label, zorder=3)
    _block_axis(axes, {block for block, _ in places})
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    if legend and len(kinds) > 1:
        cut = len(kinds) > MOST_IN_LEGEND
        _legend_beside(axes, title=f"{MOST_IN_LEGEND} of {len(kinds)} kinds" if cut else None)


def _draw_codes(axes: Any, layers: Sequence[tuple[int, list[float]]]) -> None:
    """Stack the mean shares of the codes in each block."""
    by_block: dict[int, list[list[float]]] = {}
    for block, use in layers:
        by_block.setdefault(block, []).append(use)
    blocks = sorted(by_block)
    shares = torch.tensor([torch.tensor(by_block[block]).mean(0).tolist() for block in blocks]) * 100
    bottom = torch.zeros(len(blocks))
    kind, names = CODES[shares.shape[1]]
    for name, share in zip(names, shares.T, strict=True):
        axes.bar(
            blocks,
            share.numpy(),
            bottom=bottom.numpy(),
            width=0.85,
            color=CODE_COLOURS[name],
            label=f"${name}$   {share.mean():.1f}%",
        )
        bottom += share
    _block_axis(axes, set(blocks))
    axes.set_ylim(0, 100)
    axes.set_title(f"Use of the {kind} codes")
    axes.set_ylabel("% of the codes")
    _legend_beside(axes, reverse=True)


def _draw_bits(axes: Any, places: Sequence[tuple[int, str]], bits: Sequence[float], legend: bool) -> None:
    _draw_by_layer(axes, places, bits, legend)
    axes.set_ylim(0, max(bits) * 1.15)
    axes.set_title("Stored bits of each layer")
    axes.set_ylabel("bits per weight,\nscales counted")


def _legend_beside(axes: Any, **options: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=9, **options)


def _block_axis(axes: Any, blocks: set[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("block of the model")


def draw(layers: Sequence[LayerInfo], histograms: WeightHistograms, title: str = "") -> "Figure":
    """Draw what inspect_layers found, as one matplotlib figure.

    Bits by layer are drawn where they differ; what is the same for all layers stands in the heading.

    Args:
        layers: at least one.
        histograms: filled by the same call of inspect_layers.
        title: starts the heading.

    Raises:
        ImportError: matplotlib is missing; the message says what to install.
    """
    check_plot_file("picture.png")
    from matplotlib.figure import Figure

    places = layer_kinds([layer.name for layer in layers])
    bits = [layer.bits_per_weight for layer in layers]
    errors = [layer.error for layer in layers]
    code_sets = sorted({len(layer.code_use) for layer in layers}, reverse=True)
    has_error = any(error is not None for error in errors)
    before = next((layer.error_against for layer in layers if layer.error_against), "before")
    heights = [1, 1, 0.6] if has_error else [1, 0.6]

    figure = Figure(figsize=(13, 0.9 + 3.5 * sum(heights)), layout="constrained")
    figure.suptitle("\n".join(filter(None, (title.replace("$", r"\$"), _heading(layers)))), fontsize=12)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)

    panels: list[Callable[[Any], None]] = []
    if histograms.plane:
        panels += [partial(_draw_phases, histograms=histograms, letter=letter, before=before) for letter in "UW"]
        panels.append(partial(_draw_plane, histograms=histograms))
    if histograms.values:
        panels.append(partial(_draw_values, histograms=histograms, before=before))
    _draw_row(figure, grid[0], panels)

    if has_error:
        axes = figure.add_subplot(grid[1])
        _draw_by_layer(axes, places, errors, legend=True)
        axes.set_title(f"Error of each layer against its {before}")
        axes.set_ylabel(r"$\|w-q\|\,/\,\|w\|$")

    panels = []
    for count in code_sets:
        use = [(block, layer.code_use) for (block, _), layer in zip(places, layers, strict=True)]
        panels.append(partial(_draw_codes, layers=[pair for pair in use if len(pair[1]) == count]))
    if max(bits) - min(bits) > 0.01 * max(bits):
        panels.append(partial(_draw_bits, places=places, bits=bits, legend=not has_error))
    _draw_row(figure, grid[len(heights) - 1], panels)
    return figure


def _heading(layers: Sequence[LayerInfo]) -> str:
    total = summarize(layers)
    methods = [f"{count} x {name}" if len(total["methods"]) > 1 else name for name, count in total["methods"].items()]
    shown = ", ".join(methods[:3]) + (" and others" if len(methods) > 3 else "")
    many = "s" if len(layers) > 1 else ""
    bits = f"{total['bits_per_weight']:.4f} bits"
    heading = f"{len(layers)} layer{many}, {total['weights']:,} weights at {bits}: {shown}"
    heading += "" if total["error"] is None else f"; error of all weights {total['error']:.4f}"
    return textwrap.fill(heading, 130)


def _draw_row(figure: Any, place: Any, panels: Sequence[Callable[[Any], None]]) -> None:
    grid = place.subgridspec(1, len(panels))
    for column, panel in enumerate(panels):
        panel(figure.add_subplot(grid[column]))


def plot_model(model: nn.Module, original: nn.Module | None = None, *, title: str = "") -> "Figure":
    """Draw a model with QATLinear or PackedLinear layers; as the last line of a notebook cell it shows itself.

    Args:
        model, original: as for :func:`fairy2i.inspection.inspect_layers`.
        title: heading of the figure.

    Raises:
        ImportError: matplotlib is missing; the message says what to install.
        ValueError: the model has no quantized layers, or the original does not fit.
    """
    histograms = WeightHistograms()
    layers = inspect_layers(model, original, look=histograms.add)
    if not layers:
        raise ValueError("the model has no quantized layers to draw")
    return draw(layers, histograms, title)
