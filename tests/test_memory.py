"""How much memory loading and converting take at most, each in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fairy2i import convert_to_inference_mode, replace_modules_for_qat

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc to measure")

MEASURE = """
import re

def resident(field):  # bytes
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")
    return resident("VmRSS")
"""

LOAD = """
import sys, torch, fairy2i
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[2])  # all imports are done
before = reset_peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
touched = sum(int(tensor.view(torch.uint8).max()) for tensor in model.state_dict().values())  # mapped files count, too
print(resident("VmHWM") - before)
"""

CONVERT = """
import torch
from torch import nn
from fairy2i import convert_to_inference_mode, replace_modules_for_qat
model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))
warm = nn.Sequential(nn.Linear(1024, 1024))
replace_modules_for_qat(warm, "complex_phase_v2")
convert_to_inference_mode(warm)
replace_modules_for_qat(model, "complex_phase_v2")
before = reset_peak()
convert_to_inference_mode(model)
print(resident("VmHWM") - before, resident("VmRSS") - before)
"""


def measure(script, *arguments):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back and is not counted
    run = [sys.executable, "-c", MEASURE + script, *map(str, arguments)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def save_packed(folder, width, layers):
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    replace_modules_for_qat(model, "complex_phase_v2")
    convert_to_inference_mode(model).to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        tensor.random_(0, 256) if name.endswith(".codes") else tensor.fill_(0.01)
    model.save_pretrained(folder)


def test_loading_a_packed_checkpoint_takes_no_more_than_its_size_and_a_third(tmp_path):
    save_packed(tmp_path / "large", width=2048, layers=8)
    save_packed(tmp_path / "small", width=64, layers=1)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 100e6
    (peak,) = measure(LOAD, tmp_path / "large", tmp_path / "small")
    assert 0.9 * size < peak <= 1.3 * size


def test_converting_takes_no_more_than_the_model_and_one_layer():
    layer = 4 * 1024 * 1024  # bytes
    peak, after = measure(CONVERT)
    assert (
        peak <= 7 * layer
    )  # the codes of all layers, and what quantizing one needs; its weight, ten times, or all: 24
    assert after < -0.9 * 24 * layer * (1 - 2 / 32)  # master weights are gone, codes are there
