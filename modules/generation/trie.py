"""The catalogue as a prefix tree over code tuples, laid out so that training and search are made of gathers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.tokenizer.semids import lexicographic_order
from ops.jagged import lengths_to_offsets
from ops.trie import best_children, child_log_probs, trie_cross_entropy


@dataclass(frozen=True)
class Trie:
    """Nodes of depth d are the distinct code prefixes of length d, numbered in lexicographic order.

    All arrays are int32, but `code` has the smallest integers that hold its codes (uint8, int16 or int32). At most
    8 + 16 L' bytes an item, 45 where 10 million items have four codes of 256.
    first_child[d]: [n_d + 1]; node n of depth d has the children first_child[d][n] to first_child[d][n+1] - 1, which
        are nodes of depth d + 1. Depth 0 has one node, the root.
    code[d]: [n_{d+1}], the last code of each node of depth d + 1.
    leaf_items: [N], the item of each leaf; leaves are the nodes of depth L'.
    item_codes: [N, L'], the codes of each item.
    item_nodes: [N, L' + 1], the nodes of depths 0 to L' on each item's path.
    fanout[d]: host integer, the largest number of children of a node of depth d.
    """

    first_child: list[Tensor]
    code: list[Tensor]
    leaf_items: Tensor
    item_codes: Tensor
    item_nodes: Tensor
    fanout: list[int]

    @property
    def n_levels(self) -> int:
        return len(self.code)

    @property
    def n_items(self) -> int:
        return self.leaf_items.shape[0]

    @staticmethod
    def build(codes: Tensor) -> "Trie":
        """codes: [N, L'] distinct rows; row n belongs to item n. ValueError names two items with equal codes."""
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
            raise ValueError(f"Items {a} and {b} share the codes {ordered[twin].tolist()}; a trie needs unique ones.")
        item_nodes = codes.new_zeros(n_items, n_levels + 1)
        nodes = codes.new_zeros(n_items)  # of depth d, for each ordered row
        first_child, code, fanout = [], [], []
        for level in range(n_levels):
            starts = opens[:, level]
            children = torch.bincount(nodes[starts])
            first_child.append(lengths_to_offsets(children).to(torch.int32))
            code.append(_narrow(ordered[starts, level]))
            fanout.append(int(children.max()))
            nodes = starts.cumsum(0, dtype=torch.int32) - 1
            item_nodes[order, level + 1] = nodes
        return Trie(first_child, code, order.to(torch.int32), codes, item_nodes, fanout)

    def to(self, device: torch.device | str) -> "Trie":
        return Trie(
            [tensor.to(device) for tensor in self.first_child],
            [tensor.to(device) for tensor in self.code],
            self.leaf_items.to(device),
            self.item_codes.to(device),
            self.item_nodes.to(device),
            self.fanout,
        )

    def child(self, depth: int, nodes: Tensor, place: Tensor) -> Tensor:
        """Child number `place` of each node of one depth, the last where there are fewer. Shape: [...] all."""
        first_child = self.first_child[depth]
        return torch.minimum(first_child[nodes] + place, first_child[nodes + 1] - 1).int()

    def log_probs(self, logits: Tensor, depth: int, nodes: Tensor) -> Tensor:
        """Distribution over the children of each node: a softmax over the codes that continue a real item.

        Shape: logits [..., V] of the codes of this level, nodes [...] of `depth` -> log-probabilities float32
        [..., fanout[depth]], -inf where a child does not exist.
        """
        return child_log_probs(logits, self.first_child[depth], self.code[depth], nodes, self.fanout[depth])

    def best_children(
        self, logits: Tensor, scores: Tensor, depth: int, nodes: Tensor, count: int, left_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step of beam search from `depth` to depth + 1; see `ops.trie.best_children`.

        Shape: logits [B, K, V], scores, nodes [B, K], left_out [B, K, fanout[depth]]
        -> scores, parents, nodes [B, count].
        """
        level = self.first_child[depth], self.code[depth]
        return best_children(logits, scores, *level, nodes, self.fanout[depth], count, left_out)

    def cross_entropy(self, logits: Tensor, depth: int, nodes: Tensor, targets: Tensor) -> Tensor:
        """-log of the probability, as in `log_probs`, of one child of each node.

        Shape: logits [P, V] of the codes of this level, nodes [P] of `depth`, targets [P] of depth + 1 -> [P], float32
        or wider.
        """
        level = self.first_child[depth], self.code[depth]
        return trie_cross_entropy(logits, *level, nodes, targets, self.fanout[depth])


def _narrow(codes: Tensor) -> Tensor:
    """The codes as the smallest integers that hold them: searching reads them by the million."""
    largest = int(codes.max())
    return codes.to(torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32)
