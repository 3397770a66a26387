"""Cross-entropy of rows of logits, which become their own gradient.

A program reads its row for the normalizer, then reads it again and writes the gradient over it. Instructions count
beside bytes: whole blocks are taken without masks, and the target's gradient is written by itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # logits of a row that a program takes at a time
ITEMS = 256  # seen items that a program takes at a time


@triton.jit
def _clamp(x, limit):
    """limit: the largest finite logit, which stands for infinity."""
    return tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rows(
    logits, targets, first, last, items, bias, out, N, width, smoothing, limit,
    SEEN: tl.constexpr, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """With t the target, n the columns below N, x[n] their logits, to which the bias is added where n is seen, and
    z = log(sum over n of exp(x[n])): loss = z - (1 - smoothing) x[t] - smoothing mean(x[n]), and x[n] becomes
    exp(x[n] - z) - (1 - smoothing) [n = t] - smoothing / N, x of other columns 0. The maximum runs along, and the sum
    is rescaled to it. out [2, P]: the losses, and their gradients of the bias, sums over the seen n."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    if SEEN:
        begin, end = tl.load(first + row).to(tl.int64), tl.load(last + row).to(tl.int64)
        added = tl.load(bias).to(tl.float32)
        for start in range(begin, end, ITEMS):
            place = start + tl.arange(0, ITEMS)
            item = tl.load(items + place, mask=place < end, other=-1)
            x = tl.load(logits + item, mask=item >= 0, other=0.0).to(tl.float32)
            tl.store(logits + item, (x + added).to(logits.dtype.element_ty), mask=item >= 0)
        tl.debug_barrier()  # they lie in memory before the row is read
    target = tl.load(targets + row)
    own = _clamp(tl.load(logits + target).to(tl.float32), limit)
    columns = tl.arange(0, BLOCK)
    whole = N // BLOCK * BLOCK
    inside = whole + columns < N  # of the last block, which is not whole
    largest = tl.full([], -3e38, tl.float32)  # finite, so that it can be subtracted
    total = tl.zeros([], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for start in range(0, whole, BLOCK):
        x = _clamp(tl.load(logits + start + columns).to(tl.float32), limit)
        plain += x
        highest = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - highest) + tl.sum(tl.exp(x - highest), 0)
        largest = highest
    x = _clamp(tl.load(logits + whole + columns, mask=inside, other=0.0).to(tl.float32), limit)
    plain += x
    x = tl.where(inside, x, float("-inf"))
    highest = tl.maximum(largest, tl.max(x, 0))
    total = total * tl.exp(largest - highest) + tl.sum(tl.exp(x - highest), 0)
    normalizer = highest + tl.log(total)
    tl.store(out + row, normalizer - (1 - smoothing) * own - smoothing * (tl.sum(plain, 0) / N))
    dbias = tl.zeros([ITEMS], tl.float32)
    if GRADIENTS:
        tl.debug_barrier()  # all have read the target's logit before it is overwritten
        shared = smoothing / N
        for start in range(0, whole, BLOCK):
            x = _clamp(tl.load(logits + start + columns).to(tl.float32), limit)
            tl.store(logits + start + columns, (tl.exp(x - normalizer) - shared).to(logits.dtype.element_ty))
        for start in range(whole, width, BLOCK):
            x = tl.load(logits + start + columns, mask=start + columns < N, other=0.0).to(tl.float32)
            dx = tl.where(start + columns < N, tl.exp(_clamp(x, limit) - normalizer) - shared, 0.0)
            tl.store(logits + start + columns, dx.to(logits.dtype.element_ty), mask=start + columns < width)
        tl.debug_barrier()  # the target's is written last
        dtarget = tl.exp(own - normalizer) - shared - (1 - smoothing)
        tl.store(logits + target, dtarget.to(logits.dtype.element_ty))
        if SEEN:
            tl.debug_barrier()  # the gradients lie in memory before they are read
            for start in range(begin, end, ITEMS):
                place = start + tl.arange(0, ITEMS)
                item = tl.load(items + place, mask=place < end, other=-1)
                dbias += tl.load(logits + item, mask=item >= 0, other=0.0).to(tl.float32)
    tl.store(out + tl.num_programs(0) + row, tl.sum(dbias, 0))


@torch.library.custom_op("retrieval::cross_entropy_", mutates_args=("logits",))
def cross_entropy_(
    logits: Tensor, N: int, targets: Tensor, smoothing: float, first: Tensor | None, last: Tensor | None,
    items: Tensor | None, bias: Tensor | None, gradients: bool,
) -> Tensor:  # fmt: skip
    """[2, P] float32, the losses and, where gradients are wanted, each one's gradient of the bias, of logits
    [P, width], contiguous, of which the first N columns count. They are overwritten, where gradients are wanted by the
    gradient of their row's loss. targets [P]; first, last, items and bias as in `ops.cross_entropy.Seen`."""
    P, width = logits.shape
    out = logits.new_empty(2, P, dtype=torch.float32)
    if P:
        block = min(triton.next_power_of_2(width), BLOCK)
        contiguous = [t.contiguous() if t is not None else None for t in (targets, first, last, items, bias)]
        _rows[(P,)](
            logits, *contiguous, out, N, width, smoothing, torch.finfo(logits.dtype).max,
            first is not None, gradients, block, ITEMS, num_warps=4,
        )  # fmt: skip
    return out


@cross_entropy_.register_fake
def _(logits, N, targets, smoothing, first, last, items, bias, gradients):
    return logits.new_empty(2, len(logits), dtype=torch.float32)
