"""What inspect_layers tells of a model."""

import pytest
import torch

from fairy2i import METHODS, PhaseScheme, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.inspection import inspect_layers


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
