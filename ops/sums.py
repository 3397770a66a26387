"""Sums of rows of a table, and rows taken from one, with gradients that are summed in a fixed order; the choice of
kernel or twin is made here."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.dispatch import has_kernel
from ops.precision import stream_dtype


@dataclass(frozen=True)
class RowSums:
    """Which rows of a table each of M outputs is the sum of: fixed, so that it is sorted once, by `of`.

    rows: [M, k] int32; output m is the sum of the k rows rows[m] of the table.
    keys, order: [M * k] int32: the rows in ascending order, and the places in rows, flattened, that they come from,
    ascending among equal rows.
    """

    rows: Tensor
    keys: Tensor
    order: Tensor

    @staticmethod
    def of(rows: Tensor) -> "RowSums":
        """rows: [M, k] integers, in [0, R) for a table [R, d]."""
        rows = rows.to(torch.int32).contiguous()
        keys, order = rows.flatten().sort(stable=True)
        return RowSums(rows, keys, order.to(torch.int32))


def sum_rows(table: Tensor, sums: RowSums) -> Tensor:
    """out[m] = sum over j of table[rows[m, j]], added in float32 or wider.

    Its gradient, dtable[r] = sum of g[m] over the pairs (m, j) with rows[m, j] = r, is added in float32 or wider, in a
    fixed order; rows of no pair get zeros.

    Shape: table [R, d] -> [M, d], in `ops.precision.stream_dtype` of the table.
    """
    return _sum(table, sums.rows, sums.keys, sums.order, stream_dtype(table))


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """out[t] = table[index[t]]; its gradient is added as that of `sum_rows`, however often a row is taken. Shape: table
    [R, d], index [T] integers -> [T, d], in the dtype of the table."""
    return _sum(table, index[:, None], None, None, table.dtype)


def take_sums(table: Tensor, rows: Tensor) -> Tensor:
    """`sum_rows` for rows [M, k] integers that are not known beforehand."""
    return _sum(table, rows, None, None, stream_dtype(table))


def _sum(table: Tensor, rows: Tensor, keys: Tensor | None, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    if not has_kernel(table.device, table.dtype):
        return reference_sum_rows(table, rows, dtype)
    from ops.triton.sums import sum_rows as kernel

    return kernel(table, rows, keys, order, dtype)


def reference_sum_rows(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin of the kernel: table [R, d], rows [M, k] -> [M, d] in `dtype`; one column of rows at a time."""
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    first, *others = rows.unbind(1)
    total = table.index_select(0, first)
    for column in others:
        total = total + table.index_select(0, column)
    return total.to(dtype)
