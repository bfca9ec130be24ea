"""What every test shares: determinism, no hub, one thread."""

import os

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Of processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_TORCH_THREADS", "1")

import torch


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# Marks that transformers' own tests carry.
MARKS_OF_TRANSFORMERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "slow",
    "torch_compile_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKS_OF_TRANSFORMERS:
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
