"""The variable-length type of the project, and all arithmetic of its offsets."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class JaggedTensor:
    """B rows of different lengths, stored back to back.

    values: [T, ...], the rows one after another.
    offsets: [B+1] int64; row b is `values[offsets[b]:offsets[b+1]]`, `offsets[0] == 0`, `offsets[B] == T`.
    max_length: a host integer that no row exceeds. It is a bound known without asking the device.
    """

    values: Tensor
    offsets: Tensor
    max_length: int

    @property
    def lengths(self) -> Tensor:
        """[B] int64."""
        return self.offsets.diff()

    @property
    def batch_size(self) -> int:
        return len(self.offsets) - 1

    def positions(self) -> Tensor:
        """Place of every value in its row, from 0. [T] int64."""
        total = len(self.values)
        return torch.arange(total, device=self.offsets.device) - self.offsets[row_indices(self.offsets, total)]

    def with_values(self, values: Tensor) -> "JaggedTensor":
        """The same rows with other values [T, ...]."""
        return JaggedTensor(values, self.offsets, self.max_length)

    def to(self, device: torch.device | str) -> "JaggedTensor":
        return JaggedTensor(self.values.to(device), self.offsets.to(device), self.max_length)

    @staticmethod
    def uniform(values: Tensor) -> "JaggedTensor":
        """B rows of one length: values [B, M, ...]."""
        batch, length = values.shape[:2]
        return JaggedTensor(values.flatten(0, 1), torch.arange(batch + 1, device=values.device) * length, length)


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Row lengths [B] -> row offsets [B+1] int64."""
    offsets = torch.zeros(lengths.shape[0] + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def row_indices(offsets: Tensor, total: int) -> Tensor:
    """Row number of each of the `total` = `offsets[-1]` values: offsets [B+1] -> [T] int64."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=total)


def padded_places(offsets: Tensor, total: int, width: int) -> Tensor:
    """Where each of the `total` values lies when every row has `width` places: offsets [B+1] -> [T] int64."""
    rows = row_indices(offsets, total)
    return torch.arange(total, device=offsets.device) - offsets[rows] + rows * width


def jagged_to_padded(values: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    """Rows of a jagged tensor laid side by side, zeros at their ends: values [T, ...] -> [B, max_length, ...]."""
    shape = len(offsets) - 1, max_length
    if len(values) == shape[0] * max_length:  # every row is full: the same memory, seen as a matrix
        return values.unflatten(0, shape)
    padded = values.new_zeros(shape[0] * max_length, *values.shape[1:])
    return padded.index_copy(0, padded_places(offsets, len(values), max_length), values).unflatten(0, shape)


def padded_to_jagged(padded: Tensor, offsets: Tensor, total: int) -> Tensor:
    """The inverse of `jagged_to_padded`: the `total` = `offsets[-1]` values that are no padding, back to back."""
    flat = padded.flatten(0, 1)
    return flat if total == len(flat) else flat.index_select(0, padded_places(offsets, total, padded.shape[1]))


def first_occurrences(rows: JaggedTensor) -> Tensor:
    """The values with -1 where one occurs earlier in its row. values: [T] non-negative integers."""
    values = rows.values
    span = values.max() + 1 if len(values) else 1
    keys, order = (row_indices(rows.offsets, len(values)) * span + values).sort(stable=True)
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[1:] = keys[1:] == keys[:-1]
    return values.masked_fill(torch.empty_like(again).index_copy(0, order, again), -1)
