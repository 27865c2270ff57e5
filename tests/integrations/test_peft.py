"""LoRA adapters on packed layers: they train, are saved, come back on a freshly loaded model, and are never merged."""

import copy
import subprocess
import sys

import pytest
import torch
from checkpoints import LEARNED, V2, saved_packed, saved_qat
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import logits, tiny_model, token_batch, train
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fairy2i import PackedLinear, convert_to_inference_mode, replace_modules_for_qat
from fairy2i.integrations.peft import with_packed_layers

LR = 2e-2
TARGETS = {"llama": ["q_proj", "down_proj", "lm_head"], "gpt2": ["c_attn", "c_proj"]}


def adapter_config(family="llama", **kwargs):
    return LoraConfig(**{"r": 4, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM", **kwargs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [V2, "bitnet", LEARNED], ids=["v2", "bitnet", "learned"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_trains_alone_is_saved_and_comes_back_on_a_freshly_loaded_model(
    family, method, dtype, tmp_path, recwarn
):
    saved_packed(tmp_path / "base", family, method, dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before, expected = copy.deepcopy(base.state_dict()), logits(base)
    model = get_peft_model(base, with_packed_layers(adapter_config(family)))
    assert not [str(warning.message) for warning in recwarn if "Unsupported layer" in str(warning.message)]
    assert torch.equal(logits(model), expected)  # LoRA starts at nothing
    losses = train(model, 10, LR)
    assert losses[-1] < 0.95 * losses[0]
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) is ("lora_" in name), name
    after = {name.replace(".base_layer", ""): t for name, t in base.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    trained = logits(model)
    assert not torch.equal(trained, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)

    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = with_packed_layers(LoraConfig.from_pretrained(tmp_path / "adapter"))
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=config)), trained)


def test_the_gradient_of_the_adapter_is_that_beside_plain_layers(tmp_path):
    saved_packed(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path)
    dense = tiny_model("llama")
    replace_modules_for_qat(dense, V2)
    convert_to_inference_mode(dense, packed=False)
    gradients = []
    for model, config in ((packed, with_packed_layers(adapter_config())), (dense, adapter_config())):
        torch.manual_seed(3)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        model(input_ids=token_batch(), labels=token_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 10
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_into_codes_is_an_error_and_changes_nothing(merge, tmp_path):
    saved_packed(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), with_packed_layers(adapter_config()))
    train(model, 2, LR)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged into packed codes; .*packed=False"):
        getattr(model, merge)()
    assert torch.equal(logits(model), expected)


def test_unload_gives_the_packed_model_back(tmp_path):
    saved_packed(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = logits(base)
    model = get_peft_model(base, with_packed_layers(adapter_config()))
    train(model, 2, LR)
    back = model.unload()
    assert type(back.lm_head) is PackedLinear
    assert torch.equal(logits(back), expected)


def test_an_adapter_of_the_packed_model_goes_on_the_qat_model_and_merges_there(tmp_path):
    saved_packed(tmp_path / "packed")
    saved_qat(tmp_path / "qat")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model = get_peft_model(packed, with_packed_layers(adapter_config()))
    train(model, 10, LR)
    model.save_pretrained(tmp_path / "adapter")
    for packed_false in (False, True):
        qat = AutoModelForCausalLM.from_pretrained(tmp_path / "qat")
        base = convert_to_inference_mode(qat, packed=False) if packed_false else qat
        other = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(logits(other), logits(model))
    merged = other.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_the_trainer_takes_a_packed_model_with_an_adapter_and_refuses_one_without(tmp_path):
    saved_packed(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = [{"input_ids": row, "labels": row} for row in token_batch(8)]
    options = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_steps": 3}
    arguments = TrainingArguments(tmp_path / "out", learning_rate=1e-2, **options)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        Trainer(base, arguments, train_dataset=rows)
    model = get_peft_model(base, with_packed_layers(adapter_config()))
    before = logits(model)
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(logits(model.eval()), before)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda"])
def test_a_start_that_changes_the_weights_of_the_layers_is_an_error(start):
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changes the weights of the layers"):
        with_packed_layers(adapter_config(init_lora_weights=start))


def test_a_kind_of_lora_that_needs_the_dense_weight_is_an_error(tmp_path):
    saved_packed(tmp_path)
    with pytest.raises(ValueError, match="use_dora"):
        get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path), with_packed_layers(adapter_config(use_dora=True))
        )


def test_without_peft_the_error_says_what_to_install():
    code = "import sys; sys.modules['peft'] = None; import fairy2i; import fairy2i.integrations.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: adapters need the package peft")
    assert done.stderr.splitlines()[-1].endswith("install it with: pip install peft")
