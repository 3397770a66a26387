"""Encoding a large catalogue: in chunks that survive an interruption, shared by processes, into a mapped matrix."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import PartialState

from common.files import aside


def encode_chunks(
    encode: Callable[[list[str]], np.ndarray], texts: list[str], size: int, path: Path, fresh: bool = False
) -> None:
    """Writes the [N, D] float32 matrix of N texts to `path`, a .npy file, `size` texts at a time.

    All processes call it, and share the disk; each encodes its share, the first one joins them. Chunks wait in a folder
    beside `path`, so that a run that is started again goes on with those that are missing. fresh: encode all again.

    Raises ValueError where a chunk has another number of rows or of columns than it must have, or values that are not
    finite.
    """
    if size < 1:
        raise ValueError(f"chunk_items = {size} must be positive")
    state = PartialState()
    folder = path.with_name(f".{path.stem}-{size}.chunks")
    if state.is_main_process:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    starts = range(0, len(texts), size)
    files = [folder / f"{number:06d}.npy" for number in range(len(starts))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    state.wait_for_everyone()  # all have looked before anyone writes, and share the same list
    for done, number in enumerate(missing[state.process_index :: state.num_processes], start=1):
        chunk = texts[starts[number] : starts[number] + size]
        values = np.asarray(encode(chunk), dtype=np.float32)
        if values.ndim != 2 or len(values) != len(chunk):
            raise ValueError(f"the encoder returned {values.shape} for {len(chunk)} texts")
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"the vector of item {starts[number] + row} is not finite; its text is {chunk[row][:200]!r}"
            )
        with aside(files[number]) as part:
            np.save(part, values)
        if len(starts) > 1 and state.is_main_process:
            encoded = min(len(files) - len(missing) + done * state.num_processes, len(files))
            print(f"Encoded {encoded:,} of {len(files):,} chunks", flush=True)
    state.wait_for_everyone()
    if state.is_main_process:
        lost = [file for file in files if not file.exists()]
        if lost:
            raise FileNotFoundError(f"{lost[0]} was written on another machine: the processes must share a disk")
        _join(files, len(texts), path)
        shutil.rmtree(folder)
    state.wait_for_everyone()


def _join(files: list[Path], n_rows: int, path: Path) -> None:
    """The chunks below each other, without ever holding more than one of them in memory."""
    parts = [np.load(file, mmap_mode="r") for file in files]
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise ValueError(f"the chunks in {files[0].parent} have {sorted(widths)} columns: delete that folder")
    with aside(path) as part:
        whole = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=(n_rows, *widths))
        start = 0
        for rows in parts:
            whole[start : start + len(rows)] = rows
            start += len(rows)
        whole.flush()
