"""Metrics of retrieval and of codebooks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.tokenizer.separate import number_groups


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

    def update(self, items: Tensor, target: Tensor, counted: Tensor | None = None) -> None:
        """items [B, K], best first, -1 for none; target [B]; counted [B] bool: which users count, by default all."""
        depth = len(self.counts) - 1
        rank = target_rank(items[:, :depth], target)
        rank = torch.where(rank < min(depth, items.shape[1]), rank, depth)
        self.counts.index_add_(0, rank, torch.ones_like(rank) if counted is None else counted.long())

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
    """Per level l (1-based): share of codes in use, and the perplexity of how often each is used.

    Perplexity is exp(entropy): V where all V codes are used equally often, 1 where all items have one code.
    codes: [N, L].
    """
    result = {}
    for level in range(codes.shape[1]):
        counts = torch.bincount(codes[:, level].cpu(), minlength=codebook_size).double()
        p = counts / counts.sum()
        result[f"usage_{level + 1}"] = float((counts > 0).double().mean())
        result[f"perplexity_{level + 1}"] = float(torch.exp(-torch.xlogy(p, p).sum()))
    return result


def collisions(codes: Tensor) -> dict[str, float]:
    """unique_share: of items whose codes no other has; largest_group: most items with the same codes. codes: [N, L]."""
    group = number_groups(codes)
    counts = torch.bincount(group)
    return {"unique_share": float((counts == 1).sum() / len(codes)), "largest_group": int(counts.max())}


@torch.no_grad()
def neighbour_agreement(codes: Tensor, x: Tensor, k: int = 10, n_queries: int = 1000) -> dict[str, float]:
    """neighbours_sharing_l: of each item's k nearest by cosine, the share with its first l codes.

    Over `n_queries` items spread evenly over the catalogue. Shape: codes [N, L], x [N, D], N > 1.
    """
    k = min(k, len(x) - 1)
    queries = torch.arange(0, len(x), max(1, len(x) // n_queries), device=x.device)[:n_queries]
    similarity = torch.full((len(queries), k), -2.0, device=x.device)
    nearest = torch.zeros_like(similarity, dtype=torch.int64)
    wanted = F.normalize(x[queries].float(), dim=1)
    for start in range(0, len(x), 65536):
        rows = F.normalize(x[start : start + 65536].float(), dim=1)
        found = wanted @ rows.T
        number = torch.arange(start, start + len(rows), device=x.device).expand_as(found)
        found = found.masked_fill(number == queries[:, None], -2.0)
        pool = torch.cat([similarity, found], 1)
        similarity, best = pool.topk(k, dim=1)
        nearest = torch.cat([nearest, number], 1).gather(1, best)
    codes = codes.to(x.device)
    same = (codes[nearest] == codes[queries][:, None]).cumprod(-1).double().mean((0, 1))  # [L]
    return {f"neighbours_sharing_{level + 1}": float(share) for level, share in enumerate(same)}
