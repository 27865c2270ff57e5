"""Packing from disk to disk gives what loading, converting and saving in memory gives, with little memory."""

import filecmp
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, logits, tiny_model, token_batch
from tiny_text import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fairy2i import (
    METHODS,
    PackedLinear,
    PhaseScheme,
    QATLinear,
    cli,
    convert_to_inference_mode,
    replace_modules_for_qat,
    streaming,
)
from fairy2i.checksums import crc32
from fairy2i.streaming import NotStreamable, pack_checkpoint

V2 = "complex_phase_v2"
LEARNED = PhaseScheme(granularity="row", scales="learned")
MIXED = {"lm_head": None, "*.layers.0.*": "bitnet_1_58", "down_proj": LEARNED, "*": V2}
SCHEMES = {
    **{name: name for name in METHODS},
    "one learned scale": PhaseScheme(stages=1, scales="learned"),
    "learned by row": LEARNED,
    "joint by tile": PhaseScheme(stages=3, granularity="tile", tile=5, scales="joint"),
    "mixed": MIXED,
}
EACH_METHOD = pytest.mark.parametrize("method", SCHEMES.values(), ids=SCHEMES)


def save(path, family="llama", method=None, skip_lm_head=None, max_shard_size="50GB", **overrides):
    """Save a plain checkpoint, or with a method a QAT checkpoint as after training; return the folder."""
    model = tiny_model(family, **overrides)
    if method is not None:
        replace_modules_for_qat(model, method, skip_lm_head)
        for layer in model.modules():
            if isinstance(layer, QATLinear) and layer.scales is not None:
                layer.scales.data *= 1 + 0.3 * torch.rand_like(layer.scales)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def pack_in_memory(source, output, method=None, *, dtype="auto", max_shard_size="1GB", **skips):
    """Load, convert and save; return the report."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    report = replace_modules_for_qat(model, method or {}, **skips)
    convert_to_inference_mode(model).save_pretrained(output, max_shard_size=max_shard_size)
    return report


def read(folder):
    """Return all tensors of a checkpoint, and the names of its files."""
    names = sorted(os.listdir(folder))
    tensors = [load_file(folder / name) for name in names if name.endswith(".safetensors")]
    assert sum(map(len, tensors)) == len({key for part in tensors for key in part})
    return {key: tensor for part in tensors for key, tensor in part.items()}, names


def checksums(folder):
    """Return the checksums in the headers of all files of a checkpoint."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found |= json.loads(opened.metadata()["crc32"])
    return found


def check_the_same(tmp_path, source, method=None, **kwargs):
    """Pack a checkpoint in both ways, compare all that was written, and load it; return its tensors."""
    report = pack_checkpoint(source, tmp_path / "streamed", method, **kwargs)
    expected_report = pack_in_memory(source, tmp_path / "expected", method, **kwargs)
    got, files = read(tmp_path / "streamed")
    expected, expected_files = read(tmp_path / "expected")
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key], tensor), key
    if files == expected_files == [name for name in files if "-of-" not in name]:
        equal, different, failed = filecmp.cmpfiles(tmp_path / "streamed", tmp_path / "expected", files, shallow=False)
        assert (sorted(equal), different, failed) == (files, [], [])
    sums = {key: crc32(tensor) for key, tensor in expected.items()}
    assert checksums(tmp_path / "streamed") == checksums(tmp_path / "expected") == sums
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "streamed" / name).read_text()) == json.loads(
            (tmp_path / "expected" / name).read_text()
        )
    assert str(report) == str(expected_report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "expected")))
    return got


# The same checkpoint


@pytest.mark.parametrize("skip_lm_head", [None, False], ids=["head by default", "head packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_of_each_family(tmp_path, family, tied, skip_lm_head):
    source = save(tmp_path / "source", family, tied=tied, dtype=torch.bfloat16)
    tensors = check_the_same(tmp_path, source, V2, skip_lm_head=skip_lm_head)
    heads = [key for key in tensors if re.search(r"(lm_head|embed_out)\.codes", key)]
    assert len(heads) == (not tied or skip_lm_head is False)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox"])
def test_a_qat_checkpoint_of_families_that_differ(tmp_path, family, tied):
    source = save(tmp_path / "source", family, LEARNED, tied=tied, skip_lm_head=False)
    trained, tensors = load_file(source / "model.safetensors"), check_the_same(tmp_path, source)
    scales = [key for key in trained if key.endswith(".scales")]
    assert scales
    assert all(torch.equal(tensors[key], trained[key]) for key in scales)


@EACH_METHOD
@pytest.mark.parametrize("trained", [False, True], ids=["plain", "qat"])
def test_each_method(tmp_path, trained, method):
    source = save(tmp_path / "source", method=method if trained else None, dtype=torch.bfloat16)
    check_the_same(tmp_path, source, None if trained else method)


@pytest.mark.parametrize("trained", [False, True], ids=["plain", "qat"])
def test_shards_in_and_out(tmp_path, trained):
    source = save(tmp_path / "source", "opt", LEARNED if trained else None, tied=True, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    check_the_same(tmp_path, source, None if trained else LEARNED, max_shard_size="10KB")
    shards = sorted((tmp_path / "streamed").glob("*.safetensors"))
    assert len(shards) > 3
    contents = [load_file(shard).values() for shard in shards]
    assert all(sum(tensor.nbytes for tensor in tensors) <= 10_000 for tensors in contents if len(tensors) > 1)
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: shard.name for shard in shards for key in load_file(shard)}
    expected = json.loads((tmp_path / "expected" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == expected["metadata"]


def test_layers_are_left_alone_as_they_are_in_memory(tmp_path):
    source = save(tmp_path / "source")
    tensors = check_the_same(tmp_path, source, V2, skip_lm_head=True, skip_modules=["down_proj", "*.layers.1.*"])
    assert {"lm_head.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"} < set(tensors)
    assert sum(key.endswith(".codes") for key in tensors) == 6


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float32])
def test_weights_take_the_dtype_that_from_pretrained_gives_them(tmp_path, dtype):
    source = save(tmp_path / "source", "opt", LEARNED, dtype=torch.float16)
    rewrite(source, lambda tensors: {key: tensor.float() for key, tensor in tensors.items()})  # the config says float16
    check_the_same(tmp_path, source, dtype=dtype)


def rewrite(folder, change, name="model.safetensors"):
    """Change the tensors of a checkpoint in place."""
    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("skip_lm_head", [None, False])
def test_a_tied_head_that_is_stored_twice_is_tied_if_it_is_equal(tmp_path, skip_lm_head):
    source = save(tmp_path / "source", tied=True)
    rewrite(source, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    check_the_same(tmp_path, source, V2, skip_lm_head=skip_lm_head)


def test_a_backbone_without_a_head_and_its_prefix(tmp_path):
    tiny_model("gpt2", tied=True).transformer.save_pretrained(tmp_path / "source")
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "source" / "model.safetensors")
    check_the_same(tmp_path, tmp_path / "source", V2)


def test_names_that_transformers_changes_on_load_and_back_on_save(tmp_path):
    source = save(tmp_path / "source", "gpt_neox", max_shard_size="20KB")
    assert "embed_out.weight" in read(source)[0]
    assert "embed_out.codes" in check_the_same(tmp_path, source, V2)


# What lies beside the weights


def test_tokenizer_and_chat_templates_are_copied_and_nothing_else(tmp_path):
    source = Path(save_tiny_model(tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    for name in copied[2:]:
        (source / name).write_text("{{ messages }}")
    blob = shutil.move(source / "tokenizer.json", tmp_path / "blob")  # the cache of the Hub has links to its files
    (source / "tokenizer.json").symlink_to(blob)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "pytorch_model.bin"):
        (source / name).touch()
    pack_checkpoint(source, tmp_path / "out", V2)
    assert filecmp.cmpfiles(source, tmp_path / "out", copied, shallow=False)[0] == copied
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    made = {"config.json", "generation_config.json", "model.safetensors", "modeling_fairy2i.py"}
    assert set(os.listdir(tmp_path / "out")) == {*made, *copied[:3], "additional_chat_templates"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template["default"] == "{{ messages }}"


def test_a_tokenizer_from_elsewhere(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    pack_checkpoint(save(tmp_path / "source"), tmp_path / "out", V2, tokenizer=str(tmp_path / "tokenizer"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the fox") == tiny_tokenizer()("the fox")


def test_a_generation_config_of_its_own_is_kept(tmp_path):
    source = save(tmp_path / "source")
    fields = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**fields, "do_sample": True, "top_k": 7}))
    check_the_same(tmp_path, source, V2)
    assert json.loads((tmp_path / "streamed" / "generation_config.json").read_text())["top_k"] == 7


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_a_hub_id_downloads_what_is_needed_and_no_more(tmp_path, monkeypatch, max_shard_size):
    remote = Path(save_tiny_model(tmp_path / "remote"))
    save(remote, vocab_size=280, max_shard_size=max_shard_size)
    if max_shard_size != "50GB":
        (remote / "model.safetensors").unlink()
    needed = set(os.listdir(remote))
    (remote / "original").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "original/weights.safetensors"):
        (remote / name).touch()

    def download(repo_id, allow_patterns):
        assert repo_id == "someone/model"
        files = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            target = tmp_path / "cache" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(remote / name, target)
        return str(tmp_path / "cache")

    monkeypatch.setattr(streaming, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    pack_checkpoint("someone/model", "out", V2)
    assert set(os.listdir(tmp_path / "cache")) == needed
    pack_in_memory(remote, tmp_path / "expected", V2)
    assert all(
        torch.equal(tensor, read(tmp_path / "out")[0][key]) for key, tensor in read(tmp_path / "expected")[0].items()
    )


# What cannot be packed


def damage_index(source):
    (source / "model.safetensors.index.json").write_text('{"weight_map": [')


def lose_a_shard(source):
    max(source.glob("*.safetensors")).unlink()


def truncate(source):
    path = min(source.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def empty(source):
    min(source.glob("*.safetensors")).write_bytes(b"")


def no_config(source):
    (source / "config.json").unlink()


def quantized_by_others(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def other_size(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 90}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (damage_index, ValueError, r"model\.safetensors\.index\.json is damaged"),
        (lose_a_shard, FileNotFoundError, r"model-(\d+)-of-\1\.safetensors is not there, but"),
        (truncate, ValueError, r"model-00001-of-\d+\.safetensors is truncated or damaged"),
        (empty, ValueError, r"model-00001-of-\d+\.safetensors is truncated or damaged"),
        (no_config, (ValueError, OSError), "config.json|model_type"),
        (quantized_by_others, ValueError, "already quantized by gptq"),
        (other_size, ValueError, r"model-\d+-of-\d+\.safetensors: \S+ has shape \(96, 32\), expected \(90, 32\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_source_is_an_error_that_names_what_is_wrong(tmp_path, change, error, message):
    source = save(tmp_path / "source", max_shard_size="20KB")
    change(source)
    with pytest.raises(error, match=message):
        pack_checkpoint(source, tmp_path / "out", V2)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_an_error_that_names_it(tmp_path, key):
    source = save(tmp_path / "source")
    rewrite(source, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(ValueError, match=f"has no {re.escape(key)}; the checkpoint is incomplete"):
        pack_checkpoint(source, tmp_path / "out", V2)


def test_missing_learned_scales_are_an_error_that_names_them(tmp_path):
    source = save(tmp_path / "source", method=LEARNED)
    key = "model.layers.0.self_attn.q_proj.scales"
    rewrite(source, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(ValueError, match=re.escape(key)):
        pack_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.scales"])
def test_nan_and_infinity_are_errors_that_name_tensor_and_file(tmp_path, key, value):
    source = save(tmp_path / "source", method=LEARNED)

    def change(tensors):
        tensors[key].view(-1)[5] = value
        return tensors

    rewrite(source, change)
    where = re.escape(str(source / "model.safetensors"))
    with pytest.raises(ValueError, match=f"{where}: {re.escape(key)} has NaN or infinite entries"):
        pack_checkpoint(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_what_is_packed_or_dequantized_is_not_packed_again(tmp_path):
    source = save(tmp_path / "source", method=V2)
    pack_checkpoint(source, tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed already"):
        pack_checkpoint(tmp_path / "packed", tmp_path / "out")
    convert_to_inference_mode(AutoModelForCausalLM.from_pretrained(source), packed=False).save_pretrained(
        tmp_path / "dense"
    )
    with pytest.raises(ValueError, match="already quantized values"):
        pack_checkpoint(tmp_path / "dense", tmp_path / "out", V2)


@pytest.mark.parametrize(
    ("trained", "arguments", "message"),
    [
        (False, {}, "is not a QAT checkpoint; give a method"),
        (False, {"method": "complex_phase_v22"}, "unknown method"),
        (False, {"method": {"q_prj": V2}}, "no linear layer matches 'q_prj'"),
        (True, {"method": V2}, "is a QAT checkpoint and is packed as it was trained"),
        (True, {"skip_lm_head": True}, "is a QAT checkpoint and is packed as it was trained"),
        (True, {"skip_modules": ["q_proj"]}, "is a QAT checkpoint and is packed as it was trained"),
    ],
)
def test_the_method_belongs_to_a_plain_checkpoint_and_to_no_other(tmp_path, trained, arguments, message):
    source = save(tmp_path / "source", method=V2 if trained else None)
    with pytest.raises(ValueError, match=message):
        pack_checkpoint(source, tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == ["source"]


def test_where_the_weights_are_of_another_kind_the_error_says_what_to_do(tmp_path):
    source = save(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(NotStreamable, match=r"has no model\.safetensors.*; load it with from_pretrained and convert"):
        pack_checkpoint(source, tmp_path / "out", V2)
    shutil.move(source / "pytorch_model.bin", source / "tiny.gguf")
    with pytest.raises(ValueError, match=r"GGUF weights; name the file, gguf_file='tiny\.gguf'"):
        pack_checkpoint(source, tmp_path / "out", V2)
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        pack_checkpoint(tmp_path / "nowhere", tmp_path / "out", V2)


def test_a_tied_head_that_is_stored_with_other_values_has_to_be_loaded(tmp_path):
    source = save(tmp_path / "source", tied=True)
    rewrite(source, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(NotStreamable, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        pack_checkpoint(source, tmp_path / "out", V2)


# The command


@pytest.mark.parametrize("trained", [False, True], ids=["plain", "qat"])
def test_the_command_packs_safetensors_from_disk_to_disk(tmp_path, monkeypatch, capsys, trained):
    source = save(tmp_path / "source", method=V2 if trained else None)
    tiny_tokenizer().save_pretrained(source)
    monkeypatch.setattr(cli, "_quantize_in_memory", None)
    method = [] if trained else ["--method", V2, "--no-skip_lm_head"]
    assert cli.main(["quantize", str(source), str(tmp_path / "out"), "--dtype", "bfloat16", *method]) == 0
    out = capsys.readouterr().out
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "Fairy2i: 15 of 15 linear layers quantized: complex_phase_v2" in out
    assert out.endswith(f"{tmp_path / 'out'}: {size / 1e6:,.1f} MB of weights\n")
    pack_in_memory(source, tmp_path / "expected", None if trained else V2, dtype="bfloat16")
    assert filecmp.cmp(tmp_path / "out" / "model.safetensors", tmp_path / "expected" / "model.safetensors", False)


@pytest.mark.filterwarnings("ignore:fused expert weights")
@pytest.mark.parametrize("case", ["fused experts", "pytorch_model.bin", "dequantized"])
def test_the_command_goes_through_memory_where_it_must(tmp_path, capsys, case):
    source = save(tmp_path / "source", "mixtral" if case == "fused experts" else "llama", vocab_size=280)
    tiny_tokenizer().save_pretrained(source)
    if case == "pytorch_model.bin":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    options = ["--dequantized"] if case == "dequantized" else []
    assert cli.main(["quantize", str(source), str(tmp_path / "out"), "--method", V2, *options]) == 0
    out, err = capsys.readouterr()
    assert "linear layers quantized" in out
    assert ("the whole model goes into memory: " in err) == (case != "dequantized")
    model = AutoModelForCausalLM.from_pretrained(source)
    replace_modules_for_qat(model, V2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(token_batch()).logits, convert_to_inference_mode(model)(token_batch()).logits)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


@pytest.mark.parametrize("options", [[], ["--dequantized"]], ids=["streamed", "in memory"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys, options):
    source = save_tiny_model(tmp_path / "source")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        code = cli.main(["quantize", source, str(tmp_path / "out"), "--method", V2, *options])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    message = f"error: [Errno 27] File too large while writing {tmp_path / 'out'}; nothing of it was kept\n"
    assert capsys.readouterr().err.endswith(message)
    assert os.listdir(tmp_path) == ["source"]


def test_a_disk_without_room_is_known_before_the_work_begins(tmp_path, monkeypatch):
    source = save(tmp_path / "source")
    pack_checkpoint(source, tmp_path / "one", V2)
    need = sum(tensor.nbytes for tensor in read(tmp_path / "one")[0].values())
    disk = {"total": 10 * need, "used": 0, "free": need}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(**disk))
    pack_checkpoint(source, tmp_path / "two", V2)
    disk["free"] -= 1
    monkeypatch.setattr(streaming, "_pack", None)
    megabytes = f"{need / 1e6:,.1f} MB"
    with pytest.raises(OSError, match=f"the packed weights need {megabytes}, the disk has {megabytes} left"):
        pack_checkpoint(source, tmp_path / "three", V2)
    assert sorted(os.listdir(tmp_path)) == ["one", "source", "two"]


# Memory, and a sudden end


def run(script, *arguments, **kwargs):
    """Start Python with the script in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **kwargs)


MEASURE = """
import json, sys
import torch
from safetensors.torch import load_file
from fairy2i.checksums import crc32
from fairy2i.streaming import pack_checkpoint

def peak():  # of this process alone: ru_maxrss starts from that of the process that started it
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
small, large, out = sys.argv[1:]
pack_checkpoint(small, out + "/small", "complex_phase_v1", max_shard_size="10MB")  # all that is imported late
before = peak()
pack_checkpoint(large, out + "/large", "complex_phase_v1", max_shard_size="10MB")
packed = peak()
held = load_file(large + "/model.safetensors")  # the measure sees a model that is in memory
total = sum(float(tensor.sum()) for tensor in held.values())
print(json.dumps([packed - before, peak() - before]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads peak memory from /proc")
def test_memory_stays_far_below_the_size_of_the_model(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096, "num_hidden_layers": 36}
    large = save(tmp_path / "large", dtype=torch.bfloat16, **sizes)
    size = (large / "model.safetensors").stat().st_size
    assert size > 280e6
    process = run(MEASURE, save(tmp_path / "small"), large, tmp_path / "out")
    packing, loading = json.loads(process.communicate(timeout=300)[0])
    assert loading > size
    assert packing < size / 2


STOP = """
import sys, time
import fairy2i.streaming as streaming

write = streaming.save_file
def stop(tensors, path, **kwargs):
    write(tensors, path, **kwargs)
    print(path, flush=True)
    time.sleep(600)

streaming.save_file = stop
streaming.pack_checkpoint(sys.argv[1], sys.argv[2], "complex_phase_v2", max_shard_size="10KB")
"""


def test_kill_9_in_the_middle_leaves_no_folder_of_that_name_and_the_next_run_cleans_up(tmp_path):
    source, out = save(tmp_path / "source"), tmp_path / "out"
    process = run(STOP, source, out)
    written = Path(process.stdout.readline().strip())
    assert written.is_file()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sorted(os.listdir(tmp_path)) == sorted([written.parent.name, "source"])
    pack_checkpoint(source, out, V2)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    pack_in_memory(source, tmp_path / "expected", V2)
    assert filecmp.cmp(out / "model.safetensors", tmp_path / "expected" / "model.safetensors", False)
