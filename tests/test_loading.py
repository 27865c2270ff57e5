"""What users name: documents of every kind of file, methods as text, models by folder; and the errors of wrong ones."""

import gzip
import json
import lzma

import pytest
import torch
from datasets import Dataset
from tiny_models import VOCABULARY, logits, tiny_model
from tiny_text import save_tiny_model

from fairy2i import METHODS, PhaseScheme, QATLinear, replace_modules_for_qat
from fairy2i.loading import (
    DTYPES,
    context_length,
    default_device,
    load_config,
    load_model_and_tokenizer,
    move_to_device,
    parse_method,
    read_documents,
)

pytestmark = pytest.mark.usefixtures("own_cache")

DOCUMENTS = ["the first\n\ndocument", "ein zweites: Bär", "3"]
TEXT = "<|endoftext|>".join(DOCUMENTS)
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS))


def write(path, content):
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return str(path)


def texts(source, **kwargs):
    documents = read_documents(str(source), **kwargs)
    assert documents.column_names == ["text"]
    return list(documents["text"])


# Documents


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.text", "plain"])
def test_a_text_file_is_parted_at_the_separator_and_nothing_else_changes(tmp_path, name):
    assert texts(write(tmp_path / name, TEXT)) == DOCUMENTS


def test_a_text_file_without_separator_is_one_document(tmp_path):
    assert texts(write(tmp_path / "a.txt", "one\n\ntwo\n")) == ["one\n\ntwo\n"]


def test_blank_documents_are_dropped(tmp_path):
    assert texts(write(tmp_path / "a.txt", "<|endoftext|>one<|endoftext|>\n \n<|endoftext|>two<|endoftext|>\n")) == [
        "one",
        "two",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.JSONL", "a.jsonl.gz", "a.jsonl.xz"])
def test_a_row_of_json_lines_is_a_document(tmp_path, name):
    assert texts(write(tmp_path / name, JSONL)) == DOCUMENTS


def test_a_row_of_parquet_is_a_document(tmp_path):
    Dataset.from_dict({"id": [0, 1, 2], "text": DOCUMENTS}).to_parquet(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == DOCUMENTS


def test_another_column_can_hold_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "no", "body": "yes"}))
    assert texts(path, text_column="body") == ["yes"]


def test_a_folder_is_read_with_its_subfolders_in_the_order_of_the_paths(tmp_path):
    (tmp_path / "data" / "b").mkdir(parents=True)
    for name in ("c.txt", "a.txt.gz", "b/x.txt"):
        write(tmp_path / "data" / name, name)
    assert texts(tmp_path / "data") == ["a.txt.gz", "b/x.txt", "c.txt"]


def test_a_glob_takes_what_matches(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "other.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))
    assert texts(tmp_path / "?.jsonl") == ["a.jsonl", "b.jsonl"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "at home")
    assert texts("~/a.txt") == ["at home"]


def test_files_of_several_kinds_are_refused(tmp_path):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "b.jsonl", JSONL)
    with pytest.raises(ValueError, match=r"mixes json, text files"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.txt.gz", "./no", "/no/such/folder", "~/no", "no*"])
def test_a_missing_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder"):
        read_documents(name)


@pytest.mark.parametrize(
    ("source", "name", "config"),
    [
        ("owner/corpus", "owner/corpus", None),
        ("owner/corpus-1.0", "owner/corpus-1.0", None),
        ("owner/corpus:part", "owner/corpus", "part"),
    ],
)
def test_what_is_no_path_is_a_hub_data_set(monkeypatch, source, name, config):
    def load_dataset(*args, split):
        assert (*args, split) == (name, config, "validation")
        return Dataset.from_dict({"text": DOCUMENTS})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert texts(source, split="validation") == DOCUMENTS


def test_a_missing_column_names_the_ones_there(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'body'; it has id, text"):
        read_documents(write(tmp_path / "a.jsonl", JSONL), text_column="body")


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", "\n"), ("a.txt.gz", ""), ("a.jsonl", "")])
def test_a_file_without_text_is_refused(tmp_path, name, content):
    with pytest.raises(ValueError, match=r"has no text in it"):
        read_documents(write(tmp_path / name, content))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no files"):
        read_documents(str(tmp_path))


def test_a_broken_json_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"broken\.jsonl cannot be read as json"):
        read_documents(write(tmp_path / "broken.jsonl", JSONL + "{"))


# Methods


@pytest.mark.parametrize("name", METHODS)
def test_a_method_name_is_itself(name):
    assert parse_method(name) == name


@pytest.mark.parametrize("text", [None, "none"])
def test_none_is_no_quantization(text):
    assert parse_method(text) is None


SCHEME = PhaseScheme(stages=3, granularity="row", scales="learned")
MAPPING = {"*.mlp.*": SCHEME, "q_proj": None, "k_proj": None, "*": "bitnet"}
MAPPING_TEXT = {"*.mlp.*": SCHEME.to_dict(), "q_proj": "none", "k_proj": None, "*": "bitnet"}


@pytest.mark.parametrize("form", [lambda data: data, json.dumps, lambda data: "\n " + json.dumps(data)])
@pytest.mark.parametrize(("data", "method"), [(SCHEME.to_dict(), SCHEME), (MAPPING_TEXT, MAPPING)])
def test_schemes_and_mappings_come_as_dicts_or_json(form, data, method):
    parsed = parse_method(form(data))
    assert parsed == method
    if method is MAPPING:
        assert list(parsed) == list(MAPPING)  # the first match counts, so the order does


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("complex_phase_v22", "Did you mean 'complex_phase_v2'"),
        ('{"kind": "phase"', "is not valid JSON"),
        ('{"kind": "wave"}', "unknown scheme kind 'wave'"),
        ('{"kind": "phase", "steps": 2}', "has no field steps"),
        ('{"kind": "phase", "stages": 99}', "stages must be"),
        ('{"*": "bitnett"}', "Did you mean 'bitnet'"),
        ('{"*": {"q_proj": "bitnet"}}', "must stand for one method"),
        ('{"*": 2}', "got 2"),
        (["bitnet"], "got ['bitnet']"),
    ],
)
def test_a_wrong_method_is_a_value_error_that_says_what_is_wrong(text, message):
    with pytest.raises(ValueError) as caught:
        parse_method(text)
    assert message in str(caught.value)


# Models


def test_a_qat_checkpoint_comes_back_as_a_qat_model(tmp_path):
    save_tiny_model(tmp_path)
    model = tiny_model(vocab_size=280)
    replace_modules_for_qat(model, "complex_phase_v2")
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_model_and_tokenizer(str(tmp_path))
    assert sum(isinstance(module, QATLinear) for module in loaded.modules()) == 15
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer.eos_token == "</s>"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_the_dtype_is_that_of_the_weights(tmp_path, dtype):
    path = save_tiny_model(tmp_path, dtype=torch.float16)
    model, _ = load_model_and_tokenizer(path, dtype=dtype)
    expected = {"auto": torch.float16, torch.bfloat16: torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, torch.OutOfMemoryError])
def test_a_device_that_does_not_take_the_model_is_a_value_error_that_names_it(monkeypatch, error):
    def refuse(*_):
        raise error("not here")

    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(model, "to", refuse)
    with pytest.raises(ValueError, match="the model cannot go to cuda:7: not here"):
        move_to_device(model, "cuda:7")


def test_a_model_moves_in_place():
    model = torch.nn.Linear(1, 1)
    move_to_device(model, "meta")
    assert model.weight.device.type == "meta"


@pytest.mark.parametrize("there", [True, False])
def test_the_device_is_the_gpu_where_there_is_one(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert default_device() == ("cuda" if there else "cpu")


def test_the_tokenizer_may_lie_elsewhere_also_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_model().save_pretrained(tmp_path / "model")
    save_tiny_model(tmp_path / "both")
    model, tokenizer = load_model_and_tokenizer("~/model", tokenizer="~/both")
    assert (model.config.vocab_size, len(tokenizer)) == (VOCABULARY, 280)


@pytest.mark.parametrize("name", ["./no_model", "/no/model", "~/no_model", "outputs/no/model"])
def test_a_missing_model_folder_is_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=r"there is no model folder"):
        load_model_and_tokenizer(name)


def write_gguf(path, model):
    """Write the weights of a tiny LLaMA under the names of GGUF."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_model_that_can_be_quantized_and_saved(tmp_path):
    save_tiny_model(tmp_path / "gguf")
    write_gguf(tmp_path / "gguf" / "tiny.gguf", tiny_model(vocab_size=280))
    config = load_config(str(tmp_path / "gguf"), "tiny.gguf")
    assert (context_length(config), getattr(config, "quantization_config", None)) == (64, None)
    model, _ = load_model_and_tokenizer(str(tmp_path / "gguf"), gguf_file="tiny.gguf")
    assert torch.equal(
        model.model.layers[1].mlp.up_proj.weight, tiny_model(vocab_size=280).model.layers[1].mlp.up_proj.weight
    )
    for kind in ("plain", "qat"):
        if kind == "qat":
            replace_modules_for_qat(model, "complex_phase_v2")
        model.save_pretrained(tmp_path / kind)
        reloaded, _ = load_model_and_tokenizer(str(tmp_path / kind), tokenizer=str(tmp_path / "gguf"))
        assert torch.equal(logits(reloaded), logits(model))
