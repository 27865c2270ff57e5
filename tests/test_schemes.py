"""Schemes are validated, JSON-able plain data; METHODS are the paper's."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairy2i import METHODS, PhaseScheme, RealScheme
from fairy2i.schemes import method_name, resolve_method, scheme_from_dict

COMMON = {
    "granularity": st.sampled_from(["tensor", "row", "tile"]),
    "tile": st.integers(1, 300),
    "rotation": st.sampled_from([0, 4, 16, 64, 256]),
}
SCHEMES = st.one_of(
    st.builds(
        PhaseScheme,
        stages=st.integers(1, 8),
        refits=st.integers(1, 3),
        scales=st.sampled_from(["mean", "joint", "learned"]),
        **COMMON,
    ),
    st.builds(RealScheme, levels=st.sampled_from([2, 3]), scales=st.sampled_from(["mean", "learned"]), **COMMON),
)


@given(scheme=SCHEMES)
def test_a_scheme_survives_json(scheme):
    back = scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert back == scheme
    assert type(back) is type(scheme)


def test_the_written_form_is_plain_and_names_its_kind():
    assert PhaseScheme(stages=3, granularity="row", scales="joint").to_dict() == {
        "kind": "phase",
        "granularity": "row",
        "tile": 64,
        "scales": "joint",
        "stages": 3,
        "refits": 8,
    }
    assert RealScheme(levels=2).to_dict()["kind"] == "real"


def test_methods_are_those_of_the_paper():
    paper = {f"complex_phase_v{t}": PhaseScheme(stages=t, granularity="tensor", scales="mean") for t in (1, 2, 3, 4)}
    paper["bitnet"] = RealScheme(levels=2, granularity="tensor", scales="mean")
    paper["bitnet_1_58"] = RealScheme(levels=3, granularity="tensor", scales="mean")
    assert {name: METHODS[name] for name in paper} == paper


def test_each_method_is_found_by_its_name_and_named_by_its_scheme():
    for name, scheme in METHODS.items():
        assert resolve_method(name) is scheme
        assert method_name(scheme) == name
    assert method_name(PhaseScheme(stages=7)) == repr(PhaseScheme(stages=7))


def test_schemes_are_frozen_and_hashable():
    scheme = PhaseScheme()
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.stages = 1
    assert {scheme: 1}[PhaseScheme()] == 1


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (PhaseScheme, {"stages": 0}, "stages must be a whole number from 1 to 8, got 0"),
        (PhaseScheme, {"stages": 9}, "stages"),
        (PhaseScheme, {"stages": 2.0}, "stages"),
        (PhaseScheme, {"stages": True}, "stages"),
        (PhaseScheme, {"refits": 0}, "refits"),
        (PhaseScheme, {"tile": 0}, "tile"),
        (PhaseScheme, {"granularity": "column"}, "granularity must be one of 'tensor', 'row', 'tile', got 'column'"),
        (PhaseScheme, {"scales": "max"}, "scales must be one of 'mean', 'joint', 'learned', got 'max'"),
        (RealScheme, {"scales": "joint"}, "scales must be one of 'mean', 'learned', got 'joint'"),
        (RealScheme, {"levels": 4}, "levels must be one of 2, 3, got 4"),
        (RealScheme, {"granularity": None}, "granularity"),
    ],
)
def test_an_impossible_field_is_an_error_that_says_what_is_possible(build, fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "phaze"}, "unknown scheme kind 'phaze'. Known kinds: phase, real"),
        ({}, "unknown scheme kind None"),
        ({"kind": "phase", "stage": 2}, "a phase scheme has no field stage. Known fields: granularity, refits"),
        ({"kind": "real", "stages": 2}, "a real scheme has no field stages"),
        ({"kind": "phase", "stages": "2"}, "stages must be a whole number"),
    ],
)
def test_reading_an_unknown_form_is_an_error(data, message):
    with pytest.raises(ValueError, match=message):
        scheme_from_dict(data)


def test_reading_does_not_change_what_was_read():
    data = PhaseScheme().to_dict()
    before = dict(data)
    scheme_from_dict(data)
    assert data == before


@pytest.mark.parametrize("near", ["complex_phase_v5", "complex_phase_2", "bitnet158"])
def test_an_unknown_method_lists_the_known_and_suggests_the_nearest(near):
    with pytest.raises(ValueError, match=f"unknown method '{near}'. Did you mean") as error:
        resolve_method(near)
    assert all(name in str(error.value) for name in METHODS)


def test_a_far_miss_suggests_nothing():
    with pytest.raises(ValueError, match=r"unknown method 'gptq'\. Known methods: ") as error:
        resolve_method("gptq")
    assert "mean" not in str(error.value)


def test_a_method_of_another_type_is_an_error():
    with pytest.raises(TypeError, match="a name or a scheme, got int"):
        resolve_method(2)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        # 64 x 128: U and W are 32 x 64; a stage has a re and an im scale of 32 bits for each of U and W and each group
        (PhaseScheme(stages=1), 1 + 4 * 32 / 8192),
        (PhaseScheme(stages=2), 2 + 8 * 32 / 8192),
        (PhaseScheme(stages=2, granularity="row"), 2 + 8 * 32 * 32 / 8192),
        (PhaseScheme(stages=3, granularity="tile", tile=20), 3 + 12 * (2 * 4) * 32 / 8192),
        (RealScheme(levels=2), 1 + 32 / 8192),
        (RealScheme(levels=3), 2 + 32 / 8192),
        (RealScheme(levels=3, granularity="row"), 2 + 64 * 32 / 8192),
        (RealScheme(levels=2, granularity="tile", tile=50), 1 + (2 * 3) * 32 / 8192),
    ],
    ids=str,
)
def test_bits_per_weight_count_codes_and_scales(scheme, bits):
    assert scheme.bits_per_weight(64, 128) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    ("scheme", "codes", "packed"),
    [
        # 6 x 10: U and W are 3 x 5; five codes of 2 bits need two bytes
        (PhaseScheme(stages=3), (3, 2, 3, 5), (3, 2, 3, 2)),
        (RealScheme(levels=2), (6, 10), (6, 2)),
        (RealScheme(levels=3), (6, 10), (6, 3)),
    ],
    ids=str,
)
def test_bits_per_weight_count_the_padding_of_packed_rows(scheme, codes, packed):
    assert scheme.code_shape(6, 10) == codes
    assert scheme.packed_shape(6, 10) == packed
    scales = 4 * math.prod(scheme.scale_shape(6, 10))
    assert scheme.bits_per_weight(6, 10) == 8 * (math.prod(packed) + scales) / 60


@settings(max_examples=15)
@given(scheme=SCHEMES, n=st.integers(1, 20), m=st.integers(1, 20))
def test_codes_and_scales_have_the_shapes_and_width_that_the_scheme_says(scheme, n, m):
    codes, scales = scheme.quantize(torch.randn(2 * n, 2 * m))
    assert scales.shape == scheme.scale_shape(2 * n, 2 * m)
    assert codes.shape == scheme.code_shape(2 * n, 2 * m)
    assert codes.max() < 2**scheme.code_width


@pytest.mark.parametrize(("shape", "fine"), [((4, 6), True), ((3, 4), False), ((4, 3), False), ((0, 4), False)])
def test_phase_schemes_say_why_they_cannot_take_a_shape(shape, fine):
    reason = PhaseScheme().unsupported(*shape)
    assert reason is None if fine else isinstance(reason, str)


def test_real_schemes_take_odd_sizes_but_not_empty_ones():
    assert RealScheme().unsupported(3, 5) is None
    assert RealScheme().unsupported(0, 5) == "has no entries"
