"""Packages that are not there: what does without them works, what needs them says what to install."""

import subprocess
import sys
from pathlib import Path

from tiny_text import save_tiny_model


def run_without(package, code, *arguments):
    """Run code where a package looks as if it were not installed, for those who look for it and those who import it."""
    code = f"import sys; sys.modules[{package!r}] = None\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)


def test_models_are_packed_loaded_and_used_without_datasets_and_texts_say_what_is_missing(tmp_path):
    save_tiny_model(tmp_path / "plain")
    code = """
import fairy2i
from fairy2i.cli import main
plain, packed = sys.argv[1] + "/plain", sys.argv[1] + "/packed"
assert main(["quantize", plain, packed, "--method", "complex_phase_v2"]) == 0
assert main(["generate", packed, "the quick", "--max_new_tokens", "3", "--device", "cpu"]) == 0
from fairy2i.loading import read_documents
read_documents(plain)
"""
    done = run_without("datasets", code, tmp_path)
    assert done.returncode == 1
    assert (tmp_path / "packed" / "model.safetensors").is_file()
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: reading texts needs the package datasets")
    assert last.endswith("pip install datasets")
