"""Metrics of retrieval and of codebooks.

Those of retrieval come from ranks: of each evaluated user one integer, the target's place from 0. Under the protocol
"all" every item is ranked, under "new" only those that the user has not consumed; a consumed target is a miss there,
with the number of items as its rank.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import write_tensors
from data.batches import SequenceSource
from data.splits import in_training
from modules.tokenizer.collisions import number_groups
from ops.jagged import JaggedTensor, row_indices

PROTOCOLS = {"all": "all items", "new": "items not yet consumed"}  # which items are ranked
CHOSEN_K = 10  # of the figures by groups of users, and of
CHOSEN = f"ndcg@{CHOSEN_K}"  # which chooses checkpoints by validation
DRAWS = 10**7  # numbers that the bootstrap draws at a time


def exact_ranks(scores: Tensor, targets: Tensor, consumed: JaggedTensor) -> tuple[Tensor, Tensor]:
    """Ranks under the protocols "all" and "new": the other items that are not scored below the target.

    Items that tie with the target so come before it, as all do where its score is NaN.
    Shape: scores [B, N] float, targets [B] int64, consumed: rows of item ids, those from B on ignored -> 2 x [B] int64.
    """
    score = scores.gather(1, targets[:, None])  # [B, 1]
    ranks = scores.shape[1] - 1 - (scores < score).sum(1)

    def ahead(rows: Tensor, items: Tensor) -> Tensor:
        return ~(scores[rows, items] < score[rows, 0])

    return ranks, ranks_among_new(ranks, targets, consumed, scores.shape[1], ahead)


def ranks_among_new(
    ranks: Tensor, targets: Tensor, consumed: JaggedTensor, n_items: int, ahead: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Ranks among the items that are not consumed; n_items for a consumed target. Never asks the device for a number.

    ahead(rows [T], items [T]) -> [T] bool: whether an item comes before the target of its row.
    Shape: ranks among all items [B] int64, targets [B] int64, consumed: rows of item ids, those from B on ignored
    -> [B] int64.
    """
    rows = row_indices(consumed.offsets, len(consumed.values))
    keys = (rows * n_items + consumed.values).sort().values  # an item that was consumed twice counts once
    rows, items = keys // n_items, keys % n_items
    counted = (F.pad(keys.diff(), (1, 0), value=1)[: len(keys)] != 0) & (rows < len(ranks))
    rows = rows.clamp_max(len(ranks) - 1)
    gone = torch.zeros_like(ranks).index_add_(0, rows, (counted & ahead(rows, items)).long())
    missed = torch.zeros_like(ranks).index_add_(0, rows, (counted & (items == targets[rows])).long())
    return torch.where(missed > 0, n_items, ranks - gone)


def gains(ranks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each user's part of Recall@k and of NDCG@k. Shape: int64 -> 2 x the same, float64.

    Recall: 1 for a target within the first k. NDCG: 1 / log2(rank + 2) for it (one relevant item, so the ideal DCG
    is 1; Jarvelin and Kekalainen 2002). Else both are 0.
    """
    hit = (ranks < k).double()
    return hit, hit / torch.log2(ranks.double() + 2)


def ranking_metrics(ranks: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """{"recall@5": .., "ndcg@5": .., .., "mrr": ..}: means over the users. ranks: [S] int64. mrr: of 1 / (rank + 1), 0
    where the target is not within the first max(ks). ValueError where S = 0."""
    if len(ranks) == 0:
        raise ValueError("No samples to evaluate: the split is empty.")
    result: dict[str, float] = {}
    for k in ks:
        recall, ndcg = gains(ranks, k)
        result |= {f"recall@{k}": float(recall.mean()), f"ndcg@{k}": float(ndcg.mean())}
    hit, _ = gains(ranks, max(ks))
    return result | {"mrr": float((hit / (ranks + 1)).mean())}


def breakdown(ranks: Tensor, groups: dict[str, Tensor], k: int) -> dict[str, dict[str, float]]:
    """Each group's number of "users", "recall@k" and "ndcg@k". Groups without users are left out. Shape: ranks [S]
    int64, groups [S] bool each."""
    result = {}
    for name, group in groups.items():
        recall, ndcg = (gain[group] for gain in gains(ranks, k))
        if len(recall):
            result[name] = {"users": len(recall), f"recall@{k}": float(recall.mean()), f"ndcg@{k}": float(ndcg.mean())}
    return result


def bins(values: Tensor, starts: tuple[int, ...]) -> dict[str, Tensor]:
    """Groups of users by a number: {"1-5": [S] bool, .., "21+": [S] bool} for values [S] and starts (1, .., 21)."""
    result = {}
    for start, after in zip(starts, starts[1:], strict=False):
        name = str(start) if after == start + 1 else f"{start}-{after - 1}"
        result[name] = (values >= start) & (values < after)
    return result | {f"{starts[-1]}+": values >= starts[-1]}


def task_groups(source: SequenceSource, train_lengths: Tensor, n_items: int) -> dict[str, dict[str, Tensor]]:
    """The users of a split by how often the target occurs in training, and by how many items they had consumed.
    train_lengths: [U] int64, how many leading interactions of each user are training data. Groups as of `breakdown`."""
    interactions, samples = source.interactions, source.samples
    items = interactions.items.long()
    counts = torch.bincount(items[in_training(interactions, train_lengths)], minlength=n_items)
    targets = items[interactions.offsets[samples.user] + samples.position]
    return {
        "target_in_training": bins(counts[targets], (0, 1, 6, 21)),
        "history": bins(samples.position, (1, 6, 11, 21, 51)),
    }


def all_figures(
    ranks: dict[str, dict[str, Tensor]], groups: dict[str, dict[str, Tensor]], ks: tuple[int, ...], n_items: int
) -> dict[str, float]:
    """All that metrics.json says of a split's rankings, flat.

    ranks: [S] int64 of each row of the table and each protocol, as {"most_popular": {"all": .., "new": ..}, ..}; that
    row tells which targets were consumed. groups: of `task_groups`.
    Keys: "users", "unseen_targets" and "consumed_targets" (how many), "<row>/<protocol>/<metric>" with those of
    `ranking_metrics`, "<row>/<protocol>/<kind>/<group>/<metric>" with those of `breakdown` at CHOSEN_K.
    """
    consumed = ranks["most_popular"]["new"] >= n_items
    unseen = groups["target_in_training"]["0"]
    result: dict[str, float] = {"users": len(consumed), "unseen_targets": int(unseen.sum())}
    result["consumed_targets"] = int(consumed.sum())
    for row, protocols in ranks.items():
        for protocol, own in protocols.items():
            figures = ranking_metrics(own, ks)
            for kind, members in groups.items():
                for group, values in breakdown(own, members, CHOSEN_K).items():
                    figures |= {f"{kind}/{group}/{name}": value for name, value in values.items()}
            result |= {f"{row}/{protocol}/{name}": value for name, value in figures.items()}
    return result


def save_ranks(path: Path, ranks: dict[str, dict[str, Tensor]]) -> None:
    """One safetensors file: "<row>/<protocol>" to [S] int32, the users in the order of the split."""
    tensors = {f"{row}/{name}": own.int() for row, protocols in ranks.items() for name, own in protocols.items()}
    write_tensors(path, tensors)


def paired_bootstrap(
    ranks_a: Tensor, ranks_b: Tensor, k: int, samples: int = 10_000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """How a differs from b at "recall@k" and "ndcg@k", by drawing the users with replacement (Efron 1979).

    ranks: [S] int64, or [R, S] of R runs, over which a user's gains are averaged. Each metric has the "difference" of
    the means a - b, "low" and "high", the ends of its 95 % interval, and "not_better", the share of the `samples`
    draws in which a is not above b. Users with equal differences are drawn as one, by how many they are.
    """
    difference = torch.stack(gains(ranks_a, k), -1) - torch.stack(gains(ranks_b, k), -1)
    difference = difference.reshape(-1, ranks_a.shape[-1], 2).mean(0)  # [S, 2]
    values, counts = (tensor.cpu().numpy() for tensor in difference.unique(dim=0, return_counts=True))
    draw, n_users = np.random.default_rng(seed), counts.sum()
    chunk = max(1, DRAWS // len(counts))
    sizes = [min(chunk, samples - start) for start in range(0, samples, chunk)]
    means = [draw.multinomial(n_users, counts / n_users, size) @ values / n_users for size in sizes]
    means = np.concatenate(means)  # [samples, 2]
    result = {}
    for column, name in enumerate((f"recall@{k}", f"ndcg@{k}")):
        low, high = np.quantile(means[:, column], (0.025, 0.975))
        result[name] = {
            "difference": float(difference[:, column].mean()),
            "low": float(low),
            "high": float(high),
            "not_better": float((means[:, column] <= 0).mean()),
        }
    return result


def occurring(lists: Tensor, n_items: int) -> Tensor:
    """Which items occur in the lists: [N] bool, whose mean is their share of the catalogue. lists: [S, K] int64, -1
    for none."""
    mask = torch.zeros(n_items + 1, dtype=torch.bool, device=lists.device)  # -1 marks the last
    return mask.index_fill_(0, lists.flatten() % (n_items + 1), True)[:-1]


def codebook_usage(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """Per level l (1-based): share of codes in use, and the perplexity of how often each is used. Perplexity is
    exp(entropy): V where all V codes are used equally often, 1 where all items have one code. codes: [N, L]."""
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
    """neighbours_sharing_l: of each item's k nearest by cosine, the share with its first l codes. Over `n_queries`
    items spread evenly over the catalogue. Shape: codes [N, L], x [N, D], N > 1."""
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
