"""Copies between jagged and padded rows, against boolean masks and index copies, at Amazon Beauty's lengths.

    python -m benchmarks.copies

Needs a CUDA GPU. The limit is the bandwidth of a large device copy over the bytes that must be read and written. All
but boolean masks are timed as CUDA graphs, without the host: small copies several in one graph, as they stand in a
training step, each on memory of its own, so that none finds anything in the cache.
"""

import torch

from benchmarks.attention import beauty_lengths
from benchmarks.timing import copy_bandwidth, heading, quantiles, replayed, row
from ops import reference
from ops.jagged import lengths_to_offsets
from ops.triton import rows as kernels

TOGETHER = 1 << 30  # bytes that the copies of a graph move


def compare(lengths: torch.Tensor, width: int, dtype: torch.dtype, bandwidth: float) -> None:
    offsets, total, longest = lengths_to_offsets(lengths).cuda(), int(lengths.sum()), int(lengths.max())
    users, mask = len(lengths), torch.arange(longest, device="cuda") < lengths.cuda()[:, None]
    size = width * dtype.itemsize  # bytes of a value
    times = -(-TOGETHER // (2 * total * size))
    values = [torch.randn(total, width, device="cuda", dtype=dtype) for _ in range(times)]
    padded = [reference.jagged_to_padded(v, offsets, longest) for v in values]
    print(f"\n[{users}, {longest}, {width}] {str(dtype)[6:]}, {total:,} values, {times} copies in a graph")
    print(f"  {'microseconds a copy':<52}{'p20':>10}{'p50':>10}{'p80':>10}{'of limit':>9}")

    def line(name: str, function, tensors: list[torch.Tensor], values_moved: int) -> None:
        graph = replayed(lambda: [function(tensor) for tensor in tensors])
        row(name, tuple(t / times for t in quantiles(graph)), values_moved * size / bandwidth * 1e6)

    line("torch's copy of the values", torch.clone, values, 2 * total)
    moved = total + users * longest
    line("jagged to padded", lambda v: kernels.jagged_to_padded(v, offsets, longest), values, moved)
    line("jagged to padded, torch index copy", lambda v: reference.jagged_to_padded(v, offsets, longest), values, moved)
    line("padded to jagged", lambda p: kernels.padded_to_jagged(p, offsets, total), padded, 2 * total)

    def put() -> torch.Tensor:
        return padded[0].new_zeros(padded[0].shape).index_put((mask,), values[0])

    row("jagged to padded, boolean mask", quantiles(put), (total + users * longest) * size / bandwidth * 1e6)
    row("padded to jagged, boolean mask", quantiles(lambda: padded[0][mask]), 2 * total * size / bandwidth * 1e6)


def main() -> None:
    heading()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s")
    for width, dtype in ((128, torch.float32), (512, torch.float32), (384, torch.bfloat16)):
        compare(beauty_lengths(4096), width, dtype, bandwidth)
    compare(torch.tensor([799] + [800] * 4095), 128, torch.float32, bandwidth)
    for width in (128, 512):
        compare(beauty_lengths(600), width, torch.float32, bandwidth)


if __name__ == "__main__":
    main()
