"""What recommendations leave out, for all users and for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from modules.generation.beam_search import LeftOut
from modules.serving.lookup import Keys, Lookup
from modules.tree import Tree
from ops.jagged import JaggedTensor, lengths_to_offsets, row_indices

Given = Keys | Sequence[Keys] | None


@dataclass(frozen=True)
class Filters:
    """rows: of B users the items not to be given, or where `only` the only ones. for_all: [N] bool, the items no user
    is to be given, or None. On the CPU."""

    rows: JaggedTensor
    for_all: Tensor | None
    only: bool

    @staticmethod
    def of(lookup: Lookup, users: int, consumed: JaggedTensor | None, allow: Given, block: Given) -> "Filters":
        """consumed: rows of items that count as blocked; allow, block: as of `Recommender.rank`, for B users."""
        n_items, each, for_all = len(lookup.keys), {}, None
        for name, given in (("allow", allow), ("block", block)):
            if isinstance(given, (list, tuple)) and any(isinstance(k, (set, frozenset, list, tuple)) for k in given):
                if len(given) != users:
                    raise ValueError(f"{name} has {len(given)} collections of keys for {users} histories.")
                each[name] = lookup.rows(given)[0]
            elif given is not None:
                meant = lookup.mask(cast(Keys, given))
                gone = meant if name == "block" else ~meant
                for_all = gone if for_all is None else for_all | gone
        if not each and consumed is not None:
            return Filters(consumed, for_all, False)
        gone = [_pairs(rows, n_items) for rows in (consumed, each.get("block")) if rows is not None]
        pairs = torch.cat([torch.empty(0, dtype=torch.int64), *gone])
        if "allow" in each:
            allowed = _pairs(each["allow"], n_items)
            pairs = allowed[~torch.isin(allowed, pairs)]
        pairs = pairs.sort().values
        offsets = torch.searchsorted(pairs, torch.arange(users + 1) * n_items)
        return Filters(JaggedTensor(pairs % n_items, offsets, len(pairs)), for_all, "allow" in each)

    def left_out(self, users: Tensor, tree: Tree) -> LeftOut | None:
        """For some of the users, on the tree's device."""
        rows, device = chosen(self.rows, users), tree.leaf_items.device
        if not self.only and self.for_all is None and len(rows.values) == 0:
            return None
        for_all = self.for_all.to(device) if self.for_all is not None else None
        return LeftOut.of(rows.to(device), tree, for_all, self.only)


def _pairs(rows: JaggedTensor, n_items: int) -> Tensor:
    """[T]: row * N + item."""
    return row_indices(rows.offsets, len(rows.values)) * n_items + rows.values


def chosen(rows: JaggedTensor, users: Tensor | slice = slice(None), most: int | None = None) -> JaggedTensor:
    """The rows of some users, of each the last `most` values; on the CPU."""
    ends, lengths = rows.offsets[1:][users], rows.lengths[users]
    lengths = lengths if most is None else lengths.clamp_max(most)
    offsets = lengths_to_offsets(lengths)
    places = torch.arange(int(offsets[-1])) + (ends - offsets[1:]).repeat_interleave(lengths)
    return JaggedTensor(rows.values[places], offsets, int(lengths.max()))
