"""Rows of a matrix that may be larger than memory, chunk by chunk on the device."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def stream(x: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Up to batch_size rows of x [N, ...] at a time, on the device, in order.

    x may be a memory-mapped file. On the way to a GPU a thread reads the next rows into one of two pinned buffers
    while the caller works on those before.
    """
    starts = range(0, len(x), batch_size)
    if device.type != "cuda" or x.is_cuda:
        for start in starts:
            yield x[start : start + batch_size].to(device)
        return
    shape = (min(batch_size, len(x)), *x.shape[1:])
    buffers = [torch.empty(shape, dtype=x.dtype, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers]  # that the buffer's rows have arrived on the device

    def read(n: int) -> Tensor:
        rows = x[starts[n] : starts[n] + batch_size]
        copied[n % 2].synchronize()
        return buffers[n % 2][: len(rows)].copy_(rows)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for n in range(len(starts)):
            chunk = ahead.result().to(device, non_blocking=True)
            copied[n % 2].record(torch.cuda.current_stream(device))
            if n + 1 < len(starts):
                ahead = reader.submit(read, n + 1)
            yield chunk
