"""How processes join. What they do together is tested by tests.test_several and tests.test_launch."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from tests.pipeline import REPOSITORY
from training import distributed

JOIN = """
from datetime import timedelta
from training import cli, distributed
cli.show_log()
distributed.SILENCE, distributed.PROCESS_TIMEOUT = 0.5, timedelta(seconds=3)
try:
    distributed.start()
except ConnectionError as error:
    print(error)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stale_environment_is_named_while_it_is_waited_for_and_after(rank):
    stale = {
        "RANK": rank,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29871",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", JOIN]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | stale, capture_output=True, text=True)
    advice = "For a run of one process unset RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, which something has set.\n"
    assert f"warning: process {rank} waits at 127.0.0.1:29871 for all 2 to come. {advice}" in done.stderr
    assert done.stdout.startswith(f"Process {rank} of 2 can't join at 127.0.0.1:29871 (") and advice in done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "The environment has WORLD_SIZE = 'two', which must be a whole number"),
        ({"WORLD_SIZE": ""}, "The environment has WORLD_SIZE = '', which must be a whole number"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "The environment has ACCELERATE_USE_CPU = 'maybe', which must be true or"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "The environment is of process 5 of 2, which are counted from 0. For a run"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"Process 0 of 2 can't join at \?:\? \(no port\). For a run of one"),
        (
            {"LOCAL_RANK": "0"},
            r"Accelerate can't start as the environment says \(no port\): unset what asks",
        ),
    ],
)
def test_an_environment_that_cannot_be_is_named(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "Accelerator", Mock(side_effect=ValueError("no port\nat all")))
    with pytest.raises((ValueError, ConnectionError), match=message):
        distributed.start(cpu=True)


def test_what_cannot_be_is_one_error(monkeypatch):
    with pytest.raises(ValueError, match='train.mixed_precision_type = "fp16" needs a GPU'):
        distributed.start(amp=True, mixed_precision_type="fp16", cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: type("Alone", (), {"num_processes": 1}))
    with pytest.raises(ValueError, match="3 processes were started, and this one is alone"):
        distributed.start()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes were started on a machine with 2 GPUs"):
        distributed.start()
