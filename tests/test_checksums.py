"""Damaged files: every bit of a packed checkpoint is either guarded or without effect."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from fairy2i import convert_to_inference_mode, replace_modules_for_qat
from fairy2i.checksums import checksum_metadata, crc32, sort_metadata, verify_checksums


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A packed checkpoint, its bytes and its weights."""
    folder = tmp_path_factory.mktemp("packed")
    model = tiny_model("llama", tied=True)
    replace_modules_for_qat(model, "complex_phase_v2")
    convert_to_inference_mode(model).save_pretrained(folder)
    return folder, (folder / "model.safetensors").read_bytes(), model.state_dict()


def test_crc32_is_that_of_the_bytes():
    assert crc32(torch.tensor([49, 50, 51, 52, 53, 54, 55, 56, 57], dtype=torch.uint8)) == "cbf43926"  # the check value
    assert crc32(torch.tensor(1.0)) == crc32(torch.tensor([0, 0, 128, 63], dtype=torch.uint8))
    assert crc32(torch.ones(2, 3, dtype=torch.bfloat16).T) == crc32(torch.ones(6, dtype=torch.bfloat16))
    assert crc32(torch.empty(0, 4)) == "00000000"


def test_tensors_without_bytes_have_no_checksum():
    sums = json.loads(checksum_metadata({"a": torch.ones(2), "b": torch.ones(2, device="meta")})["crc32"])
    assert sums == {"a": crc32(torch.ones(2))}


def test_a_file_without_checksums_is_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    with safe_open(tmp_path / "plain.safetensors", "pt") as opened:
        assert verify_checksums(opened, "plain") == set()


def test_equal_tensors_make_equal_files(tmp_path):
    tensors = {"ä": torch.ones(2), "b": torch.arange(3)}
    made = set()
    for run in range(12):  # the metadata come in random order: 1 in 2,048 that all are the same by chance
        path = tmp_path / f"{run}.safetensors"
        save_file(tensors, path, metadata={"format": "pt", **checksum_metadata(tensors)})
        sort_metadata(path)
        made.add(path.read_bytes())
        with safe_open(path, "pt") as opened:
            assert verify_checksums(opened, str(path)) == {"ä", "b"}
            assert opened.metadata()["format"] == "pt"
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    assert len(made) == 1


def load_damaged(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_an_error_or_changes_nothing(checkpoint, data):
    folder, content, weights = checkpoint
    header = 8 + int.from_bytes(content[:8], "little")
    in_header = data.draw(st.booleans(), "in the header")
    start, end = (0, header) if in_header else (header, len(content))
    position = data.draw(st.integers(start, end - 1), "byte")
    damaged = bytearray(content)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7), "bit")
    try:
        loaded = load_damaged(folder, bytes(damaged))
    except (ValueError, OSError, RuntimeError) as error:
        assert "safetensors" in str(error), error
        return
    assert in_header, "a flipped bit of a tensor was not seen"
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_an_error_that_names_it(checkpoint, share):
    folder, content, _ = checkpoint
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        load_damaged(folder, content[: int(share * len(content))])


def test_a_damaged_tensor_is_named(checkpoint):
    folder, content, _ = checkpoint
    with safe_open_bytes(folder, content) as opened:
        header_length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_length])
        name = next(key for key in opened.keys() if key.endswith("q_proj.codes"))
    damaged = bytearray(content)
    damaged[8 + header_length + header[name]["data_offsets"][0] + 3] ^= 16
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} is damaged"):
        load_damaged(folder, bytes(damaged))


def test_a_tensor_that_is_gone_is_named(checkpoint):
    folder, content, _ = checkpoint
    with safe_open_bytes(folder, content) as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys() if key != "model.norm.weight"}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"checksum of model\.norm\.weight, but not the tensor"):
        AutoModelForCausalLM.from_pretrained(folder)


def safe_open_bytes(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    return safe_open(folder / "model.safetensors", "pt")
