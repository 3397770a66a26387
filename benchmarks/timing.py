"""Times: quantiles of what runs on a GPU, by CUDA events with a cold L2 cache, or on a CPU by its clock; the card's own
limits; and one way to print them."""

import time
from collections.abc import Callable

import torch

from training.replay import record


def heading() -> None:
    """The card and the versions that all figures below belong to."""
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")


def quantiles(function: Callable, milliseconds: int = 100) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles of the time of one call, in microseconds."""
    from triton.testing import do_bench

    return tuple(1e3 * t for t in do_bench(function, warmup=25, rep=milliseconds, quantiles=[0.2, 0.5, 0.8]))


def replayed(function: Callable) -> Callable:
    """The function's work on the device, recorded as a CUDA graph: what it takes where the host does not hold it up."""
    graph, output = record(function)

    def again() -> object:
        graph.replay()
        return output  # so that it lives as long as the graph

    return again


def timed(function: Callable, device: torch.device) -> tuple[float, float, float]:
    """Quantiles as of `quantiles`: on a GPU of a CUDA graph, on a CPU of 15 calls."""
    if device.type == "cuda":
        return quantiles(replayed(function))
    function()
    marks = [mark(device)]
    for _ in range(15):
        function()
        marks.append(mark(device))
    return tuple(torch.tensor(seconds_between(marks)).quantile(torch.tensor([0.2, 0.5, 0.8])).mul(1e6).tolist())


def mark(device: torch.device) -> float | torch.cuda.Event:
    """A moment: of the host, or of the GPU's stream."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: list) -> list[float]:
    """Of each moment to the next; waits for the GPU."""
    pairs = list(zip(marks, marks[1:], strict=False))
    if isinstance(marks[0], float):
        return [end - start for start, end in pairs]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def copy_bandwidth() -> float:
    """Bytes a second of a large device copy, counting those read and those written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (quantiles(lambda: target.copy_(source))[1] * 1e-6)


def matrix_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a large matrix product on random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / (quantiles(lambda: a @ b)[1] * 1e-6)


def row(name: str, times: tuple[float, float, float], limit: float | None = None) -> None:
    """One line: p20, p50, p80 in microseconds and the share of the limit (microseconds) that p50 reaches."""
    share = f"{limit / times[1]:>9.0%}" if limit else ""
    print(f"  {name:<52}" + "".join(f"{t:>10.1f}" for t in times) + share, flush=True)
