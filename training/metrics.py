"""Metrics of retrieval and of codebooks."""

import torch
from torch import Tensor


def target_rank(items: Tensor, target: Tensor) -> Tensor:
    """0-based place of the target in a ranking without repeats; K where it is missing.

    Shape: items [B, K], target [B] -> [B] int64.
    """
    hits = items == target[:, None]
    return torch.where(hits.any(1), hits.int().argmax(1), items.shape[1])


class RankingMetrics:
    """Recall@K and NDCG@K over single-target rankings, accumulated as exact counts per rank.

    Recall@K = share of targets within the first K. NDCG@K = mean of 1 / log2(rank + 2) for those within the
    first K, else 0 (one relevant item, so the ideal DCG is 1; Jarvelin and Kekalainen 2002).
    """

    def __init__(self, ks: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.ks = ks
        self.counts = torch.zeros(max(ks) + 1, dtype=torch.int64, device=device)  # per rank; the last: missing

    def update(self, items: Tensor, target: Tensor) -> None:
        """items [B, K], best first, -1 for none; target [B]."""
        depth = len(self.counts) - 1
        rank = target_rank(items[:, :depth], target)
        rank = torch.where(rank < min(depth, items.shape[1]), rank, depth)
        self.counts += torch.bincount(rank, minlength=depth + 1)

    def compute(self) -> dict[str, float]:
        """{"recall@5": .., "ndcg@5": .., ...}. ValueError where nothing was added."""
        counts = self.counts.double().cpu()
        if counts.sum() == 0:
            raise ValueError("No samples to evaluate: the split is empty.")
        gains = 1 / torch.log2(torch.arange(len(counts) - 1, dtype=torch.float64) + 2)
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
