"""The GPU's kernels for packed layers: every scheme and way against PyTorch, and what surrounds them.

On the processor Triton's interpreter runs them (tests/conftest.py turns it on), on small shapes, and the compiler makes
machine code of them; tests marked gpu run them for what they are.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from layers import DTYPES, NEEDS_TRITON, on_both, on_gpu, random_layer
from torch import nn

from fairy2i import METHODS, PhaseScheme, RealScheme
from fairy2i.cli import main
from fairy2i.ops import gpu
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
WAYS = ["planes", "wide", "blocks", "dense"]


def words_and_layout(layer):
    layout = layout_of(layer.scheme, "gpu")
    shape = code_rows_and_columns(layer.out_features, layer.in_features, layout[0])
    return gpu.repack(layer.codes, shape, layout), layout


def check(layer, x, way):
    """The error is at most twice that of the plain path in the same dtype, plus a unit of the result's own rounding."""
    words, layout = words_and_layout(layer)
    weight = layer.dense_weight()
    exact = F.linear(x.double(), weight.double(), layer.bias.double())
    plain = F.linear(x, weight.to(x.dtype), layer.bias.to(x.dtype)).double() - exact
    y = gpu.linear(x, words, layer.scales, layer.bias, layer.out_features, layout, way=way)
    assert y.dtype == x.dtype and y.shape == exact.shape
    error = y.double() - exact
    floor = torch.finfo(x.dtype).eps / 2 * exact.norm()
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
    if way == "wide" and not gpu.takes_wide(layout, torch.bfloat16):
        pytest.skip("for phase codes with scales of tensors or rows")
    shapes = SHAPES[1:2]
    if device == "cuda":  # most of the time goes into compiling
        shapes = (
            [*SHAPES, *BIG] if scheme in (METHODS["complex_phase_v2"], METHODS["fairy2i_w2"]) else [*SHAPES, BIG[2]]
        )
    for out_features, in_features in shapes:
        layer = random_layer(scheme, out_features, in_features, bias=True, device=device)
        for dtype in DTYPES if way != "wide" else [torch.bfloat16]:
            for tokens in (1, 3, 70) if device == "cuda" else (3,):
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


@on_both
@pytest.mark.parametrize("tokens, split", [(1, 3), (5, 2), (40, 1)])
def test_tokens_and_splits(device, tokens, split, monkeypatch):
    from fairy2i.ops.triton import multiply

    layer = random_layer(PhaseScheme(granularity="row", scales="learned"), 22, 1200, bias=True, device=device)
    for signs, inner in ((32, 1), (128, 1), (32, 2), (16, 4)):
        config = multiply.Config(signs=signs, split=split, inner=inner)
        monkeypatch.setattr(multiply, "planes_config", lambda *_, config=config: config)
        check(layer, torch.randn(tokens, 1200, device=device).bfloat16(), "planes")
    for swap in (False, True):
        wide = multiply.WideConfig(tokens=16, rows=16, words=16, split=split, swap=swap)
        monkeypatch.setattr(multiply, "wide_config", lambda *_, wide=wide: wide)
        check(layer, torch.randn(tokens, 1200, device=device).bfloat16(), "wide")
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
    assert "backend=gpu (Triton)" in repr(layers[0])


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
    x = torch.randn(1, 1024, device=device).bfloat16()
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
    assert "Backend  GPU kernels (gpu): on" in capsys.readouterr().out


MACHINE_CODE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fairy2i.ops.triton import packed

def build(kernel, warps=4, **known):
    types = {"x": "*bf16", "y": "*bf16", "dense": "*bf16", "words": "*i16", "scales": "*fp32"}
    types |= {"out": "*fp16", "normal": "*fp16", "factors": "*fp32", "powers": "*fp32"}
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
build(packed.normalize, STAGES=2, ROWS=True, WIDTH=4096, BR=256, OVERLAP=True)
build(packed.write_dense_bf16, **codes, ROWS=True, BR=32, WB=32, OVERLAP=True, EXACT=False)
for swap in (False, True):
    wide = build(packed.multiply_wide, 8, **codes, ROWS=True, SPLIT=2, BR=64, BM=256, WB=32, SWAP=swap, DEPTH=3,
                 OVERLAP=True, EXACT=False)["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n" in wide and "add.rn.f16x2" in wide
codes["KIND"] = 0
for groups in (0, 2):
    build(packed.multiply_blocks, **codes, GROUPS=groups, SPLIT=1, BR=64, BM=16, OVERLAP=False, EXACT=False)
"""


def test_the_compiler_takes_the_kernels(tmp_path):
    """What the interpreter lets pass, the compiler may not."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", MACHINE_CODE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
