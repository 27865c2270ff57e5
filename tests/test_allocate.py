"""Stages by a budget of bits: the choice against brute force, the errors against gradients, and the command."""

import copy
import dataclasses
import itertools
import logging
import math
import re

import pytest
import torch
from tiny_models import logits, tiny_model, token_batch
from tiny_text import save_tiny_model, tiny_text
from torch import nn
from transformers import AutoModelForCausalLM

from fairy2i import METHODS, PackedLinear, PhaseScheme, QATLinear, convert_to_inference_mode, replace_modules_for_qat
from fairy2i import allocate as allocate_module
from fairy2i.allocate import STAGES, allocate_stages, choose_stages
from fairy2i.calibrate import calibrate
from fairy2i.cli import main
from fairy2i.schemes import mean_bits_per_weight, method_name

ROWS = PhaseScheme(granularity="row", scales="learned")


def allocate(model, bits, method=ROWS, **settings):
    return allocate_stages(model, token_batch(rows=4, seed=5), method, bits, progress=False, **settings)


class Out:
    def __init__(self, logits):
        self.logits = logits


class ThreeLayers(nn.Module):
    """A language model of three linear layers of different sizes, one with a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(96, 8)
        self.up = nn.Linear(8, 12)
        self.mid = nn.Linear(12, 10, bias=False)
        self.lm_head = nn.Linear(10, 96, bias=False)

    def forward(self, input_ids, use_cache=False):
        return Out(self.lm_head(self.mid(self.up(self.embed(input_ids)).relu_()).tanh()))


def expected_errors(model, tokens, scheme):
    """The definition, one gradient at a time: {name: {stages: error}}, in float64."""
    model = copy.deepcopy(model).double()
    x, hidden, inputs, outputs = model.embed(tokens), None, {}, {}
    for name in ("up", "mid", "lm_head"):
        inputs[name] = x if hidden is None else hidden
        outputs[name] = model.get_submodule(name)(inputs[name])
        hidden = outputs[name].relu() if name == "up" else outputs[name].tanh()
    picked = outputs["lm_head"][:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    gradients = dict(zip(outputs, torch.autograd.grad(-picked.sum(), list(outputs.values())), strict=True))
    errors = {}
    for name in outputs:
        weight = model.get_submodule(name).weight
        g, h = (tensor.detach().flatten(0, 1).square() for tensor in (gradients[name], inputs[name]))
        fisher = torch.outer(g.sum(0), h.mean(0)) / picked.numel()
        errors[name] = {}
        for stages in STAGES:
            of_stages = dataclasses.replace(scheme, stages=stages)
            _, scales = of_stages.quantize(weight.float())
            codes, _ = of_stages.quantize(weight.float(), scales)
            square = (weight - of_stages.dequantize(codes, scales)).square()
            errors[name][stages] = 0.5 * (fisher * square).sum().item()
    return errors


@pytest.mark.parametrize("rotation", [0, 64])
def test_the_errors_are_those_of_the_definition_in_the_basis_of_the_model(rotation, monkeypatch):
    seen = {}

    def look(bits, errors, budget):
        seen.update(errors)
        return choose_stages(bits, errors, budget)

    monkeypatch.setattr(allocate_module, "choose_stages", look)
    model, tokens = ThreeLayers(), token_batch(rows=5, seed=5)
    scheme = dataclasses.replace(ROWS, rotation=rotation)
    allocate_stages(model, tokens, scheme, 12, batch_size=2, progress=False)
    expected = expected_errors(model, tokens, scheme)
    assert list(seen) == ["up", "mid", "lm_head"]
    for name, errors in expected.items():
        assert seen[name] == pytest.approx(errors, rel=1e-4)


def random_problem(seed, layers=3):
    generator = torch.Generator().manual_seed(seed)
    bits, errors = {}, {}
    for index in range(layers):
        weights, scales = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(2))
        falling = torch.rand(4, generator=generator).sort(descending=True).values
        bits[f"layer{index}"] = {t: t * weights + scales for t in STAGES}
        errors[f"layer{index}"] = dict(zip(STAGES, falling.tolist(), strict=True))
    return bits, errors


def total(table, chosen):
    return sum(table[name][stages] for name, stages in chosen.items())


def brute_force(bits, errors, budget):
    """Return the smallest error that any choice within the budget has."""
    choices = (dict(zip(bits, stages, strict=True)) for stages in itertools.product(STAGES, repeat=len(bits)))
    return min(total(errors, chosen) for chosen in choices if total(bits, chosen) <= budget)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_keeps_the_budget_uses_it_and_is_near_the_best_there_is(seed):
    bits, errors = random_problem(seed)
    least, most = (sum(pick(options.values()) for options in bits.values()) for pick in (min, max))
    budgets = hull_budgets(bits, errors)
    step = max(after - before for before, after in itertools.pairwise(budgets))
    for budget in range(least, most + 1):
        chosen = choose_stages(bits, errors, budget)
        spent, error = total(bits, chosen), total(errors, chosen)
        assert spent <= budget
        for name, now in chosen.items():
            assert all(spent + bits[name][more] - bits[name][now] > budget for more in range(now + 1, 5))
        assert error >= brute_force(bits, errors, budget) - 1e-9
        if budget - step >= least:  # the walk is the best choice until a step does not fit
            assert error <= brute_force(bits, errors, budget - step) + 1e-9
    assert choose_stages(bits, errors, least) == dict.fromkeys(bits, 1)
    assert choose_stages(bits, errors, most) == dict.fromkeys(bits, 4)


def hull_budgets(bits, errors):
    """Return the budgets at which the walk along the hulls has just taken a step, from the steps sorted at once."""
    steps = []
    for name in bits:
        now = 1
        while now < 4:
            slope, further = min(
                ((errors[name][t] - errors[name][now]) / (bits[name][t] - bits[name][now]), t)
                for t in range(now + 1, 5)
            )
            steps.append((slope, bits[name][further] - bits[name][now]))
            now = further
    return list(itertools.accumulate([sum(b[1] for b in bits.values()), *(step for _, step in sorted(steps))]))


@pytest.mark.parametrize("seed", range(8))
def test_a_budget_that_the_walk_uses_up_has_the_best_choice(seed):
    bits, errors = random_problem(seed)
    budgets = hull_budgets(bits, errors)
    assert len(budgets) > 2
    for budget in budgets:
        assert total(errors, choose_stages(bits, errors, budget)) == pytest.approx(brute_force(bits, errors, budget))


def test_ties_go_by_name_and_more_error_is_never_bought():
    bits = {name: {1: 10, 2: 20, 3: 30} for name in "cab"}
    errors = {name: {1: 1.0, 2: 0.5, 3: 0.6} for name in "cab"}
    assert choose_stages(bits, errors, 50) == {"a": 2, "b": 2, "c": 1}
    assert choose_stages(bits, errors, 90) == {"a": 2, "b": 2, "c": 2}


def test_a_step_over_a_stage_that_gains_little_falls_back_to_that_stage_where_only_it_fits():
    bits, errors = {"a": {1: 10, 2: 20, 3: 30}}, {"a": {1: 1.0, 2: 0.9, 3: 0.0}}
    assert [choose_stages(bits, errors, budget)["a"] for budget in (10, 20, 29, 30)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("family", "tied", "settings"),
    [
        ("llama", False, {}),
        ("llama", True, {"skip_lm_head": False}),
        ("gpt2", True, {}),
        ("opt", True, {}),
        ("qwen2", False, {"skip_lm_head": True}),
        ("phi3", False, {"skip_modules": ["*layers.0.*"]}),
    ],
)
def test_a_model_of_each_kind_keeps_the_budget_and_gets_the_layers_it_would_get(family, tied, settings):
    model = tiny_model(family, tied=tied)
    plain = replace_modules_for_qat(copy.deepcopy(model), ROWS, **settings)
    low, high = (
        mean_bits_per_weight((PhaseScheme(stages=t, granularity="row"), layer.shape) for layer in plain.replaced)
        for t in (1, 4)
    )
    bits = 0.6 * low + 0.4 * high
    chosen = allocate(model, bits, **settings)
    report = replace_modules_for_qat(model, chosen, **settings)
    assert [layer.name for layer in report.replaced] == [layer.name for layer in plain.replaced] == list(chosen)
    assert len({scheme.stages for scheme in chosen.values()}) > 1
    assert report.bits_per_weight <= bits
    for layer in report.replaced:  # and one stage more anywhere would exceed it
        if layer.scheme.stages < 4:
            more = {**chosen, layer.name: PhaseScheme(stages=layer.scheme.stages + 1, granularity="row")}
            assert mean_bits_per_weight((more[la.name], la.shape) for la in report.replaced) > bits


def test_a_budget_equal_to_a_uniform_setting_can_be_kept_and_the_rest_of_the_scheme_stays():
    model = tiny_model("llama")
    for stages in (1, 4):
        scheme = PhaseScheme(stages=stages, granularity="tile", tile=8, scales="joint", refits=3)
        report = replace_modules_for_qat(copy.deepcopy(model), scheme)
        chosen = allocate(
            model, report.bits_per_weight, PhaseScheme(granularity="tile", tile=8, scales="joint", refits=3)
        )
        assert set(chosen.values()) == {scheme}


def test_only_the_stages_that_are_asked_for_are_chosen():
    chosen = allocate(tiny_model("llama"), 8, stages=iter((4, 2)))
    assert {scheme.stages for scheme in chosen.values()} == {2, 4}


class Branches(nn.Module):
    """Two equal branches, one of which counts more."""

    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.a, self.lm_head = nn.Embedding(96, 8), nn.Linear(8, 8), nn.Linear(8, 96, bias=False)
        self.b = copy.deepcopy(self.a)
        self.share = first, second

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        return Out(self.lm_head(self.share[0] * self.a(x) + self.share[1] * self.b(x)))


def test_a_layer_with_larger_gradients_gets_more_stages():
    for shares in ((1.0, 0.1), (0.1, 1.0)):
        chosen = allocate(Branches(*shares), 8, {"lm_head": None, "*": PhaseScheme(scales="joint")}, stages=(1, 2, 3))
        more, less = ("a", "b") if shares[0] > shares[1] else ("b", "a")
        assert chosen[more].stages > chosen[less].stages


def test_the_same_text_gives_the_same_choice_whatever_the_batches():
    chosen = [allocate(tiny_model("llama"), 4.0, batch_size=size) for size in (1, 1, 4)]
    assert chosen[0] == chosen[1] == chosen[2]
    assert list(chosen[0]) == list(chosen[1])


def state_of(model):
    """Return all that the choice might leave behind: parameters, gradients, modes, hooks."""
    return {
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "types": [type(module) for module in model.modules()],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return one == other


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind_in_the_model(fails):
    model = tiny_model("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = state_of(model)
    if fails:
        handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            allocate(model, 4.0)
        handle.remove()
    else:
        chosen = allocate(model, 4.0)
        assert chosen == allocate(model.eval(), 4.0)  # without the dropout, too
        model.train()
        model.model.layers[0].mlp.eval()
    assert same(state_of(model), before)


def test_it_works_without_gradients_around_it():
    with torch.no_grad():
        chosen = allocate(tiny_model("llama"), 4.0)
    assert chosen == allocate(tiny_model("llama"), 4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gets_nearly_the_same_stages(dtype):
    full, half = (allocate(tiny_model("llama", dtype=d), 4.0) for d in (torch.float32, dtype))
    assert sum(full[name] != half[name] for name in full) <= 2


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (1.5, r"1.5 bits per weight cannot be had; here 1 to 4 stages take ([\d.]+) to ([\d.]+) with scales"),
        (60.0, r"60 bits per weight cannot be had; here 1 to 4 stages take ([\d.]+) to ([\d.]+) with scales"),
        (math.nan, r"nan bits per weight cannot be had"),
    ],
)
def test_a_budget_out_of_range_is_an_error_that_says_the_range(bits, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message) as caught:
        allocate(model, bits)
    low, high = map(float, re.search(r"take ([\d.]+) to ([\d.]+)", str(caught.value)).groups())
    assert {scheme.stages for scheme in allocate(model, low).values()} == {1}
    assert len(allocate(model, high)) == 15  # both ends can be had
    for outside in (low - 2e-4, high + 2e-4):
        with pytest.raises(ValueError, match="cannot be had"):
            allocate(model, outside)


def test_what_has_no_stages_to_choose_is_an_error_that_names_it():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has bitnet; only phase codes"):
        allocate(model, 3.0, {"*q_proj": "bitnet", "*": ROWS})
    with pytest.raises(ValueError, match=r"tokens must be \(sequences, length\) .* got \(4, 1\)"):
        allocate_stages(model, token_batch(rows=4, length=1), ROWS, 4.0, progress=False)
    with pytest.raises(ValueError, match=r"the weight of .*q_proj is not in memory"):
        allocate(model.to("meta"), 4.0)
    model = tiny_model("llama")
    replace_modules_for_qat(model, ROWS)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is quantized already"):
        allocate(model, 4.0)
    with pytest.raises(ValueError, match="is packed already"):
        allocate(convert_to_inference_mode(model), 4.0)


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("model.layers.1.self_attn.v_proj.weight", math.nan, r"weight of model\.layers\.1\.self_attn\.v_proj has NaN"),
        (
            "model.layers.1.input_layernorm.weight",
            math.inf,
            r"model\.layers\.1\.self_attn\.q_proj: its inputs have NaN",
        ),
        ("model.layers.0.mlp.up_proj.bias", math.nan, r"model\.layers\.0\.mlp\.down_proj: its inputs have NaN"),
    ],
)
def test_what_is_not_finite_is_an_error_that_names_the_layer(parameter, value, message):
    model = tiny_model("llama", mlp_bias=True)
    model.get_parameter(parameter).data.fill_(value)
    with pytest.raises(ValueError, match=message):
        allocate(model, 4.0)


def test_gradients_that_are_not_finite_name_the_layer_that_got_them_first():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda module, args, output: (output.register_hook(lambda grad: grad * math.inf), None)[1]
    )
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.o_proj: its gradients have NaN"):
        allocate(model, 4.0)


def test_layers_that_no_token_comes_to_get_what_is_left_and_are_named(caplog):
    class Unused(ThreeLayers):
        def __init__(self):
            super().__init__()
            self.a_spare = nn.Linear(8, 8)

    with caplog.at_level(logging.WARNING):
        model, seen = Unused(), {"*": dataclasses.replace(ROWS, stages=4)}
        report = replace_modules_for_qat(copy.deepcopy(model), {"a_spare": dataclasses.replace(ROWS, stages=1), **seen})
        chosen = allocate(model, report.bits_per_weight)
    assert "no token comes to a_spare" in caplog.text
    assert {name: scheme.stages for name, scheme in chosen.items()} == {"up": 4, "mid": 4, "lm_head": 4, "a_spare": 1}


def test_a_layer_that_cannot_be_quantized_is_left_out():
    model = ThreeLayers()
    model.mid, model.lm_head = nn.Linear(12, 9), nn.Linear(9, 96)
    assert list(allocate(model, 16.0)) == ["up"]


def test_a_mixed_model_is_calibrated_packed_saved_and_loaded(tmp_path):
    model, tokens = tiny_model("llama"), token_batch(rows=8, seed=9)
    chosen = allocate(model, 6.0)
    replace_modules_for_qat(model, chosen)
    rounded = calibrate(model, tokens, progress=False)
    assert all(layer.after <= layer.before for layer in rounded)
    model.save_pretrained(tmp_path / "qat")
    convert_to_inference_mode(model).save_pretrained(tmp_path / "packed")
    expected = logits(model)
    for folder, kind in (("qat", QATLinear), ("packed", PackedLinear)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        layers = {name: module.scheme for name, module in loaded.named_modules() if isinstance(module, kind)}
        assert layers == chosen
        assert torch.equal(logits(loaded), expected)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("plain"))


def quantize(folder, plain, *extra, text=True):
    (folder / "text.txt").write_text(tiny_text(400))
    calibrate_on = ["--calibrate", str(folder / "text.txt"), "--calibrate_length", "32"] if text else []
    return main(["quantize", plain, str(folder / "out"), *calibrate_on, *extra])


def cells(line):
    """Return the cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []


def test_the_command_chooses_calibrates_and_packs(plain, tmp_path, capsys):
    assert quantize(tmp_path, plain, "--method", "fairy2i_w2", "--bits", "6.5") == 0
    out = capsys.readouterr().out
    table = {row[0]: [int(cell or 0) for cell in row[1:]] for row in map(cells, out.splitlines()) if row}
    stages = table.pop("stages")
    assert len(stages) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    schemes = {name: module.scheme for name, module in loaded.named_modules() if isinstance(module, PackedLinear)}
    found = {name.rpartition(".")[2]: [0] * len(stages) for name in schemes}
    for name, scheme in schemes.items():
        assert dataclasses.replace(scheme, stages=2) == METHODS["fairy2i_w2"]
        found[name.rpartition(".")[2]][stages.index(scheme.stages)] += 1
    assert found == table
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert {method_name(scheme) for scheme in schemes.values()} == {
        row[1] for row in map(cells, shown.splitlines()[1:]) if row
    }
    assert 6.0 < float(re.search(r"weights at ([\d.]+) bits", shown).group(1)) <= 6.5


@pytest.mark.parametrize(
    ("extra", "text", "message"),
    [
        (["--method", "fairy2i_w2", "--bits", "6.5"], False, "--bits needs a text"),
        (["--bits", "6.5"], True, "give a method"),
        (["--method", "bitnet", "--bits", "1.5"], True, "chooses the stages of phase codes, and bitnet has none"),
        (["--method", '{"*q_proj": "fairy2i_w2", "*": "bitnet"}', "--bits", "2"], True, "and bitnet has none"),
        (["--method", "fairy2i_w2", "--bits", "0.5"], True, "0.5 bits per weight cannot be had; here 1 to 4 stages"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_budget(plain, tmp_path, capsys, extra, text, message):
    assert quantize(tmp_path, plain, *extra, text=text) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
