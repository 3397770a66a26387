"""Candidates of the next item: the best paths down the tree, or the whole catalogue."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.schemas import RankedItems
from data.utils import is_consumed
from modules.model import Encoded, EncoderDecoderRetrievalModel, Vectors
from modules.transformer.model import Past
from modules.tree import Tree
from ops.jagged import JaggedTensor, row_indices
from ops.precision import matmul_precision
from ops.tree import best_children


@dataclass(frozen=True)
class Candidates:
    """C items of each of B users, in any order.

    items: [B, C] int64, -1 where a user has fewer. tree: [B, C] float32, their log-probabilities down the tree; head:
    [B, C], the item head's logits, which differ from log-probabilities by one number a user. None: no such head.
    """

    items: Tensor
    tree: Tensor | None
    head: Tensor | None

    def scores(self, share: float | Tensor) -> Tensor:
        """[B, C]: the item head's share of both; -inf where there is no item."""
        if self.head is None or self.tree is None:
            scores = self.tree if self.head is None else self.head
        else:
            scores = torch.lerp(self.tree, self.head, share)
        return scores.masked_fill(self.items < 0, float("-inf"))

    def best(self, share: float | Tensor, k: int) -> RankedItems:
        """The k best of each user, of equal ones the first. k: at most C."""
        scores, order = self.scores(share).sort(dim=1, descending=True, stable=True)
        return RankedItems(self.items.gather(1, order[:, :k]), scores[:, :k])


@dataclass(frozen=True)
class LeftOut:
    """Items that users are not to be given, as leaves of the tree.

    keys: [C] int64 ascending, user * N + leaf, each once; what was there twice is B * N, at the end.
    """

    keys: Tensor
    n_leaves: int

    @staticmethod
    def of(items: JaggedTensor, tree: Tree) -> "LeftOut":
        """items: rows of item ids, values [C]."""
        users = row_indices(items.offsets, len(items.values))
        keys = (users * tree.n_items + tree.item_nodes[items.values, -1]).sort().values
        again = torch.zeros_like(keys, dtype=torch.bool)
        again[1:] = keys[1:] == keys[:-1]
        return LeftOut(keys.masked_fill(again, items.batch_size * tree.n_items).sort().values, tree.n_items)

    def covers(self, first_leaf: Tensor, nodes: Tensor) -> Tensor:
        """Whether all leaves below a node are left out. Shape: first_leaf [n+1], nodes [B, M] of users -> [B, M]."""
        start = torch.arange(len(nodes), device=nodes.device)[:, None] * self.n_leaves
        first, last = first_leaf[nodes], first_leaf[nodes + 1]
        inside = torch.searchsorted(self.keys, start + last) - torch.searchsorted(self.keys, start + first)
        return inside == last - first


@torch.no_grad()
def beam_search(
    model: EncoderDecoderRetrievalModel,
    history: JaggedTensor,
    vectors: Vectors,
    beams: int,
    consumed: JaggedTensor | None = None,
    new: bool = False,
) -> Candidates:
    """The `beams` items of every user with the highest probability down the tree, best first.

    consumed: rows of all items that the users have consumed, for the item head. new: none of them is a candidate. A
    node whose items are all left out is never entered, so K items come whenever K are left. Exact where no level has
    more nodes than beams. The model should be in evaluation mode. Shape: B histories -> C = min(beams, N).
    """
    tree, encoded = model.tree, model.encode(history, vectors)
    users, device = history.batch_size, history.values.device
    out = LeftOut.of(consumed, tree) if new else None
    nodes = torch.zeros(users, 1, dtype=torch.int32, device=device)
    scores, past = torch.zeros(users, 1, device=device), None
    for depth, fanout in enumerate(tree.fanout):
        query, tokens = model.next_query(encoded, depth, nodes, vectors, past)
        first_child, dead = tree.first_child[depth], None
        if out is not None:
            child = first_child[nodes][..., None] + torch.arange(fanout, dtype=torch.int32, device=device)
            child = child.clamp_max(tree.n_nodes[depth] - 1)  # of nodes with fewer children
            dead = out.covers(tree.first_leaf[depth + 1], child.flatten(1)).view_as(child)
        count = min(beams, nodes.shape[1] * fanout, tree.n_nodes[depth])
        scores, parents, nodes = best_children(
            query, scores, vectors.nodes[depth], first_child, nodes, fanout, count, dead
        )
        if tokens and depth < tree.n_levels - 1:
            rows = (parents + torch.arange(users, device=device)[:, None] * query.shape[1]).flatten()
            past = Past.extend(past, tokens, rows)
    items = tree.leaf_items[nodes].long()
    head = None
    if "items" in model.heads:
        head = (encoded.state[:, None].to(scores.dtype) * vectors.items[items]).sum(-1, dtype=scores.dtype)
        if consumed is not None and not new:
            head = head + model.seen_bias * is_consumed(items, consumed)
    return Candidates(items.masked_fill(scores == float("-inf"), -1), scores, head)


@torch.no_grad()
def whole_catalogue(
    model: EncoderDecoderRetrievalModel,
    history: JaggedTensor,
    vectors: Vectors,
    consumed: JaggedTensor | None = None,
    new: bool = False,
) -> Candidates:
    """All N items of every user with their exact scores, in the order of their ids.

    consumed: as of `beam_search`. new: they become -1.
    ValueError with a decoder, whose queries depend on the path: its whole catalogue is a beam search with N beams.
    """
    if model.decoder is not None:
        raise ValueError("train.exact ranks models without a decoder (decoder_layers = 0): set train.exact = False.")
    tree, encoded, users = model.tree, model.encode(history, vectors), history.batch_size
    items = torch.arange(tree.n_items, device=history.values.device).expand(users, -1)
    by_leaf = tree_log_probs(model, encoded, vectors) if "tree" in model.heads else None
    head = products(encoded.state, vectors.items) if "items" in model.heads else None
    if consumed is not None:
        place = row_indices(consumed.offsets, len(consumed.values)), consumed.values  # some of them twice
        if head is not None:
            head = head.index_put(place, head[place] + model.seen_bias.to(head.dtype))
        if new:
            items = items.index_put(place, torch.full((), -1, device=items.device))
    return Candidates(items, by_leaf[:, tree.item_nodes[:, -1]] if by_leaf is not None else None, head)


def tree_log_probs(model: EncoderDecoderRetrievalModel, encoded: Encoded, vectors: Vectors) -> Tensor:
    """log p of every leaf down the tree, in float32 or wider: [B, N]."""
    total = None
    for depth, (query, rows) in enumerate(zip(model.queries, vectors.nodes, strict=True)):
        offsets, parent = model.tree.first_child[depth].long(), model.tree.parent[depth].long()
        logits = products(query(encoded.state), rows).T.contiguous()  # [n, B]
        highest = torch.segment_reduce(logits, "max", offsets=offsets)
        shifted = logits - highest[parent]
        normalizer = torch.segment_reduce(shifted.exp(), "sum", offsets=offsets).log()
        log_probs = shifted - normalizer[parent]
        total = log_probs if total is None else total[parent] + log_probs
    return total.T


def products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T in float32 or wider, also under autocast: rounded to half precision, many scores would be equal.

    Products of half-precision numbers are exact in TF32. Shape: [B, dim], [n, dim] -> [B, n].
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    precision = torch.get_float32_matmul_precision() if y.dtype == wide else "high"
    with torch.autocast(x.device.type, enabled=False), matmul_precision(precision):
        return x.to(y.dtype).to(wide) @ y.to(wide).T
