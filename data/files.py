"""Writing files so that no reader ever sees half of one, and no two processes write the same ones."""

import os
import socket
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout


def write_file(path: Path, content: bytes) -> None:
    """Writes aside, flushes to the disk and renames: the file is the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


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
        print(f"{path.parent}: waiting for {owner}, which writes there", flush=True)
        proxy = held.acquire()
    if isinstance(held, FileLock):  # where the disk knows no such locks, filelock writes the file itself
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    return proxy
