"""The GPU's kernels for packed layers: every scheme and way against PyTorch, and what surrounds them.

On the processor Triton's interpreter runs them (tests/conftest.py turns it on), on small shapes, and the compiler makes
machine code of them; the kernel in CUDA C++ is compiled by g++ there (cuda_on_cpu). Tests marked gpu run them for what
they are.
"""

import copy
import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import decode_library
from layers import DTYPES, NEEDS_TRITON, exact_weight, on_both, on_gpu, random_layer
from safetensors.torch import load_file
from tiny_models import tiny_model, token_batch
from torch import nn
from transformers import AutoModelForCausalLM

from fairy2i import (
    METHODS,
    PackedLinear,
    PhaseScheme,
    RealScheme,
    convert_to_inference_mode,
    replace_modules_for_qat,
)
from fairy2i.cli import main
from fairy2i.ops import cuda, gpu
from fairy2i.ops.cuda import decode, wide
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
BIG = [(2, 8192), (576, 1536), (1002, 336), (4096, 4096), (11008, 4096)]
TOKENS_OF = {("decode", "cuda"): (1, 2, 3, 5, 8, 13, 16), ("decode", "cpu"): (1, 3, 13)}
HALVES = [torch.bfloat16, torch.float16]
DTYPES_OF = {"decode": DTYPES, "planes": HALVES, "wide": HALVES[:1], "blocks": HALVES, "dense": DTYPES}


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
    """Multiply, and compare with the plain path."""
    words, layout = words_and_layout(layer)
    y = gpu.linear(x, words, layer.scales, layer.bias, layer.out_features, layout, way=way)
    compare(y, x, layer)
    return y


def compare(y, x, layer):
    """The error is at most twice that of the plain path in the same dtype, plus a unit of the result's own rounding.

    A second unit for a rotation: activations are rounded once more when they are rotated, which the plain path, whose
    weight is rotated back before, does not do.
    """
    weight, bias = layer.dense_weight(), layer.bias
    exact = F.linear(x.double(), exact_weight(layer), bias.double())
    plain = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).double() - exact
    assert plain.isfinite().all(), "nothing to compare with"
    assert y.dtype == x.dtype and y.shape == exact.shape
    error = y.double() - exact
    eps = torch.finfo(x.dtype).eps
    assert error.norm() <= 2 * plain.norm() + eps / 2 * exact.norm() * (2 if layer.scheme.rotation else 1)
    assert error.abs().max() <= 2 * plain.abs().max() + eps * exact.abs().max()


@on_both
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_come_back_from_words(device, scheme):
    for out_features, in_features in SHAPES:
        layer = random_layer(scheme, out_features, in_features, device=device)
        words, layout = words_and_layout(layer)
        shape = code_rows_and_columns(out_features, in_features, layout[0])
        assert torch.equal(gpu.unpack(words, layer.codes.shape, shape, layout), layer.codes)


@on_both
@pytest.mark.parametrize("way", DTYPES_OF)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_way_is_as_exact_as_pytorch(device, scheme, way):
    layout = layout_of(scheme, "gpu")
    if way == "planes" and scheme.granularity == "tile":
        pytest.skip("planes apply scales to sums over whole rows")
    if way == "wide":
        if device == "cpu":
            pytest.skip("test_gpu_wide.py runs it there")
        here = torch.device(device, torch.cuda.current_device())
        if not gpu.takes_wide(layout, torch.bfloat16, 16, here):
            pytest.skip(
                gpu.why_no_cuda("wide", here) or "for phase codes with scales of tensors or rows, up to 4 stages"
            )
    if way == "decode":
        if layout[0] != 0 or layout[1] > 4 or layout[2] == 2:
            pytest.skip("for phase codes with scales of tensors or rows, up to 4 stages")
        skip_without_decode()
    shapes = SHAPES[1:2]
    if device == "cuda":  # most of the time goes into compiling
        shapes = (
            [*SHAPES, *BIG] if scheme in (METHODS["complex_phase_v2"], METHODS["fairy2i_w2"]) else [*SHAPES, BIG[2]]
        )
    checked = 0
    for out_features, in_features in shapes:
        layer = random_layer(scheme, out_features, in_features, bias=True, device=device)
        if way == "wide" and not gpu.takes_wide(layout, torch.bfloat16, in_features, layer.scales.device):
            continue
        for dtype in DTYPES_OF[way]:
            for tokens in TOKENS_OF.get((way, device), (1, 3, 70) if device == "cuda" else (3,)):
                if way == "decode" and not decode.takes(layout, words_and_layout(layer)[0], tokens, dtype):
                    continue
                x = torch.randn(tokens, in_features, device=device).to(dtype)
                y = check(layer, x, way)
                checked += 1
                if device == "cuda":
                    assert torch.equal(y, check(layer, x, way)), "the same bits in each run"
    assert checked, f"no shape that {way} takes"


@on_both
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_and_one_sided_activations(device, dtype):
    """Sums of +-activations must not drown in the sum of all of them."""
    layer = random_layer(METHODS["complex_phase_v2"], 6, 1100, bias=True, device=device)
    spread = torch.randn(2, 1100) * torch.randn(1100).mul(3).exp()
    for x in (torch.ones(2, 1100), torch.rand(2, 1100) + 3, spread * (1e3 / spread.abs().max())):
        check(layer, x.to(device, dtype), "planes")


FORMS = [  # some: a block has more tiles than wait for a barrier
    decode.Config(warps=4, depth=2),
    decode.Config(warps=4, depth=3),
    decode.Config(warps=8, depth=2, parts=1),
    decode.Config(warps=4, depth=2, blocks=2, parts=4),
    decode.Config(warps=4, depth=2, early=False),
    decode.Config(warps=4, depth=2, halves=True),
    decode.Config(warps=8, depth=2, ranges=2, halves=True),
    decode.Config(warps=8, depth=4, ranges=2, halves=True, early=False),
    decode.Config(warps=4, depth=3, blocks=2, parts=1, ranges=4, halves=True),
]


@on_both
@pytest.mark.parametrize("config", FORMS, ids=str)
def test_decode_in_other_forms(device, config, monkeypatch):
    skip_without_decode()
    if config.ranges > 1 and not decode.chip(torch.device(device)).hopper:
        pytest.skip("needs a GPU with clusters")
    monkeypatch.setattr(decode, "SUMS", 1)
    multiply = decode.multiply
    monkeypatch.setattr(decode, "multiply", lambda *args: multiply(*args, config))
    tokens = (4, 8, 16) if config.halves else (1, 1, 2)
    for shape, count in zip(((6, 2), (130, 1200), (38, 1042)), tokens, strict=True):
        layer = random_layer(PhaseScheme(granularity="row", scales="learned"), *shape, bias=True, device=device)
        x = torch.randn(count, shape[1] + 8, device=device).bfloat16()[:, : shape[1]]
        assert torch.equal(check(layer, x, "decode"), check(layer, x.clone(), "decode"))


@on_both
@pytest.mark.parametrize("tokens", [1, 9])
def test_decode_without_what_only_hopper_has(device, tokens, monkeypatch):
    skip_without_decode()
    older = dataclasses.replace(decode.chip(torch.device(device)), hopper=False)
    monkeypatch.setattr(decode, "chip", lambda device: older)
    if device == "cuda":
        monkeypatch.setattr(decode, "_ready", decode._ready.__wrapped__)
    for shape in ((22, 34), (130, 1200)):
        layer = random_layer(METHODS["complex_phase_v2"], *shape, bias=True, device=device)
        check(layer, torch.randn(tokens, shape[1], device=device).bfloat16(), "decode")


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
                assert found.config.depth > 0 and found.tokens >= tokens and (chip.hopper or found.config.ranges == 1)
    assert {shape for shape, _ in refused} <= {(8192, 28672)} if chip.hopper else ((4096, 11008), 16) in refused


@on_both
@pytest.mark.parametrize("parts", [1, 4])
def test_parts_of_float32_sums_that_are_larger_than_their_sum(device, parts):
    skip_without_decode()
    layer = random_layer(METHODS["complex_phase_v2"], 6, 8192, device=device)
    words, layout = words_and_layout(layer)
    x = torch.full((2, 8192), 0.1, device=device)
    x[1, 2048:4096] = -0.1
    y = x.new_empty(2, 6)
    decode.multiply(x, words, layer.scales, None, y, layout, None, decode.Config(warps=4, depth=2, parts=parts))
    exact = F.linear(x.double(), exact_weight(layer))
    assert (y.double() - exact).abs().max() <= torch.finfo(torch.float32).eps * exact.abs().max()


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
def test_what_is_not_finite_stays_with_its_token(device, dtype, way):
    """And shows there: an infinity may become NaN, as in other sums of several."""
    if dtype not in DTYPES_OF[way]:
        pytest.skip(f"{way} does not take it")
    if way == "decode":
        skip_without_decode()
    layer = random_layer(METHODS["complex_phase_v2"], 6, 48, device=device)
    words, layout = words_and_layout(layer)
    for value in (float("nan"), float("inf"), -float("inf")):
        for tokens in (2, 6) if dtype != torch.float32 else (2,):
            x = torch.randn(tokens, 48, device=device).to(dtype)
            x[1, 30] = value
            y = gpu.linear(x, words, layer.scales, None, 6, layout, way=way)
            others = torch.arange(tokens) != 1
            assert (y[1].isnan().all() if way == "decode" else not y[1].isfinite().any()) and y[others].isfinite().all()


@on_both
@pytest.mark.parametrize("way, tokens", [("decode", 2), ("decode", 5), ("planes", 2), ("blocks", 2), ("dense", 2)])
def test_joined_layers(device, way, tokens):
    if way == "decode":
        skip_without_decode()
    sizes = [18, 4]
    parts = [random_layer(METHODS["complex_phase_v2"], size, 64, bias=True, device=device) for size in sizes]
    layout = layout_of(parts[0].scheme, "gpu")
    words = gpu.join_words([words_and_layout(part)[0] for part in parts])
    scales = gpu.group_scales([part.scales for part in parts], [size // 2 for size in sizes], layout)
    places = gpu.group_places(sizes, 0, torch.device(device))
    x = torch.randn(tokens, 3, 64, device=device)[:, 1].bfloat16()
    for dtype in DTYPES:
        for part in parts:
            part.bias.data = part.bias.to(dtype)
        bias = torch.cat([part.bias.detach() for part in parts])
        y = gpu.linear(x, words, scales, bias, 22, (*layout[:2], 1, *layout[3:]), places, way=way)
        for part, found in zip(parts, y.split(sizes, dim=-1), strict=True):
            compare(found, x, part)


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
    monkeypatch.setattr(gpu, "linear", lambda *args: calls.append(1) or linear(*args))
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
    in_cuda = device == "cuda" and isinstance(scheme, PhaseScheme) and gpu.why_no_cuda() is None
    assert f"backend=gpu ({'CUDA C++ and ' if in_cuda else ''}Triton)" in repr(layers[0])


def on_an_h100(monkeypatch, *ways):
    monkeypatch.setattr(gpu, "why_no_cuda", lambda way="decode", device=None: None if way in ways else "not here")


def test_which_way(monkeypatch):
    def way(tokens, scheme=METHODS["complex_phase_v2"], dtype=torch.bfloat16, features=64):
        layer = random_layer(scheme, 6, features)
        words, layout = words_and_layout(layer)
        return gpu.way_for(tokens, layout, dtype, words, features)

    tile = PhaseScheme(granularity="tile", tile=64)
    monkeypatch.setattr(gpu, "THRESHOLDS", gpu.Thresholds(wide=256, wide_of_more=64))
    for ways in ((), ("decode",), ("decode", "wide")):
        on_an_h100(monkeypatch, *ways)
        few = "decode" if "decode" in ways else "planes"
        several, many = ("wide", "wide") if "wide" in ways else (few, "dense")
        expected = [few] * 2 + [several] * 2 + [many] * 2 + ["dense"]
        assert [way(tokens) for tokens in (1, 8, 9, 16, 17, 256, 257)] == expected
        assert [way(tokens, METHODS["complex_phase_v3"]) for tokens in (8, 9, 64, 65)] == [few, several, many, "dense"]
        assert [way(tokens, dtype=torch.float16) for tokens in (9, 16, 17)] == [few, few, "blocks"]
        one_of_float32 = "decode" if "decode" in ways else "dense"
        assert [way(tokens, dtype=torch.float32) for tokens in (2, 3, 17)] == [one_of_float32, "dense", "dense"]
        assert way(17, features=24) == way(17, PhaseScheme(stages=5)) == "dense"
        assert [way(tokens, tile) for tokens in (1, 128, 129)] == ["blocks", "blocks", "dense"]
        assert [way(tokens, METHODS["bitnet"]) for tokens in (1, 16, 17)] == ["planes", "planes", "blocks"]
        shown = [
            gpu.languages(layout_of(scheme, "gpu"), (8, columns), torch.device("cpu"))
            for scheme, columns in ((METHODS["fairy2i_w2"], 64), (tile, 64), (METHODS["fairy2i_w2"], 1 << 20))
        ]  # the last: activations that are too much for a multiprocessor's memory
        assert shown == ["CUDA C++ and Triton" if "decode" in ways else "Triton", "Triton", "Triton"]


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
        why = cuda.why_off.__wrapped__(0), cuda.why_off.__wrapped__(0, (9, 0), (10, 0))
        assert [reason is None for reason in why] == [few, many]
        assert few or why[0] == "they need a GPU of compute capability 8.0 or more"
        assert many or why[1] == "they need a GPU of compute capability 9.0"
    assert seen == ["sm_80", "sm_90a", "sm_90a", "sm_103a"]
    monkeypatch.setattr(cuda, "compiled", refuse)
    assert cuda.why_off.__wrapped__(0) == "the GPU is younger"
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(cuda, "why_off", lambda device, *_: f"asked about {device}")
    for device, index in ((torch.device("cuda", 1), 1), (torch.device("cuda"), 2), (None, 2)):
        assert gpu.why_no_cuda.__wrapped__("wide", device) == f"asked about {index}"


@on_both
def test_kernels_are_compiled_when_the_backend_is_chosen(device, monkeypatch):
    scheme = METHODS["fairy2i_w2"]
    names = ("gate_proj", "up_proj", "down_proj")
    model = nn.ModuleDict({name: random_layer(scheme, 20, 64, device=device) for name in names})
    model["norm"] = nn.LayerNorm(4, dtype=torch.bfloat16)
    on_an_h100(monkeypatch, "decode", "wide")
    prepared = []
    for kernels in (decode, wide):
        monkeypatch.setattr(kernels, "prepare", lambda words, *rest: prepared.append((words.shape[2], *rest)))
    use_backend(model, "gpu")
    layout = layout_of(scheme, "gpu")
    joined = (*layout[:2], 1, *layout[3:])
    assert prepared == [
        (20, joined, torch.bfloat16, 64),
        (20, joined, 64, (16, 256)),
        (10, layout, torch.bfloat16, 64),
        (10, layout, 64, (16, 256)),
    ]
    assert "backend=gpu (CUDA C++ and Triton)" in repr(model["down_proj"])


def test_auto_takes_the_gpus_that_can(monkeypatch):
    monkeypatch.setattr(gpu, "_can_use", lambda device: device.index == 1)
    for auto in (False, True):
        monkeypatch.setattr(gpu, "AUTO", auto)
        assert [gpu.auto_takes(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")] == [False, False, auto]


@on_both
@pytest.mark.parametrize("auto", [False, True])
def test_auto(device, auto, monkeypatch):
    """With AUTO layers on a GPU are prepared as for "gpu" when they are loaded, and once more after a move."""
    monkeypatch.setattr("fairy2i.packed.DEFAULT", "auto")
    monkeypatch.setattr(gpu, "AUTO", auto)
    if device == "cpu":
        monkeypatch.setattr(gpu, "auto_takes", lambda _: gpu.AUTO)
    names = ("gate_proj", "up_proj")
    parts = {name: random_layer(METHODS["fairy2i_w2"], 20, 64, bias=True, device=device) for name in names}
    model = nn.ModuleDict(parts).eval()
    model.forward = lambda x: model["gate_proj"](x) * model["up_proj"](x)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    x = torch.randn(1, 64, device=device)
    with torch.no_grad():
        expected = use_backend(model, "reference")(x)
        assert use_backend(model, "auto") is model
        for moved in (False, True):
            if moved:
                model.to(torch.float64)
                assert model["gate_proj"].words is None and model["up_proj"]._group is None
                close(model(x), expected)
            assert ("backend=gpu" in repr(model)) == auto
            for part in parts.values():
                assert (part._layout is not None and part._layout[4] == gpu.MODES["gpu"]) == auto
                assert (part._group is not None) == auto
            close(model(x), expected)
        close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    model.train()
    assert "backend=reference" in repr(model)


@on_both
@pytest.mark.parametrize("auto", [False, True])
def test_auto_in_a_model_that_is_loaded(device, auto, tmp_path, monkeypatch):
    model = tiny_model(num_hidden_layers=1)
    replace_modules_for_qat(model, "fairy2i_w2")
    convert_to_inference_mode(model).save_pretrained(tmp_path)
    ids = token_batch(rows=1).to(device)
    with torch.no_grad():
        expected = model.to(device)(ids).logits
    monkeypatch.setattr("fairy2i.packed.DEFAULT", "auto")
    monkeypatch.setattr(gpu, "AUTO", auto)
    if device == "cpu":
        monkeypatch.setattr(gpu, "auto_takes", lambda _: gpu.AUTO)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device)
    layers = [layer for layer in loaded.modules() if isinstance(layer, PackedLinear)]
    assert {layer.words is not None for layer in layers} == {auto} and ("backend=gpu" in repr(loaded)) == auto
    assert (loaded.model.layers[0].self_attn.v_proj._group is not None) == auto
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(again[name], first[name]) for name in first)


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
    x = torch.randn(2, 10, device=device).bfloat16()
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
    with pytest.raises(TypeError, match="planes takes bfloat16 or float16"):
        gpu.linear(torch.zeros(1, 10, device=device), words, layer.scales, None, 6, layout, way="planes")
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
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fairy2i import METHODS, PhaseScheme, RealScheme
from fairy2i.ops import gpu
from fairy2i.ops.inference import code_rows_and_columns, layout_of
from fairy2i.ops.triton import multiply, packed
from layers import random_layer

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int16: "*i16",
         torch.int32: "*i32"}
OPTIONS = ("num_warps", "enable_fp_fusion")
built = {}

class Compiler:  # in place of a kernel: compiles what would be launched
    def __init__(self, name):
        self.name, self.kernel = name, getattr(packed, name)

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **named):
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        given = dict(zip(self.kernel.arg_names, args)) | named
        known = {name: value for name, value in given.items() if value is None or name.isupper()}
        rest = {name: value for name, value in given.items() if name not in known}
        types = {name: TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32" for name, value in rest.items()}
        key = (self.name, *known.items(), *types.items(), *options.items())
        if key not in built:
            places = {name: (place,) for place, name in enumerate(self.kernel.arg_names)}
            even = {places[name]: [["tt.divisibility", 16]] for name, value in rest.items()
                    if isinstance(value, torch.Tensor) or value % 16 == 0}
            signature = {name: types.get(name, "constexpr") for name in self.kernel.arg_names}
            source = ASTSource(self.kernel, signature, known, even)
            built[key] = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for name in ("multiply_planes", "multiply_blocks", "add_splits", "write_dense", "write_dense_bf16"):
    setattr(packed, name, Compiler(name))
multiply.INTERPRETED = False

def launch(way, scheme, shape, tokens, dtype=torch.bfloat16, joined=False):
    layer = random_layer(scheme, *shape, bias=joined)
    layout = layout_of(scheme, "gpu")
    rows, columns = code_rows_and_columns(*shape, layout[0])
    words = gpu.repack(layer.codes, (rows, columns), layout)
    places = gpu.group_places([shape[0]], layout[0], words.device) if joined else None
    x = torch.zeros(tokens, shape[1], dtype=dtype)
    gpu.linear(x, words, layer.scales, layer.bias, shape[0], layout, places, way)

row = {"granularity": "row", "scales": "learned"}
phase, row_phase = ([PhaseScheme(stages=stages, **more) for stages in range(1, 6)] for more in ({}, row))
real, row_real = ([RealScheme(levels=levels, **more) for levels in (2, 3)] for more in ({}, {"granularity": "row"}))
tiles = [PhaseScheme(stages=3, granularity="tile", tile=64), RealScheme(levels=3, granularity="tile", tile=64)]
for schemes, joined in (([*phase, *real], False), ([*row_phase, *row_real], True)):
    for scheme in schemes:
        launch("planes", scheme, (64, 4096), 1, joined=joined)
for scheme in (phase[2], real[1]):
    launch("planes", scheme, (1002, 1538), 1)
    launch("planes", scheme, (64, 4096), 2, torch.float16)
    launch("planes", scheme, (64, 4096), 4)
    launch("planes", scheme, (64, 4096), 16, torch.float16)
for scheme in (row_phase[2], row_phase[4], real[0], row_real[1], *tiles):
    launch("blocks", scheme, (64, 4096), 17, torch.float16)
launch("blocks", tiles[0], (64, 4096), 128, joined=True)
for scheme in (phase[0], *row_phase, *tiles, *real):
    launch("dense", scheme, (64, 4096), 200)
launch("dense", row_phase[2], (64, 4096), 200, torch.float32, joined=True)
launch("dense", row_phase[2], (64, 4096), 200, torch.bfloat16, joined=True)
made = {key[0] for key in built}
assert len(made) == 5, made
for (name, *known), ptx in built.items():
    if name == "multiply_planes":
        assert all(what in ptx for what in ("lop3.b32", "mma.sync", "cp.async")), known
        assert (".bf16.bf16." in ptx) == (("x", "*bf16") in known), known
    if name == "write_dense_bf16":
        assert "add.rn.f16x2" in ptx
print(len(built))
"""


def test_the_compiler_takes_the_kernels(tmp_path):
    """What the interpreter lets pass, the compiler may not: each kernel, compiled as it is launched."""
    here = os.path.dirname(__file__)
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    done = subprocess.run([sys.executable, "-c", MACHINE_CODE], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def test_repacking_in_a_cuda_graph_and_inputs_elsewhere_are_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured: call the model"):
        gpu._check_not_captured(torch.device("cuda"))
    gpu._check_not_captured(torch.device("cpu"))
    layout = layout_of(METHODS["complex_phase_v2"], "gpu")
    words = torch.zeros(gpu.words_shape(8, 16, *layout[:2]), dtype=torch.int16)
    with pytest.raises(RuntimeError, match="the packed layer is on cpu, its input on meta"):
        gpu.linear(torch.zeros(1, 32, device="meta"), words, torch.zeros(2, 2), None, 16, layout)


def test_auto_wants_the_compiler_that_triton_needs(monkeypatch):
    monkeypatch.setattr(gpu, "why_off", lambda device: None)
    monkeypatch.delenv("CC", raising=False)
    for found in (None, "/usr/bin/clang"):
        monkeypatch.setattr(gpu.shutil, "which", lambda name, found=found: found if name == "clang" else None)
        assert gpu._can_use.__wrapped__(torch.device("cuda", 0)) == (found is not None)
