"""What holds for all tests."""

import os

import pytest
import torch

for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_API_KEY"):
    os.environ.pop(name, None)  # what the shell has set would change what the tests see; they stay on this machine
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked with `gpu` runs where there is one."""
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on which others ran before it."""
    torch.manual_seed(0)


pytest_plugins = ["tests.hub", "tests.pipeline"]
