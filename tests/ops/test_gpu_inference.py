"""The GPU's kernels for packed layers: every scheme and way against PyTorch, and what surrounds them.

On the processor Triton's interpreter runs them (tests/conftest.py turns it on), on small shapes, and the compiler makes
machine code of them; the kernel in CUDA C++ is compiled by g++ there (cuda_on_cpu). Tests marked gpu run them for what
they are.
"""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import decode_library
from layers import DTYPES, NEEDS_TRITON, on_both, on_gpu, random_layer
from torch import nn

from fairy2i import METHODS, PhaseScheme, RealScheme
from fairy2i.cli import main
from fairy2i.ops import cuda, gpu
from fairy2i.ops.cuda import decode
from fairy2i.ops.inference import code_rows_and_columns, layout_of
from fairy2i.packed import use_backend

pytestmark = NEEDS_TRITON
SCHEMES = [
    *METHODS.values(),
    PhaseScheme(stages=4, granularity="row", scales="learned"),
    PhaseScheme(stages=5, granularity="row", scales="learned"),
    PhaseScheme(stages=3, granularity="tile", tile=5),
    PhaseScheme(stages=2, granularity="tile", tile=64),
    *(RealScheme(levels=levels, granularity="row") for levels in (2, 3)),
    *(RealScheme(levels=levels, granularity="tile", tile=7) for levels in (2, 3)),
]
SHAPES = [(2, 2), (22, 34), (6, 518)]
BIG = [(2, 8192), (576, 1536), (1002, 334), (4096, 4096), (11008, 4096)]
TOKENS_OF = {("decode", "cuda"): (1, 2, 3, 5, 8, 13, 16), ("decode", "cpu"): (1, 3, 13)}
WAYS = ["decode", "planes", "wide", "blocks", "dense"]


def words_and_layout(layer):
    layout = layout_of(layer.scheme, "gpu")
    shape = code_rows_and_columns(layer.out_features, layer.in_features, layout[0])
    return gpu.repack(layer.codes, shape, layout), layout


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("decode")


@pytest.fixture(autouse=True)
def decode_without_a_gpu(libraries, monkeypatch):
    """Let the way "decode" run where there is no GPU; nothing but a test asks for it there."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(decode, "_ready", decode_library.ready(libraries, decode.Config(warps=4, depth=2)))


def skip_without_decode():
    if torch.cuda.is_available():
        if reason := gpu.why_no_cuda():
            pytest.skip(reason)
    elif shutil.which("g++") is None:
        pytest.skip("needs g++")


def check(layer, x, way):
    """The error is at most twice that of the plain path in the same dtype, plus a unit of the result's own rounding.

    A second unit for a rotation: activations are rounded once more when they are rotated, which the plain path, whose
    weight is rotated back before, does not do.
    """
    words, layout = words_and_layout(layer)
    weight = layer.dense_weight()
    exact = F.linear(x.double(), weight.double(), layer.bias.double())
    plain = F.linear(x, weight.to(x.dtype), layer.bias.to(x.dtype)).double() - exact
    y = gpu.linear(x, words, layer.scales, layer.bias, layer.out_features, layout, way=way)
    assert y.dtype == x.dtype and y.shape == exact.shape
    error = y.double() - exact
    floor = torch.finfo(x.dtype).eps / 2 * exact.norm() * (2 if layer.scheme.rotation else 1)
    assert error.norm() <= 2 * plain.norm() + floor
    assert error.abs().max() <= 2 * plain.abs().max() + torch.finfo(x.dtype).eps * exact.abs().max()
    return y


@on_both
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_come_back_from_words(device, scheme):
    for out_features, in_features in SHAPES:
        layer = random_layer(scheme, out_features, in_features, device=device)
        words, layout = words_and_layout(layer)
        shape = code_rows_and_columns(out_features, in_features, layout[0])
        assert torch.equal(gpu.unpack(words, layer.codes.shape, shape, layout), layer.codes)


@on_both
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_way_is_as_exact_as_pytorch(device, scheme, way):
    layout = layout_of(scheme, "gpu")
    if way == "planes" and scheme.granularity == "tile":
        pytest.skip("planes apply scales to sums over whole rows")
    if way == "wide":
        if device == "cpu":
            pytest.skip("test_gpu_wide.py runs it there")
        if not gpu.takes_wide(layout, torch.bfloat16, 16):
            pytest.skip(gpu.why_no_cuda("wide") or "for phase codes with scales of tensors or rows, up to 4 stages")
    if way == "decode":
        if layout[0] != 0 or layout[1] > 4 or layout[2] == 2:
            pytest.skip("for phase codes with scales of tensors or rows, up to 4 stages")
        skip_without_decode()
    shapes = SHAPES[1:2]
    if device == "cuda":  # most of the time goes into compiling
        shapes = (
            [*SHAPES, *BIG] if scheme in (METHODS["complex_phase_v2"], METHODS["fairy2i_w2"]) else [*SHAPES, BIG[2]]
        )
    for out_features, in_features in shapes:
        if way == "wide" and not gpu.takes_wide(layout, torch.bfloat16, in_features):
            continue
        layer = random_layer(scheme, out_features, in_features, bias=True, device=device)
        for dtype in DTYPES if way != "wide" else [torch.bfloat16]:
            for tokens in TOKENS_OF.get((way, device), (1, 3, 70) if device == "cuda" else (3,)):
                if way == "decode" and not decode.takes(layout, words_and_layout(layer)[0], tokens, dtype):
                    continue
                x = torch.randn(tokens, in_features, device=device).to(dtype)
                y = check(layer, x, way)
                if device == "cuda":
                    assert torch.equal(y, check(layer, x, way)), "the same bits in each run"


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_one_sided_activations(device, dtype):
    """Sums of +-activations must not drown in the sum of all of them."""
    layer = random_layer(METHODS["complex_phase_v2"], 6, 1100, bias=True, device=device)
    for x in (torch.ones(2, 1100), torch.rand(2, 1100) + 3, torch.randn(2, 1100) * torch.randn(1100).mul(3).exp()):
        check(layer, x.to(device, dtype), "planes")


FORMS = [  # some: a block has more tiles than wait for a barrier
    decode.Config(warps=4, depth=2),
    decode.Config(warps=4, words=4, depth=3),
    decode.Config(warps=8, depth=2, parts=1),
    decode.Config(warps=4, depth=2, blocks=2, parts=4),
    decode.Config(warps=4, depth=2, halves=True),
    decode.Config(warps=8, words=4, depth=2, ranges=2, halves=True),
    decode.Config(warps=4, depth=3, blocks=2, parts=1, ranges=4, halves=True),
]


@on_both
@pytest.mark.parametrize("config", FORMS, ids=str)
def test_decode_in_other_forms(device, config, monkeypatch):
    skip_without_decode()
    if config.ranges > 1 and not decode.chip(torch.device(device)).clusters:
        pytest.skip("needs a GPU with clusters")
    monkeypatch.setattr(decode, "SUMS", 1)
    multiply = decode.multiply
    monkeypatch.setattr(decode, "multiply", lambda *args: multiply(*args, config))
    tokens = (4, 8, 16) if config.halves else (1, 1, 4)
    for shape, count in zip(((6, 2), (130, 1200), (38, 1042)), tokens, strict=True):
        layer = random_layer(PhaseScheme(granularity="row", scales="learned"), *shape, bias=True, device=device)
        x = torch.randn(count, shape[1] + 8, device=device).bfloat16()[:, : shape[1]]
        assert torch.equal(check(layer, x, "decode"), check(layer, x.clone(), "decode"))


@pytest.mark.parametrize("chip", [decode.H100, decode.Chip(108, 163 << 10, False)], ids=str)
def test_what_fits_into_the_memory_of_a_block(chip):
    refused = set()
    for shape in (*BIG, (4096, 11008), (8192, 28672)):
        for stages in (1, 2, 3, 4):
            words = gpu.words_shape(shape[0] // 2, shape[1] // 2, 0, stages)
            for tokens in (1, 2, 4, 8, 12, 16):
                found = decode._planned(words, stages, tokens, torch.bfloat16, chip, None)
                if found is None:
                    refused.add((shape, tokens))
                    continue
                assert found.memory * found.config.blocks <= chip.memory and found.grid % found.config.ranges == 0
                assert found.config.depth > 1 and found.tokens >= tokens and (chip.clusters or found.config.ranges == 1)
    assert {shape for shape, _ in refused} <= {(8192, 28672)} if chip.clusters else ((4096, 11008), 16) in refused


@on_both
@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_of_any_activations(device, dtype, tokens):
    """Numbers have one exponent for a token: neither others nor what is far from 1 may harm it."""
    skip_without_decode()
    if tokens > 2 and dtype == torch.float32:
        pytest.skip("for two tokens of float32 at most")
    layer = random_layer(METHODS["complex_phase_v2"], 6, 1100, bias=True, device=device)
    normal, small, large = torch.randn(3, tokens, 1100)
    small, large = (small * 1e-3, large * 10) if dtype == torch.float16 else (small * 1e-30, large * 1e30)
    one_sided, spread = torch.rand(tokens, 1100) + 3, torch.randn(tokens, 1100) * torch.randn(1100).mul(3).exp()
    outlier = normal.clone()
    outlier[:, 17] *= 1e4 if dtype != torch.float16 else 1e3
    for x in (torch.ones(tokens, 1100), one_sided, spread, small, large, outlier):
        check(layer, x.to(device, dtype), "decode")
    mixed = torch.cat([small[:1], large[1:2], normal[2:]]).to(device, dtype)
    together = check(layer, mixed, "decode")
    assert torch.equal(check(layer, mixed.roll(1, 0), "decode"), together.roll(1, 0))
    for i in range(2 if tokens == 2 else 0):
        assert torch.equal(check(layer, mixed[i : i + 1], "decode")[0], together[i])
    y = check(layer, torch.zeros(tokens, 1100, device=device, dtype=dtype), "decode")
    assert torch.equal(y, layer.bias.to(dtype).expand(tokens, -1))


@on_both
@pytest.mark.parametrize("way", ["decode", "planes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_makes_the_outputs_of_its_token_nan(device, dtype, way):
    if way == "decode":
        skip_without_decode()
    layer = random_layer(METHODS["complex_phase_v2"], 6, 48, device=device)
    words, layout = words_and_layout(layer)
    for value in (float("nan"), float("inf"), -float("inf")):
        for tokens in (2, 6) if dtype != torch.float32 else (2,):
            x = torch.randn(tokens, 48, device=device).to(dtype)
            x[1, 30] = value
            y = gpu.linear(x, words, layer.scales, None, 6, layout, way=way)
            assert y[1].isnan().all() and y[torch.arange(tokens) != 1].isfinite().all()


@on_both
def test_decode_of_joined_layers(device):
    skip_without_decode()
    sizes = [18, 4]
    parts = [random_layer(METHODS["complex_phase_v2"], size, 64, bias=True, device=device) for size in sizes]
    layout = layout_of(parts[0].scheme, "gpu")
    words = torch.cat([words_and_layout(part)[0] for part in parts], dim=2)
    scales = gpu.group_scales([part.scales for part in parts], [size // 2 for size in sizes], layout)
    places = gpu.group_places(sizes, 0, torch.device(device))
    x = torch.randn(2, 3, 64, device=device)[:, 1].bfloat16()
    for dtype in DTYPES:
        bias = torch.cat([part.bias for part in parts]).to(dtype)
        y = gpu.linear(x, words, scales, bias, 22, (*layout[:2], 1, *layout[3:]), places, way="decode")
        for part, found in zip(parts, y.split(sizes, dim=-1), strict=True):
            exact = F.linear(x.double(), part.dense_weight().double(), part.bias.to(dtype).double())
            torch.testing.assert_close(found, exact.bfloat16(), rtol=1e-2, atol=1e-2)


@on_both
@pytest.mark.parametrize("tokens, split", [(1, 3), (5, 2), (40, 1)])
def test_tokens_and_splits(device, tokens, split, monkeypatch):
    from fairy2i.ops.triton import multiply

    layer = random_layer(PhaseScheme(granularity="row", scales="learned"), 22, 1200, bias=True, device=device)
    for signs, inner in ((32, 1), (128, 1), (32, 2), (16, 4)):
        config = multiply.Config(signs=signs, split=split, inner=inner)
        monkeypatch.setattr(multiply, "planes_config", lambda *_, config=config: config)
        check(layer, torch.randn(tokens, 1200, device=device).bfloat16(), "planes")
    config = multiply.Config(signs=32, warps=4, split=split)
    monkeypatch.setattr(multiply, "blocks_config", lambda *_, config=config: config)
    check(layer, torch.randn(tokens, 1200, device=device).bfloat16(), "blocks")


@on_both
@pytest.mark.parametrize(
    "scheme", [METHODS["complex_phase_v2"], METHODS["fairy2i_w3"], METHODS["bitnet_1_58"]], ids=str
)
def test_layers_of_one_input_are_one_call_and_nothing_saved_changes(device, scheme, monkeypatch):
    model = nn.Module()
    for name, size, bias in (("q_proj", 36, True), ("k_proj", 10, False), ("v_proj", 12, True)):
        model.add_module(name, random_layer(scheme, size, 48, bias=bias, device=device))
    layers = [model.q_proj, model.k_proj, model.v_proj]
    model.forward = lambda x: [layer(x) for layer in layers]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 48, device=device)
    expected = model(x)
    calls = []
    use_backend(model, "gpu")
    linear = gpu.linear
    monkeypatch.setattr("fairy2i.packed.packed_linear", lambda *args: calls.append(1) or linear(*args))
    for y, ref in zip(model(x), expected, strict=True):
        torch.testing.assert_close(y, ref, rtol=1e-5, atol=1e-4)
    assert len(calls) == 1
    layers[0](x)
    torch.testing.assert_close(layers[0](x), expected[0], rtol=1e-5, atol=1e-4)  # the others were not asked
    assert len(calls) == 3 and layers[0]._group is None
    for y, ref in zip(copy.deepcopy(model.k_proj)(x), expected[1], strict=True):
        torch.testing.assert_close(y, ref, rtol=1e-5, atol=1e-4)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.to(torch.float64)
    assert all(torch.equal(value.to(before[key]), before[key]) for key, value in model.state_dict().items())
    assert f"backend=gpu ({gpu.languages(layout_of(scheme, 'gpu'))})" in repr(layers[0])


def on_an_h100(monkeypatch, *ways):
    monkeypatch.setattr(gpu, "why_no_cuda", lambda way="decode": None if way in ways else "not here")


def test_which_way(monkeypatch):
    def way(tokens, scheme=METHODS["complex_phase_v2"], dtype=torch.bfloat16, features=64):
        layer = random_layer(scheme, 6, features)
        words, layout = words_and_layout(layer)
        return gpu.way_for(tokens, layout, dtype, words, features)

    tile = PhaseScheme(granularity="tile", tile=64)
    monkeypatch.setattr(gpu, "THRESHOLDS", gpu.Thresholds(decode=16, planes=16, wide=256, blocks=128))
    for ways in ((), ("decode",), ("decode", "wide")):
        on_an_h100(monkeypatch, *ways)
        few, many = ("decode" if "decode" in ways else "planes"), ("wide" if "wide" in ways else "dense")
        assert [way(tokens) for tokens in (1, 4, 5, 16, 17, 256, 257)] == [few] * 4 + [many] * 2 + ["dense"]
        assert [way(tokens, dtype=torch.float32) for tokens in (2, 3, 17, 129)] == [few, "planes", "blocks", "dense"]
        assert way(17, features=24) == way(17, PhaseScheme(stages=5)) == "dense"
        assert [way(tokens, tile) for tokens in (1, 128, 129)] == ["blocks", "blocks", "dense"]
        assert [way(tokens, METHODS["bitnet"]) for tokens in (1, 16, 17)] == ["planes", "planes", "blocks"]
        shown = [gpu.languages(layout_of(scheme, "gpu")) for scheme in (METHODS["fairy2i_w2"], tile)]
        assert shown == ["CUDA C++ and Triton" if "decode" in ways else "Triton", "Triton"]


def test_what_kernels_of_cuda_need(monkeypatch):
    def refuse(*_):
        raise cuda.CompilerError("the GPU is younger")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "driver", lambda: None)
    monkeypatch.setattr(cuda, "compiled", lambda _, target: seen.append(target))
    seen = []
    for capability, few, many in (
        ((7, 5), False, False),
        ((8, 0), True, False),
        ((9, 0), True, True),
        ((10, 3), True, False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, capability=capability: capability)
        why = cuda.why_off.__wrapped__(), cuda.why_off.__wrapped__((9, 0), (10, 0))
        assert [reason is None for reason in why] == [few, many]
        assert few or why[0] == "they need a GPU of compute capability 8.0 or more"
        assert many or why[1] == "they need a GPU of compute capability 9.0"
    assert seen == ["sm_80", "sm_90a", "sm_90a", "sm_103a"]
    monkeypatch.setattr(cuda, "compiled", refuse)
    assert cuda.why_off.__wrapped__() == "the GPU is younger"


def test_kernels_are_compiled_when_the_backend_is_chosen(monkeypatch):
    scheme = METHODS["fairy2i_w2"]
    model = nn.ModuleDict({name: random_layer(scheme, 20, 64) for name in ("gate_proj", "up_proj", "down_proj")})
    model["norm"] = nn.LayerNorm(4, dtype=torch.bfloat16)
    on_an_h100(monkeypatch, "decode")
    prepared = []
    monkeypatch.setattr(decode, "prepare", lambda words, *rest: prepared.append((words.shape[2], *rest)))
    use_backend(model, "gpu")
    layout = layout_of(scheme, "gpu")
    joined = (*layout[:2], 1, *layout[3:])
    assert prepared == [(20, joined, torch.bfloat16, 64), (10, layout, torch.bfloat16, 64)]
    assert "backend=gpu (CUDA C++ and Triton)" in repr(model["down_proj"])


@on_both
def test_one_graph_with_joined_layers(device):
    scheme = METHODS["fairy2i_w2"]
    model = nn.ModuleDict(
        {name: random_layer(scheme, 20, 64, bias=True, device=device) for name in ("gate_proj", "up_proj")}
    )
    model.forward = lambda x: model["gate_proj"](x) * model["up_proj"](x)
    use_backend(model, "gpu")
    x = torch.randn(1, 64, device=device)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x), expected)


@on_gpu
@pytest.mark.parametrize("scheme", [METHODS["complex_phase_v2"], METHODS["fairy2i_w2"]], ids=str)
def test_replayed_as_a_cuda_graph(device, scheme):
    layer = use_backend(random_layer(scheme, 512, 1024, bias=True, device=device), "gpu")
    for tokens in (1, 16):
        x = torch.randn(tokens, 1024, device=device).bfloat16()
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, layer(x))


@on_both
@pytest.mark.parametrize("scheme", [METHODS["complex_phase_v3"], METHODS["bitnet"]], ids=str)
def test_opcheck(device, scheme):
    layer = random_layer(scheme, 6, 10, bias=True, device=device)
    words, layout = words_and_layout(layer)
    x = torch.randn(2, 10, device=device)
    torch.library.opcheck(
        torch.ops.fairy2i.packed_linear, (x, words, layer.scales, layer.bias.detach(), 6, layout, None)
    )


@on_both
def test_no_tokens_and_wrong_sizes(device):
    layer = random_layer(METHODS["complex_phase_v2"], 6, 10, bias=True, device=device)
    words, layout = words_and_layout(layer)
    assert gpu.linear(torch.zeros(0, 10, device=device), words, layer.scales, None, 6, layout).shape == (0, 6)
    with pytest.raises(ValueError, match="needs words of"):
        gpu.linear(torch.zeros(1, 10, device=device), words[:, :, :2], layer.scales, None, 6, layout)
    with pytest.raises(TypeError, match="float64"):
        gpu.linear(torch.zeros(1, 10, device=device).double(), words, layer.scales, None, 6, layout)
    with pytest.raises(RuntimeError, match="10 input features"):
        use_backend(layer, "gpu")(torch.zeros(1, 8, device=device))


def test_asked_for_where_it_cannot_be_used(monkeypatch):
    layer = random_layer(METHODS["complex_phase_v2"], 6, 10)
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no GPU"):
            use_backend(layer, "gpu")
    layer.backend = "gpu"
    with pytest.raises(RuntimeError, match="cannot be used"):
        layer(torch.zeros(1, 10))
    assert "backend=off (the backend gpu cannot be used" in repr(layer)


def test_the_doctor_knows_the_backend(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Backend  GPU kernels (gpu): on" in shown and "in CUDA C++, for many tokens: off, " in shown


MACHINE_CODE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fairy2i.ops.triton import packed

def build(kernel, warps=4, **known):
    types = {"x": "*bf16", "y": "*bf16", "dense": "*bf16", "words": "*i16", "scales": "*fp32"}
    names = kernel.arg_names
    known |= {name: None for name in ("bias", "places") if name in names}
    signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in names}
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in known and name != "chunks"}
    source = ASTSource(kernel, signature, known, even)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm

codes = dict(KIND=0, STAGES=2, PASSES=1, G=8, BK=32, PLACES=False)
planes = build(packed.multiply_planes, **codes, ROWS=True, PIECES=1, MAGIC=True, SPLIT=1, INNER=4, BR=16, NC=8,
               EVEN=True, FULL=True, DEPTH=2, OVERLAP=True, EXACT=False)["ptx"]
assert all(what in planes for what in ("lop3.b32", "mma.sync", "cp.async", "prefetch.L2", "griddepcontrol.wait"))
build(packed.write_dense, **codes, GROUPS=1, BR=32)
del codes["KIND"]
dense = build(packed.write_dense_bf16, **codes, ROWS=True, BR=32, WB=32, OVERLAP=True, EXACT=False)["ptx"]
assert "add.rn.f16x2" in dense
codes["KIND"] = 0
for groups in (0, 2):
    build(packed.multiply_blocks, **codes, GROUPS=groups, SPLIT=1, BR=64, BM=16, OVERLAP=False, EXACT=False)
"""


def test_the_compiler_takes_the_kernels(tmp_path):
    """What the interpreter lets pass, the compiler may not."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", MACHINE_CODE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
