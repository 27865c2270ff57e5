"""What the picture of a model counts, which panels it has, and what it says where it cannot be drawn."""

import sys

import pytest
import torch

from fairy2i import METHODS, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.inspection import inspect_layers
from fairy2i.plotting import MOST_IN_LEGEND, WeightHistograms, check_plot_file, layer_kinds, plot_model

N = WeightHistograms.PHASES
CODE_BINS = {0: N // 2, 1: 0, 2: 3 * N // 4, 3: N // 4}  # -1, +1, -i, +i
COMPLEX_PANELS = ["Phases of U", "Phases of W", "U and W in the complex plane"]


def small_model(method="complex_phase_v1", layers=2):
    model = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(layers)])
    replace_modules_for_qat(model, method)
    return model


def histograms_of(model, original=None):
    histograms = WeightHistograms()
    inspect_layers(model, original, look=histograms.add)
    return histograms


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_one_stage_puts_every_entry_on_the_phase_of_its_code():
    model = small_model()
    histograms = histograms_of(model)
    codes = torch.stack([layer.codes_and_scales()[0][0] for layer in model])  # (layers, 2, n, m)
    for index, letter in enumerate("UW"):
        before, after = histograms.phases["before", letter], histograms.phases["after", letter]
        counts = {code: int((codes[:, index] == code).sum()) for code in range(4)}
        assert {code: int(after[middle]) for code, middle in CODE_BINS.items()} == counts
        assert int(after.sum()) == sum(counts.values())
        sector = torch.arange(N // 4) - N // 8  # no bin lies across the border of a sector
        assert {code: int(before[(middle + sector) % N].sum()) for code, middle in CODE_BINS.items()} == counts
        assert (before > 0).sum() > N // 2


def test_the_plane_holds_the_entries_divided_by_their_root_mean_square():
    model = small_model()
    with torch.no_grad():
        model[1].weight *= 1000
    plane = histograms_of(model).plane["before"].view(WeightHistograms.PLANE, WeightHistograms.PLANE)
    at = (torch.arange(WeightHistograms.PLANE) + 0.5) / WeightHistograms.PLANE * 2 - 1
    square = (at * WeightHistograms.REACH) ** 2
    assert float((plane * (square[:, None] + square)).sum() / plane.sum()) == pytest.approx(1, abs=0.01)
    assert int(plane.sum()) == 2 * 32 * 32 // 2


@pytest.mark.parametrize(("method", "levels"), [("bitnet", 2), ("bitnet_1_58", 3)])
def test_real_methods_have_their_levels_and_no_phases(method, levels):
    histograms = histograms_of(small_model(method, layers=1))
    assert int((histograms.values["after"] > 0).sum()) == levels
    assert int(histograms.values["after"].sum()) == 32 * 32
    assert int((histograms.values["before"] > 0).sum()) > levels
    assert not histograms.phases and not histograms.plane


def test_a_packed_model_has_no_before_but_beside_its_original():
    model = small_model()
    original = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(2)])
    convert_to_inference_mode(model)
    assert set(histograms_of(model).plane) == {"after"}
    assert set(histograms_of(model, original).plane) == {"before", "after"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m.layers.0.a.q_proj", "m.layers.11.a.q_proj"], [(0, "q_proj"), (11, "q_proj")]),
        (["h.0.attn.c_proj", "h.0.mlp.c_proj"], [(0, "attn.c_proj"), (0, "mlp.c_proj")]),
        (["0", "2"], [(0, "layers"), (2, "layers")]),
        (["layers.3.fc", "lm_head", "score"], [(3, "fc"), (4, "lm_head"), (5, "score")]),
        (["l.0.experts.7.w1", "l.1.experts.0.w2"], [(0, "w1"), (1, "w2")]),
        (["enc.0.fc", "dec.0.fc"], [(0, "enc.*.fc"), (0, "dec.*.fc")]),
        (["head"], [(0, "head")]),
    ],
)
def test_layers_are_sorted_by_block_and_by_as_few_words_as_tell_them_apart(names, expected):
    assert layer_kinds(names) == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_picture_has_the_panels_that_make_sense(method, tmp_path):
    model = small_model(method)
    top = ["Real weights"] if method.startswith("bitnet") else COMPLEX_PANELS
    codes = {"bitnet": "binary", "bitnet_1_58": "ternary"}.get(method, "complex")
    figure = plot_model(model)
    assert titles(figure) == [*top, "Error of each layer against its master weight", f"Use of the {codes} codes"]
    errors = figure.axes[len(top)].collections[0].get_offsets()[:, 1].tolist()
    assert errors == pytest.approx([layer.error for layer in inspect_layers(model)])
    convert_to_inference_mode(model)
    figure = plot_model(model, title="a title with $ and $")
    assert titles(figure) == [*top, f"Use of the {codes} codes"]
    figure.savefig(tmp_path / "packed.png", dpi=40)
    assert (tmp_path / "packed.png").read_bytes().startswith(b"\x89PNG")


def test_bits_are_drawn_where_they_differ():
    model = small_model({"0": "complex_phase_v3", "1": "bitnet_1_58"})
    bottom = ["Use of the complex codes", "Use of the ternary codes", "Stored bits of each layer"]
    assert titles(plot_model(model))[-3:] == bottom


def test_nothing_is_drawn_over_the_edge_or_over_a_neighbour_with_many_kinds_of_layers():
    kinds = {f"a_rather_long_name_{i}": torch.nn.Linear(8, 8) for i in range(MOST_IN_LEGEND + 3)}
    model = torch.nn.ModuleList([torch.nn.ModuleDict(kinds)])
    replace_modules_for_qat(model, {"*_1": "bitnet", "*": "complex_phase_v2"})
    figure = plot_model(model)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert all(figure.bbox.padded(1).fully_contains(*corner) for box in boxes for corner in box.corners())
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    errors = figure.axes[4]
    assert errors.get_legend().get_title().get_text() == f"{MOST_IN_LEGEND} of {len(kinds)} kinds"
    looks = {(tuple(m.get_facecolor()[0]), m.get_paths()[0].vertices.tobytes()) for m in errors.collections}
    assert len(looks) == len(kinds)


def test_a_plain_model_is_not_drawn():
    with pytest.raises(ValueError, match="no quantized layers"):
        plot_model(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def test_an_unknown_kind_of_file_is_refused():
    check_plot_file("a.PNG")
    with pytest.raises(ValueError, match=r"cannot draw a\.txt: give a name that ends in one of .*png.*svg"):
        check_plot_file("a.txt")


def test_a_missing_matplotlib_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"pip install 'fairy2i\[plot\]'"):
        plot_model(small_model())
