"""Operations on one depth of the catalogue's tree, in which every node has a vector; the choice of kernel or twin is
made here.

Node n of a depth has the children first_child[n] to first_child[n+1] - 1, which are nodes of the next depth: rows of
vectors. The logit of a child is the product of a query with its vector, and its probability is the softmax over its
siblings and itself. Under autocast queries and vectors are cast as a linear layer casts its input and weight.
"""

import warnings

import torch
from torch import Tensor

from ops.dispatch import has_kernel
from ops.jagged import lengths_to_offsets


def tree_cross_entropy(
    query: Tensor, vectors: Tensor, first_child: Tensor, parents: Tensor, targets: Tensor, fanout: int,
    smoothing: float = 0.0, order: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy between the softmax over a parent's children and its target child, with label smoothing.

    x[p, c] = query[p] . vectors[c]
    loss[p] = log(sum_c exp(x[p, c])) - (1 - smoothing) x[p, targets[p]] - smoothing mean_c x[p, c],   c children

    It and its gradient are exactly 0 where the target is the only child. Gradients are summed in a fixed order.

    Shape: query [P, d], vectors [n, d] of one dtype, first_child [m+1] int32, parents and targets [P], integers,
    targets[p] a child of parents[p] -> [P] in float32, or wider where the query is. fanout: host integer, the largest
    number of children of a node. order: [P] int64, the targets in ascending order of their parents; None: found here.
    """
    query, vectors = _cast(query, vectors)
    if has_kernel(query.device, query.dtype):
        from ops.triton.tree import tree_cross_entropy as kernel

        order = parents.argsort(stable=True) if order is None else order
        return kernel(query, vectors, first_child, parents, targets, order, smoothing)[0]
    logits = _child_logits(query, vectors, first_child, parents, fanout)  # [P, fanout]
    first, end = first_child[parents], first_child[parents + 1]
    own = logits.gather(1, (targets - first).long()[:, None])[:, 0]
    losses = logits.logsumexp(1) - (1 - smoothing) * own
    if smoothing:
        losses = losses - smoothing * logits.masked_fill(logits.isneginf(), 0.0).sum(1) / (end - first)
    return losses.where(end - first > 1, 0.0)


def child_log_probs(query: Tensor, vectors: Tensor, first_child: Tensor, nodes: Tensor, fanout: int) -> Tensor:
    """Log-probabilities of the children of each node. No gradient.

    Shape: query [B, K, d], or [B, 1, d] where all nodes of a user share it, vectors [n, d] of its dtype, first_child
    [m+1] int32, nodes [B, K] integers -> [B, K, fanout] in float32, or wider where the query is; -inf where a node has
    fewer children. fanout: host integer, the largest number of children of a node.
    """
    query, vectors = _cast(query, vectors)
    if has_kernel(query.device, query.dtype):
        from ops.triton.tree_search import child_logits

        return child_logits(query, vectors, first_child, nodes, fanout).log_softmax(-1)
    rows = query.expand(*nodes.shape, -1).flatten(0, 1)
    logits = _child_logits(rows, vectors, first_child, nodes.flatten(), fanout)
    return logits.unflatten(0, nodes.shape).log_softmax(-1)


def best_children(
    query: Tensor, scores: Tensor, vectors: Tensor, first_child: Tensor, nodes: Tensor, fanout: int, count: int,
    dead: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The children of a user's nodes with the highest scores, best first: one step of beam search. No gradient.

    A child's score is that of its node plus its log-probability, as in `child_log_probs`. Of equal ones the first are
    chosen, by the place of the node among the K, then by the child's.

    Shape: query, vectors, first_child, nodes and fanout as in `child_log_probs`, scores [B, K], dead [B, K, fanout]
    bool, children not to choose -> scores [B, count] float32, parents [B, count] int64, places of the nodes among the
    K, and children [B, count] int32. Where too few children exist or are not dead, the rest has the score -inf.
    ValueError where count is not from 1 to K * fanout.
    """
    if not 1 <= count <= nodes.shape[1] * fanout:
        raise ValueError(f"best_children with count = {count} takes 1 to {nodes.shape[1]} x {fanout}, nodes x fanout.")
    if has_kernel(query.device, query.dtype):
        from ops.triton import tree_search

        if tree_search.chooses(nodes.shape[1], fanout, count):
            logits = tree_search.child_logits(*_cast(query, vectors), first_child, nodes, fanout)
            return tree_search.choose_children(logits, scores, first_child, nodes, count, dead)
    total = scores[..., None] + child_log_probs(query, vectors, first_child, nodes, fanout)
    total = total.float() if dead is None else total.float().masked_fill(dead, float("-inf"))
    places = best_places(total.flatten(1), count)
    parents = places // fanout
    chosen = nodes.gather(1, parents)
    children = torch.minimum(first_child[chosen] + places % fanout, first_child[chosen + 1] - 1)
    return total.flatten(1).gather(1, places), parents, children.int()


def best_places(scores: Tensor, count: int) -> Tensor:
    """Where the highest scores of each row are, best first, of equal ones the first: float32 [B, M] -> [B, count]."""
    # Keys of 64 bits, all different: above an integer that orders as the score does, below minus the place.
    bits = scores.contiguous().view(torch.int32).long()
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32
    return -(keys - torch.arange(keys.shape[1], device=keys.device)).topk(count).values & 0xFFFFFFFF


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast casts the arguments of a linear layer."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _child_logits(query: Tensor, vectors: Tensor, first_child: Tensor, nodes: Tensor, fanout: int) -> Tensor:
    """query [P, d], nodes [P] -> [P, fanout], -inf where there is no child; in float32 or wider, as all products."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return _ChildLogits.apply(query.to(dtype), vectors.to(dtype), first_child, nodes, fanout)


class _ChildLogits(torch.autograd.Function):
    """A product of matrices of which only some numbers are wanted, one for each pair of a query and a child. With the
    pairs as a sparse matrix [P, n] no vector is copied."""

    @staticmethod
    def forward(ctx, query: Tensor, vectors: Tensor, first_child: Tensor, nodes: Tensor, fanout: int) -> Tensor:
        first, counts = first_child[nodes].long(), first_child[nodes + 1] - first_child[nodes]
        place = torch.arange(fanout, device=nodes.device)
        exists = place < counts[:, None]  # [P, fanout]
        ctx.pairs = lengths_to_offsets(counts), (first[:, None] + place)[exists], (len(query), len(vectors))
        ctx.save_for_backward(query, vectors, exists)
        none = query.new_zeros(len(ctx.pairs[1]))
        logits = torch.sparse.sampled_addmm(_sparse(none, *ctx.pairs), query, vectors.T).values()
        return query.new_full(exists.shape, float("-inf")).masked_scatter(exists, logits)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, vectors, exists = ctx.saved_tensors
        weights = _sparse(grad[exists], *ctx.pairs)
        return weights @ vectors, weights.t() @ query, None, None, None


def _sparse(values: Tensor, offsets: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # that sparse tensors may still change
        return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)
