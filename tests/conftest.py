"""What holds for all tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on which others ran before it."""
    torch.manual_seed(0)


pytest_plugins = ["tests.pipeline"]
