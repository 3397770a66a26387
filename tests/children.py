"""Runs of the stages in children of a process that has imported everything, so that no run pays for the imports.

For scripts of one thread that are run by tests: python -m tests.kills, python -m tests.several.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable

import matplotlib.figure  # noqa: F401
import polars  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  (imported by the optimizer's first step)

from training.signals import Stopped


def start(task: Callable[[], object], environment: dict[str, str] | None = None) -> int:
    """Forks a child that runs the task; its process id. Its exit status is that of the scripts, 1 after an error."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment or {})
    sys.stdout = open(os.devnull, "w")
    try:
        task()
    except Stopped as stopped:
        os._exit(stopped.status)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def status(child: int) -> int:
    """The exit status of a child, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def several(n: int, task: Callable[[int], object]) -> list[int]:
    """Runs task(rank) in n processes that train together through gloo; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    common |= {"OMP_NUM_THREADS": "1"}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    children = [start(lambda rank=rank: task(rank), environment) for rank, environment in enumerate(ranks)]
    return [status(child) for child in children]


def in_step(number: int, action: Callable[[], object]) -> None:
    """Does something when this process takes the optimizer's step of that number, counted from 1."""
    taken, step = 0, torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        nonlocal taken
        taken += 1
        if taken == number:
            action()
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = counted
