"""The protocols by name against naive implementations of their definitions."""

import copy
import json
import math

import naive_perplexity as naive
import pytest
import torch
from tiny_models import tiny_model
from tiny_text import BOS, EOS, tiny_text, tiny_tokenizer

from fairy2i.evaluation.perplexity import PROTOCOLS, document_windows, make_windows, measure, strided_windows
from fairy2i.evaluation.texts import EvalText
from fairy2i.loading import load_model_and_tokenizer

# lengths from a few to about a hundred tokens; an empty one among them
DOCUMENTS = tuple("" if i == 5 else tiny_text(3 + (i * 7) % 30, offset=i) for i in range(40))
TEXT = EvalText("tiny", DOCUMENTS)
WINDOW = 48


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=280)


def run(model, protocol, text=TEXT, tokenizer=None, window=WINDOW, batch_size=1, **options):
    windows = make_windows(protocol, text, tokenizer or tiny_tokenizer(), window, **options)
    return windows, measure(model, windows, batch_size, progress=False)


@pytest.mark.parametrize(
    ("protocol", "options"), [("gptq", ()), ("fairy2i", ()), ("strided", (17,)), ("strided", (1,))]
)
def test_a_protocol_is_its_definition(model, protocol, options):
    documents = [d for d in DOCUMENTS if d or protocol != "fairy2i"]
    nll, tokens = getattr(naive, protocol)(model, tiny_tokenizer(), documents, WINDOW, *options)
    _, result = run(model, protocol, stride=options[0] if options else None)
    assert result.tokens == tokens
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert (result.protocol, result.window) == (protocol, WINDOW)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_do_not_depend_on_the_batch_size(model, protocol):
    """Windows of several lengths share a batch: what fills the short ones must not count."""
    _, alone = run(model, protocol)
    for batch_size in (2, 3, 64):
        assert run(model, protocol, batch_size=batch_size)[1].nll == pytest.approx(alone.nll, rel=1e-6)


def test_the_protocols_differ(model):
    assert len({round(run(model, protocol)[1].nll, 5) for protocol in PROTOCOLS}) == len(PROTOCOLS)


# Documents


def test_documents_are_packed_whole_in_bos_and_eos_and_long_ones_dropped():
    tokenizer = tiny_tokenizer()
    windows = document_windows(DOCUMENTS, tokenizer, WINDOW)
    own = [tokenizer(d, add_special_tokens=False).input_ids for d in DOCUMENTS if d]
    fits = [len(ids) + 2 <= WINDOW for ids in own]
    assert 0 < sum(fits) < len(own)
    assert torch.cat(windows.ids).tolist() == [
        i for ids, fit in zip(own, fits, strict=True) if fit for i in [BOS, *ids, EOS]
    ]
    assert (windows.documents, windows.dropped_documents) == (sum(fits), len(own) - sum(fits))
    assert windows.dropped_tokens == sum(len(ids) + 2 for ids, fit in zip(own, fits, strict=True) if not fit)
    assert windows.bytes == sum(
        len(d.encode()) for d, fit in zip([d for d in DOCUMENTS if d], fits, strict=True) if fit
    )
    for ids, following in zip(windows.ids, windows.ids[1:], strict=False):
        assert ids[0] == BOS and ids[-1] == EOS and len(ids) <= WINDOW
        first = following.tolist().index(EOS) + 1
        assert len(ids) + first > WINDOW  # the next document would not have fitted


def test_the_token_after_an_eos_is_not_scored_and_the_eos_is():
    windows = document_windows(["the quick", "brown fox"], tiny_tokenizer(), WINDOW)
    (ids,), (scored,) = windows.ids, windows.scored
    assert [bool(s) for s in scored] == [int(i) != EOS for i in ids[:-1]]
    assert ids.tolist().count(EOS) == 2 and int((~scored).sum()) == 1


def test_a_document_that_fills_its_window_is_kept_and_one_more_token_is_dropped():
    ids = tiny_tokenizer()(DOCUMENTS[3], add_special_tokens=False).input_ids
    assert document_windows([DOCUMENTS[3]], tiny_tokenizer(), len(ids) + 2).dropped_documents == 0
    with pytest.raises(ValueError, match=r"none of 1 documents fits a window of .* part the text into documents"):
        document_windows([DOCUMENTS[3]], tiny_tokenizer(), len(ids) + 1)


@pytest.mark.parametrize(("names", "message"), [(["bos"], "no BOS token"), (["bos", "eos"], "no BOS and no EOS token")])
def test_a_tokenizer_without_bos_or_eos_is_refused(names, message):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    for name in names:
        setattr(tokenizer, f"{name}_token", None)
    with pytest.raises(ValueError, match=rf"{message}; use --protocol gptq"):
        document_windows(DOCUMENTS, tokenizer, WINDOW)


# Strides


@pytest.mark.parametrize(
    ("total", "window", "stride"), [(100, 10, 3), (100, 10, 9), (7, 10, 5), (10, 10, 5), (11, 10, 1)]
)
def test_each_token_but_the_first_is_scored_once_with_the_context_of_the_stride(total, window, stride):
    windows = strided_windows(torch.arange(total), window, stride)
    scored = [
        (int(ids[i + 1]), i + 1)
        for ids, mask in zip(windows.ids, windows.scored, strict=True)
        for i in range(len(mask))
        if mask[i]
    ]
    assert [token for token, _ in scored] == list(range(1, total))
    assert all(context >= min(token, window - stride) for token, context in scored)
    assert max(map(len, windows.ids)) <= window


def test_the_default_stride_is_half_a_window():
    windows = strided_windows(torch.arange(100), 10)
    assert windows.stride == 5
    assert [int(ids[0]) for ids in windows.ids] == list(range(0, 91, 5))


@pytest.mark.parametrize("stride", [0, 10, -1])
def test_a_stride_is_between_one_and_the_window(stride):
    with pytest.raises(ValueError, match=r"--stride must be at least 1 and less than the window of 10"):
        strided_windows(torch.arange(100), 10, stride)


# Bits per byte


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bits_per_byte_are_the_bits_of_a_token_over_its_bytes(protocol):
    """A model that knows nothing spends log2(vocabulary) bits on each token."""
    blank = tiny_model("llama", vocab_size=280)
    torch.nn.init.zeros_(blank.lm_head.weight)
    windows, result = run(blank, protocol)
    tokenizer = tiny_tokenizer()
    if protocol == "fairy2i":
        scored = [d for d in DOCUMENTS if d and len(tokenizer(d).input_ids) + 1 <= WINDOW]
        tokens_per_byte = sum(len(tokenizer(d).input_ids) for d in scored) / sum(len(d.encode()) for d in scored)
    else:
        tokens_per_byte = (len(tokenizer(TEXT.text).input_ids) - 1) / len(TEXT.text.encode())
    assert result.bits_per_byte(windows) == pytest.approx(math.log2(280) * tokens_per_byte, rel=1e-6)


# Limits


def test_the_most_windows_of_a_data_set_bind_gptq_alone(model):
    capped = EvalText("capped", DOCUMENTS, most_windows=2)
    assert run(model, "gptq", capped)[1].windows == 2
    assert run(model, "gptq", capped, max_windows=1)[1].windows == 1
    assert run(model, "gptq", capped, max_windows=9)[1].windows == 2
    assert run(model, "fairy2i", capped)[1].windows == run(model, "fairy2i")[1].windows > 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_max_windows_takes_the_first_windows(protocol):
    all_of_them = make_windows(protocol, TEXT, tiny_tokenizer(), WINDOW)
    some = make_windows(protocol, TEXT, tiny_tokenizer(), WINDOW, max_windows=3)
    assert [ids.tolist() for ids in some.ids] == [ids.tolist() for ids in all_of_them.ids[:3]]
    assert len(all_of_them.ids) > 3


# Real models


@pytest.mark.parametrize("protocol", ["gptq", "fairy2i"])
def test_stories260k_scores_what_the_definition_says(shared_data, protocol):
    model, tokenizer = load_model_and_tokenizer(str(shared_data / "models" / "stories260K"))
    stories = (shared_data / "corpora/tinystories/tinystories_235.txt").read_text(encoding="utf-8")
    text = EvalText("stories", tuple([d for d in stories.split("<|endoftext|>") if d.strip()][:40]))
    nll, tokens = getattr(naive, protocol)(model.eval(), tokenizer, text.documents, 512)
    for batch_size in (1, 3):
        _, result = run(model, protocol, text, tokenizer, 512, batch_size)
        assert result.tokens == tokens > 5000
        assert result.nll == pytest.approx(nll, rel=1e-6)
    assert 2 < result.perplexity < 7


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["gptq", "fairy2i"])
def test_smollm2_scores_what_the_definition_says(shared_data, tmp_path, protocol):
    source = shared_data / "models" / "smollm2-135m-instruct"
    for file in source.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    parts = sorted(source.glob("*.part?"))
    (tmp_path / "m.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
    model, tokenizer = load_model_and_tokenizer(str(tmp_path), gguf_file="m.gguf")
    rows = (shared_data / "corpora/c4-en/c4_en_1480docs.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    documents = [json.loads(row)["text"] for row in rows]
    nll, tokens = getattr(naive, protocol)(model.eval(), tokenizer, documents, 512)
    for batch_size in (1, 2):
        _, result = run(model, protocol, EvalText("c4", tuple(documents)), tokenizer, 512, batch_size)
        assert result.tokens == tokens
        assert result.nll == pytest.approx(nll, rel=1e-6)
