"""Candidates of the next item: the best paths down the tree, or the whole catalogue."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.schemas import RankedItems
from modules.embedding import Vectors
from modules.model import Encoded, EncoderDecoderRetrievalModel
from modules.transformer.model import KVCache
from modules.tree import Tree
from ops.jagged import JaggedTensor, row_indices
from ops.precision import matmul_precision
from ops.tree import best_children, best_places


@dataclass(frozen=True)
class Candidates:
    """C items of each of B users, in any order. items: [B, C] int64, -1 where a user has fewer. tree: [B, C] float32,
    their log-probabilities down the tree; head: [B, C], the item head's logits, which differ from log-probabilities by
    one number per user. None: no such head."""

    items: Tensor
    tree: Tensor | None
    head: Tensor | None

    def fused(self, share: float | Tensor) -> Tensor:
        """[B, C]: the item head's share of both."""
        if self.head is None or self.tree is None:
            [only] = [scores for scores in (self.head, self.tree) if scores is not None]
            return only
        return torch.lerp(self.tree, self.head, share)

    def scores(self, share: float | Tensor) -> Tensor:
        """`fused`, -inf where there is no item."""
        return self.fused(share).masked_fill(self.items < 0, float("-inf"))

    def best(self, share: float | Tensor, k: int) -> RankedItems:
        """The k best of each user, of equal ones the first. k: at most C."""
        scores = self.scores(share).float()
        places = best_places(scores, k)
        return RankedItems(self.items.gather(1, places), scores.gather(1, places))


@dataclass(frozen=True)
class LeftOut:
    """Items that users are not to be given, as leaves of the tree.

    keys: [C] int64 ascending, user * N + leaf, each once; what does not count is B * N, at the end.
    n_leaves: N. before: [N + 1] int32, how many of the leaves before each are left out for all users; None: none.
    only: the keys are what each user may be given instead, and nothing else.
    """

    keys: Tensor
    n_leaves: int
    before: Tensor | None = None
    only: bool = False

    @staticmethod
    def of(items: JaggedTensor, tree: Tree, for_all: Tensor | None = None, only: bool = False) -> "LeftOut":
        """items: rows of item ids, values [C], of each user; `only`: what the user may be given. for_all: [N] bool, of
        each item whether no user is to be given it."""
        leaves = tree.item_nodes[items.values, -1]
        keys = row_indices(items.offsets, len(leaves)) * tree.n_items + leaves
        nothing, before = items.batch_size * tree.n_items, None
        if for_all is not None:
            before = F.pad(for_all[tree.leaf_items].cumsum(0, dtype=torch.int32), (1, 0))
            keys = keys.masked_fill(for_all[items.values], nothing)
        keys = keys.sort().values
        again = torch.zeros_like(keys, dtype=torch.bool)
        again[1:] = keys[1:] == keys[:-1]
        return LeftOut(keys.masked_fill(again, nothing).sort().values, tree.n_items, before, only)

    def covers(self, first_leaf: Tensor, nodes: Tensor) -> Tensor:
        """Whether all leaves below a node are left out. Shape: first_leaf [n+1], nodes [B, M] of users -> [B, M]."""
        start = torch.arange(len(nodes), device=nodes.device)[:, None] * self.n_leaves
        first, last = first_leaf[nodes], first_leaf[nodes + 1]
        inside = torch.searchsorted(self.keys, start + last) - torch.searchsorted(self.keys, start + first)
        if self.only:
            return inside == 0
        if self.before is not None:
            inside = inside + self.before[last] - self.before[first]
        return inside == last - first

    def leaves(self, users: int) -> Tensor:
        """Whether each leaf is left out: [B, N] bool."""
        marks = torch.zeros(users * self.n_leaves + 1, dtype=torch.bool, device=self.keys.device)
        marks = marks.index_fill(0, self.keys, True)[:-1].view(users, self.n_leaves)
        if self.only:
            return ~marks
        return marks if self.before is None else marks | self.before.diff().bool()


@torch.no_grad()
def beam_search(
    model: EncoderDecoderRetrievalModel,
    encoded: Encoded,
    vectors: Vectors,
    beams: int,
    consumed: JaggedTensor | None = None,
    new: bool = False,
    left_out: LeftOut | None = None,
) -> Candidates:
    """The `beams` items of every user with the highest probability down the tree, best first.

    encoded: histories, by `encode` of the model in evaluation mode. consumed: rows of all items that the users have
    consumed, for the item head. left_out: what is no candidate; new stands for the consumed items. A node whose items
    are all left out is never entered, so K items come whenever K are left. Exact where no level has more nodes than
    beams. Shape: B histories -> C = min(beams, N).
    """
    tree, users, device = model.tree, len(encoded.state), encoded.state.device
    out = LeftOut.of(consumed, tree) if new and consumed is not None else left_out
    nodes = torch.zeros(users, 1, dtype=torch.int32, device=device)
    scores, cache = torch.zeros(users, 1, device=device), None
    for depth, fanout in enumerate(tree.fanout):
        query, tokens = model.next_query(encoded, depth, nodes, vectors, cache)
        first_child, dead = tree.first_child[depth], None
        if out is not None:
            child = first_child[nodes][..., None] + torch.arange(fanout, dtype=torch.int32, device=device)
            child = child.clamp_max(tree.n_nodes[depth] - 1)  # of nodes with fewer children
            dead = out.covers(tree.first_leaf[depth + 1], child.flatten(1)).view_as(child)
        count = min(beams, nodes.shape[1] * fanout, tree.n_nodes[depth])
        scores, parents, nodes = best_children(
            query, scores, vectors.made_nodes[depth], first_child, nodes, fanout, count, dead
        )
        if tokens and depth < tree.n_levels - 1:
            chosen = (parents + torch.arange(users, device=device)[:, None] * query.shape[1]).flatten()
            cache = KVCache.extend(cache, tokens, chosen)
    items = tree.leaf_items[nodes].long()
    head = None
    if "items" in model.heads and vectors.items is not None:
        head = (encoded.state[:, None].to(scores.dtype) * vectors.items[items]).sum(-1, dtype=scores.dtype)
        if consumed is not None and not new:
            seen = LeftOut.of(consumed, tree).covers(tree.first_leaf[-1], nodes)
            head = head + model.seen_bias * seen
    return Candidates(items.masked_fill(scores == float("-inf"), -1), scores, head)


@torch.no_grad()
def whole_catalogue(
    model: EncoderDecoderRetrievalModel,
    encoded: Encoded,
    vectors: Vectors,
    consumed: JaggedTensor | None = None,
    new: bool = False,
    left_out: LeftOut | None = None,
) -> Candidates:
    """All N items of every user with their exact scores, in the order of their ids. encoded, consumed, new, left_out:
    as of `beam_search`; what is no candidate is -1. ValueError with a decoder, whose queries depend on the path: its
    whole catalogue is a beam search with N beams."""
    if model.decoder is not None:
        raise ValueError("With a decoder (decoder_layers > 0) the whole catalogue is a search with N beams.")
    tree, users, leaf = model.tree, len(encoded.state), model.tree.item_nodes[:, -1]
    items = torch.arange(tree.n_items, device=leaf.device).expand(users, -1)
    by_leaf = tree_log_probs(model, encoded, vectors) if "tree" in model.heads else None
    head = head_logits(model, encoded, vectors, consumed) if "items" in model.heads else None
    out = LeftOut.of(consumed, tree) if new and consumed is not None else left_out
    if out is not None:
        items = items.masked_fill(out.leaves(users)[:, leaf], -1)
    return Candidates(items, by_leaf[:, leaf] if by_leaf is not None else None, head)


def head_logits(
    model: EncoderDecoderRetrievalModel, encoded: Encoded, vectors: Vectors, consumed: JaggedTensor | None
) -> Tensor:
    """The item head's logits of all items, in float32 or wider: [B, N]."""
    assert vectors.items is not None  # there is an item head
    head = products(encoded.state, vectors.items)
    if consumed is None:
        return head
    place = row_indices(consumed.offsets, len(consumed.values)), consumed.values
    return _add_to_seen(head, place, model.seen_bias)


def head_normalizer(
    model: EncoderDecoderRetrievalModel, encoded: Encoded, vectors: Vectors, consumed: JaggedTensor, size: int
) -> Tensor:
    """The logarithm of the sum of exp(`head_logits`), [B, 1], of which `size` items' exist at a time. It waits for the
    device."""
    assert vectors.items is not None  # there is an item head
    rows, parts = row_indices(consumed.offsets, len(consumed.values)), []
    for start in range(0, len(vectors.items), size):
        head, items = products(encoded.state, vectors.items[start : start + size]), consumed.values - start
        here = (items >= 0) & (items < head.shape[1])
        parts.append(_add_to_seen(head, (rows[here], items[here]), model.seen_bias).logsumexp(1))
    return torch.stack(parts, 1).logsumexp(1, keepdim=True)


def _add_to_seen(head: Tensor, place: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
    """place: rows and columns of logits, some of them twice."""
    return head.index_put_(place, head[place] + bias.to(head.dtype))


def tree_log_probs(model: EncoderDecoderRetrievalModel, encoded: Encoded, vectors: Vectors) -> Tensor:
    """log p of every leaf down the tree, in float32 or wider: [B, N]. That of an only child is its parent's."""
    total = None  # [n, B] of a depth
    for depth, (query, made) in enumerate(zip(model.queries, vectors.made_nodes, strict=True)):
        nodes, offsets, parent = model.tree.siblings[depth]
        state, rows = query(encoded.state), vectors.siblings[depth] if vectors.siblings else made[nodes]
        logits = products(state, rows).T.contiguous()  # [m, B]
        above = logits.new_zeros(1, logits.shape[1]) if total is None else total
        total = above[model.tree.parent[depth].long()]
        if len(nodes):
            highest = torch.segment_reduce(logits, "max", offsets=offsets)
            shifted = logits - highest[parent]
            normalizer = torch.segment_reduce(shifted.exp(), "sum", offsets=offsets).log()
            total.index_add_(0, nodes, shifted - normalizer[parent])
    assert total is not None
    return total.T


def products(x: Tensor, y: Tensor) -> Tensor:
    """x @ y.T in float32 or wider, also under autocast: rounded to half precision, many scores would be equal. Products
    of half-precision numbers are exact in TF32. Shape: [B, dim], [n, dim] -> [B, n]."""
    wide = torch.promote_types(y.dtype, torch.float32)
    precision = torch.get_float32_matmul_precision() if y.dtype == wide else "high"
    with torch.autocast(x.device.type, enabled=False), matmul_precision(precision):
        return x.to(y.dtype).to(wide) @ y.to(wide).T
