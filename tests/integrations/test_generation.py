"""generate and the text-generation pipeline: a packed model says what its QAT model says, in every way of asking."""

import pytest
import torch
from checkpoints import LEARNED, V2, saved_packed, saved_qat
from tiny_models import tiny_model, token_batch
from tiny_text import save_tiny_model, tiny_tokenizer
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, pipeline

from fairy2i import convert_to_inference_mode, replace_modules_for_qat

WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}
COMMON = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_reloaded_model_generates_the_tokens_of_its_qat_model(family, save, way, tmp_path):
    if save is saved_qat:
        model = tiny_model(family)
        replace_modules_for_qat(model, V2)
        model.save_pretrained(tmp_path)
    else:
        model = saved_packed(tmp_path, family)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = token_batch(rows=2, length=5)
    tokens = []
    for each in (model, loaded):
        torch.manual_seed(4)
        tokens.append(each.generate(prompt, **COMMON, **way))
    assert tokens[0].shape == (2, 13)
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("way", ["static cache", "no cache"])
def test_the_cache_changes_no_token(way, tmp_path):
    saved_packed(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = token_batch(rows=2, length=5)
    expected = loaded.generate(prompt, **COMMON, **WAYS["greedy"])
    assert torch.equal(loaded.generate(prompt, **COMMON, **WAYS[way]), expected)


@pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
def test_a_static_cache_is_compiled_into_one_graph_where_transformers_compiles_it(save, tmp_path):
    save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = token_batch(rows=2, length=5)
    expected = loaded.generate(prompt, **COMMON, **WAYS["greedy"])
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True  # transformers by itself compiles on GPUs alone
    torch.compiler.reset()
    counters.clear()
    tokens = loaded.generate(prompt, **COMMON, **WAYS["static cache"], compile_config=compiling)
    assert torch.equal(tokens, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("method", [V2, "bitnet", LEARNED], ids=["v2", "bitnet", "learned"])
@pytest.mark.parametrize("save", [saved_packed, saved_qat], ids=["packed", "qat"])
def test_prompts_that_are_padded_on_the_left_go_on_as_they_do_alone(save, method, tmp_path):
    save(tmp_path, method=method)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = [token_batch(1, length, seed=length)[0] for length in (3, 9, 6)]
    batch = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 9 - len(prompt) :] = prompt
        mask[row, 9 - len(prompt) :] = 1
    options = {**COMMON, **WAYS["greedy"], "output_logits": True, "return_dict_in_generate": True}
    together = loaded.generate(batch, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = loaded.generate(prompt[None], **options)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, len(prompt) :])
        for step, (one, other) in enumerate(zip(together.logits, alone.logits, strict=True)):
            torch.testing.assert_close(one[row], other[0], rtol=1e-5, atol=1e-6, msg=f"row {row}, step {step}")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "qat"])
def test_the_pipeline_takes_a_folder_or_a_model(packed, tmp_path):
    path = save_tiny_model(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(path)
    replace_modules_for_qat(model, V2)
    if packed:
        convert_to_inference_mode(model)
    model.save_pretrained(tmp_path / "quantized")
    tiny_tokenizer().save_pretrained(tmp_path / "quantized")
    ids = tiny_tokenizer()("the quick brown fox", return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = tiny_tokenizer().decode(tokens[0], skip_special_tokens=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "quantized")
    for generator in (
        pipeline("text-generation", model=str(tmp_path / "quantized"), device="cpu"),
        pipeline("text-generation", model=loaded, tokenizer=tokenizer, device="cpu"),
    ):
        out = generator("the quick brown fox", max_new_tokens=6, do_sample=False)
        assert out[0]["generated_text"] == expected
        assert len(expected) > len("the quick brown fox")
