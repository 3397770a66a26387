"""Writing files so that no reader ever sees half of one, and no two processes write the same ones."""

import hashlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of writing that names no file, as a full disk raises it, becomes an OSError that names this one."""
    try:
        yield
    except Exception as error:
        inner = re.search(r"\(os error (\d+)\)", str(error))  # as libraries in Rust say it
        if inner:
            raise OSError(int(inner[1]), os.strerror(int(inner[1])), str(path)) from error
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write a file, which at the end of the block is flushed to the disk and takes the place of `path`.

    So `path` is the old file or the new one, never a part; after an error it is the old one. The name ends as that of
    `path` does; a process that is killed leaves the file, and the next one writes over it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    try:
        with naming(path):
            yield part
            flush(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file by way of `aside`."""
    with aside(path) as part:
        part.write_bytes(content)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file by way of `aside`, without a copy in memory of what lies on the CPU."""
    with aside(path) as part:
        part.touch()  # with the permissions of every new file; those of save_file's are 0600
        mode = part.stat().st_mode
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata)
        part.chmod(mode)


def write_rows(path: Path, n_rows: int, parts: Iterable[np.ndarray]) -> None:
    """Writes parts [m, D] of a matrix [n_rows, D], in order, as a .npy file by way of `aside`; memory holds one part.

    A full disk is an error here; under a memory-mapped file it would end the process.
    """
    with aside(path) as part, open(part, "wb") as file:
        for rows in parts:
            if file.tell() == 0:
                header = {"descr": rows.dtype.str, "fortran_order": False, "shape": (n_rows, *rows.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(rows).data)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """As `aside`, an empty folder to fill. Where it takes the place of another, that one is renamed first: there may
    be none for a moment, but never one that is half old, half new."""
    part, old = path.with_name(f".{path.name}"), path.with_name(f".removed_{path.name}")
    for left in (part, old):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with naming(path):
            yield part
            flush(part)
        if path.exists():
            os.rename(path, old)
        os.rename(part, path)
        flush(path.parent)
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Makes a file's content, or a folder's names, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def in_turn() -> Iterator[None]:
    """The main process first, then one process of each other node, then all: each finds the caches of those before.

    So data is prepared once where the nodes share a disk, and once per node where they don't.
    """
    from accelerate import PartialState

    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def lock(path: Path, busy: str | None = None) -> AcquireReturnProxy:
    """Takes a lock file, until the `with` block of the result or this process ends, however it ends.

    busy: what to say where another process has it, in a ValueError that names that process; None waits for it. Within
    one process a lock can be taken several times.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path, is_singleton=True)
    try:
        proxy = held.acquire(timeout=0)
    except Timeout:
        owner = " ".join(path.read_text().split())
        if busy is not None:
            raise ValueError(f"{path.parent} is in use by {owner}. {busy}") from None
        logger.info(f"{path.parent}: waiting for {owner}, which writes there")
        proxy = held.acquire()
    if isinstance(held, FileLock):  # where the disk knows no such locks, filelock writes the file itself
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    return proxy
