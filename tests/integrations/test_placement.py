"""Where weights go while they load: shards, device maps, disk offload, "meta" first, another dtype."""

import pytest
import torch
from checkpoints import LEARNED, V2, packed_names, saved_packed, saved_qat
from safetensors.torch import load_file
from tiny_models import logits, tiny_model
from transformers import AutoModelForCausalLM

from fairy2i import PhaseScheme, QATLinear

EACH_KIND = pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
EACH_METHOD = pytest.mark.parametrize("method", [V2, "bitnet", LEARNED], ids=["v2", "bitnet", "learned"])
PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def on_meta(model):
    return {name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta}


def same_files(one, two):
    assert sorted(file.name for file in one.glob("*.safetensors")) == sorted(
        file.name for file in two.glob("*.safetensors")
    )
    for file in one.glob("*.safetensors"):
        tensors, others = load_file(file), load_file(two / file.name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize(
    "options",
    [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}],
    ids=lambda options: str(next(iter(options.values()))),
)
@EACH_METHOD
@EACH_KIND
def test_shards_and_a_device_map_change_no_bit(save, method, options, tmp_path):
    model = save(tmp_path / "whole", method=method)
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", **options)
    assert on_meta(loaded) == set()
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    same_files(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("shard", ["1GB", "8KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers too"])
@EACH_METHOD
@EACH_KIND
def test_a_part_that_is_offloaded_to_disk_computes_and_saves_the_same(save, method, buffers, shard, tmp_path):
    model = save(tmp_path / "one", method=method)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two", max_shard_size=shard)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "two", device_map=PLACES, offload_folder=tmp_path / "offload", offload_buffers=buffers
    )
    norm, layer = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj"
    assert norm in on_meta(loaded)
    if save is saved_qat:
        assert f"{layer}.weight" in on_meta(loaded)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.warns(UserWarning, match="offloaded"):
        loaded.save_pretrained(tmp_path / "again")
    same_files(tmp_path / "one", tmp_path / "again")


@EACH_KIND
def test_a_memory_limit_offloads_what_does_not_fit(save, tmp_path):
    model = save(tmp_path / "one", method=LEARNED)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "one", device_map="auto", max_memory={"cpu": "16KB"}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert on_meta(loaded)
    assert torch.equal(logits(loaded), logits(model))


def test_a_packed_model_fits_where_its_qat_model_does_not(tmp_path):
    for save in (saved_packed, saved_qat):
        save(tmp_path / save.__name__)
    limits = {"device_map": "auto", "max_memory": {"cpu": "60KB"}, "offload_folder": tmp_path / "offload"}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "saved_packed", **limits)
    qat = AutoModelForCausalLM.from_pretrained(tmp_path / "saved_qat", **limits)
    assert on_meta(packed) == set()
    assert on_meta(qat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"device_map": PLACES}], ids=["in memory", "offloaded"])
@pytest.mark.parametrize(
    "method", [V2, PhaseScheme(granularity="tile", tile=8, scales="learned")], ids=["v2", "learned"]
)
@EACH_KIND
def test_another_dtype_casts_what_is_not_quantized_and_never_the_scales(save, method, options, dtype, tmp_path):
    model = save(tmp_path, method=method)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **options)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert logits(loaded).dtype == dtype
    assert torch.equal(logits(loaded), logits(plain))
    for name, layer in plain.named_modules():
        if isinstance(layer, QATLinear):
            assert layer.weight.dtype == dtype
        elif name in packed_names(plain):
            assert torch.equal(layer.dense_weight(), model.get_submodule(name).quantized_weight())
        if getattr(layer, "scales", None) is not None:
            assert layer.scales.dtype == torch.float32


def test_loading_needs_no_second_copy_of_the_weights(tmp_path, monkeypatch):
    saved_packed(tmp_path)
    made = []
    zeros = torch.zeros

    def watch(*args, **kwargs):
        made.append(zeros(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", watch)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    codes = [tensor for tensor in made if tensor.dtype == torch.uint8]
    assert len(codes) == len(packed_names(loaded))
    assert all(tensor.is_meta for tensor in codes)


def test_a_plain_model_on_meta_is_converted_on_meta_in_both_steps(tmp_path):
    from fairy2i import convert_to_inference_mode, replace_modules_for_qat

    with torch.device("meta"):
        model = tiny_model("llama")
    replace_modules_for_qat(model, LEARNED)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    convert_to_inference_mode(model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    saved_packed(tmp_path, method=LEARNED)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in stored.items()
    }
