"""Copies between jagged and padded rows, against boolean masks and index copies, at Amazon Beauty's lengths.

    python -m benchmarks.copies

Needs a CUDA GPU. The limit is the device's copy bandwidth over the bytes that must be read and written. All but boolean
masks are timed as CUDA graphs, without the host.
"""

import torch

from benchmarks.attention import beauty_lengths
from benchmarks.timing import copy_bandwidth, heading, quantiles, replayed, row
from ops import reference
from ops.jagged import lengths_to_offsets
from ops.triton import rows as kernels


def compare(lengths: torch.Tensor, width: int, dtype: torch.dtype, bandwidth: float) -> None:
    offsets, total, longest = lengths_to_offsets(lengths).cuda(), int(lengths.sum()), int(lengths.max())
    values = torch.randn(total, width, device="cuda", dtype=dtype)
    padded = reference.jagged_to_padded(values, offsets, longest)
    users, mask = len(lengths), torch.arange(longest, device="cuda") < offsets.diff()[:, None]
    prefix = torch.randn(users, width, device="cuda", dtype=dtype)
    ones = torch.arange(users + 1, device="cuda")
    unit = width * values.element_size() / bandwidth * 1e6  # microseconds to move one row of values once
    print(f"\n[{users}, {longest}, {width}] {str(dtype)[6:]}, {total:,} values")
    print(f"  {'microseconds':<52}{'p20':>10}{'p50':>10}{'p80':>10}{'of limit':>9}")
    limit = (total + users * longest) * unit

    def line(name: str, function, limit: float) -> None:
        row(name, quantiles(function if "mask" in name else replayed(function)), limit)

    line("jagged to padded", lambda: kernels.jagged_to_padded(values, offsets, longest), limit)
    line("jagged to padded, torch index copy", lambda: reference.jagged_to_padded(values, offsets, longest), limit)
    line("jagged to padded, boolean mask", lambda: padded.new_zeros(padded.shape).index_put((mask,), values), limit)
    line("padded to jagged", lambda: kernels.padded_to_jagged(padded, offsets, total), 2 * total * unit)
    line("padded to jagged, boolean mask", lambda: padded[mask], 2 * total * unit)
    joined = 2 * (total + users) * unit
    line("prepend", lambda: kernels.concat_rows(prefix, values, ones, offsets, 1, longest), joined)
    line("prepend, torch index copy", lambda: reference.jagged_concat(prefix, values, ones, offsets), joined)


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
