"""Vectors of semantic IDs; the choice of kernel or twin is made here."""

from torch import Tensor

from ops import reference
from ops.jagged import has_kernel
from ops.residual import stream_dtype


def embed_codes(codes: Tensor, starts: Tensor, table: Tensor, prefix_table: Tensor | None) -> Tensor:
    """out[t, l] = table[starts[l] + codes[t, l]] + (l > 0) * prefix_table[hash(codes[t, :l+1]) % buckets].

    The hash is `ops.reference.hash_prefixes`; without a prefix table there is the first term alone. Gradients are
    summed in a fixed order.

    Shape: codes [T, l] integers, of the first l of L levels, starts [L] int64, table [rows, dim], prefix_table
    [buckets, dim] -> [T, l, dim], in `ops.residual.stream_dtype` of the tables.
    """
    dtype = stream_dtype(table)
    if not has_kernel(table):
        return reference.embed_codes(codes, starts, table, prefix_table).to(dtype)
    from ops.triton.embedding import embed_codes as kernel

    return kernel(codes, starts, table, prefix_table, dtype)[0]
