"""Encoding a large catalogue: in chunks that survive an interruption, shared by processes, into a mapped matrix."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import PartialState

from common.files import write_rows
from data.sources import checked

logger = logging.getLogger(__name__)


def encode_chunks(
    encode: Callable[[list[str]], np.ndarray], texts: list[str], size: int, path: Path, fresh: bool = False
) -> None:
    """Writes the [N, D] float32 matrix of N texts to `path`, a .npy file, `size` texts at a time.

    All processes call it, and share the disk; each encodes its share, the first one joins them. Chunks wait in a folder
    beside `path`, so that a run that is started again goes on with those that are missing. fresh: encode all again.
    ValueError where a chunk has another number of rows or columns than it must have, or a value that is not finite.
    """
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
        values = checked(encode(chunk), "the encoder", chunk, starts[number])
        write_rows(files[number], len(values), [values])
        if len(starts) > 1 and state.is_main_process:
            encoded = min(len(files) - len(missing) + done * state.num_processes, len(files))
            logger.info(f"Encoded {encoded:,} of {len(files):,} chunks")
    state.wait_for_everyone()
    if state.is_main_process:
        lost = [file for file in files if not file.exists()]
        if lost:
            raise FileNotFoundError(f"{lost[0]} was written on another machine: the processes must share a disk")
        parts = [np.load(file, mmap_mode="r") for file in files]
        if len(widths := {part.shape[1] for part in parts}) > 1:
            raise ValueError(f"the chunks in {folder} have {sorted(widths)} columns: delete that folder")
        write_rows(path, len(texts), parts)
        shutil.rmtree(folder)
    state.wait_for_everyone()
