"""What every test shares: determinism, no hub, one thread."""

import os

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Of processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_TORCH_THREADS", "1")

import torch


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
