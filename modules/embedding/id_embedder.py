"""Embeddings of semantic-ID tokens and of users."""

import torch
from torch import Tensor, nn

from ops.embedding import embed_codes


class SemIdEmbedder(nn.Module):
    """Each code of a semantic ID becomes a vector for the code plus one for the prefix that ends with it.

    Code c of level l has its own row of a table, `starts[l] + c`. A prefix of two or more codes is hashed to one
    of `prefix_buckets` rows of another (prefix n-grams: Singh et al. 2024; Zheng et al. 2025), because what a
    deeper code means depends on those before it. Rows of that table start at zero, so a bucket that no
    training prefix falls into adds nothing.

    level_sizes: number of codes on each of the L' levels. prefix_buckets: 0 leaves prefixes out.
    """

    def __init__(self, level_sizes: tuple[int, ...], dim: int, prefix_buckets: int) -> None:
        super().__init__()
        sizes = torch.tensor(level_sizes)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), dim)
        self.prefix_table = nn.Embedding(prefix_buckets, dim) if prefix_buckets and len(level_sizes) > 1 else None

    def forward(self, codes: Tensor) -> Tensor:
        """codes [T, l] integers, of the first l levels -> [T, l, dim], in `ops.residual.stream_dtype`."""
        prefix_table = self.prefix_table.weight if self.prefix_table is not None else None
        return embed_codes(codes, self.starts, self.table.weight, prefix_table)


class UserEmbedder(nn.Module):
    """Users share `buckets` vectors (Rajput et al. 2023, section 3.2), by multiplicative hashing of the id."""

    def __init__(self, buckets: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, dim)

    def forward(self, user: Tensor) -> Tensor:
        """user [B] int64 -> [B, dim], in `ops.residual.stream_dtype`."""
        hashed = (user * 2654435761) % 2**32  # Knuth's multiplicative hash: equal on every machine
        rows = (hashed % self.table.num_embeddings)[:, None]
        # Not the table itself, whose gradient torch may sum by atomics on a GPU.
        return embed_codes(rows, rows.new_zeros(1), self.table.weight, None)[:, 0]
