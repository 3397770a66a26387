"""Writing files so that no reader ever sees half of one."""

import os
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Writes aside, flushes to the disk and renames: the file is the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
