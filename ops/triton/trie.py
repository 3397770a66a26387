"""Log-probabilities over the children of trie nodes, and the best children of all nodes of a user.

    p[r, j] = logits[r, c(j)] - log sum_i exp(logits[r, c(i)]),   c(j) = code[first[node[r]] + j],   0 <= j < children

They read the logits and codes of the children alone, however many nodes there are. Without gradient: only generation
looks at all children.

The best are chosen in one program a user, which keeps the scores of all children in registers. By bisection over the
integers that order floats it looks for a bound that `count` of them or somewhat more pass, writes those to memory, and
ranks them by comparing each with each. Of equal ones the first are chosen, so that the result is defined.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # children that a program looks at together, of one row or of several
MAX_ROWS = 64  # of a program
MAX_CHILDREN = 16384  # among which a program chooses: nodes times children a node, each up to a power of two
MAX_CHOSEN = 128  # of them
PER_WARP = 512  # children that a warp keeps, while 16 warps suffice
LOWEST = tl.constexpr(-(2**31))  # of no child


@triton.jit
def _scores(logits, code, start, child, exists):
    """Logits of children, in rows that start there, -inf where there are none. float32, as `child`."""
    number = tl.load(code + child, mask=exists, other=0).to(tl.int32)
    return tl.load(logits + (start + number), mask=exists, other=-float("inf")).to(tl.float32)


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
        score = _scores(logits, code, row * width, first + place, place < children)
        highest = tl.max(score, 1)[:, None]
        normalizer = highest + tl.log(tl.sum(tl.exp(score - highest), 1))[:, None]
        score = tl.where(place < children, score - normalizer, -float("inf"))
        tl.store(out + row * fanout + place, score, mask=place < fanout)
    else:
        highest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, fanout, BLOCK):
            score = _scores(logits, code, row * width, first + start + place, start + place < children)
            above = tl.maximum(highest, tl.max(score, 1))
            shift = tl.where(above == -float("inf"), 0.0, above)  # where no child has been seen
            total = total * tl.exp(highest - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
            highest = above
        normalizer = (highest + tl.log(total))[:, None]
        for start in range(0, fanout, BLOCK):
            score = _scores(logits, code, row * width, first + start + place, start + place < children)
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


@triton.jit
def _ordered(bits):
    """Bits of a float32 as an integer that orders as floats do, and back. int32"""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best_kernel(
    logits, scores, first_child, code, nodes, left_out, passing, best, parents, children_out,
    width, n_nodes, fanout, count,
    CHUNKS: tl.constexpr, NODES: tl.constexpr, LANES: tl.constexpr, ROOM: tl.constexpr, LEAVES_OUT: tl.constexpr,
):  # fmt: skip
    """Blocks are [CHUNKS, NODES, LANES]: a warp has whole nodes, where there are enough, and a thread some of their
    children."""
    user = tl.program_id(0).to(tl.int64)
    nodes += user * n_nodes
    number = tl.arange(0, NODES)[None, :, None]
    row = tl.minimum(number, n_nodes - 1)
    node = tl.load(nodes + row)
    first = tl.load(first_child + node)
    children = tl.load(first_child + node + 1) - first
    place = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    # Addresses have one dimension, in which all compilers take the same neighbours for a warp.
    SIZE: tl.constexpr = CHUNKS * NODES * LANES
    there = tl.reshape(place < children, [SIZE])
    code_at = tl.reshape(first + place, [SIZE])
    logits_at = tl.reshape(row * width + place * 0, [SIZE])
    score = _scores(logits + user * n_nodes * width, code, logits_at, code_at, there)
    score = tl.reshape(score, [CHUNKS, NODES, LANES])
    highest = tl.max(tl.max(score, 0), 1)[None, :, None]
    normalizer = highest + tl.log(tl.sum(tl.sum(tl.exp(score - highest), 0), 1))[None, :, None]
    score += tl.load(scores + user * n_nodes + row) - normalizer
    exists = (number < n_nodes) & (place < fanout)
    position = number * fanout + place
    if LEAVES_OUT:
        at = tl.reshape(position, [SIZE])
        out = tl.load(left_out + user * n_nodes * fanout + at, mask=tl.reshape(exists, [SIZE]), other=0)
        score = tl.where(tl.reshape(out, [CHUNKS, NODES, LANES]) != 0, -float("inf"), score)
    key = tl.where(exists, tl.maximum(_ordered(score.to(tl.int32, bitcast=True)), LOWEST + 1), LOWEST)

    # n keys, no fewer than count, are above low; fewer than count are above high.
    low, high, n = tl.full([], LOWEST, tl.int32), tl.max(key), n_nodes * fanout
    middle = _ordered((_ordered(high).to(tl.float32, bitcast=True) - 32).to(tl.int32, bitcast=True))  # a first guess
    while (n > ROOM) & (low + 1 < high):
        above = tl.sum((key > middle).to(tl.int32))
        enough = above >= count
        low, high, n = tl.where(enough, middle, low), tl.where(enough, high, middle), tl.where(enough, above, n)
        middle = (low & high) + ((low ^ high) >> 1)
    start, end = n_nodes * 0, n_nodes * fanout
    while n > ROOM:  # of the many keys that equal high, those at the positions below end
        middle = (start + end) // 2
        above = tl.sum(((key > high) | ((key == high) & (position < middle))).to(tl.int32))
        enough = above >= count
        start, end, n = tl.where(enough, start, middle), tl.where(enough, middle, end), tl.where(enough, above, n)

    chosen = (key > low) & ((position < end) | (key > low + 1))
    in_thread = tl.cumsum(chosen.to(tl.int32), 0)
    in_lane = tl.sum(chosen.to(tl.int32), 0)  # [NODES, LANES]
    in_node = tl.sum(in_lane, 1)
    before = tl.cumsum(in_lane, 1) - in_lane + (tl.cumsum(in_node, 0) - in_node)[:, None]
    passing += user * ROOM
    slot = tl.reshape(before[None, :, :] + in_thread - 1, [SIZE])
    one = tl.reshape((key.to(tl.int64) << 32) | (0x7FFFFFFF - position), [SIZE])
    tl.store(passing + slot, one, mask=tl.reshape(chosen, [SIZE]))
    tl.debug_barrier()  # what one thread writes another reads
    slot = tl.arange(0, ROOM)
    one = tl.load(passing + slot, mask=slot < n, other=0)
    other = tl.load(passing + slot[None, :], mask=slot[None, :] < n, other=-(2**63))
    rank = tl.sum((other > one[:, None]).to(tl.int32), 1)
    position = 0x7FFFFFFF - (one & 0xFFFFFFFF).to(tl.int32)
    kept = (slot < n) & (rank < count)
    parent = position // fanout
    node = tl.load(nodes + parent, mask=kept, other=0)
    first, end = tl.load(first_child + node), tl.load(first_child + node + 1)
    place = user * count + rank
    tl.store(best + place, _ordered((one >> 32).to(tl.int32)).to(tl.float32, bitcast=True), mask=kept)
    tl.store(parents + place, parent, mask=kept)
    tl.store(children_out + place, tl.minimum(first + position % fanout, end - 1), mask=kept)


def chooses(n_nodes: int, fanout: int, count: int) -> bool:
    """Whether `best_children` takes so many."""
    tile = triton.next_power_of_2(n_nodes) * triton.next_power_of_2(fanout)
    return tile <= MAX_CHILDREN and count <= MAX_CHOSEN


@torch.library.custom_op("retrieval::best_children", mutates_args=())
def best_children(
    logits: Tensor,
    scores: Tensor,
    first_child: Tensor,
    code: Tensor,
    nodes: Tensor,
    fanout: int,
    count: int,
    left_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.trie.best_children`; where `chooses` allows."""
    logits, scores, nodes = logits.contiguous(), scores.contiguous(), nodes.contiguous()
    users, n_nodes = nodes.shape
    if not 1 <= count <= n_nodes * fanout:
        raise ValueError(f"best_children with count = {count} takes 1 to {n_nodes} x {fanout}, nodes times children.")
    block, lanes = triton.next_power_of_2(fanout), min(triton.next_power_of_2(fanout), 32)
    tile = block // lanes, triton.next_power_of_2(n_nodes), lanes
    room = triton.next_power_of_2(count + count // 4)
    warps = min(max(block * tile[1] // PER_WARP, room**2 // 2048, 1), 16)
    passing = torch.empty(users, room, dtype=torch.int64, device=nodes.device)
    best = torch.empty(users, count, dtype=torch.float32, device=nodes.device)
    parents = torch.empty(users, count, dtype=torch.int64, device=nodes.device)
    children = torch.empty(users, count, dtype=torch.int32, device=nodes.device)
    if users:
        left_out = left_out.contiguous() if left_out is not None else None
        _best_kernel[(users,)](
            logits, scores, first_child, code, nodes, left_out, passing, best, parents, children,
            logits.shape[-1], n_nodes, fanout, count, *tile, room, left_out is not None, num_warps=warps,
        )  # fmt: skip
    return best, parents, children


@best_children.register_fake
def _(logits, scores, first_child, code, nodes, fanout, count, left_out=None):
    best = scores.new_empty(len(nodes), count, dtype=torch.float32)
    return best, torch.empty_like(best, dtype=torch.int64), torch.empty_like(best, dtype=torch.int32)
