"""What holds for all tests."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings

from training.cli import show_log

for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_API_KEY"):
    os.environ.pop(name, None)  # what the shell has set would change what the tests see; they stay on this machine
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
show_log()  # tests read what the scripts show
settings.register_profile("no deadline", deadline=None)  # a busy machine is no fault
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked with `gpu` runs where there is one."""
    for item in items if not torch.cuda.is_available() else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on which others ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def small_disk() -> Callable:
    """A context in which the system takes no more than so many bytes a file."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


pytest_plugins = ["tests.hub", "tests.pipeline"]
