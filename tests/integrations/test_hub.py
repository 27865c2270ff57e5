"""push_to_hub, and loading by id what was pushed, against a hub on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fake_hub import fake_hub

import fairy2i

TESTS = str(Path(__file__).resolve().parents[1])
ROOT = str(Path(fairy2i.__file__).resolve().parents[1])


def run(code, hub, folder):
    """Run code in a process of its own, whose hub is the fake one and whose caches are empty."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder),
        "HF_TOKEN": "hf_of_nobody",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",  # a protocol of its own for large files; without it they go by LFS
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join((ROOT, TESTS)),
    }
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


PUSH = """
import sys, torch
from fairy2i import convert_to_inference_mode, replace_modules_for_qat
from tiny_models import logits, tiny_model
for name in ("packed", "qat", "saved"):
    model = tiny_model("llama")
    replace_modules_for_qat(model, "complex_phase_v2")
    if name != "qat":
        convert_to_inference_mode(model)
    if name == "saved":
        model.save_pretrained(f"{sys.argv[1]}/{name}")
        model.save_pretrained(f"{sys.argv[1]}/{name}", push_to_hub=True, repo_id=f"somebody/{name}")
    else:
        model.push_to_hub(f"somebody/{name}", max_shard_size="8KB")
    torch.save(logits(model), f"{sys.argv[1]}/{name}.pt")
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from tiny_models import logits
assert "fairy2i" not in sys.modules
loaded = AutoModelForCausalLM.from_pretrained("somebody/saved", trust_remote_code=True)
assert torch.equal(logits(loaded), torch.load(f"{sys.argv[1]}/saved.pt"))
from fairy2i import PackedLinear, QATLinear
for name, layer in (("packed", PackedLinear), ("qat", QATLinear), ("saved", PackedLinear)):
    loaded = AutoModelForCausalLM.from_pretrained(f"somebody/{name}")
    assert type(loaded.lm_head) is layer
    assert torch.equal(logits(loaded), torch.load(f"{sys.argv[1]}/{name}.pt"))
loaded.save_pretrained(f"{sys.argv[1]}/again")
"""


def test_a_pushed_model_loads_by_its_id_with_fairy2i_imported_and_through_its_shim(tmp_path):
    with fake_hub() as hub:
        done = run(PUSH, hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert sorted(hub.repositories) == ["somebody/packed", "somebody/qat", "somebody/saved"]
        for name in ("packed", "qat"):
            files = hub.repositories[f"somebody/{name}"]
            weights = [file for file in files if file.endswith(".safetensors")]
            assert len(weights) > 1
            assert {"config.json", "README.md", "modeling_fairy2i.py", "model.safetensors.index.json"} < files.keys()
            config = json.loads(files["config.json"])
            assert config["quantization_config"]["mode"] == name
            assert config["architectures"] == ["LlamaForCausalLM"]
        # this one was in its folder before, and only what is new there goes up
        saved = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
        assert hub.repositories["somebody/saved"] == saved
        assert {"model.safetensors", "modeling_fairy2i.py"} < saved.keys()
        done = run(LOAD, hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert hub.unknown == []
    again = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}
    assert again == {name: content for name, content in saved.items() if name != "README.md"}
