"""Metrics of retrieval and of codebooks."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def target_rank(items: Tensor, target: Tensor) -> Tensor:
    """0-based place of the target in a ranking without repeats; K where it is missing.

    Shape: items [B, K], target [B] -> [B] int64.
    """
    hits = items == target[:, None]
    return torch.where(hits.any(1), hits.int().argmax(1), items.shape[1])


@dataclass
class RankingMetrics:
    """Recall@K and NDCG@K over single-target rankings, accumulated as exact counts per rank.

    Recall@K = share of targets within the first K. NDCG@K = mean of 1 / log2(rank + 2) for those within the
    first K, else 0 (one relevant item, so the ideal DCG is 1; Jarvelin and Kekalainen 2002).
    """

    ks: tuple[int, ...] = (1, 5, 10)
    counts: Tensor | None = field(default=None, repr=False)  # [max K + 1], the last: missing

    def update(self, items: Tensor, target: Tensor) -> None:
        """items [B, K >= max(ks) unless the catalogue is smaller], target [B]."""
        rank = target_rank(items[:, : max(self.ks)], target)
        rank = torch.where(rank < items.shape[1], rank, max(self.ks))
        counts = torch.bincount(rank, minlength=max(self.ks) + 1)
        self.counts = counts if self.counts is None else self.counts + counts

    def compute(self) -> dict[str, float]:
        """{"recall@5": .., "ndcg@5": .., ...}."""
        counts = self.counts.double().cpu()
        gains = 1 / torch.log2(torch.arange(max(self.ks), dtype=torch.float64) + 2)
        result = {}
        for k in self.ks:
            result[f"recall@{k}"] = float(counts[:k].sum() / counts.sum())
            result[f"ndcg@{k}"] = float((counts[:k] * gains[:k]).sum() / counts.sum())
        return result


def codebook_usage(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """Per level l (1-based): share of codes in use, and the entropy in bits of how often each is used.

    codes: [N, L].
    """
    result = {}
    for level in range(codes.shape[1]):
        counts = torch.bincount(codes[:, level].cpu(), minlength=codebook_size).double()
        p = counts / counts.sum()
        result[f"usage_{level + 1}"] = float((counts > 0).double().mean())
        result[f"entropy_{level + 1}"] = float(-torch.xlogy(p, p).sum() / torch.tensor(2.0).log())
    return result


def collision_rate(codes: Tensor) -> float:
    """Share of items whose codes [N, L] another item has too."""
    _, inverse, counts = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    return float((counts[inverse] > 1).double().mean())
