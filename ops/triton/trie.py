"""Log-probabilities over the children of trie nodes, in one pass.

    out[r, j] = logits[r, c(j)] - log sum_i exp(logits[r, c(i)]),   c(j) = code[first[node[r]] + j],   0 <= j < children

It reads the logits and codes of the children alone and writes the result, which bounds it: fanout float32 numbers a
row, however many nodes there are. Without gradient: only generation looks at all children.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # children that a program looks at together, of one row or of several
MAX_ROWS = 64  # of a program


@triton.jit
def _scores(logits, code, row, first, children, place, width):
    """Logits of the children at these places, -inf where there are none. [ROWS, BLOCK] float32."""
    number = tl.load(code + first + place, mask=place < children, other=0)
    return tl.load(logits + row * width + number, mask=place < children, other=-float("inf")).to(tl.float32)


@triton.jit
def _kernel(
    logits, first_child, code, nodes, out, n_rows, width, fanout,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """ONCE: a block holds all children of a node, so that they are read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, n_rows - 1)[:, None]  # what is left of the last program repeats the last row
    node = tl.load(nodes + row)
    first = tl.load(first_child + node)
    children = tl.load(first_child + node + 1) - first
    place = tl.arange(0, BLOCK)[None, :]
    if ONCE:
        score = _scores(logits, code, row, first, children, place, width)
        highest = tl.max(score, 1)[:, None]
        normalizer = highest + tl.log(tl.sum(tl.exp(score - highest), 1))[:, None]
        score = tl.where(place < children, score - normalizer, -float("inf"))
        tl.store(out + row * fanout + place, score, mask=place < fanout)
    else:
        highest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, fanout, BLOCK):
            score = _scores(logits, code, row, first, children, start + place, width)
            above = tl.maximum(highest, tl.max(score, 1))
            shift = tl.where(above == -float("inf"), 0.0, above)  # where no child has been seen
            total = total * tl.exp(highest - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
            highest = above
        normalizer = (highest + tl.log(total))[:, None]
        for start in range(0, fanout, BLOCK):
            score = _scores(logits, code, row, first, children, start + place, width)
            score = tl.where(start + place < children, score - normalizer, -float("inf"))
            tl.store(out + row * fanout + start + place, score, mask=start + place < fanout)


@torch.library.custom_op("retrieval::child_log_probs", mutates_args=())
def child_log_probs(logits: Tensor, first_child: Tensor, code: Tensor, nodes: Tensor, fanout: int) -> Tensor:
    """See `ops.trie.child_log_probs`; without gradients."""
    logits, nodes = logits.contiguous(), nodes.contiguous()
    out = torch.empty(*nodes.shape, fanout, dtype=torch.float32, device=logits.device)
    if n_rows := nodes.numel():
        block = min(triton.next_power_of_2(fanout), TILE)
        rows = min(TILE // block, MAX_ROWS)
        _kernel[(triton.cdiv(n_rows, rows),)](
            logits, first_child, code, nodes, out, n_rows, logits.shape[-1], fanout, rows, block, fanout <= block
        )
    return out


@child_log_probs.register_fake
def _(logits, first_child, code, nodes, fanout):
    return logits.new_empty(*nodes.shape, fanout, dtype=torch.float32)
