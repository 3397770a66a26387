"""Lists of strings as two tensors, so that they fit in a safetensors file."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ops.jagged import lengths_to_offsets


def pack_strings(strings: list[str]) -> tuple[Tensor, Tensor]:
    """Joins n strings as UTF-8.

    Returns bytes [M] uint8 and offsets [n+1] int64; string i is `bytes[offsets[i]:offsets[i+1]]`.
    Raises UnicodeEncodeError, a ValueError, where a string holds half a surrogate pair.
    """
    parts: Sequence[str] | Sequence[bytes] = strings
    if (text := "".join(strings)).isascii():
        joined = text.encode("ascii")
    else:
        parts = [string.encode("utf-8") for string in strings]
        joined = b"".join(parts)
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    return torch.from_numpy(np.frombuffer(bytearray(joined), np.uint8)), lengths_to_offsets(torch.from_numpy(lengths))


def unpack_strings(packed: Tensor, offsets: Tensor) -> list[str]:
    """The strings behind `pack_strings`: packed [M] uint8, offsets [n+1] int64.

    Raises ValueError where the offsets don't cover the bytes in order, or a string is not UTF-8.
    """
    bounds = offsets.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != len(packed) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"the string offsets must rise from 0 to the number of bytes, {len(packed)}")
    joined, places = packed.numpy().tobytes(), zip(bounds, bounds[1:], strict=False)
    if joined.isascii():  # then it is decoded once, in half of the time
        text = joined.decode("ascii")
        return [text[start:end] for start, end in places]
    return [joined[start:end].decode("utf-8") for start, end in places]


def pack_lists(lists: list[list[str]]) -> tuple[Tensor, Tensor, Tensor]:
    """n lists as the strings of all, see `pack_strings`, and the length of each, [n] int64."""
    lengths = torch.tensor([len(strings) for strings in lists], dtype=torch.int64)
    return *pack_strings([string for strings in lists for string in strings]), lengths


def unpack_lists(packed: Tensor, offsets: Tensor, lengths: Tensor) -> list[list[str]]:
    """The lists behind `pack_lists`. ValueError as of `unpack_strings`."""
    strings, bounds = unpack_strings(packed, offsets), lengths_to_offsets(lengths).tolist()
    with without_collector():
        return [strings[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's collector of cycles walks through all lists again and again while millions are made: it waits."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
