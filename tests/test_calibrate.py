"""Calibration against naive least squares, and what it does to a model."""

import copy

import pytest
import torch
from tiny_models import logits, tiny_model, token_batch
from torch import nn

from fairy2i import PhaseScheme, QATLinear, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.calibrate import (
    calibrate,
    calibrate_layer,
    inverse_factor,
    loosen,
    output_error,
    refit_row_scales,
    round_with_feedback,
)

OUT, IN = 12, 20


def scheme(stages=2, granularity="row"):
    return PhaseScheme(stages=stages, granularity=granularity, scales="learned")


def correlated_inputs(rows=400, features=IN, rank=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, features, generator=generator)
    return low + 0.3 * torch.randn(rows, features, generator=generator)


@pytest.fixture
def case():
    """A weight, inputs and their Gram matrix."""
    x = correlated_inputs()
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)), x, x.T @ x


def test_the_factor_is_that_of_the_damped_inverse(case):
    gram = case[2].double()
    upper = inverse_factor(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(IN)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped))


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.ones(4, 4)], ids=["no input", "one direction"])
def test_inputs_that_span_nothing_are_no_obstacle(gram):
    assert torch.isfinite(inverse_factor(gram, 0.01)).all()


def test_what_is_not_a_gram_matrix_is_an_error():
    with pytest.raises(ValueError, match="not positive definite"):
        inverse_factor(-torch.eye(4), 0.01)


@pytest.mark.parametrize("granularity", ["tensor", "row", "tile"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_inputs_without_correlation_leave_plain_rounding(case, stages, granularity):
    weight, chosen = case[0], PhaseScheme(stages=stages, granularity=granularity, tile=4, scales="learned")
    scales = chosen.quantize(weight)[1]
    expected = chosen.quantize(weight, scales)[0]
    codes, moved = round_with_feedback(weight, torch.eye(IN), scales, chosen)
    assert torch.equal(codes, expected)
    assert torch.equal(moved, weight)


@pytest.mark.parametrize("lazy", [1, 3, 64])
@pytest.mark.parametrize("stages", [1, 2])
def test_feedback_is_the_least_squares_answer_of_the_columns_that_are_left(case, stages, lazy):
    """Round a pair, then move all columns that are left to where they make good what is done best; in float64."""
    weight, _, gram = (tensor.double() for tensor in case)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(IN)
    m, energy = IN // 2, gram.diagonal()
    chosen = scheme(stages)
    scales = chosen.quantize(weight.float())[1]
    left = sorted(range(m), key=lambda j: -float(energy[j] + energy[m + j]))
    now, quantized, done = weight.clone(), torch.zeros_like(weight), []
    while left:
        pair = [left[0], m + left[0]]
        dense = chosen.dequantize(*chosen.quantize(now.float(), scales)).double()
        quantized[:, pair] = dense[:, pair]
        done, left = done + pair, left[1:]
        rest = left + [m + j for j in left]
        if rest:
            lost = (weight - quantized)[:, done]
            now[:, rest] = weight[:, rest] + lost @ damped[done][:, rest] @ torch.linalg.inv(damped[rest][:, rest])
    codes, moved = round_with_feedback(case[0], case[2], scales, chosen, lazy=lazy)
    torch.testing.assert_close(chosen.dequantize(codes, scales).double(), quantized)
    torch.testing.assert_close(moved.double(), now, rtol=1e-3, atol=1e-4)
    assert torch.equal(chosen.quantize(moved, scales)[0], codes)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_scales_are_the_least_squares_answer_for_the_outputs(case, stages):
    weight, x, gram = case
    chosen = scheme(stages)
    codes, scales = chosen.quantize(weight)
    fit = refit_row_scales(weight.double(), gram.double(), codes, torch.full_like(scales, torch.nan).double())
    n = OUT // 2
    for row in range(n):
        if fit[..., row].isnan().any():  # not positive: kept
            continue
        columns = []
        for index in range(4 * stages):  # outputs of rows i and n + i that each scale by itself gives
            one = torch.zeros(4 * stages)
            one[index] = 1
            alone = torch.zeros(stages, 2, 2, n)
            alone[..., row] = one.view(stages, 2, 2)
            columns.append((x @ chosen.dequantize(codes, alone)[[row, n + row]].T).T.flatten())
        target = (x @ weight[[row, n + row]].T).T.flatten()
        expected = torch.linalg.lstsq(torch.stack(columns, 1).double(), target.double()).solution
        torch.testing.assert_close(fit[..., row].flatten(), expected, rtol=1e-3, atol=1e-4)
    assert not fit.isnan().all()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_layer_comes_nearer_to_its_outputs_and_its_forward_says_so(case, stages):
    weight, x, gram = case
    layer = QATLinear(IN, OUT, bias=False, scheme=scheme(stages))
    layer.weight.data.copy_(weight)
    before, after = calibrate_layer(layer, gram)
    target = x @ weight.T
    error = float((layer(x).detach() - target).square().sum() / target.square().sum())
    assert error == pytest.approx(after, rel=1e-3)
    assert after < 0.7 * before
    assert after == pytest.approx(output_error(weight, layer.quantized_weight(), gram), rel=1e-6)


def model_and_tokens(family="llama", stages=2):
    """A plain model, the same converted, and text to calibrate on, in which that of `logits` is not."""
    model = tiny_model(family)
    plain = copy.deepcopy(model)
    replace_modules_for_qat(model, scheme(stages))
    return plain, model, token_batch(rows=12, seed=9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3", "phi3", "gpt_neox", "mistral"])
def test_each_family_is_calibrated_layer_by_layer(family):
    plain, model, tokens = model_and_tokens(family)
    rounded = logits(copy.deepcopy(model))
    done = calibrate(model, tokens, batch_size=2, progress=False)
    names = [name for name, module in model.named_modules() if isinstance(module, QATLinear) and "head" not in name]
    assert sorted(layer.name for layer in done) == sorted(set(names) - {"embed_out"})
    assert all(layer.after <= layer.before for layer in done)
    assert sum(layer.after for layer in done) < 0.95 * sum(layer.before for layer in done)
    target = logits(plain)
    assert (logits(model) - target).norm() < (rounded - target).norm()


def test_a_calibrated_model_packs_as_it_is_and_trains_on():
    _, model, tokens = model_and_tokens()
    model.train()
    calibrate(model, tokens, progress=False)
    assert model.training
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    layer = next(module for module in model.modules() if isinstance(module, QATLinear))
    assert layer.weight.grad is not None and layer.scales.grad.abs().sum() > 0
    expected = logits(model.eval())
    assert torch.equal(logits(convert_to_inference_mode(model)), expected)


def test_the_same_text_gives_the_same_model():
    states = []
    for batch_size in (2, 2):
        _, model, tokens = model_and_tokens()
        calibrate(model, tokens, batch_size=batch_size, progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("tensor", ["input_layernorm.weight", "self_attn.q_proj.weight"])
def test_nan_is_an_error_that_names_the_layer_and_leaves_the_model_whole(tensor):
    _, model, tokens = model_and_tokens()
    model.model.layers[1].get_parameter(tensor).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: its (inputs|weight) have NaN"):
        calibrate(model, tokens, progress=False)
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_schemes_and_other_models_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no list of decoder blocks"):
        calibrate(model, token_batch())
    replace_modules_for_qat(model, "complex_phase_v2")
    with pytest.raises(ValueError, match=r"q_proj has complex_phase_v2; calibration needs learned row scales"):
        calibrate(model, token_batch())
    with pytest.raises(ValueError, match="no list of decoder blocks"):
        calibrate(nn.Sequential(QATLinear(4, 4, scheme=scheme())), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_loosened_master_weight_has_the_same_codes_and_is_nearer_to_the_target(stages):
    scheme = PhaseScheme(stages=stages, granularity="row", scales="learned")
    target = torch.randn(24, 40, generator=torch.Generator().manual_seed(6))
    noise = torch.randn(24, 40, generator=torch.Generator().manual_seed(7))
    _, scales = scheme.quantize(target)
    tight = scheme.dequantize(*scheme.quantize(target + 0.3 * noise, scales))  # in the middle of cells
    codes, _ = scheme.quantize(tight, scales)
    loose = loosen(tight, target, scales, scheme)
    assert torch.equal(scheme.quantize(loose, scales)[0], codes)
    assert (loose - target).norm() < 0.8 * (tight - target).norm()
    if stages < 3:  # the middle of a cell is in the cell; with three fitted scales not always
        own = loosen(scheme.dequantize(*scheme.quantize(target)), target, scales, scheme)
        torch.testing.assert_close(own, target)  # nothing is in the way where the codes are the target's own


def test_codes_of_a_calibrated_layer_can_move():
    torch.manual_seed(8)
    layer = QATLinear(64, 48, bias=False, scheme=PhaseScheme(stages=2, granularity="row", scales="learned"))
    x = torch.randn(300, 64) @ torch.randn(64, 64)
    weight = layer.weight.detach().clone()
    calibrate_layer(layer, x.T @ x)
    middle = layer.quantized_weight()
    at_target = (layer.weight - weight).abs() < 1e-5 * weight.abs().max()
    assert at_target.float().mean() > 0.1
    assert ((layer.weight - middle).abs() < 1e-6).float().mean() < 0.3


# Going on behind a stop


def stoppable(stages=2):
    model = tiny_model(num_hidden_layers=3)
    replace_modules_for_qat(model, scheme(stages))
    return model


def test_a_calibration_that_was_stopped_goes_on_and_ends_where_it_would_have(tmp_path, monkeypatch, caplog):
    tokens, folder = token_batch(4, 16), str(tmp_path / "blocks")
    whole = stoppable()
    expected = calibrate(whole, tokens, progress=False)
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:  # in the second block, of 7 layers
            raise KeyboardInterrupt
        return calibrate_layer(*args, **kwargs)

    monkeypatch.setattr("fairy2i.calibrate.calibrate_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        calibrate(stoppable(), tokens, progress=False, keep=folder)
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["block-0000.safetensors"]
    again = stoppable()
    assert calibrate(again, tokens, progress=False, keep=folder) == expected
    assert len(calls) == 12 + 14  # two blocks were left
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert calibrate(stoppable(), tokens, progress=False, keep=folder) == expected
    assert len(calls) == 26


@pytest.mark.parametrize("what", ["text", "stages", "weights", "cut off", "another file"])
def test_blocks_of_another_calibration_are_not_used(what, tmp_path, caplog):
    tokens, folder = token_batch(4, 16), tmp_path / "blocks"
    calibrate(stoppable(), tokens, progress=False, keep=str(folder))
    first = folder / "block-0000.safetensors"
    stages = 3 if what == "stages" else 2
    plain, model = stoppable(stages), stoppable(stages)
    if what == "text":
        tokens = token_batch(4, 16, seed=9)
    elif what == "weights":
        for one in (plain, model):
            with torch.no_grad():
                one.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    elif what == "cut off":
        first.write_bytes(first.read_bytes()[:-8])
    elif what == "another file":
        first.write_bytes(b"nothing of ours")
    expected = calibrate(plain, tokens, progress=False)
    assert calibrate(model, tokens, progress=False, keep=str(folder)) == expected
    assert torch.equal(logits(model), logits(plain))
    assert any("calibrated again" in record.message for record in caplog.records)


def test_a_full_disk_while_keeping_a_block_loses_no_block(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from fairy2i import calibrated_blocks

    tokens, folder = token_batch(4, 16), tmp_path / "blocks"
    real, saved = calibrated_blocks.save_file, []

    def full(*args):
        saved.append(1)
        if len(saved) == 2:
            raise SafetensorError("No space left on device")
        return real(*args)

    monkeypatch.setattr(calibrated_blocks, "save_file", full)
    with pytest.raises(OSError, match=r"block-0001.*No space left"):
        calibrate(stoppable(), tokens, progress=False, keep=str(folder))
    assert (folder / "block-0000.safetensors").exists()
    assert calibrate(stoppable(), tokens, progress=False, keep=str(folder))
    assert len(saved) == 4  # the first block is not made again
