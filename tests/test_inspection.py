"""What inspect_layers tells of a model."""

import pytest
import torch

from fairy2i import METHODS, PhaseScheme, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.inspection import inspect_layers, model_bits_per_weight, summarize


def two_layers():
    return torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8, bias=False))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_code_use_bits_and_error_are_those_of_the_layers(method, packed):
    original, model = two_layers(), two_layers()
    model.load_state_dict(original.state_dict())
    replace_modules_for_qat(model, method)
    layer = model[0]
    codes, weight, scheme = layer.codes_and_scales()[0], layer.quantized_weight(), layer.scheme
    if packed:
        convert_to_inference_mode(model)
    first, second = inspect_layers(model, original)
    assert (first.name, first.method, first.shape, second.shape) == ("0", method, (16, 32), (8, 16))
    assert first.code_use == [float((codes == code).double().mean()) for code in range(len(first.code_use))]
    assert sum(first.code_use) == pytest.approx(1, abs=1e-12)
    assert first.bits_per_weight == scheme.bits_per_weight(16, 32)
    plain = original[0].weight.detach()
    error = (plain - weight).norm() / plain.norm()
    assert first.error == pytest.approx(float(error), rel=1e-6)


def relative(weight, quantized):
    return float((weight - quantized).norm() / weight.norm())


def test_without_an_original_a_layer_is_compared_with_its_own_master_weight():
    original, model = two_layers(), two_layers()
    model.load_state_dict(original.state_dict())
    replace_modules_for_qat(model, "complex_phase_v2")
    with torch.no_grad():
        model[0].weight += 0.05 * torch.randn(16, 32)  # training
    master, quantized = model[0].weight.detach(), model[0].quantized_weight()
    own, moved = inspect_layers(model)[0], inspect_layers(model, original)[0]
    assert (own.error_against, moved.error_against) == ("master weight", "original")
    assert own.error == pytest.approx(relative(master, quantized), rel=1e-6)
    assert moved.error == pytest.approx(relative(original[0].weight.detach(), quantized), rel=1e-6)
    assert own.error < moved.error
    convert_to_inference_mode(model)
    assert inspect_layers(model, original)[0] == moved
    packed = inspect_layers(model)[0]
    assert (packed.error, packed.error_against, packed.norm) == (None, None, None)


def test_the_total_error_is_that_of_all_weights_in_one_vector():
    model = two_layers()
    replace_modules_for_qat(model, {"0": "complex_phase_v2", "2": "bitnet"})
    layers = [model[0], model[2]]
    weight = torch.cat([layer.weight.detach().flatten() for layer in layers])
    quantized = torch.cat([layer.quantized_weight().flatten() for layer in layers])
    total = summarize(inspect_layers(model))
    assert total["error"] == pytest.approx(relative(weight, quantized), rel=1e-6)
    assert total["bits_per_weight"] == pytest.approx(model_bits_per_weight(model), rel=1e-12)
    assert (total["layers"], total["weights"]) == (2, 16 * 32 + 8 * 16)
    assert total["methods"] == {"complex_phase_v2": 1, "bitnet": 1}
    convert_to_inference_mode(model)
    assert (summarize(inspect_layers(model))["error"], summarize([])["bits_per_weight"]) == (None, 0)


def test_who_looks_on_sees_the_weights_before_and_after():
    model, seen = two_layers(), []
    replace_modules_for_qat(model, "bitnet_1_58")
    inspect_layers(model, look=lambda *layer: seen.append(layer))
    for layer, (scheme, before, after) in zip([model[0], model[2]], seen, strict=True):
        assert scheme == layer.scheme
        assert torch.equal(before, layer.weight)
        assert torch.equal(after, layer.quantized_weight())


def test_more_stages_have_smaller_errors():
    errors = []
    for stages in (1, 2, 3, 4):
        model, original = two_layers(), two_layers()
        model.load_state_dict(original.state_dict())
        replace_modules_for_qat(model, PhaseScheme(stages=stages))
        errors.append(inspect_layers(model, original)[0].error)
    assert errors == sorted(errors, reverse=True)


def test_an_original_of_another_shape_or_name_is_refused():
    model = two_layers()
    replace_modules_for_qat(model, "bitnet")
    with pytest.raises(ValueError, match="no layer 2"):
        inspect_layers(model, torch.nn.Sequential(torch.nn.Linear(32, 16)))
    with pytest.raises(ValueError, match=r"0 is \(4, 32\) in the original and \(16, 32\) here"):
        inspect_layers(model, torch.nn.Sequential(torch.nn.Linear(32, 4)))


def test_a_plain_model_has_no_layers_to_show():
    assert inspect_layers(two_layers()) == []
