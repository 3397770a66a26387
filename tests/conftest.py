"""What holds for all tests."""

import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on which others ran before it."""
    torch.manual_seed(0)


pytest_plugins = ["tests.pipeline"]
