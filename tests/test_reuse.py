"""Quantized weights are kept while the weights stay, no longer: same results, fewer quantizations, nothing stale."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from fairy2i import METHODS, PhaseScheme, QATLinear, RealScheme
from fairy2i import reuse as module
from fairy2i.reuse import KEPT, reuse_quantized
from fairy2i.training.sharding import keep_scales_exact

LEARNED = PhaseScheme(stages=2, granularity="row", scales="learned")
SCHEMES = [
    METHODS["complex_phase_v1"],
    METHODS["complex_phase_v2"],
    PhaseScheme(stages=3, granularity="tile", tile=5),
    PhaseScheme(scales="joint", granularity="row"),
    LEARNED,
    PhaseScheme(stages=3, granularity="tensor", scales="learned"),
    METHODS["bitnet"],
    METHODS["bitnet_1_58"],
    RealScheme(levels=3, granularity="row", scales="learned"),
    PhaseScheme(granularity="row", rotation=4),
]


def model_of(scheme, dtype=torch.float32):
    layers = [QATLinear(24, 32, scheme=scheme, dtype=dtype), nn.SiLU(), QATLinear(32, 24, scheme=scheme, dtype=dtype)]
    return nn.Sequential(*layers)


def micro_batches(model, count=3, run=None, dtype=torch.float32):
    """Return the outputs and summed gradients of a few micro-batches."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    outputs = []
    device = next(model.parameters()).device
    for _ in range(count):
        y = (run or model)(torch.randn(5, 24, generator=generator, dtype=dtype).to(device))
        y.square().sum().backward()
        outputs.append(y.detach())
    return [*outputs, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.fixture
def quantizations(monkeypatch):
    """A list that grows by one for each quantization."""
    done = []
    for kind in (PhaseScheme, RealScheme):
        original = kind.quantize

        def counted(self, weight, scales=None, original=original):
            done.append(weight.shape)
            return original(self, weight, scales)

        monkeypatch.setattr(kind, "quantize", counted)
    return done


@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_reuse_changes_no_bit_of_outputs_and_gradients(scheme, what):
    model = model_of(scheme)
    plain = micro_batches(model)
    with reuse_quantized(model, what):
        kept = micro_batches(model)
    assert same(plain, kept)


@pytest.mark.parametrize("what", KEPT)
def test_reuse_changes_no_bit_under_autocast(what):
    model = model_of(METHODS["complex_phase_v2"])

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    plain = micro_batches(model, run=run)
    for dtype in (None, torch.bfloat16):
        with reuse_quantized(model, what, dtype):
            assert same(plain, micro_batches(model, run=run))


@pytest.mark.parametrize("what", KEPT)
def test_accumulation_and_recomputation_quantize_each_weight_once(quantizations, what):
    model = model_of(METHODS["complex_phase_v2"])

    def recomputed(x):
        return checkpoint(model, x.requires_grad_(), use_reentrant=False)

    plain = micro_batches(model, 4, recomputed)
    assert len(quantizations) == 2 * 4 * 3  # forward, recomputation, backward
    quantizations.clear()
    with reuse_quantized(model, what):
        kept = micro_batches(model, 4, recomputed)
    assert len(quantizations) == 2
    assert same(plain, kept)


def test_the_kept_values_are_as_small_as_they_say():
    model = model_of(METHODS["complex_phase_v2"])
    with reuse_quantized(model, "codes"):
        assert [layer.kept.nbytes * 4 for layer in model[::2]] == [layer.weight.numel() for layer in model[::2]]
    with reuse_quantized(model, "dense", torch.bfloat16):
        assert [layer.kept.dtype for layer in model[::2]] == [torch.bfloat16] * 2


def test_nothing_is_left_after_the_scope_nor_after_an_error_in_it():
    model = model_of(LEARNED)
    keys = set(model.state_dict())
    with pytest.raises(KeyError), reuse_quantized(model):
        assert set(model.state_dict()) == keys
        assert model[0].kept is not None
        raise KeyError
    assert [(layer.kept, layer.kept_scales, layer.reuse) for layer in model[::2]] == [(None, None, None)] * 2


def test_an_unknown_way_to_keep_is_an_error():
    with pytest.raises(ValueError, match="codes, dense"), reuse_quantized(model_of(LEARNED), "everything"):
        pass


# Nothing stale

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adamw, for each": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


def scaled(model):
    return {name: value * 1.5 + 0.01 for name, value in model.state_dict().items()}


def by_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def by_new_parameters(model):
    for layer in model[::2]:
        layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


@torch.no_grad()
def in_place(model):
    for parameter in model.parameters():
        parameter.mul_(1.5)


@torch.no_grad()
def one_entry(model):
    model[0].weight[3, 2] += 1


CHANGES = {
    **{name: (lambda model, make=make: make(model.parameters()).step()) for name, make in OPTIMIZERS.items()},
    "load_state_dict": lambda model: model.load_state_dict(scaled(model)),
    "load_state_dict, assigned": lambda model: model.load_state_dict(scaled(model), assign=True),
    "in place": in_place,
    "one entry": one_entry,
    "another tensor in .data": by_data,
    "another parameter": by_new_parameters,
    "another dtype": lambda model: model.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("scheme", [METHODS["complex_phase_v2"], LEARNED], ids=["mean", "learned"])
def test_a_changed_weight_is_quantized_anew(scheme, what, change):
    model = model_of(scheme)
    with reuse_quantized(model, what) as reuse:
        before = micro_batches(model)
        CHANGES[change](model)
        after = micro_batches(model)
        reuse.refresh_all()
        again = micro_batches(model)
    assert not same(before, after)
    assert same(after, micro_batches(model))
    assert same(after, again)


def test_a_write_past_the_version_counter_is_found_by_verify_and_gone_with_the_scope():
    model = model_of(METHODS["complex_phase_v2"])
    with reuse_quantized(model, verify=True):
        micro_batches(model)
        model[2].weight.data.mul_(1.5)  # the one thing that the guard cannot see
        with pytest.raises(RuntimeError, match=r"stale.*\.data"):
            micro_batches(model)
    fresh = micro_batches(model)
    with reuse_quantized(model, verify=True):
        assert same(fresh, micro_batches(model))


def test_a_change_between_forward_and_backward_is_an_error_or_leaves_the_gradient_of_the_forward():
    model = model_of(METHODS["complex_phase_v2"])
    x = torch.randn(5, 24, requires_grad=True)
    with reuse_quantized(model, "dense"):
        y = model(x)
        expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        in_place(model)
        model(x)  # quantizes anew, in other memory
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_in_no_scope(duplicate):
    model = model_of(METHODS["complex_phase_v2"])
    with reuse_quantized(model):
        other = duplicate(model)
        other[0].weight.data.mul_(2)
        result = micro_batches(other)
    assert same(result, micro_batches(other))
    assert other[0].reuse is None


# Compiled, sharded


@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("scheme", [METHODS["complex_phase_v2"], LEARNED], ids=["mean", "learned"])
def test_a_compiled_model_uses_what_is_kept_and_is_not_compiled_for_each_step(request, scheme, what):
    torch._dynamo.reset()
    request.addfinalizer(torch._dynamo.reset)
    model = model_of(scheme)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        with reuse_quantized(model, what) as reuse:
            kept = micro_batches(model, 2, compiled)
            reuse.refresh_all()
            again = micro_batches(model, 2, compiled)
        assert same(kept, again)
        assert same(kept, micro_batches(model, 2))
        optimizer.step()
    assert len(compilations) == 1
    assert same(micro_batches(model, 2, compiled), micro_batches(model, 2))


def test_a_compiled_model_is_compiled_once_where_gradients_of_scales_come_later(request):
    torch._dynamo.reset()
    request.addfinalizer(torch._dynamo.reset)
    model = model_of(LEARNED)
    twin, compilations = copy.deepcopy(model), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled, reuse = torch.compile(model, fullgraph=True, backend=backend), module.Reuse(model, "dense", defer=True)
    for _ in range(3):
        reuse.begin()
        micro_batches(model, 2, compiled)
        reuse.scale_gradients()
        reuse.end()
        micro_batches(twin, 2)
        for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)
    assert len(compilations) == 1


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flat(values):
    return [tensor for layer in values for tensor in layer if tensor is not None]


@pytest.fixture
def recordings(monkeypatch):
    """A list that grows by one for each recording; replayed on the processor: called again, into the same tensors."""
    done = []

    def record(call):
        done.append(1)
        found = call()

        def replay():
            for old, new in zip(flat(found), flat(call()), strict=True):
                old.copy_(new)

        for tensor in flat(found):
            tensor.zero_()  # a recording computes nothing
        return found, replay

    monkeypatch.setattr(module, "_record", record)
    monkeypatch.setattr(module, "_on_gpu", bool)
    return done


def steps(model, reuse, count=4):
    """Return outputs and gradients of some optimizer steps of two micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    results = []
    for _ in range(count):
        if reuse is not None:
            reuse.begin()
        results += [value.clone() for value in micro_batches(model, 2)]
        if reuse is not None:
            reuse.end()
        optimizer.step()
    return results


@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_recorded_graph_gives_the_same_steps(recordings, scheme, what):
    model = model_of(scheme)
    twin = copy.deepcopy(model)
    assert same(steps(twin, None), steps(model, module.Reuse(model, what, graph=True)))
    assert len(recordings) == 1
    assert all(layer.kept is None and layer.kept_codes is None for layer in model[::2])


def test_a_recording_is_made_anew_where_a_weight_has_moved(recordings):
    model = model_of(LEARNED)
    twin = copy.deepcopy(model)
    reuse = module.Reuse(model, "dense", graph=True)
    assert same(steps(twin, None), steps(model, reuse))
    with torch.no_grad():
        for one in (model, twin):
            one[0].weight = nn.Parameter(one[0].weight * 0.5 + 0.01)
    assert same(steps(twin, None), steps(model, reuse))
    assert len(recordings) == 2


def test_what_cannot_be_recorded_is_quantized_layer_by_layer(recordings, monkeypatch, caplog):
    def fails(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(module, "_record", fails)
    model = model_of(LEARNED)
    twin = copy.deepcopy(model)
    assert same(steps(twin, None), steps(model, module.Reuse(model, "dense", graph=True)))
    assert caplog.text.count("layer by layer") == 1


LEARNING = [scheme for scheme in SCHEMES if scheme.learned] + [METHODS["fairy2i_w2"]]


def later(model, **how):
    return module.Reuse(model, defer=True, **how)


def close_steps(model, twin, reuse, count=4):
    """Do the same steps with gradients of scales from each backward, and later; compare losses and all weights."""
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01) for one in (model, twin)]
    for _ in range(count):
        results = []
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            if one is model:
                reuse.begin()
            values = [value.clone() for value in micro_batches(one, 2)[:2]]
            if one is model:
                reuse.scale_gradients()
                reuse.end()
            results.append([*values, *(p.grad.clone() for p in one.parameters())])
            optimizer.step()
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", [False, True], ids=["layer by layer", "graph"])
@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("scheme", LEARNING, ids=str)
def test_gradients_of_scales_may_be_made_from_those_of_the_weights(recordings, scheme, what, graph):
    model = model_of(scheme)
    twin = copy.deepcopy(model)
    close_steps(model, twin, later(model, what=what, graph=graph))
    assert len(recordings) == 2 * graph


def test_scales_whose_weight_is_frozen_or_tied_have_their_gradient_from_the_backward():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(32, 24)
            self.body = QATLinear(24, 24, scheme=LEARNED)
            self.frozen = QATLinear(24, 24, scheme=LEARNED)
            self.frozen.weight.requires_grad_(False)
            self.head = QATLinear(24, 32, bias=False, scheme=LEARNED)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.frozen(self.body(self.embedding(ids))))

    model = Tied()
    twin, reuse, ids = copy.deepcopy(model), later(model), torch.arange(20) % 32
    twin(ids).square().sum().backward()
    reuse.begin()
    assert [layer.scales_later for layer in (model.body, model.frozen, model.head)] == [True, False, False]
    model(ids).square().sum().backward()
    assert model.body.scales.grad is None and model.head.scales.grad is not None
    reuse.scale_gradients()
    reuse.end()
    assert not model.body.scales_later
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("scheme", LEARNING, ids=str)
def test_gradients_of_scales_by_a_real_graph(scheme, what):
    model = model_of(scheme).cuda()
    reuse = later(model, what=what, graph=True)
    close_steps(model, copy.deepcopy(model), reuse, 6)
    assert reuse._gradients._recorded is not None


@pytest.mark.gpu
@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_real_graph_gives_the_same_steps(scheme, what):
    model = model_of(scheme).cuda()
    twin = copy.deepcopy(model)
    reuse = module.Reuse(model, what, graph=True)
    results = [[value.to("cpu") for value in steps(one, how, 5)] for one, how in ((twin, None), (model, reuse))]
    assert same(*results)
    assert reuse._graph._recorded is not None and not reuse._graph._fails


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "whole until backward"])
@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("scheme", [METHODS["complex_phase_v2"], LEARNED], ids=["mean", "learned"])
def test_fsdp2_reuses_within_a_step_and_sees_the_next(one_process, quantizations, scheme, what, reshard):
    results = []
    for keep in (False, True):
        torch.manual_seed(0)
        model = model_of(scheme)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model[::2]:
            fully_shard(layer, mp_policy=policy, reshard_after_forward=reshard)
        keep_scales_exact(fully_shard(model, mp_policy=policy, reshard_after_forward=reshard))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        quantizations.clear()
        result = []
        for _ in range(2):
            if keep:
                with reuse_quantized(model, what, verify=False):
                    result += [value.clone() for value in micro_batches(model, dtype=torch.float32)]
            else:
                result += micro_batches(model, dtype=torch.float32)
            optimizer.step()
        results.append((result, len(quantizations)))
    (plain, often), (kept, once) = results
    assert all(torch.equal(a, b) for a, b in zip(map(whole, plain), map(whole, kept), strict=True))
    assert often == 2 * 3 * (4 if scheme.learned else 3)  # the first layer's backward asks for no gradient of its input
    assert once == 2 * 2


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
