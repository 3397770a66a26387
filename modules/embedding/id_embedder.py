"""Embeddings of semantic-ID tokens and of users."""

import torch
from torch import Tensor, nn


class SemIdEmbedder(nn.Module):
    """One table for the codes of all levels; code c of level l is row `starts[l] + c`.

    level_sizes: number of codes on each of the L' levels.
    """

    def __init__(self, level_sizes: tuple[int, ...], dim: int) -> None:
        super().__init__()
        sizes = torch.tensor(level_sizes)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), dim)

    def forward(self, codes: Tensor, first_level: int = 0) -> Tensor:
        """codes [..., l] of the levels first_level, first_level + 1, ... -> [..., l, dim]."""
        return self.table(codes + self.starts[first_level : first_level + codes.shape[-1]])


class UserEmbedder(nn.Module):
    """Users share `buckets` vectors (Rajput et al. 2023, section 3.2), by multiplicative hashing of the id."""

    def __init__(self, buckets: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(buckets, dim)

    def forward(self, user: Tensor) -> Tensor:
        """user [B] int64 -> [B, dim]."""
        hashed = (user * 2654435761) % 2**32  # Knuth's multiplicative hash: equal on every machine
        return self.table(hashed % self.table.num_embeddings)
