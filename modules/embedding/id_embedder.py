"""Embeddings of semantic-ID tokens and of users."""

import torch
from torch import Tensor, nn


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
        """codes [..., l] of the first l levels -> [..., l, dim]."""
        embedded = self.table(codes + self.starts[: codes.shape[-1]])
        if self.prefix_table is None or codes.shape[-1] < 2:
            return embedded
        hashed = hash_prefixes(codes)[..., 1:] % self.prefix_table.num_embeddings  # [..., l-1]
        prefixes = self.prefix_table(hashed)
        return embedded + torch.cat([torch.zeros_like(embedded[..., :1, :]), prefixes], -2)


def hash_prefixes(codes: Tensor) -> Tensor:
    """A non-negative 31-bit hash of each prefix, equal on every machine. Shape: codes [..., l] -> [..., l] int64."""
    state, hashes = torch.zeros_like(codes[..., 0]), []
    for level in range(codes.shape[-1]):
        state = (state * 1_000_003 + codes[..., level] + 1) % (2**31 - 1)
        state = state ^ (state >> 15)
        hashes.append(state * 48_271 % (2**31 - 1))
    return torch.stack(hashes, -1)


class UserEmbedder(nn.Module):
    """Users share `buckets` vectors (Rajput et al. 2023, section 3.2), by multiplicative hashing of the id."""

    def __init__(self, buckets: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, dim)

    def forward(self, user: Tensor) -> Tensor:
        """user [B] int64 -> [B, dim]."""
        hashed = (user * 2654435761) % 2**32  # Knuth's multiplicative hash: equal on every machine
        return self.table(hashed % self.table.num_embeddings)
