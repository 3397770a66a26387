"""The variable-length type of the project and the public operations on it.

On a GPU they run the kernels of `ops.triton`, elsewhere, and where Triton is not installed, their pure-torch twins in
`ops.reference`. The choice is made here, by `has_kernel`, so that callers never know.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ops import reference

HAS_TRITON = find_spec("triton") is not None


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
        return self.offsets.shape[0] - 1

    def positions(self) -> Tensor:
        """Place of every value in its row, from 0. [T] int64."""
        total = self.values.shape[0]
        rows = reference.row_indices(self.offsets, total)
        return torch.arange(total, device=self.offsets.device) - self.offsets[rows]

    def with_values(self, values: Tensor) -> "JaggedTensor":
        """The same rows with other values [T, ...]."""
        return JaggedTensor(values, self.offsets, self.max_length)

    def to(self, device: torch.device | str) -> "JaggedTensor":
        return JaggedTensor(
            self.values.to(device),
            self.offsets.to(device),
            self.max_length,
        )

    @staticmethod
    def from_rows(rows: list[Tensor]) -> "JaggedTensor":
        """Joins B tensors [length_b, ...]."""
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return JaggedTensor(torch.cat(rows), lengths_to_offsets(lengths), max(len(row) for row in rows))

    @staticmethod
    def uniform(values: Tensor) -> "JaggedTensor":
        """B rows of one length: values [B, M, ...]."""
        batch, length = values.shape[:2]
        offsets = torch.arange(batch + 1, device=values.device) * length
        return JaggedTensor(values.reshape(batch * length, *values.shape[2:]), offsets, length)


def lengths_to_offsets(lengths: Tensor) -> Tensor:
    """Row lengths [B] -> row offsets [B+1] int64."""
    offsets = torch.zeros(lengths.shape[0] + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def row_indices(offsets: Tensor, total: int) -> Tensor:
    """Row number of each of the `total` = `offsets[-1]` values: offsets [B+1] -> [T] int64."""
    return reference.row_indices(offsets, total)


def jagged_attention(
    query: JaggedTensor,
    memory: JaggedTensor | None = None,
    bias: Tensor | None = None,
    key_limits: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
) -> JaggedTensor:
    """Scaled dot-product attention in which the queries of row b see the keys of row b only.

    out[i] = sum_j softmax_j(scale * q[i].k[j] + bias[h, clamp(j - place[i], -R, R) + R]) v[j]

    with i, j counted from the start of their rows (Vaswani et al. 2017, eq. 1; the bias is that of T5,
    Raffel et al. 2020, section 2.1, already looked up by distance). A query without keys gets zeros.

    query: queries [Tq, H, D] that look at the keys and values of memory [Tk, 2, H, D]; without memory, self-attention:
    the queries, keys and values [T, 3, H, D] of each token side by side, as one product makes them.
    Shape: bias [H, 2R+1] -> values [Tq, H, D].
    key_limits: [Tq] integers; a query sees only the first `key_limits` keys of its row, and its place is that
    of the last of them. Without them it sees all keys of its row, or, if `causal`, keys 0 to i; its place is i.
    dtype: scores and softmax accumulate in float32 or wider; the result has the dtype of the values.
    """
    if causal and key_limits is not None:
        raise ValueError("jagged_attention takes key_limits or causal, not both.")
    keys = query if memory is None else memory
    arguments = (query.offsets, keys.offsets, query.max_length, keys.max_length, bias, key_limits, causal, scale)
    packed = (query.values, memory.values if memory is not None else None)
    if has_kernel(query.values) and query.values.shape[-1] <= 128:
        from ops.triton.attention import attention

        return query.with_values(attention(*packed, *arguments)[0])
    return query.with_values(reference.jagged_attention(*packed, *arguments))


def has_kernel(values: Tensor) -> bool:
    """Whether operations on these values run as kernels."""
    return runs_kernels(values.device) and values.dtype in (torch.float32, torch.float16, torch.bfloat16)


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels run there: on a GPU, if Triton is installed. Elsewhere all is plain torch code, which may ask the
    device for numbers, so that training is not recorded as CUDA graphs either."""
    return device.type == "cuda" and HAS_TRITON
