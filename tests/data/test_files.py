"""Locks between processes. Files written aside are tested with the checkpoints."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from data.files import lock
from tests.pipeline import REPOSITORY

HOLD = """
import sys
from pathlib import Path
from data.files import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock, until it ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "folder" / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_the_process_that_has_it_is_named_and_its_death_frees_it(tmp_path, holder):
    path = tmp_path / "folder" / ".lock"
    who = f"{path.parent} is in use by process {holder.pid} on {socket.gethostname()}. Go away."
    with pytest.raises(ValueError) as raised:
        lock(path, "Go away.")
    assert str(raised.value) == who
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lock(path, "Go away."):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_it_is_waited_for_and_taken_twice_by_one_process(tmp_path, holder, capsys):
    path = tmp_path / "folder" / ".lock"
    os.kill(holder.pid, signal.SIGTERM)  # it may still hold it for a moment
    with lock(path), lock(path, "Go away."):
        holder.wait()
