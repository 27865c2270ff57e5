"""Texts by name and from files."""

import hashlib

import pytest
from datasets import Dataset

from fairy2i.evaluation import texts as module
from fairy2i.evaluation.texts import EvalText, load_eval_text


def test_the_documents_of_a_file_are_joined_by_a_blank_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two", encoding="utf-8")
    text = load_eval_text(str(path))
    assert (text.name, text.text) == (str(path), "one\n\ntwo")
    assert text.sha256 == hashlib.sha256(b"one\n\ntwo").hexdigest()


def test_wikitext2_is_the_raw_test_split_joined_by_blank_lines(monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config, split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        return Dataset.from_dict({"text": ["", " = Title = \n", "text"]})

    monkeypatch.setattr(module, "load_dataset", load_dataset)
    assert load_eval_text("wikitext2").text == "\n\n = Title = \n\n\ntext"


def test_c4_is_the_first_1100_documents_joined_by_spaces(monkeypatch):
    def load_dataset(name, data_files, split):
        assert (name, split) == ("allenai/c4", "validation")
        return Dataset.from_dict({"text": [str(i) for i in range(1200)]})

    monkeypatch.setattr(module, "load_dataset", load_dataset)
    assert load_eval_text("c4").text == " ".join(map(str, range(1100)))


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_without_a_network_a_named_text_asks_for_a_local_file(monkeypatch, name):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(module, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=rf"{name} could not be fetched .*give a local file"):
        load_eval_text(name)


def test_a_local_copy_of_wikitext2_gives_the_rows_of_the_hub(tmp_path):
    """The Hub's copy has one row a line, and blank lines, which hold a space in the file, as empty ones."""
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n text here . \n", encoding="utf-8")
    text = load_eval_text(f"wikitext2={tmp_path / 'wiki.test.raw'}")
    assert text.documents == ("", " = Title = \n", "", " text here . \n")
    assert (text.name, text.text) == ("wikitext2", "\n\n = Title = \n\n\n\n\n text here . \n")


def test_a_local_copy_of_c4_has_the_joint_and_the_limits_of_c4(tmp_path):
    (tmp_path / "c4.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    text = load_eval_text(f"c4={tmp_path / 'c4.jsonl'}")
    assert (text.name, text.text, text.joined, text.most_windows) == ("c4", "one two", 1100, 256)


def test_a_local_copy_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*no\.raw to read wikitext2 from"):
        load_eval_text(f"wikitext2={tmp_path / 'no.raw'}")


def test_a_text_of_nothing_but_empty_documents_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "  "}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"no text in it: all of its 2 documents are empty"):
        load_eval_text(str(tmp_path / "a.jsonl"))


def test_the_hash_of_documents_knows_where_one_ends():
    one, other = EvalText("a", ("ab", "c")), EvalText("a", ("a", "bc"))
    assert one.documents_sha256 != other.documents_sha256
    assert EvalText("a", ("ab", "c"), joint="").sha256 == EvalText("a", ("a", "bc"), joint="").sha256
