"""The CUDA kernels for many tokens (ops/cuda/wide.cu): what they make of layers, against PyTorch.

On the processor g++ compiles them, with what tests/ops/cuda_on_cpu says of the machine (fragments, descriptors,
barriers, clusters); tests marked gpu run them for what they are.
"""

import ctypes
import functools
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layers import exact_weight, on_both, random_layer

from fairy2i import METHODS, PhaseScheme
from fairy2i.ops import cuda, gpu
from fairy2i.ops.cuda import wide
from fairy2i.ops.inference import code_rows_and_columns, layout_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None and not torch.cuda.is_available(), reason="needs g++")
HERE = Path(__file__).parent / "cuda_on_cpu"
ROWS = PhaseScheme(stages=2, granularity="row", scales="learned")
Config = wide.Config
PROCESSORS = 3  # on the processor


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Return a function that compiles the kernels for the processor, once for the same constants."""
    folder = tmp_path_factory.mktemp("wide")

    @functools.cache
    def library(constants):
        path = folder / ("_".join(str(value) for _, value in constants) + ".so")
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-Wno-psabi"]
        flags += [f"-I{folder}" for folder in (HERE, Path(wide.__file__).parent)]
        flags += [f"-D{name}={value}" for name, value in constants]
        subprocess.run(["g++", *flags, "-o", path, HERE / "wide.cpp"], check=True)
        return ctypes.CDLL(path)

    return lambda constants: library(tuple(constants.items()))


@pytest.fixture
def multiply(compiled):
    """Return wide.wide, and on the processor what stands for it."""

    def run(x, words, scales, bias, y, layout, places, config, processors=PROCESSORS):
        if x.is_cuda:
            return wide.wide(x, words, scales, bias, y, layout, places, config)
        m = x.shape[1] // 2
        x_map = (ctypes.c_uint64 * 16)(x.data_ptr(), m, x.shape[0], 2, x.stride(0), m)
        chunks, passes, n, signs, width = words.shape
        words_map = (ctypes.c_uint64 * 16)(
            words.data_ptr(), signs * width, n, passes, chunks, *(words.stride(i) for i in (2, 1, 0))
        )
        (blocks, _, _), shared = wide.grid(words.shape[2], m, x.shape[0], config, processors)
        sums, flags = torch.full((blocks, 128, config.tokens), torch.nan), torch.zeros(blocks, dtype=torch.int32)
        memory = wide.slots(config, *(words.shape[i] for i in (3, 1, 4)))[2]
        compiled(wide.defines(words.shape, layout, config)).run(
            x_map, words_map, *wide.arguments(x, words, scales, bias, y, places, shared, sums, flags), blocks, memory
        )
        assert not flags.any(), "flags are left as they were found"

    return run


def layer_and_words(scheme, out_features, in_features, device, scale=1.0):
    torch.manual_seed(0)
    layer = random_layer(scheme, out_features, in_features, bias=True, device=device)
    layer.scales *= scale
    layout = layout_of(scheme, "gpu")
    return layer, gpu.repack(layer.codes, code_rows_and_columns(out_features, in_features, layout[0]), layout), layout


def check(multiply, layer, words, layout, x, config):
    """The error is at most twice that of the plain path in bf16, plus a unit of the result's own rounding."""
    weight = layer.dense_weight()
    exact = F.linear(x.double(), exact_weight(layer), layer.bias.double())
    plain = F.linear(x, weight.to(x.dtype), layer.bias.to(x.dtype)).double() - exact
    room = torch.full((x.shape[0] + 2, layer.out_features), torch.nan, dtype=x.dtype, device=x.device)
    y = room[1:-1]
    multiply(x, words, layer.scales, layer.bias.detach(), y, layout, None, config)
    error = y.double() - exact
    assert error.norm() <= 2 * plain.norm() + torch.finfo(x.dtype).eps / 2 * exact.norm()
    assert error.abs().max() <= 2 * plain.abs().max() + torch.finfo(x.dtype).eps * exact.abs().max()
    assert room[[0, -1]].isnan().all(), "nothing is written beside the results"
    return y


CASES = [  # a chunk has 256 or 512 columns of the codes, a step 64, a block 64 rows of the codes
    (ROWS, 2, 16, 40, Config(64, pair=1)),
    (ROWS, 44, 96, 3, Config(64, split=2, pair=1)),
    (ROWS, 200, 2064, 70, Config(64)),
    (ROWS, 300, 2064, 130, Config(128, split=4, pair=1)),
    (ROWS, 200, 2608, 5, Config(64, split=3, pair=2)),
    (ROWS, 136, 480, 5, Config(256, split=2)),
    (ROWS, 300, 2064, 70, Config(64, pair=1, even=True)),  # 3 blocks: 6 whole tiles of 17 steps
    (ROWS, 500, 2064, 70, Config(64, pair=1, even=True)),  # 5 shared tiles, 3 whole ones
    (ROWS, 200, 2064, 20, Config(64, pair=1, even=True)),  # 2 shared tiles
    (ROWS, 100, 2064, 20, Config(16, pair=1, even=True)),  # 2 tiles for 6 blocks
    (ROWS, 300, 4128, 20, Config(32, pair=2, even=True)),
    (ROWS, 200, 2608, 20, Config(16, split=2, pair=2)),
    (METHODS["complex_phase_v1"], 200, 2608, 5, Config(16, pair=1, even=True)),
    (METHODS["complex_phase_v3"], 200, 2608, 30, Config(32, pair=1, even=True)),
    (METHODS["complex_phase_v4"], 136, 2608, 16, Config(16, pair=1, even=True)),
    (ROWS, 300, 2064, 20, Config(16, split=3, pair=1)),
    (ROWS, 300, 2064, 130, Config(128, pair=2, even=True)),
    (ROWS, 16, 96, 3, Config(16, pair=1, even=True)),
    (ROWS, 300, 4128, 70, Config(64, pair=1, even=True)),
    (METHODS["complex_phase_v1"], 200, 2608, 5, Config(64, split=2)),
    (METHODS["complex_phase_v2"], 136, 480, 260, Config(256, pair=1)),
    (METHODS["complex_phase_v3"], 200, 2608, 5, Config(64, split=2)),
    (METHODS["complex_phase_v4"], 136, 2608, 5, Config(64)),
    (METHODS["complex_phase_v4"], 136, 480, 5, Config(64, split=4, pair=1)),
    (METHODS["complex_phase_v4"], 136, 480, 5, Config(256, split=2, pair=1)),  # two slots: sums reach into the words
    (PhaseScheme(stages=3, granularity="row", scales="learned"), 136, 480, 5, Config(64, split=4, pair=1)),
]
BIG = [
    (ROWS, 4096, 4096, 256, Config(split=4)),
    (ROWS, 4096, 4096, 300, Config(128, split=2)),
    (ROWS, 4096, 4096, 256, Config(128, pair=1, even=True)),
    (ROWS, 11008, 4096, 512, Config(pair=1, even=True)),
    (ROWS, 11008, 4096, 300, Config(pair=2, even=True)),
    (ROWS, 11008, 4096, 16, Config(16, pair=1, even=True)),
    (ROWS, 32000, 4096, 7, Config(16, pair=1)),
    (ROWS, 4096, 4096, 16, Config(16, split=3, pair=1)),
    (ROWS, 4096, 11008, 17, Config(32, pair=2, even=True)),
    (ROWS, 11008, 4096, 64, Config(64, pair=1, even=True)),
    (ROWS, 11008, 4096, 64, Config(64)),
    (METHODS["complex_phase_v4"], 1024, 11008, 512, Config()),
]


@on_both
@pytest.mark.parametrize("scheme, out_features, in_features, tokens, config", CASES + BIG, ids=str)
def test_as_exact_as_pytorch(device, scheme, out_features, in_features, tokens, config, multiply):
    if device == "cpu" and out_features > 1000:
        pytest.skip("takes too long without a GPU")
    layer, words, layout = layer_and_words(scheme, out_features, in_features, device)
    x = torch.randn(tokens, in_features, device=device).bfloat16()
    y = check(multiply, layer, words, layout, x, config)
    if device == "cuda":
        for _ in range(3):
            assert torch.equal(y, check(multiply, layer, words, layout, x, config)), "the same bits in each run"


@on_both
@pytest.mark.parametrize("out_features, config", [(64, Config(16, pair=1, even=True)), (200, Config(16, even=True))])
def test_many_blocks_that_share_a_tile(device, out_features, config, multiply):
    """More than gather their sums at once: 44 and 22 clusters, which begin and end anywhere in tiles."""
    layer, words, layout = layer_and_words(ROWS, out_features, 5600, device)
    x = torch.randn(16, 5600, device=device).bfloat16()
    check(functools.partial(multiply, processors=44), layer, words, layout, x, config)


EACH_FORM = [Config(16, pair=1), Config(64, split=2, pair=1), Config(256, pair=1)]  # of scales: see wide.cu


@on_both
@pytest.mark.parametrize("config", EACH_FORM, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_large_and_small_numbers(device, scale, config, multiply):
    layer, words, layout = layer_and_words(ROWS, 44, 1360, device, scale)
    layer.bias.data *= scale
    layer.scales[:, 0] *= 100.0  # U beside W
    layer.scales[1] /= 30.0  # a second stage as it is
    for x in (torch.ones(2, 1360), torch.rand(2, 1360) + 3, torch.randn(2, 1360) * torch.randn(1360).mul(3).exp()):
        check(multiply, layer, words, layout, x.to(device).bfloat16(), config)


@on_both
@pytest.mark.parametrize("config", EACH_FORM, ids=str)
@pytest.mark.parametrize("method", ["complex_phase_v1", "complex_phase_v2", "complex_phase_v4"])
def test_scales_that_are_zero_negative_or_far_apart(device, method, config, multiply):
    """What is divided by may be nothing: each of the scales of a row, and pairs, and all."""
    scheme = PhaseScheme(stages=METHODS[method].stages, granularity="row", scales="learned")
    layer, words, layout = layer_and_words(scheme, 600, 96, device)
    every = layer.scales.flatten(0, 2)  # (stage, U or W, re or im), rows
    assert every.data_ptr() == layer.scales.data_ptr()
    factors, count = torch.ones(len(every), 300, device=device), len(every)
    each = [0.0, -1.0, 1e-12, -1e-5, 1e4, 1e-38, -0.0]
    for i, (factor, k) in enumerate(itertools.product(each, range(count))):
        factors[k, i % 200] = factor
        factors[(k + 1 + i) % count, 200 + i % 90] = factor
    factors[:, 290:] = torch.tensor([0.0, 1e-38, 1e-20, -1.0, 1e20, 0, 0, 0, 0, 0], device=device)
    every *= factors
    x = torch.randn(9, 96, device=device).bfloat16()
    y = check(multiply, layer, words, layout, x, config).double() - layer.bias.double()
    weight = exact_weight(layer)
    size, eps = x.double().norm(dim=1)[:, None] * weight.norm(dim=1), torch.finfo(torch.bfloat16).eps
    error = (y - F.linear(x.double(), weight)).abs()
    assert (error <= 4 * eps * size + eps * layer.bias.double().abs()).all(), "large rows hide what is wrong in others"


@on_both
@pytest.mark.parametrize("config", EACH_FORM, ids=str)
@pytest.mark.parametrize("size, of_x", [(2.5e38, 1e-3), (1e-35, 1e3)])
def test_scales_at_the_ends_of_float32(device, size, of_x, config, multiply):
    layer, words, layout = layer_and_words(ROWS, 44, 96, device)
    layer.scales.copy_(torch.rand_like(layer.scales) * 0.7 + 0.3).mul_(size)
    layer.scales[1:] *= 0.1  # no weight is too large for bf16
    layer.scales[:, 1] *= 0.1
    layer.scales[0, 0, :, :11] = 0.0
    x, y = torch.randn(9, 96, device=device).bfloat16() * of_x, torch.empty(9, 44, device=device, dtype=torch.bfloat16)
    multiply(x, words, layer.scales, None, y, layout, None, config)
    weight = exact_weight(layer)
    error = (y.double() - F.linear(x.double(), weight)).abs()
    allowed = 4 * torch.finfo(torch.bfloat16).eps * x.double().norm(dim=1)[:, None] * weight.norm(dim=1)
    assert (error <= allowed).all()


@on_both
def test_what_is_not_a_number_stays_with_its_token(device, multiply):
    layer, words, layout = layer_and_words(ROWS, 44, 96, device)
    x = torch.randn(4, 96, device=device).bfloat16()
    x[1, 5], x[2, 77] = torch.nan, torch.inf
    y = x.new_empty(4, 44)
    multiply(x, words, layer.scales, None, y, layout, None, Config(64, pair=1))
    finite = y.isfinite().all(1)
    assert finite.tolist() == [True, False, False, True]


@on_both
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, None])
def test_places_and_bias(device, kind, multiply):
    """Rows of joined layers go where the layers' outputs are; a bias belongs to the place."""
    layer, words, layout = layer_and_words(ROWS, 160, 96, device)
    x = torch.randn(9, 96, device=device).bfloat16()
    bias = torch.randn(160, device=device).to(kind) if kind else None
    config = Config(64, split=2, pair=1)
    orders = [
        gpu.group_places([112, 48], 0, x.device),
        torch.randperm(160, dtype=torch.int32, device=device).view(2, -1),
    ]
    for places in orders:
        y, straight = x.new_empty(9, 160), x.new_empty(9, 160)
        where = places.flatten().long()
        multiply(x, words, layer.scales, bias, y, layout, places, config)
        multiply(x, words, layer.scales, bias[where] if kind else None, straight, layout, None, config)
        assert torch.equal(y[:, where], straight)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, config", [(64, Config(64, pair=1, even=True)), (16, Config(16, pair=2, even=True))])
def test_streams_and_graphs_do_not_mix_what_blocks_leave_to_each_other(tokens, config):
    layer, words, layout = layer_and_words(ROWS, 11008, 4096, "cuda")
    xs = torch.randn(4, tokens, 4096, device="cuda").bfloat16()
    expected, found = xs.new_empty(4, tokens, 11008), xs.new_zeros(4, tokens, 11008)
    for x, y in zip(xs, expected, strict=True):
        wide.wide(x, words, layer.scales, None, y, layout, None, config)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(20):
        for x, y, stream in zip(xs, found, streams, strict=True):
            with torch.cuda.stream(stream):
                wide.wide(x, words, layer.scales, None, y, layout, None, config)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, y in zip(xs, found.zero_(), strict=True):
            wide.wide(x, words, layer.scales, None, y, layout, None, config)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "ways, tokens",
    [
        *((["decode"], tokens) for tokens in (1, 2, 4, 8)),
        *((["wide"], tokens) for tokens in (8, 16, 64, 256)),
        (["decode", "wide"], 8),
    ],
    ids=str,
)
def test_kernels_in_a_row_take_what_those_before_leave(ways, tokens):
    """Each begins before the one before it has ended, and reads what that one writes."""
    layer, words, layout = layer_and_words(ROWS, 4096, 4096, "cuda", scale=0.02)
    first = torch.randn(tokens, 4096, device="cuda").bfloat16()

    def row(between):
        results = [first]
        for way in itertools.islice(itertools.cycle(ways), 12):
            results.append(gpu.linear(results[-1], words, layer.scales, None, 4096, layout, way=way))
            between()
        return results[1:]

    expected = torch.stack(row(torch.cuda.synchronize))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = row(lambda: None)
    for _ in range(3):
        for y in found:
            y.zero_()
        graph.replay()
        assert torch.equal(torch.stack(found), expected)


@pytest.mark.gpu
def test_what_is_prepared_can_be_captured_at_once():
    layer, words, layout = layer_and_words(ROWS, 1002, 4128, "cuda")
    wide._ready.cache_clear()  # of what other tests have loaded
    cuda.kernel.cache_clear()
    wide.prepare(words, layout, 4128, [16, 100])
    loaded = cuda.kernel.cache_info().misses
    for tokens in (16, 100, 12):
        x = torch.randn(tokens, 4128, device="cuda").bfloat16()
        y, again, graph = x.new_empty(tokens, 1002), x.new_empty(tokens, 1002), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            wide.wide(x, words, layer.scales, None, y, layout, None)
        assert cuda.kernel.cache_info().misses == loaded, "nothing is compiled or loaded meanwhile"
        graph.replay()
        wide.wide(x, words, layer.scales, None, again, layout, None)
        assert torch.equal(y, again)


@pytest.mark.parametrize("tokens", [5, 12, 17, 64, 100, 256, 2048])
@pytest.mark.parametrize("rows, columns", [(1, 8), (2048, 2048), (5504, 2048), (2048, 5504), (16000, 2048)])
def test_every_size_has_a_configuration(rows, columns, tokens):
    config = wide.wide_config(rows, columns, tokens, 132)
    assert config.tokens in wide.STEP_TIMES and config.pair * config.split <= 8
    for signs, passes, width in ((4, 1, 32), (8, 1, 32), (4, 3, 32), (16, 1, 32), (16, 1, 16)):
        count, chunks, memory = wide.slots(config, signs, passes, width)
        assert count >= 2 and chunks >= 1 and memory + 1024 <= wide.MEMORY


def test_what_it_takes():
    layout = layout_of(ROWS, "gpu")
    assert wide.takes(layout, torch.bfloat16, 4096)
    assert not wide.takes(layout, torch.float16, 4096)
    assert not wide.takes(layout, torch.bfloat16, 4100), "rows of activations begin at multiples of 16 bytes"
    assert not wide.takes(layout_of(PhaseScheme(granularity="tile", tile=64), "gpu"), torch.bfloat16, 4096)
    assert not wide.takes(layout_of(METHODS["bitnet"], "gpu"), torch.bfloat16, 4096)
