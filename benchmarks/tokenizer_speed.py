"""Speed of the tokenizer: training steps, and codes of catalogues larger than memory. Run by `tokenizer.py`."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.prefetch import stream
from data.shuffle import Shuffler, derive_seed, seed_noise
from modules.rqvae import RqVae
from modules.tokenizer.catalogue import catalogue_codes
from modules.tokenizer.semids import rank_within_equal
from ops.precision import matmul_precision
from train_rqvae import flat_parameters, recorded_passes
from training import distributed
from training.flat import FlatParameters
from training.metrics import collisions
from training.sharded import ShardedAdamW

BATCH, ROWS = 640, 65536  # of a training step; written at a time


def operations(model: RqVae, batch: int) -> int:
    """Of the matrix products of one step, and of the distances to all codes."""
    matrices = [p.numel() for name, p in model.named_parameters() if "mlp" in name]
    codebooks = sum(layer.embedding.weight.numel() for layer in model.layers)
    return batch * (6 * sum(matrices) - 2 * matrices[0] + 2 * codebooks)  # the features need no gradient


def stepper(
    model: RqVae, x: Tensor, batch: int
) -> tuple[Callable[[Tensor, float, float], None], ShardedAdamW, FlatParameters]:
    """The step of train_rqvae.py as a function of index, rate and temperature; its optimizer, and the codebooks."""
    accelerator = distributed.start(cpu=not x.is_cuda)
    codebooks, _ = flats = flat_parameters(model)
    optimizer = ShardedAdamW(flats, 1e-3, (0.01, 0.01))
    replay = recorded_passes(model, x, flats, batch, accelerator)

    def step_once(index: Tensor, rate: float, temperature: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        replay(len(index), index, torch.tensor(temperature))
        optimizer.update(1.0, accelerator.scaler)

    return step_once, optimizer, codebooks


def speed(device: torch.device, profile: bool) -> None:
    """Training steps a second at batch 640 on the 768-512-256-128-32, 3 x 256 model."""
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    x = torch.randn(20_000, 768, device=device)
    model = RqVae(768, embed_dim=32).to(device)
    model.initialize(x, torch.Generator(device).manual_seed(0))
    step_once, shuffler = stepper(model.train(), x, BATCH)[0], Shuffler(len(x), BATCH, 0)

    def steps(first: int, n: int) -> float:
        """Seconds for n steps as train_rqvae.py makes them."""
        start = time.perf_counter()
        for step in range(first, first + n):
            seed_noise(derive_seed(0, "noise", step, 0), device)
            step_once(shuffler.draw(step)[0], 1e-3, 1.0)
        launched = time.perf_counter() - start
        if gpu:
            torch.cuda.synchronize()
        host.append(launched / n)
        return time.perf_counter() - start

    host: list[float] = []
    n, repeats = (500, 30) if gpu else (10, 9)
    steps(0, n)
    times = torch.tensor([steps(k * n, n) / n for k in range(repeats)], dtype=torch.float64)
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    print(
        f"{1 / p50:,.1f} steps/s; a step {1e6 * p20:,.1f} / {1e6 * p50:,.1f} / {1e6 * p80:,.1f} us (p20, p50, p80 of ",
        end="",
    )
    print(f"{repeats} x {n}); the host is done after {1e6 * min(host):,.1f} us")
    work = operations(model, BATCH)
    line = f"{work / 1e9:.2f} GFLOP a step, {work / p50 / 1e12:.3f} TFLOP/s"
    if gpu:
        from benchmarks.timing import matrix_rate

        with matmul_precision("high"):
            peak = matrix_rate(torch.float32)
        line += f": {work / p50 / peak:.1%} of a large product in TF32, {peak / 1e12:.0f} TFLOP/s"
    print(line)
    if profile:
        profiled(steps, 50 if gpu else 5, p50, gpu)


def profiled(steps: Callable[[int, int], float], n: int, seconds: float, gpu: bool) -> None:
    """Kernels of a step (on a CPU: operators) by time."""
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        steps(0, n)
    rows = [
        ((event.self_device_time_total if gpu else event.self_cpu_time_total) / n, event.count / n, event.key)
        for event in profiler.key_averages()
    ]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    busy, launches = sum(row[0] for row in rows), sum(row[1] for row in rows)
    print(f"{launches:.1f} kernels a step, busy {busy:,.1f} us of {1e6 * seconds:,.1f}")
    for microseconds, calls, name in rows:
        print(f"  {microseconds:9.2f} us {calls:7.1f} x  {name[:140]}")


def write_features(path: Path, n: int, dim: int, device: torch.device) -> None:
    """[n, dim] float32 around 1,000 centres, as .npy; chunks are drawn on the device and written side by side."""
    centres = torch.randn(1000, dim, generator=torch.Generator(device).manual_seed(0), device=device)

    def write(start: int) -> None:
        count = min(ROWS, n - start)
        generator = torch.Generator(device).manual_seed(derive_seed(0, start))
        values = torch.randn(count, dim, generator=generator, device=device)
        values += centres[torch.randint(0, len(centres), (count,), generator=generator, device=device)]
        left, place = values.cpu().numpy().data.cast("B"), header + start * dim * 4
        while left:  # a call writes 2 GiB at most
            written = os.pwrite(file.fileno(), left, place)
            left, place = left[written:], place + written

    with open(path, "wb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (n, dim)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.flush()
        header = file.tell()
        list(pool.map(write, range(0, n, ROWS)))


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """The most memory of this process meanwhile, in GiB: its own, and pages of mapped files (which can be dropped)."""
    peak, done = {"RssAnon": 0.0, "RssFile": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], int(value.split()[0]) / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def tokenize(n: int, dim: int, options: dict, folder: str, cold: bool, device: torch.device) -> None:
    """Codes and unique IDs of n items whose features stream from a file of n * dim * 4 bytes.

    options: of the model. cold: write the file out and drop it from the page cache first.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path, start = Path(scratch) / "features.npy", time.perf_counter()
        write_features(path, n, dim, device)
        if cold:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        print(f"{n:,} x {dim}, {n * dim * 4 / 1e9:.1f} GB written in {time.perf_counter() - start:.1f} s", flush=True)
        x = torch.from_numpy(np.load(path, mmap_mode="c"))
        model = RqVae(dim, **options).to(device)
        model.initialize(x[:20_000].clone().to(device), torch.Generator(device).manual_seed(0))
        with peak_memory() as peak:
            start = time.perf_counter()
            codes = catalogue_codes(model, x)
            middle = time.perf_counter()
            extra = rank_within_equal(codes)
            largest = int(extra.max())
            end = time.perf_counter()
        print(f"codes {middle - start:.1f} s, extra level {end - middle:.1f} s, {n / (end - start):,.0f} items/s")
        print(f"unique {collisions(codes)['unique_share']:.4f}, largest extra code {largest}")
        print(f"most memory {peak['RssAnon']:.2f} GiB, and {peak['RssFile']:.2f} GiB of the mapped file")
        start = time.perf_counter()
        read(x, model.chunk_rows, device)
        print(f"reading the features alone, from the page cache: {time.perf_counter() - start:.1f} s", flush=True)
        if device.type == "cuda":
            print(f"device memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def read(x: Tensor, rows: int, device: torch.device) -> None:
    """Moves all of x to the device, chunk by chunk."""
    for chunk in stream(x, rows, device):
        float(chunk.amax())
