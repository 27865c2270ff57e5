"""Shared fixtures. Nothing here, or in any test, reaches for the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the first import of transformers
os.environ["FAIRY2I_BACKEND"] = "reference"  # what tests of formats compare bit for bit; kernels have tests/ops
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compiler processes on small machines

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton: kernels run here too

# The models here are tiny: threads would only wait for each other, much so where a machine is shared.
torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# Examples are the same in each run, and a slow machine does not make a test fail.
settings.register_profile(
    "fairy2i", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fairy2i")


@pytest.fixture(autouse=True)
def seed():
    """Start each test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Let ``datasets`` cache in a folder of this test, where nothing from before is found."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real models and texts that lies beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data folder (../shared/data beside the repository) is not on this machine")
    return SHARED_DATA
