"""Cross-entropy over the children of trie nodes.

Forward reads the logits of the children alone; backward reads them again and writes the gradient [P, V]. Both are bound
by those bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512  # logits that a program, one warp, takes at a time


@triton.jit
def _range_of_children(first_child, nodes, node_stride, rows, real):
    """First child and end of each row's children; none where there is one only, whose probability is 1."""
    node = tl.load(nodes + rows * node_stride, mask=real, other=0)
    first = tl.load(first_child + node, mask=real, other=0)
    end = tl.load(first_child + node + 1, mask=real, other=0)
    return first, tl.where(end - first > 1, end, first)


@triton.jit
def _forward(
    logits, first_child, code, nodes, targets, losses, normalizers, P, V, node_stride, target_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """normalizer = log(sum over children c of exp(x[code[c]])), loss = normalizer - x[code[target]]; the maximum runs
    along, and the sum is rescaled to it."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = rows < P
    first, end = _range_of_children(first_child, nodes, node_stride, rows, real)
    largest = tl.full([ROWS], -3e38, tl.float32)  # finite, so that it can be subtracted
    several = end > first
    total = tl.where(several, 0.0, 1.0)
    for start in range(0, tl.max(end - first, 0), BLOCK):
        child = (first + start)[:, None] + tl.arange(0, BLOCK)[None, :]
        exists = child < end[:, None]
        place = rows[:, None] * V + tl.load(code + child, mask=exists, other=0)
        x = tl.load(logits + place, mask=exists, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(largest, tl.max(x, 1))
        total = total * tl.exp(largest - highest) + tl.sum(tl.exp(x - highest[:, None]), 1)
        largest = highest
    target = tl.load(targets + rows * target_stride, mask=several, other=0)
    place = rows * V + tl.load(code + target, mask=several, other=0)
    normalizer = largest + tl.log(total)
    loss = normalizer - tl.load(logits + place, mask=several, other=0.0).to(tl.float32)
    tl.store(normalizers + rows, normalizer, mask=real)
    tl.store(losses + rows, tl.where(several, loss, 0.0), mask=real)


@triton.jit
def _backward(
    logits, first_child, code, nodes, targets, normalizers, grad_losses, grad_logits,
    P, V, node_stride, target_stride, grad_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx[code[c]] = dloss * (exp(x[code[c]] - normalizer) - [c is the target]) for the children c, 0 elsewhere."""
    own = tl.program_id(0).to(tl.int64) * ROWS
    rows = own + tl.arange(0, ROWS)
    real = rows < P
    size = tl.minimum(ROWS, P - own) * V
    for start in range(0, size, TILE):
        place = start + tl.arange(0, TILE)
        tl.store(grad_logits + own * V + place, tl.zeros([TILE], grad_logits.dtype.element_ty), mask=place < size)
    first, end = _range_of_children(first_child, nodes, node_stride, rows, real)
    target = tl.load(targets + rows * target_stride, mask=real, other=0)
    normalizer = tl.load(normalizers + rows, mask=real, other=0.0)
    grad = tl.load(grad_losses + rows * grad_stride, mask=real, other=0.0)
    tl.debug_barrier()  # the zeros lie in memory before what replaces them
    for start in range(0, tl.max(end - first, 0), BLOCK):
        child = (first + start)[:, None] + tl.arange(0, BLOCK)[None, :]
        exists = child < end[:, None]
        place = rows[:, None] * V + tl.load(code + child, mask=exists, other=0)
        x = tl.load(logits + place, mask=exists, other=float("-inf")).to(tl.float32)
        probability = tl.exp(x - normalizer[:, None])
        dx = grad[:, None] * (probability - tl.where(child == target[:, None], 1.0, 0.0))
        tl.store(grad_logits + place, dx.to(grad_logits.dtype.element_ty), mask=exists)


def _block(size: int) -> int:
    return min(triton.next_power_of_2(size), 256)


@torch.library.custom_op("retrieval::trie_cross_entropy", mutates_args=())
def trie_cross_entropy(
    logits: Tensor, first_child: Tensor, code: Tensor, nodes: Tensor, targets: Tensor, fanout: int
) -> tuple[Tensor, Tensor]:
    """Losses and normalizers, [P] float32 each; see `ops.trie.trie_cross_entropy`. Normalizers have no gradient."""
    logits = logits.contiguous()
    P, V = logits.shape
    losses, normalizers = (torch.empty(P, dtype=torch.float32, device=logits.device) for _ in range(2))
    if P:
        block = _block(fanout)
        rows = TILE // block
        _forward[(triton.cdiv(P, rows),)](
            logits, first_child, code, nodes, targets, losses, normalizers, P, V, nodes.stride(0), targets.stride(0),
            rows, block, num_warps=1,
        )  # fmt: skip
    return losses, normalizers


@trie_cross_entropy.register_fake
def _(logits, first_child, code, nodes, targets, fanout):
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    return losses, torch.empty_like(losses)


@torch.library.custom_op("retrieval::trie_cross_entropy_backward", mutates_args=())
def trie_cross_entropy_backward(
    logits: Tensor,
    first_child: Tensor,
    code: Tensor,
    nodes: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    grad_losses: Tensor,
    fanout: int,
) -> Tensor:
    """The gradient of the logits [P, V], in their dtype."""
    logits = logits.contiguous()
    P, V = logits.shape
    grad_logits = torch.empty_like(logits)
    if P:
        rows = TILE // _block(V)
        _backward[(triton.cdiv(P, rows),)](
            logits, first_child, code, nodes, targets, normalizers, grad_losses, grad_logits,
            P, V, nodes.stride(0), targets.stride(0), grad_losses.stride(0), rows, _block(fanout), TILE,
            num_warps=1,
        )  # fmt: skip
    return grad_logits


@trie_cross_entropy_backward.register_fake
def _(logits, first_child, code, nodes, targets, normalizers, grad_losses, fanout):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.fanout = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradient(ctx, grad_losses: Tensor, _):
    return trie_cross_entropy_backward(*ctx.saved_tensors, grad_losses, ctx.fanout), *(None,) * 5


trie_cross_entropy.register_autograd(_gradient, setup_context=_save)
