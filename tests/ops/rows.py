"""Jagged tensors from lists of rows, joined by torch's own nested tensors, and of noise."""

import torch
from torch import Tensor

from ops.jagged import JaggedTensor


def jagged(rows: list[Tensor]) -> JaggedTensor:
    """Joins B tensors [length_b, ...]."""
    joined = torch.nested.nested_tensor(rows, layout=torch.jagged)
    return JaggedTensor(joined.values(), joined.offsets(), max(len(row) for row in rows))


def random_rows(lengths: list[int], *shape: int, seed: int = 0, slack: int = 0, dtype=torch.float64) -> JaggedTensor:
    """Rows of noise; `slack`: by how much max_length is above the longest row."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), *shape, dtype=dtype, generator=generator)
    return JaggedTensor(values, torch.tensor([0, *lengths]).cumsum(0), max(lengths) + slack)


def split(rows: JaggedTensor) -> list[Tensor]:
    return list(rows.values.split(rows.lengths.tolist()))
