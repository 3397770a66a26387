"""Files and folders written aside, and locks between processes."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from common.files import aside, folder_aside, lock, write_file, write_rows
from tests.pipeline import REPOSITORY

HOLD = """
import sys
from pathlib import Path
from common.files import lock
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


def test_a_file_written_aside_is_the_old_one_until_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.npy"
    write_file(path, b"old")
    with pytest.raises(ZeroDivisionError), aside(path) as part:
        part.write_bytes(b"half")
        assert path.read_bytes() == b"old" and part.suffix == ".npy" and part.name.startswith(".")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with aside(path) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["a.npy"]


def test_a_folder_written_aside_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "deep" / "a"
    (path.parent / ".a" / "left by a process that was killed").mkdir(parents=True)
    for content in ("old", "new"):
        with folder_aside(path) as part:
            assert os.listdir(part) == [] and path.exists() == (content == "new")
            (part / content).touch()
        assert os.listdir(path) == [content] and os.listdir(path.parent) == ["a"]
    with pytest.raises(ZeroDivisionError), folder_aside(path) as part:
        raise ZeroDivisionError
    assert os.listdir(path) == ["new"] and os.listdir(path.parent) == ["a"]


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
import polars as pl
from common.files import folder_aside, write_file, write_rows
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

def array(path):
    write_rows(path, 5000, np.zeros((5, 1000, 3)))

def table(path):
    with folder_aside(path) as part:
        pl.DataFrame({"a": np.random.rand(5000)}).write_parquet(part / "a.parquet")

for n, write in enumerate([lambda path: write_file(path, bytes(5000)), array, table]):
    try:
        write(Path(sys.argv[1]) / f"{n}.npy")
    except OSError as error:
        print(error)
"""


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64"])
def test_rows_are_what_numpy_writes(tmp_path, dtype):
    values = np.arange(60).reshape(10, 6).astype(dtype)
    write_rows(path := tmp_path / "a.npy", 10, (values[start : start + 3, ::2] for start in range(0, 10, 3)))
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), values[:, ::2], strict=True)


def test_a_disk_that_takes_no_more_is_an_error_that_names_the_file(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in said] == [repr(f"{tmp_path}/{n}.npy") for n in range(3)]
    assert list(tmp_path.iterdir()) == []
