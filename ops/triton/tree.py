"""Cross-entropy over the children of a tree's nodes, whose logits are products of a query with their vectors.

The targets are sorted by parent. Forward, a program takes some of them, whose siblings lie together: it reads their
vectors once for the normalizers and once more for the gradients of the queries. Backward, a program owns a block of
children: the targets whose parents have children in it lie together, and what they add is summed in that order. All
are matrix products, those of float32 made of three in TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16384  # numbers of vectors, or backward of queries, that a program reads at a time
TARGETS = 16  # of a program of the forward pass
CHILDREN = 16  # of a program of the backward pass


@triton.jit
def _next_sibling(first, last, child, end):
    """The first child from `child` on that is below one of the parents, whose children are first[p] to last[p] - 1;
    `end` if there is none."""
    return tl.min(tl.where(last > child, tl.maximum(first, child), end), 0)


@triton.jit
def _forward(
    query, vectors, first_child, parents, targets, order, losses, normalizers, pulls,
    P, parent_stride, target_stride, width, smoothing,
    TARGETS: tl.constexpr, CHILDREN: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With x = q . v[c], wanted = (1 - smoothing) x[target] + smoothing mean_c x[c], normalizer = log(sum_c exp(x[c])),
    loss = normalizer - wanted, pull = dloss / dq = sum_c w[c] v[c],
    w[c] = exp(x[c] - normalizer) - (1 - smoothing) [c is the target] - smoothing / children."""
    number = tl.program_id(0) * TARGETS + tl.arange(0, TARGETS)
    real = number < P
    column = tl.arange(0, COLUMNS)[None, :]
    row = tl.load(order + number, mask=real, other=0).to(tl.int64)
    parent = tl.load(parents + row * parent_stride, mask=real, other=0)
    first = tl.load(first_child + parent, mask=real, other=0)
    last = tl.load(first_child + parent + 1, mask=real, other=0)
    target = tl.load(targets + row * target_stride, mask=real, other=-1)
    place = row[:, None] * width + column
    q = tl.load(query + place, mask=real[:, None] & (column < width), other=0.0)
    begin, end = tl.min(tl.where(real, first, 2**31 - 1), 0), tl.max(last, 0)  # siblings of all targets
    share = smoothing / tl.maximum(last - first, 1)  # of each child in what is wanted
    highest = tl.full([TARGETS], -3e38, tl.float32)  # finite, so that it can be subtracted
    total, wanted = tl.zeros([TARGETS], tl.float32), tl.zeros([TARGETS], tl.float32)
    start = begin
    while start < end:
        child = start + tl.arange(0, CHILDREN)
        inside = (child < end)[:, None] & (column < width)
        v = tl.load(vectors + child[:, None].to(tl.int64) * width + column, mask=inside, other=0.0)
        belongs = (first[:, None] <= child[None, :]) & (child[None, :] < last[:, None])
        x = tl.dot(q, tl.trans(v), input_precision=PRECISION)
        wanted += tl.sum(tl.where(belongs, x, 0.0), 1) * share
        wanted += tl.sum(tl.where(child[None, :] == target[:, None], x, 0.0), 1) * (1 - smoothing)
        x = tl.where(belongs, x, float("-inf"))
        above = tl.maximum(highest, tl.max(x, 1))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above[:, None]), 1)
        highest = above
        start = _next_sibling(first, last, start + CHILDREN, end)
    several = last - first > 1  # else the probability is 1
    normalizer = highest + tl.log(tl.where(real, total, 1.0))
    tl.store(normalizers + row, normalizer, mask=real)
    tl.store(losses + row, tl.where(several, normalizer - wanted, 0.0), mask=real)
    pull = tl.zeros([TARGETS, COLUMNS], tl.float32)
    start = begin
    while start < end:
        child = start + tl.arange(0, CHILDREN)
        inside = (child < end)[:, None] & (column < width)
        v = tl.load(vectors + child[:, None].to(tl.int64) * width + column, mask=inside, other=0.0)
        belongs = (first[:, None] <= child[None, :]) & (child[None, :] < last[:, None]) & several[:, None]
        x = tl.dot(q, tl.trans(v), input_precision=PRECISION)
        w = tl.exp(tl.where(belongs, x - normalizer[:, None], 0.0)) - share[:, None]
        w -= tl.where(child[None, :] == target[:, None], 1 - smoothing, 0.0)
        # In float32, of whose range small probabilities have need; half precision is exact in TF32.
        pull = tl.dot(tl.where(belongs, w, 0.0), v.to(tl.float32), pull, input_precision=PRECISION)
        start = _next_sibling(first, last, start + CHILDREN, end)
    tl.store(pulls + place, pull.to(pulls.dtype.element_ty), mask=real[:, None] & (column < width))


@triton.jit
def _backward(
    query, vectors, first_child, parents, targets, normalizers, grad_losses, order, begins, ends, grad_vectors,
    n, parent_stride, target_stride, grad_stride, width, smoothing,
    CHILDREN: tl.constexpr, TARGETS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv[c] = sum over targets p whose parent has child c of w[p, c] q[p],
    w[p, c] = dloss[p] (exp(q[p] . v[c] - normalizer[p]) - (1 - smoothing) [c is the target] - smoothing / children)."""
    block = tl.program_id(0)
    child = (block * CHILDREN + tl.arange(0, CHILDREN))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    place = child.to(tl.int64) * width + column
    v = tl.load(vectors + place, mask=(child < n) & (column < width), other=0.0)
    dv = tl.zeros([CHILDREN, COLUMNS], tl.float32)
    end = tl.load(ends + block)
    for start in range(tl.load(begins + block), end, TARGETS):
        number = start + tl.arange(0, TARGETS)
        real = number < end
        row = tl.load(order + number, mask=real, other=0).to(tl.int64)
        parent = tl.load(parents + row * parent_stride, mask=real, other=0)
        first = tl.load(first_child + parent, mask=real, other=0)
        last = tl.load(first_child + parent + 1, mask=real, other=0)
        target = tl.load(targets + row * target_stride, mask=real, other=0)
        normalizer = tl.load(normalizers + row, mask=real, other=0.0)
        grad = tl.load(grad_losses + row * grad_stride, mask=real, other=0.0)
        q = tl.load(query + row[:, None] * width + column, mask=real[:, None] & (column < width), other=0.0)
        belongs = (first[None, :] <= child) & (child < last[None, :]) & (last - first > 1)[None, :]
        x = tl.dot(v, tl.trans(q), input_precision=PRECISION)
        w = tl.exp(tl.where(belongs, x - normalizer[None, :], 0.0))
        w -= tl.where(child == target[None, :], 1 - smoothing, 0.0)
        w -= (smoothing / tl.maximum(last - first, 1))[None, :]
        w = tl.where(belongs, w * grad[None, :], 0.0)
        # In float32, of whose range small gradients have need; half precision is exact in TF32.
        dv = tl.dot(w, q.to(tl.float32), dv, input_precision=PRECISION)
    tl.store(grad_vectors + place, dv.to(grad_vectors.dtype.element_ty), mask=(child < n) & (column < width))


@torch.library.custom_op("retrieval::tree_cross_entropy", mutates_args=())
def tree_cross_entropy(
    query: Tensor, vectors: Tensor, first_child: Tensor, parents: Tensor, targets: Tensor, order: Tensor,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses and normalizers, [P] float32 each, and pulls as the query; see `_forward` and
    `ops.tree.tree_cross_entropy`. The losses alone have a gradient."""
    query, vectors = query.contiguous(), vectors.contiguous()
    P, width = query.shape
    losses, normalizers = (torch.empty(P, dtype=torch.float32, device=query.device) for _ in range(2))
    pulls = torch.empty_like(query)
    columns, half = max(triton.next_power_of_2(width), 16), query.dtype != torch.float32
    if P:
        _forward[(triton.cdiv(P, TARGETS),)](
            query, vectors, first_child, parents, targets, order, losses, normalizers, pulls,
            P, parents.stride(0), targets.stride(0), width, smoothing,
            TARGETS, min(max(TILE // columns, 16), 64), columns, "tf32" if half else "tf32x3",
            num_warps=4 if half and columns <= 256 else 8, num_stages=1,
        )  # fmt: skip
    return losses, normalizers, pulls


@tree_cross_entropy.register_fake
def _(query, vectors, first_child, parents, targets, order, smoothing):
    losses = query.new_empty(len(query), dtype=torch.float32)
    return losses, torch.empty_like(losses), query.new_empty(query.shape)


@torch.library.custom_op("retrieval::tree_cross_entropy_backward", mutates_args=())
def tree_cross_entropy_backward(
    query: Tensor, vectors: Tensor, first_child: Tensor, parents: Tensor, targets: Tensor, order: Tensor,
    normalizers: Tensor, grad_losses: Tensor, smoothing: float,
) -> Tensor:  # fmt: skip
    """The gradient of the vectors [n, d], in their dtype."""
    query, vectors = query.contiguous(), vectors.contiguous()
    n, width = vectors.shape
    firsts = first_child[parents[order]]
    starts = torch.arange(0, n, CHILDREN, dtype=torch.int32, device=query.device)
    opening = first_child[torch.searchsorted(first_child, starts, right=True) - 1]  # the first sibling of the block's
    begins, ends = torch.searchsorted(firsts, opening), torch.searchsorted(firsts, starts + CHILDREN)
    grad_vectors = torch.empty_like(vectors)
    columns, half = max(triton.next_power_of_2(width), 16), query.dtype != torch.float32
    _backward[(len(starts),)](
        query, vectors, first_child, parents, targets, normalizers, grad_losses, order, begins, ends, grad_vectors,
        n, parents.stride(0), targets.stride(0), grad_losses.stride(0), width, smoothing,
        CHILDREN, min(max(TILE // 2 // columns, 16), 64) if half else 16, columns, "tf32" if half else "tf32x3",
        num_warps=4 if half and columns <= 256 else 8, num_stages=1,
    )  # fmt: skip
    return grad_vectors


@tree_cross_entropy_backward.register_fake
def _(query, vectors, first_child, parents, targets, order, normalizers, grad_losses, smoothing):
    return vectors.new_empty(vectors.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.smoothing = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[2], *tensors, output[1])


def _gradients(ctx, grad_losses: Tensor, *_):
    pulls, *tensors = ctx.saved_tensors
    grad_query = (grad_losses[:, None] * pulls).to(pulls.dtype)
    return grad_query, tree_cross_entropy_backward(*tensors, grad_losses, ctx.smoothing), *(None,) * 5


tree_cross_entropy.register_autograd(_gradients, setup_context=_save)
