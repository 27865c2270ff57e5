"""The kernels of quantized training against PyTorch: codes, scales and dense weights are the same, bit for bit.

On the processor Triton's interpreter runs them (tests/conftest.py turns it on), on small shapes; tests marked gpu run
them for what they are.
"""

import pytest
import torch
from layers import DTYPES, NEEDS_TRITON, on_both, on_gpu
from torch import nn

from fairy2i import METHODS, PhaseScheme, QATLinear, qat
from fairy2i.ops import training as ops
from fairy2i.phase_quant import SCALE_MIN, phase_dequantize, phase_quantize, phase_scale_gradient
from fairy2i.reuse import KEPT, reuse_quantized

pytestmark = NEEDS_TRITON
run = torch.ops.fairy2i
GROUPS = [("tensor", 64), ("row", 64), ("tile", 5)]
LAYOUTS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.T.contiguous().T,
    "every second column": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "inside another": lambda w: nn.functional.pad(w, (3, 5, 1, 2))[1 : 1 + w.shape[0], 3 : 3 + w.shape[1]],
}
BIG = [(2, 100002), (100002, 2), (130, 258), (576, 1536), (1000, 334), (4096, 4096), (11008, 4096)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Use the kernels on every device, and in compiled layers of any size."""
    monkeypatch.setattr(ops, "_backend", "triton")
    monkeypatch.setattr(qat, "COMPILED", 0)


def settings(granularity, tile):
    return {"granularity": granularity, "tile": tile}


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_as_reference(weight, stages, granularity, tile, given=None, dtype=None):
    """Check codes, scales and the dense weight of all ways to get them; return codes and scales."""
    dtype = dtype or weight.dtype
    groups = settings(granularity, tile)
    codes, scales = phase_quantize(weight, stages=stages, scales=given, **groups)
    dense = phase_dequantize(codes, scales, **groups).to(weight.dtype).to(dtype)
    how = (stages, granularity, tile, 0)
    if given is None:
        found, its_scales, blocks = run.phase_quantize_mean(weight, *how, dtype, True)
        assert equal(its_scales, scales)
        assert equal(ops.from_blocks(blocks, stages), codes)
        assert equal(found, dense)
        given = scales
    found, blocks = run.phase_quantize_given(weight, given, *how, dtype, True, None)
    assert equal(ops.from_blocks(blocks, stages), codes)
    assert equal(found, dense)
    assert equal(run.phase_dequantize_blocks(blocks, given, *how, weight.dtype, dtype, None), dense)
    return codes, scales


@on_both
@pytest.mark.parametrize("granularity, tile", GROUPS, ids=str)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_scales_and_dense_weight_equal_the_reference(device, dtype, stages, granularity, tile):
    shapes = [(6, 30), (34, 70)] if device == "cuda" else [(6, 30)]
    for shape in [(2, 2), *shapes] if dtype == torch.bfloat16 else shapes:
        assert_as_reference(torch.randn(shape, device=device).mul(0.02).to(dtype), stages, granularity, tile)


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device, layout, dtype):
    weight = LAYOUTS[layout](torch.randn(12, 20, device=device).to(dtype))
    for granularity, tile in GROUPS if device == "cuda" else GROUPS[:2]:
        assert_as_reference(weight, 2, granularity, tile)


@on_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("granularity, tile", GROUPS, ids=str)
def test_ties_and_zeros_fall_the_same_way(device, granularity, tile, dtype):
    weight = torch.randint(-2, 3, (14, 22), device=device).to(dtype) / 4  # half of the entries lie on a border
    codes, _ = assert_as_reference(weight, 3, granularity, tile)
    assert set(codes.flatten().tolist()) == {0, 1, 2, 3}
    assert_as_reference(torch.zeros(4, 6, device=device, dtype=dtype), 2, granularity, tile)


@on_both
@pytest.mark.parametrize("granularity, tile", GROUPS, ids=str)
def test_zeros_of_either_sign_and_rests_of_zero_are_the_reference_s(device, granularity, tile):
    weight = torch.randint(-2, 3, (14, 22), device=device) / 2.0
    weight = torch.where(torch.rand_like(weight) < 0.3, -0.0, weight)
    shape = phase_quantize(weight, stages=3, **settings(granularity, tile))[1].shape
    assert_as_reference(weight, 3, granularity, tile, torch.full(shape, 0.5, device=device))
    assert_as_reference(weight.sign(), 3, granularity, tile)


@on_both
@pytest.mark.parametrize("shape", [(8, 48), (10, 46)], ids=["whole chunks", "parts of chunks"])
def test_programs_share_chunks_however_many_they_are(monkeypatch, device, shape):
    from fairy2i.ops.triton import quantize

    for programs, depth in ((1, 1), (4, 2)):
        plan = quantize.Plan(rows=2, cols=8, warps=1, programs=programs, depth=depth)
        monkeypatch.setattr(quantize, "_plan", lambda *_, plan=plan: plan)
        weight = torch.randn(shape, device=device)
        for stages in (1, 2):
            codes, scales = assert_as_reference(weight, stages, "tensor", 64)
        grad = torch.randn(shape, device=device)
        found = run.phase_scale_gradient(grad, weight, None, scales, stages, "tensor", 64, 0)
        assert equal(found, phase_scale_gradient(grad, codes, granularity="tensor"))
        weight[3, 5] = float("inf")  # some programs meet it
        assert_as_reference(weight, 2, "tensor", 64)


@on_both
def test_rows_and_tiles_of_whole_chunks_and_scales_of_small_weights(device):
    for granularity, tile in (("row", 64), ("tile", 4)):
        weight = torch.randn(8, 64, device=device)
        _, scales = assert_as_reference(weight, 2, granularity, tile)
        assert_as_reference(weight, 2, granularity, tile, scales * 1.1)
        weight[3, 5] = float("inf")
        assert_as_reference(weight, 2, granularity, tile)
    assert_as_reference(torch.randn(64, 192, device=device), 2, "tensor", 64)  # chunks of 32 x 32


@on_both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity, tile", GROUPS, ids=str)
def test_nan_and_infinity_are_the_reference_s(device, granularity, tile, bad):
    for row, column in ((0, 0), (1, 7), (9, 3)):
        weight = torch.randn(10, 14, device=device)
        weight[row, column] = bad
        _, scales = assert_as_reference(weight, 2, granularity, tile)
        assert not scales.isfinite().all()


@on_both
@pytest.mark.parametrize("granularity, tile", GROUPS, ids=str)
def test_given_scales_count_at_least_the_least(device, granularity, tile):
    weight = torch.randn(10, 14, device=device)
    given = phase_quantize(weight, stages=3, **settings(granularity, tile))[1] * 1.1
    given.flatten()[::3] = -1.0
    _, scales = assert_as_reference(weight, 3, granularity, tile, given)
    assert scales.min() == torch.tensor(SCALE_MIN)


@on_both
def test_scales_may_be_of_another_dtype_as_where_sharding_casts_them(device):
    weight, how = torch.randn(6, 10, device=device), (2, "row", 64, 0)
    codes, exact = phase_quantize(weight, stages=2, granularity="row")
    scales = exact.bfloat16()
    codes, _ = assert_as_reference(weight, 2, "row", 64, scales)
    found = run.phase_scale_gradient(weight, weight, None, scales, *how)
    assert equal(found, phase_scale_gradient(weight, codes, granularity="row"))


@on_both
def test_another_call_of_the_same_kind_is_right_too(device):
    around = torch.randn(6 * 10 + 1, device=device)
    for granularity, tile in GROUPS:
        for start in (0, 1, 0, 1):  # Triton compiles for addresses that are multiples of 16 bytes, or not
            assert_as_reference(around[start : start + 60].view(6, 10), 2, granularity, tile)
            around = around.roll(7)


@on_both
@pytest.mark.parametrize("master", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_are_rounded_to_the_master_s_dtype_and_then_to_the_activations(device, master, dtype):
    assert_as_reference(torch.randn(6, 10, device=device).to(master), 2, "row", 64, dtype=dtype)


@on_both
@pytest.mark.parametrize("granularity, tile", GROUPS, ids=str)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_scale_gradients_equal_the_reference(device, stages, granularity, tile):
    groups = settings(granularity, tile)
    for grad_dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        weight = torch.randn(12, 26, device=device)
        grad = torch.randn(26, 12, device=device, dtype=grad_dtype).T
        codes, scales = phase_quantize(weight, stages=stages, **groups)
        how = (scales, stages, granularity, tile, 0)
        found = run.phase_scale_gradient(grad, weight, None, *how)
        assert found.shape == scales.shape
        assert equal(found, phase_scale_gradient(grad, codes, **groups))
        assert equal(found, run.phase_scale_gradient(grad, grad, ops.to_blocks(codes), *how))


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 8])
def test_block_codes_hold_codes_without_loss(stages):
    codes = torch.randint(0, 4, (stages, 2, 3, 5), dtype=torch.uint8)
    blocks = ops.to_blocks(codes)
    assert blocks.shape == ((stages + 1) // 2, 3, 5)
    assert torch.equal(ops.from_blocks(blocks, stages), codes)


def test_a_worked_byte_of_block_codes():
    # u and w of the first stage are 2 and 1, of the second 3 and 0: 00 11 01 10
    assert ops.to_blocks(torch.tensor([2, 1, 3, 0], dtype=torch.uint8).view(2, 2, 1, 1)).item() == 0b00110110


@pytest.mark.parametrize("kernel", [False, True], ids=["PyTorch", "kernels"])
def test_ops_have_right_schemas_and_fakes(monkeypatch, kernel):
    if kernel and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    monkeypatch.setattr(ops, "_backend", "triton" if kernel else "torch")
    weight, how = torch.randn(6, 16), (3, "row", 64, 4)
    _, scales, blocks = run.phase_quantize_mean(weight, *how, None, True)
    some = torch.zeros(1)
    for dtype, codes in ((torch.float32, False), (None, True)):
        torch.library.opcheck(run.phase_quantize_mean.default, (weight, *how, dtype, codes))
        torch.library.opcheck(run.phase_quantize_given.default, (weight, scales, *how, dtype, codes, some))
    dtypes = (torch.bfloat16, torch.float32)
    torch.library.opcheck(run.phase_dequantize_blocks.default, (blocks, scales, *how, *dtypes, None))
    torch.library.opcheck(run.phase_scale_gradient.default, (weight, weight, blocks, scales, *how))


def test_what_kernels_do_not_cover_is_left_to_pytorch():
    assert ops.fused(torch.empty(0), 4)
    assert not ops.fused(torch.empty(0), 5)
    assert not ops.fused(torch.empty(0, dtype=torch.float64), 2)
    assert not ops.fused(torch.empty(0, device="meta"), 2)


def test_backends_are_chosen_by_name():
    assert ops.set_backend("torch") == "triton"
    assert not ops.fused(torch.empty(0), 2)
    assert ops.set_backend("auto") == "torch"
    assert not ops.fused(torch.empty(0), 2)  # on a processor
    with pytest.raises(ValueError, match="auto, torch, triton"):
        ops.set_backend("cuda")


# The layer

SCHEMES = {
    "v2": METHODS["complex_phase_v2"],
    "rows": PhaseScheme(stages=2, granularity="row"),
    "learned rows": PhaseScheme(stages=2, granularity="row", scales="learned"),
    "learned tensor": PhaseScheme(stages=1, granularity="tensor", scales="learned"),
    "joint": PhaseScheme(stages=2, granularity="row", scales="joint"),
}


def layer_step(layer, backend, kept=None, compiled=None):
    """Return the output and all gradients, by a backend."""
    forward = layer if compiled is None else compiled
    before = ops.set_backend(backend)
    try:
        layer.zero_grad()
        generator = torch.Generator().manual_seed(1)
        kind = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        x = torch.randn(2, 5, layer.in_features, generator=generator).to(**kind).requires_grad_()
        grad = torch.randn(2, 5, layer.out_features, generator=generator).to(**kind)
        if kept is None:
            y = forward(x)
            y.backward(grad)
        else:
            with reuse_quantized(layer, kept):
                y = forward(x)
                y.backward(grad)
        return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
    finally:
        ops.set_backend(before)


@on_both
@pytest.mark.parametrize("turned", [False, True], ids=["(out, in)", "(in, out)"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_has_the_bits_of_pytorch(device, scheme, turned):
    kind = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    layer = QATLinear(24, 10, scheme=SCHEMES[scheme], fan_in_fan_out=turned, **kind)
    expected = layer_step(layer, "torch")
    for kept in (None, *KEPT):
        assert all(map(torch.equal, layer_step(layer, "triton", kept), expected))
    codes, scales = layer.codes_and_scales()
    dense = layer.quantized_weight()
    ops.set_backend("torch")
    assert all(map(torch.equal, (codes, scales, dense), (*layer.codes_and_scales(), layer.quantized_weight())))


@on_both
@pytest.mark.parametrize("kept", [None, *KEPT])
@pytest.mark.parametrize("scheme", ["v2", "learned rows"])
def test_a_compiled_layer_is_one_graph_with_the_same_bits(request, device, scheme, kept):
    torch._dynamo.reset()
    request.addfinalizer(torch._dynamo.reset)
    layer = QATLinear(24, 10, scheme=SCHEMES[scheme], device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    expected = layer_step(layer, "triton", kept)
    found = layer_step(layer, "triton", kept, compiled)
    if device == "cuda":  # the bias and its gradient may be fused and rounded otherwise
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert all(map(torch.equal, found, expected))


@on_both
def test_a_compiled_model_saves_no_dense_weight_for_the_backward(request, device):
    torch._dynamo.reset()
    request.addfinalizer(torch._dynamo.reset)
    saved = []

    def backend(graph, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        def forward(graph, inputs):
            saved.extend(graph.graph.output_node().args[0])
            return make_boxed_func(graph.forward)

        compiler = aot_autograd(
            fw_compiler=forward,
            bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            partition_fn=min_cut_rematerialization_partition,
        )
        return compiler(graph, inputs)

    layer = QATLinear(24, 10, bias=False, scheme=SCHEMES["v2"], device=device)
    y = torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(5, 24, device=device, requires_grad=True))
    y.sum().backward()
    shapes = [(node.op, tuple(node.meta["val"].shape)) for node in saved]
    assert ("call_function", (10, 24)) not in shapes
    assert ("call_function", (2, 2, 2)) in shapes  # the scales are what was found once


# On a GPU


# each test compiles a few kernels, which takes longer than all else
@on_gpu
@pytest.mark.parametrize("granularity, stages", [("tensor", 1), ("tensor", 2), ("tensor", 4), ("row", 2), ("tile", 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", BIG, ids=str)
def test_large_and_odd_shapes_equal_the_reference(device, shape, dtype, granularity, stages):
    assert_as_reference(torch.randn(shape, device=device).mul(0.02).to(dtype), stages, granularity, 64)


@on_gpu
def test_runs_have_the_same_bits(device):
    weight = torch.randn(1000, 3002, device=device)
    grad = torch.randn_like(weight)
    for granularity in ("tensor", "row", "tile"):
        how = (3, granularity, 48, 0)
        first = run.phase_quantize_mean(weight, *how, torch.bfloat16, True)
        sums = run.phase_scale_gradient(grad, weight, None, first[1], *how)
        for _ in range(20):
            torch.empty(1 << 24, device=device).fill_(float("nan"))  # what comes from the cache is no zeros
            assert all(map(torch.equal, run.phase_quantize_mean(weight, *how, torch.bfloat16, True), first))
            assert torch.equal(run.phase_scale_gradient(grad, weight, None, first[1], *how), sums)


@on_gpu
def test_nothing_is_written_outside(device):
    around = torch.full((64 + 34 * 70 + 64,), 7.0, device=device)
    weight = torch.randn(34, 70, device=device)
    from fairy2i.ops.triton.quantize import quantize

    for granularity, tile in GROUPS:
        around.fill_(7.0)
        scales = phase_quantize(weight, stages=2, **settings(granularity, tile))[1]
        dense = around[64:-64].view(34, 70)
        quantize(weight, scales, dense, None, stages=2, granularity=granularity, tile=tile, width=1, mean=False)
        assert (around[:64] == 7).all() and (around[-64:] == 7).all() and not (dense == 7).any()


@on_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_of_layers_needs_the_memory_of_plain_layers_and_one_weight(device, compiled):
    peaks = []
    for quantized in (False, True):
        torch._dynamo.reset()
        layers = [nn.Linear(2048, 2048, bias=False, device=device, dtype=torch.bfloat16) for _ in range(8)]
        if quantized:
            layers = [QATLinear.from_linear(layer, SCHEMES["v2"]) for layer in layers]
        model = nn.Sequential(*layers)
        forward = torch.compile(model) if compiled else model
        x = torch.randn(256, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            forward(x).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
        del layers, model, forward, x
    size = 2048 * 2048 * 2
    assert peaks[1] <= peaks[0] + 1.1 * size


@on_gpu
def test_other_devices_and_streams_are_respected(device):
    weight = torch.randn(512, 512, device=device)
    expected = run.phase_quantize_mean(weight, 2, "tensor", 64, 0, torch.float32, False)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = run.phase_quantize_mean(weight, 2, "tensor", 64, 0, torch.float32, False)[0]
    stream.synchronize()
    assert torch.equal(found, expected)
