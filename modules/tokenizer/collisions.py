"""Giving items that share all their codes different last codes, as near to their own as possible."""

import torch
from torch import Tensor

from modules.tree import lexicographic_order


def number_groups(codes: Tensor) -> Tensor:
    """Numbers the distinct rows in lexicographic order. Shape: codes [N, L] -> [N] int64."""
    order = lexicographic_order(codes)
    ordered = codes[order]
    opens = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    opens[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return torch.empty_like(order).index_copy(0, order, opens.cumsum(0))


def colliding_items(codes: Tensor, distance: Tensor) -> Tensor:
    """Items other than the nearest of those with the same codes, the nearer first, equal ones in their own order.
    Shape: codes [N, L], distance [N] to the own last code -> [M] int64."""
    by_distance = distance.argsort(stable=True)
    rank = torch.empty_like(by_distance).index_copy(0, by_distance, torch.arange(len(codes), device=codes.device))
    order = lexicographic_order(torch.cat([codes, rank[:, None]], 1))
    ordered = codes[order]
    later = order[1:][(ordered[1:] == ordered[:-1]).all(1)]
    return later[rank[later].argsort()]


def resolve_collisions(codes: Tensor, items: Tensor, candidates: Tensor, codebook_size: int) -> Tensor:
    """Moves each of `items` to the first of its candidates that no item with the same prefix has.

    Round k offers every item that is still waiting its k-th candidate; of several that want one, the first in `items`
    gets it. Items that find none keep their codes. Everything is a sort or a gather, on the device of the arguments.

    Shape: codes [N, L], items [M], candidates [M, K] last codes, best first -> codes [N, L].
    """
    codes = codes.clone()
    slot = number_groups(codes[:, :-1]) * codebook_size if codes.shape[1] > 1 else torch.zeros_like(codes[:, 0])
    taken = (slot + codes[:, -1]).unique()
    for k in range(candidates.shape[1]):
        if len(items) == 0:
            break
        wanted = slot[items] + candidates[:, k]
        order = wanted.argsort(stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = wanted[order[1:]] != wanted[order[:-1]]
        place = torch.searchsorted(taken, wanted).clamp_max(len(taken) - 1)
        wins = torch.zeros_like(first).index_copy(0, order, first) & (taken[place] != wanted)
        codes[items[wins], -1] = candidates[wins, k].long()
        taken = torch.cat([taken, wanted[wins]]).sort().values
        items, candidates = items[~wins], candidates[~wins]
    return codes
