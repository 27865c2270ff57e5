"""The CPU kernels: every scheme, shape and instruction set against float64, and what surrounds them in PyTorch."""

import contextlib
import copy
import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import random_layer
from torch import nn

from fairy2i import METHODS, PhaseScheme, QATLinear, RealScheme
from fairy2i.ops import cpu
from fairy2i.ops.inference import code_rows_and_columns, layout_of
from fairy2i.packed import use_backend
from fairy2i.rotation import rotate

CSRC = Path(__file__).resolve().parents[2] / "fairy2i" / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
VECTOR = {"avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]}
SCHEMES = [
    *METHODS.values(),
    *(PhaseScheme(stages=stages, granularity="row", scales="learned") for stages in (1, 2, 5, 8)),
    PhaseScheme(stages=3, granularity="tile", tile=5),
    PhaseScheme(stages=2, granularity="tile", tile=64),
    PhaseScheme(stages=1, granularity="tile", tile=300),
    PhaseScheme(stages=2, granularity="tile", tile=1),
    *(RealScheme(levels=levels, granularity="row") for levels in (2, 3)),
    *(RealScheme(levels=levels, granularity="tile", tile=tile) for levels in (2, 3) for tile in (7, 64)),
]
SHAPES = [(2, 2), (22, 34), (6, 1030), (130, 66), (66, 518)]
EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
BACKENDS = list(cpu.MODES)
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EPS = 2.0**-24  # half a unit in the last place of float32

# Without a compiler the package has no kernels, which is no failure; on CI there is one.
pytestmark = pytest.mark.skipif(cpu.why_off() is not None and not os.environ.get("CI"), reason=str(cpu.why_off()))
SETS = [name for name, runs in cpu.instruction_sets().items() if runs] if cpu.why_off() is None else ["none"]
EACH_SET = pytest.mark.parametrize("instruction_set", SETS)


@contextlib.contextmanager
def using(instruction_set):
    before = cpu.use_instruction_set(instruction_set)
    try:
        yield
    finally:
        cpu.use_instruction_set(before)


def error_bound(layer, x, backend):
    """The bound of |y - exact| for each output, from the roundings that a kernel makes.

    A float32 sum of k terms is off by at most k eps times the sum of their sizes. A stage's codes are summed as signs p
    and q, so an entry of either part counts with the whole scale. int8: an activation moves by at most half a step, the
    largest of its group of 256 (of one half of the features) over 127, times the weight.
    """
    weight, scheme = layer.dense_weight().double(), layer.scheme
    x = x.double()
    if isinstance(scheme, PhaseScheme):
        ones = scheme.dequantize(*_all_positive(layer))
        sizes = torch.maximum(weight.abs(), ones.double().abs())
    else:
        sizes = layer.scales.max().double().expand_as(weight)
    terms = 4 * scheme.code_shape(2, 2)[0] * 8 + x.shape[-1] + 16
    bound = terms * EPS * (x.abs() @ sizes.T) + 1e-30
    if backend == "cpu_int8":
        halves = 2 if isinstance(scheme, PhaseScheme) else 1
        width = x.shape[-1] // halves
        tile = scheme.tile if scheme.granularity == "tile" else width
        step = torch.empty_like(x)
        for start in (half * width for half in range(halves)):
            begin = 0
            while begin < width:
                end = min((begin // tile + 1) * tile, begin + 256, width)
                piece = slice(start + begin, start + end)
                step[:, piece] = x[:, piece].abs().amax(-1, keepdim=True) / 127
                begin = end
        bound = bound + (0.5 + 1e-4) * step @ weight.abs().T
        if halves == 2:  # many tokens, AVX-512: weights of 16 bits, off by 2 units a stage (csrc/avx512.cpp)
            unit = 2 * layer.scales.flatten(1).amax(1).sum().double() / 32000
            bound = bound + 2 * scheme.stages * unit * (x.abs() + step).sum(-1, keepdim=True)
    return bound + (0 if layer.bias is None else EPS * (layer.bias.double().abs() + (x.abs() @ sizes.T)))


def _all_positive(layer):
    """Codes and scales whose dense weight has at least the scales that signs p and q are summed with."""
    codes, scales = layer.codes_and_scales()
    largest = scales.flatten(0, 2).amax(0) if scales.dim() > 3 else scales.amax()
    return torch.ones_like(codes), torch.zeros_like(scales) + 2 * largest


def check(layer, x, backend):
    y = layer(x)
    expected = x.double() @ layer.dense_weight().double().T
    if layer.bias is not None:
        expected += layer.bias.double()
    excess = (y.double() - expected).abs() / error_bound(layer, x, backend)
    assert excess.max() <= 1, f"{excess.max():.3g} times the bound at {excess.argmax()}"


# Numbers


@EACH_SET
@EACH_BACKEND
@EACH_SCHEME
def test_kernels_are_within_the_bound_of_their_roundings(scheme, backend, instruction_set):
    with using(instruction_set):
        for shape in SHAPES:
            layer = random_layer(scheme, *shape, backend=backend, bias=shape[0] == 22)
            for tokens in (1, 2, 3, 7, 53) if shape == (66, 518) else (1, 5):
                check(layer, torch.randn(tokens, shape[1]), backend)


@EACH_SET
@EACH_BACKEND
@pytest.mark.parametrize("scheme", [METHODS["complex_phase_v1"], METHODS["bitnet"], METHODS["bitnet_1_58"]], ids=str)
def test_two_rows_of_a_hundred_thousand_columns(scheme, backend, instruction_set):
    with using(instruction_set):
        check(random_layer(scheme, 2, 100_002, backend), torch.randn(2, 100_002), backend)


@EACH_BACKEND
@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_scheme_threads_and_size_of_activations(backend, data):
    draw = data.draw
    where, tile = draw(st.sampled_from(["tensor", "row", "tile"])), draw(st.integers(1, 80))
    out_features, in_features = draw(st.integers(1, 90)), draw(st.integers(1, 400))
    if draw(st.booleans()):
        scheme = PhaseScheme(stages=draw(st.integers(1, 8)), granularity=where, tile=tile)
        out_features, in_features = 2 * out_features, 2 * in_features
    else:
        scheme = RealScheme(levels=draw(st.sampled_from([2, 3])), granularity=where, tile=tile)
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    layer = random_layer(scheme, out_features, in_features, backend, bias=draw(st.booleans()))
    codes = layer.codes.clone()
    x = torch.randn(draw(st.integers(1, 60)), in_features) * 10.0 ** draw(st.integers(-8, 8))
    x[draw(st.integers(0, len(x) - 1))] = 0
    threads = torch.get_num_threads()
    torch.set_num_threads(draw(st.integers(1, 3)))
    try:
        with using(draw(st.sampled_from(SETS))):
            check(layer, x, backend)
    finally:
        torch.set_num_threads(threads)
    assert layer.words is not None
    assert torch.equal(layer.codes, codes)  # from the kernels' order and back


@EACH_BACKEND
def test_a_row_of_tokens_does_not_depend_on_its_neighbours(backend):
    layer, x = random_layer(METHODS["complex_phase_v2"], 96, 640, backend), torch.randn(50, 640)
    together = layer(x)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-4 if backend == "cpu_exact" else 0.05)
    assert torch.equal(layer(x), together)


@EACH_SET
@EACH_BACKEND
def test_activations_that_are_not_finite_are_told(backend, instruction_set):
    layer, x = random_layer(METHODS["complex_phase_v2"], 8, 600, backend), torch.randn(4, 600)
    x[1, 3], x[2, 500] = float("nan"), float("inf")
    with using(instruction_set):
        y = layer(x)
    assert torch.isfinite(y).all(-1).tolist() == [True, False, False, True]


@EACH_SET
@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, backend, instruction_set):
    layer = random_layer(METHODS["complex_phase_v2"], 70, 258, backend, bias=True, dtype=dtype)
    x = torch.randn(3, 258).to(dtype)
    with using(instruction_set):
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, layer(x.float()).to(dtype))


@EACH_SET
def test_buffers_need_no_alignment(instruction_set):
    layer = random_layer(METHODS["complex_phase_v2"], 70, 258, "cpu_exact", bias=True)
    x, shifted = torch.randn(3, 258), torch.empty(3 * 258 + 1)[1:].view(3, 258)
    shifted.copy_(x)
    with using(instruction_set):
        expected = layer(x)
        for name in ("codes", "scales"):  # as when safetensors maps a file
            source = layer.state_dict()[name]
            memory = torch.empty(source.nbytes + 4, dtype=torch.uint8)[4 if name == "scales" else 1 :]
            copy = memory[: source.nbytes].view(source.dtype).view(source.shape)
            copy.copy_(source)
            layer._load_from_state_dict({}, "", {}, False, [], [], [])
            layer._buffers[name] = copy
        assert torch.equal(layer(shifted), expected)


# In PyTorch


@EACH_BACKEND
def test_the_op_passes_opcheck(backend):
    layer, x = random_layer(METHODS["complex_phase_v2"], 24, 40, backend), torch.randn(2, 3, 40)
    layer(x)
    arguments = (x, layer.words, layer.scales, torch.randn(24), 24, list(layout_of(layer.scheme, backend)))
    torch.library.opcheck(torch.ops.fairy2i.packed_linear.default, arguments)


@EACH_BACKEND
@pytest.mark.parametrize("rotation", [0, 16])
def test_the_op_of_several_layers_passes_opcheck_and_is_that_of_one(backend, rotation):
    scheme = PhaseScheme(stages=2, granularity="row", rotation=rotation)
    layers = [random_layer(scheme, rows, 48, backend) for rows in (24, 6, 34)]
    x, biases = torch.randn(2, 48, dtype=torch.bfloat16), [torch.randn(24), None, torch.randn(34)]
    for layer in layers:
        layer(x)
    layout = list(layout_of(scheme, backend))
    arguments = (x, [y.words for y in layers], [y.scales for y in layers], biases, [24, 6, 34], layout)
    torch.library.opcheck(torch.ops.fairy2i.packed_linears.default, arguments)
    for y, layer, bias in zip(torch.ops.fairy2i.packed_linears(*arguments), layers, biases, strict=True):
        one = (x, layer.words, layer.scales, bias, layer.out_features, layout)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, torch.ops.fairy2i.packed_linear(*one))


def test_the_op_refuses_codes_of_another_size():
    layer = random_layer(METHODS["complex_phase_v2"], 24, 40, "cpu_exact")
    layer(torch.randn(1, 40))
    layout = list(layout_of(layer.scheme, "cpu_exact"))
    with pytest.raises(ValueError, match="a 24x80 layer needs"):
        torch.ops.fairy2i.packed_linear(torch.randn(1, 80), layer.words, layer.scales, None, 24, layout)
    with pytest.raises(RuntimeError, match="40 input features"):
        layer(torch.randn(1, 80))


@EACH_BACKEND
def test_a_layer_compiles_into_one_graph_and_runs_the_kernel(backend):
    x = torch.randn(3, 40)
    for bias in (True, False):
        layer = use_backend(random_layer(METHODS["complex_phase_v2"], 24, 40, bias=bias), backend)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
        other = random_layer(layer.scheme, 24, 40, bias=bias)
        layer.load_state_dict(other.state_dict())  # the graph does not hold the codes that were there before
        use_backend(layer, backend)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_and_lazy_negation_are_seen():
    """No type of the tensor tells of them, and its memory is not there or has something else in it."""
    layer, x = random_layer(METHODS["complex_phase_v2"], 24, 40, "cpu_exact"), torch.randn(3, 2, 40)
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))


def test_a_layer_compiled_before_its_codes_are_repacked_says_so_and_is_right(caplog, monkeypatch):
    monkeypatch.setattr("fairy2i.packed._told", set())
    layer, x = random_layer(METHODS["complex_phase_v2"], 24, 40, "cpu_exact"), torch.randn(3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = x @ layer.dense_weight().T
    assert torch.equal(compiled(x), expected)
    assert [record.message for record in caplog.records if "before torch.compile" in record.message]
    layer(x)
    assert torch.equal(compiled(x), layer(x))  # compiled anew, with the kernel


def test_the_input_gets_its_gradient_from_the_reference():
    layer, x = random_layer(METHODS["complex_phase_v2"], 24, 40, "auto"), torch.randn(3, 40, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(grad, torch.ones(3, 24) @ layer.dense_weight())


def test_the_state_dict_is_that_of_the_format_and_loads_into_a_layer_in_use():
    layer, x = random_layer(METHODS["complex_phase_v3"], 24, 42, "cpu_exact"), torch.randn(3, 42)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    y = layer(x)
    assert layer.words is not None
    assert layer._buffers["codes"] is None  # one copy of the codes in memory
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    other = random_layer(METHODS["complex_phase_v3"], 24, 42, "cpu_exact")
    other(x)
    other.load_state_dict(after)
    assert torch.equal(other(x), y)


def test_new_scales_are_seen_at_the_next_call():
    layer, x = random_layer(METHODS["complex_phase_v2"], 24, 40, "cpu_exact"), torch.randn(3, 40)
    y = layer(x)
    layer.scales = layer.scales * 2
    assert torch.allclose(layer(x), 2 * y, rtol=1e-6)
    layer.scales.mul_(2)
    assert torch.allclose(layer(x), 4 * y, rtol=1e-6)


@pytest.mark.parametrize("team", [True, False], ids=["PyTorch's team", "own threads"])
def test_threads_share_a_layer_that_was_never_used(team):
    torch.set_num_threads(3)
    if not team:
        cpu.library().fairy2i_set_parallel(None)
    try:
        for _ in range(10):
            layer, x = random_layer(METHODS["complex_phase_v2"], 256, 512, "cpu_exact"), torch.randn(3, 512)
            expected, found = copy.deepcopy(layer)(x), []
            threads = [threading.Thread(target=lambda: found.append(layer(x))) for _ in range(4)]  # noqa: B023
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 4
            assert all(torch.equal(y, expected) for y in found)
        if not team and hasattr(os, "fork"):  # a child has none of the threads
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(layer(x), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)
        cpu.library().fairy2i_set_parallel(ctypes.cast(cpu._openmp_parallel(), ctypes.c_void_p))


class Attention(nn.Module):
    """Three layers of one input, as transformers has them."""

    def __init__(self, scheme, backend, bias):
        super().__init__()
        self.q_proj = random_layer(scheme, 64, 80, backend, bias)
        self.k_proj = random_layer(scheme, 22, 80, backend, bias)
        self.v_proj = random_layer(scheme, 34, 80, backend, bias)

    def forward(self, x, other=None):
        return self.q_proj(x), self.k_proj(x if other is None else other), self.v_proj(x)


@EACH_BACKEND
@pytest.mark.parametrize("scheme", [METHODS["complex_phase_v2"], METHODS["fairy2i_w2"]], ids=str)
def test_layers_of_one_input_are_computed_together_and_nothing_changes(scheme, backend, monkeypatch):
    together, x = Attention(scheme, backend, True), torch.randn(1, 1, 80)
    expected, large = together(x), torch.randn(9, 80)
    expected_large = together(large)
    counts, run = [], cpu.run
    monkeypatch.setattr(cpu, "run", lambda layers, *rest: counts.append(len(layers)) or run(layers, *rest))
    use_backend(together, backend)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(together(x), expected, strict=True))
    assert counts == [3, 3]
    assert all(torch.equal(*pair) for pair in zip(together(large), expected_large, strict=True))
    assert counts == [3, 3, 1, 1, 1]
    x.mul_(2)  # another input in the same memory
    assert not torch.equal(together(x)[2], expected[2])
    together.q_proj(x)
    x.mul_(0.5)  # behind q's back
    assert torch.equal(together.k_proj(x), expected[1])


def test_layers_that_turn_out_to_have_inputs_of_their_own_are_parted():
    together = use_backend(Attention(METHODS["complex_phase_v2"], "auto", False), "cpu_exact")
    x, other = torch.randn(1, 80), torch.randn(1, 80)
    expected = together.k_proj(other)
    for _ in range(3):
        assert torch.equal(together(x, other)[1], expected)
        assert together.k_proj._ahead is None
        together.q_proj(x)
    assert together.q_proj._siblings == []


# The choice of a backend


def test_auto_is_exact_in_eval_mode_and_the_reference_in_training(monkeypatch):
    monkeypatch.setattr("fairy2i.packed.DEFAULT", "auto")
    layer = random_layer(METHODS["complex_phase_v2"], 24, 40, "auto")
    assert f"backend=cpu_exact ({cpu.instruction_set()})" in repr(layer)
    layer(torch.randn(1, 40))
    assert layer.words is not None
    assert "backend=reference" in repr(layer.train())
    assert layer.eval().backend_for(torch.randn(1, 40, dtype=torch.float64)) == "reference"


def test_a_kernel_asked_for_by_name_is_used_or_the_reason_told():
    layer = use_backend(nn.Sequential(random_layer(METHODS["complex_phase_v2"], 24, 40)), "cpu_int8")
    layer(torch.randn(1, 40))
    assert layer[0]._layout[4] == cpu.MODES["cpu_int8"]
    with pytest.raises(RuntimeError, match=r"cpu_int8 cannot be used: it does not take torch\.float64"):
        layer(torch.randn(1, 40, dtype=torch.float64))
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        use_backend(layer, "fast")


def test_one_line_is_logged(caplog, monkeypatch):
    monkeypatch.setattr("fairy2i.packed._told", set())
    with caplog.at_level(logging.INFO, "fairy2i.packed"):
        for _ in range(2):
            random_layer(METHODS["complex_phase_v2"], 24, 40, "cpu_exact")(torch.randn(1, 40))
    assert [record.message for record in caplog.records] == [
        f"packed layers: cpu_exact, {cpu.instruction_set()}, {torch.get_num_threads()} threads"
    ]


ASK = """
import logging, sys, torch
logging.basicConfig(format="%(message)s")
from fairy2i import METHODS, PackedLinear
from fairy2i.packed import use_backend
layer = PackedLinear(4, 4, scheme=METHODS["complex_phase_v2"]).eval()
for _ in range(2):
    print(tuple(layer(torch.ones(1, 4)).shape), layer.backend_for())
try:
    use_backend(layer, "cpu_exact")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["missing", "corrupt", "foreign", "off"])
def test_a_library_that_is_missing_broken_or_foreign_is_told_once_and_pytorch_multiplies(kind, tmp_path):
    path = tmp_path / "library.so"
    if kind == "corrupt":
        path.write_bytes(Path(cpu.library_path()).read_bytes()[:1000])
    elif kind == "foreign":
        import _ctypes

        path = Path(_ctypes.__file__)
    environment = {
        **os.environ,
        "FAIRY2I_CPU_LIBRARY": "off" if kind == "off" else str(path),
        "FAIRY2I_BACKEND": "auto",
    }
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=300)
    said = {
        "missing": f"there is no {path}: the package was installed without a C++ compiler",
        "corrupt": f"{path} cannot be loaded",
        "foreign": f"{path} is not fairy2i's library",
        "off": "FAIRY2I_CPU_LIBRARY is off",
    }[kind]
    assert done.stdout.splitlines()[:2] == ["(1, 4) reference"] * 2
    assert done.stdout.splitlines()[2].startswith(said)
    assert done.stderr.count(f"packed layers are multiplied by PyTorch, slowly: {said}") == 1


# What was compiled


def test_the_inner_loops_of_exact_have_no_multiplication(tmp_path):
    if not (shutil.which("objdump") and shutil.which("g++")):
        pytest.skip("needs objdump and g++")
    if "avx512" not in cpu.instruction_sets():
        pytest.skip("checked for x86")
    for name in ("portable", "avx2", "avx512"):
        target = tmp_path / f"{name}.o"
        command = ["g++", "-std=c++17", "-O3", "-fPIC", *VECTOR.get(name, []), "-w"]
        subprocess.run([*command, "-c", CSRC / f"{name}.cpp", "-o", target], check=True)
        text = subprocess.run(["objdump", "-dC", target], capture_output=True, text=True, check=True).stdout
        loops = {}
        for block in text.split("\n\n"):
            if title := re.match(r"[0-9a-f]+ <.*?(exact_\w+).*>:", block.strip()):
                loops.setdefault(title[1], []).append(block)
        assert loops.keys() >= {"exact_phase_segment", "exact_real_segment"}
        for kernel, blocks in loops.items():
            for block in blocks:
                assert not re.search(r"\tv?(f?n?m(ul|add|sub)|fmadd|fnmadd|fmsub|dpp)[a-z0-9]*[ps][sd]\b", block), (
                    kernel
                )
                assert re.search(r"\tv?(add|sub)[ps]s\b", block), kernel
    text = subprocess.run(["objdump", "-dC", tmp_path / "avx512.o"], capture_output=True, text=True, check=True).stdout
    assert "vmulps" in text  # scales, elsewhere: the search can find what it looks for


SANITIZED = """
import sys, torch
sys.path[:0] = [{here!r}, {tests!r}]
import test_cpu as t
for scheme in t.SCHEMES[2:7] + t.SCHEMES[10:12] + t.SCHEMES[-3:]:
    for shape in t.SHAPES[1:3] + t.SHAPES[4:]:
        for backend in t.BACKENDS:
            layer = t.random_layer(scheme, *shape, backend=backend, bias=True)
            codes = layer.codes.clone()
            for name in t.SETS:
                with t.using(name):
                    for tokens in (1, 2, 53):
                        layer(torch.randn(tokens, shape[1]))
            assert torch.equal(layer.codes, codes)
import test_decoding as d
for rows in (1, 3):
    d.decode(d.packed_model("qwen2", backend="cpu_int8", intermediate_size=50), rows)
print("clean")
"""


def test_sanitizers_find_nothing(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    if "avx512" not in cpu.instruction_sets():
        pytest.skip("built here for x86")
    objects = []
    for name in ("dispatch", "decoder", "portable", "avx2", "avx512"):
        command = ["g++", "-std=c++17", "-O1", "-g", "-fPIC", "-w", "-fsanitize=address,undefined"]
        command += ["-fno-sanitize-recover=all", "-DFAIRY2I_X86", *VECTOR.get(name, [])]
        objects.append(tmp_path / f"{name}.o")
        subprocess.run([*command, "-c", CSRC / f"{name}.cpp", "-o", objects[-1]], check=True)
    library = tmp_path / "sanitized.so"
    subprocess.run(["g++", "-shared", "-fsanitize=address,undefined", *objects, "-o", library, "-pthread"], check=True)
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "FAIRY2I_CPU_LIBRARY": str(library),
    }
    script = SANITIZED.format(here=str(Path(__file__).parent), tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"
    assert "runtime error" not in done.stderr


def test_neon_agrees_with_the_portable_kernels_under_an_emulator(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    objects = []
    for name in ("dispatch", "decoder", "portable", "neon"):
        more = ["-march=armv8.2-a+dotprod"] if name == "neon" else []
        objects.append(tmp_path / f"{name}.o")
        command = [compiler, "-O2", "-std=c++17", "-w", "-DFAIRY2I_ARM", *more]
        subprocess.run([*command, "-c", CSRC / f"{name}.cpp", "-o", objects[-1]], check=True)
    source = Path(__file__).parent / "neon" / "compare.cpp"
    subprocess.run([compiler, "-static", *objects, source, "-o", tmp_path / "compare", "-pthread"], check=True)
    done = subprocess.run([emulator, tmp_path / "compare"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "compared 210\n")


def test_the_description_of_a_layer_is_that_of_the_codes():
    layer = QATLinear(40, 24, scheme=METHODS["complex_phase_v2"])
    assert code_rows_and_columns(24, 40, 0) == layer.scheme.code_shape(24, 40)[-2:]
    assert code_rows_and_columns(24, 40, 1) == METHODS["bitnet"].code_shape(24, 40)


# Rotation


@EACH_BACKEND
@pytest.mark.parametrize(("features", "rotation"), [(8, 4), (172, 64), (48, 16), (192, 64), (1024, 256)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_library_rotates_activations_to_the_bits_of_pytorch(features, rotation, tokens, backend):
    scheme = PhaseScheme(stages=2, granularity="row", scales="learned", rotation=rotation)
    layer = random_layer(scheme, 10, features, backend, True)
    x = torch.randn(tokens, features)
    found = layer(x)
    plain = random_layer(replace(scheme, rotation=0), 10, features, backend, True)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(found, plain(rotate(x, rotation)))
    assert not torch.equal(found, plain(x))
