"""The catalogue as a prefix tree over semantic IDs, laid out so that training and search are ranges and gathers."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ops.jagged import lengths_to_offsets

MOST = 0.95  # share of the items


@dataclass(frozen=True)
class Tree:
    """Nodes of depth d are the distinct code prefixes of length d, numbered in lexicographic order.

    Depth 0 has one node, the root; the nodes of depth L', the leaves, are the items. A list's entry d is about the
    nodes of depth d, or where it says so those of depth d + 1. All arrays are int32.
    first_child[d]: [n_d + 1]; node n has the children first_child[d][n] to first_child[d][n+1] - 1, of depth d + 1.
    parent[d]: [n_{d+1}], the node of depth d above each node of depth d + 1.
    code[d]: [n_{d+1}], the last code of each node of depth d + 1.
    first_leaf[d]: [n_d + 1]; below node n lie the leaves first_leaf[d][n] to first_leaf[d][n+1] - 1.
    leaf_items: [N], the item of each leaf.
    item_nodes: [N, L' + 1], the nodes of depths 0 to L' on each item's path.
    fanout[d], level_sizes[d]: host integers, the most children of a node of depth d, and how many codes its level has.
    """

    first_child: list[Tensor]
    parent: list[Tensor]
    code: list[Tensor]
    first_leaf: list[Tensor]
    leaf_items: Tensor
    item_nodes: Tensor
    fanout: list[int]
    level_sizes: tuple[int, ...]

    @property
    def n_levels(self) -> int:
        return len(self.code)

    @property
    def n_items(self) -> int:
        return self.leaf_items.shape[0]

    @property
    def n_nodes(self) -> list[int]:
        """Nodes of depths 1 to L'."""
        return [len(code) for code in self.code]

    @staticmethod
    def build(codes: Tensor, level_sizes: tuple[int, ...] | None = None) -> "Tree":
        """codes: [N, L'] distinct rows; row n belongs to item n. level_sizes: codes of each level; None: those in use.
        ValueError names two items with equal codes."""
        codes = codes.to(torch.int32)
        n_items, n_levels = codes.shape
        order = lexicographic_order(codes)
        ordered = codes[order]
        opens = torch.ones_like(ordered, dtype=torch.bool)  # row starts a new prefix of length d + 1
        opens[1:] = ordered[1:] != ordered[:-1]
        for level in range(1, n_levels):
            opens[:, level] |= opens[:, level - 1]
        if not bool(opens[:, -1].all()):
            twin = int((~opens[:, -1]).nonzero()[0])
            a, b = sorted((int(order[twin - 1]), int(order[twin])))
            raise ValueError(f"Items {a} and {b} share the codes {ordered[twin].tolist()}; a tree needs unique ones.")
        item_nodes = codes.new_zeros(n_items, n_levels + 1)
        nodes = codes.new_zeros(n_items)  # of depth d, for each ordered row
        first_child, parent, code, first_leaf, fanout = [], [], [], [], []
        for level in range(n_levels):
            starts = opens[:, level]
            parent.append(nodes[starts])
            children = torch.bincount(parent[-1])
            first_child.append(lengths_to_offsets(children).to(torch.int32))
            first_leaf.append(lengths_to_offsets(torch.bincount(nodes)).to(torch.int32))
            code.append(ordered[starts, level])
            fanout.append(int(children.max()))
            nodes = starts.cumsum(0, dtype=torch.int32) - 1
            item_nodes[order, level + 1] = nodes
        first_leaf.append(torch.arange(n_items + 1, dtype=torch.int32, device=codes.device))
        sizes = tuple(int(level.max()) + 1 for level in code) if level_sizes is None else tuple(level_sizes)
        return Tree(first_child, parent, code, first_leaf, order.to(torch.int32), item_nodes, fanout, sizes)

    def to(self, device: torch.device | str) -> "Tree":
        lists = (self.first_child, self.parent, self.code, self.first_leaf)
        first_child, parent, code, first_leaf = ([tensor.to(device) for tensor in each] for each in lists)
        rest = self.leaf_items.to(device), self.item_nodes.to(device), self.fanout, self.level_sizes
        return Tree(first_child, parent, code, first_leaf, *rest)

    @cached_property
    def siblings(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each depth d the m nodes of depth d + 1 that are not only children, whose parents are k: nodes [m],
        ascending; offsets [k + 1] of each parent's; which of the k is the parent of each, [m]. All int64."""
        found = []
        for first, parent in zip(self.first_child, self.parent, strict=True):
            children = first.diff()
            several = children > 1
            nodes = several[parent].nonzero()[:, 0]
            offsets = lengths_to_offsets(children[several].long())
            found.append((nodes, offsets, (several.cumsum(0) - 1)[parent[nodes]]))
        return found

    @cached_property
    def usual_fanout(self) -> list[int]:
        """Of each depth how many children the nodes above most items have at most; host integers, as `fanout`."""
        counts = (first.diff()[self.item_nodes[:, depth]] for depth, first in enumerate(self.first_child))
        return [int(count.kthvalue(math.ceil(MOST * self.n_items)).values) for count in counts]

    @property
    def digest(self) -> str:
        """16 hex digits that identify the tree and which leaf each item is."""
        digest = hashlib.sha256()
        for tensor in (*self.code, self.item_nodes):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def nodes_of(self, other: "Tree") -> list[Tensor]:
        """Of each depth 1 to L', this tree's node with the same prefix as each node of another tree with as many
        levels, -1 where there is none: [n_d of the other] int64."""
        found, above = [], torch.zeros(1, dtype=torch.int64, device=self.leaf_items.device)
        for level in range(self.n_levels):
            size = 1 + int(torch.maximum(self.code[level].max(), other.code[level].max()))
            own = self.parent[level].long() * size + self.code[level]  # ascending
            parents = above[other.parent[level].long()]
            wanted = torch.where(parents < 0, -1, parents * size + other.code[level])
            place = torch.searchsorted(own, wanted).clamp_max(len(own) - 1)
            above = torch.where(own[place] == wanted, place, -1)
            found.append(above)
        return found

    def node_means(self, depth: int, values: Tensor) -> Tensor:
        """Mean over the items below each node of a depth. Shape: values [N, D] -> [n_depth, D], float32 or wider."""
        offsets = self.first_leaf[depth].long()
        ordered = values[self.leaf_items.long()].to(torch.promote_types(values.dtype, torch.float32))
        return torch.segment_reduce(ordered, "mean", offsets=offsets)


def lexicographic_order(codes: Tensor) -> Tensor:
    """Row numbers in the order of the rows, equal rows in their own order: one stable sort if a row fits in 63 bits,
    else one per level.

    Shape: codes [N, L] non-negative integers -> [N] int64.
    """
    sizes = (codes.amax(0) + 1).tolist() if len(codes) else []
    if math.prod(sizes) < 2**63:
        key = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        for level, size in enumerate(sizes):
            key = key * size + codes[:, level]
        return key.argsort(stable=True)
    order = torch.arange(len(codes), device=codes.device)
    for level in reversed(range(codes.shape[1])):  # from the last key to the first
        order = order[codes[order, level].argsort(stable=True)]
    return order
