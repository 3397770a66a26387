"""Logits of the children of a tree's nodes, and the best children of all nodes of a user. Without gradient.

The logits are products of a query with the vectors of a node's children alone, however many nodes there are. They lie
in memory between both kernels: so each node has a program that reads its vectors, and a user's choice starts with all.

The best are chosen in one program per user, which keeps the scores of all children in registers. By bisection over the
integers that order floats it looks for a bound that `count` of them or somewhat more pass, writes those to memory, and
ranks them by comparing each with each. Of equal ones the first are chosen, so that the result is defined.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # numbers of vectors that a program reads at a time
MAX_CHILDREN = 16384  # among which a program chooses: nodes times children a node, each up to a power of two
MAX_CHOSEN = 128  # of them
PER_WARP = 512  # children that a warp keeps, while 16 warps suffice
LOWEST = tl.constexpr(-(2**31))  # of no child


@triton.jit
def _logits_kernel(
    query, vectors, first_child, nodes, out, n_sharing, width, fanout, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[row, j] = query[row // n_sharing] . vectors[first_child[nodes[row]] + j], or -inf where no child is."""
    row = tl.program_id(0).to(tl.int64)
    node = tl.load(nodes + row)
    first = tl.load(first_child + node)
    children = tl.load(first_child + node + 1) - first
    column = tl.arange(0, COLUMNS)
    inside = column < width
    q = tl.load(query + row // n_sharing * width + column, mask=inside, other=0.0).to(tl.float32)
    out += row * fanout
    for start in range(0, children, BLOCK):
        place = start + tl.arange(0, BLOCK)
        at = (first + place).to(tl.int64)[:, None] * width + column[None, :]
        v = tl.load(vectors + at, mask=(place < children)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        tl.store(out + place, tl.sum(v * q[None, :], 1), mask=place < children)
    for start in range(children, fanout, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(out + place, tl.full([BLOCK], -float("inf"), tl.float32), mask=place < fanout)


@torch.library.custom_op("retrieval::child_logits", mutates_args=())
def child_logits(query: Tensor, vectors: Tensor, first_child: Tensor, nodes: Tensor, fanout: int) -> Tensor:
    """[B, K, fanout] float32, from the arguments of `ops.tree.child_log_probs`."""
    query, vectors, nodes = query.contiguous(), vectors.contiguous(), nodes.contiguous()
    out = torch.empty(*nodes.shape, fanout, dtype=torch.float32, device=query.device)
    if n_rows := nodes.numel():
        columns = triton.next_power_of_2(query.shape[-1])
        block = min(max(TILE // columns, 1), triton.next_power_of_2(fanout))
        _logits_kernel[(n_rows,)](
            query, vectors, first_child, nodes, out, nodes.shape[1] // query.shape[1], query.shape[-1], fanout,
            block, columns,
        )  # fmt: skip
    return out


@child_logits.register_fake
def _(query, vectors, first_child, nodes, fanout):
    return query.new_empty(*nodes.shape, fanout, dtype=torch.float32)


@triton.jit
def _ordered(bits):
    """Bits of a float32 as an integer that orders as floats do, and back. int32"""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _choose_kernel(
    logits, scores, first_child, nodes, dead, passing, best, parents, children_out, n_nodes, fanout, count,
    CHUNKS: tl.constexpr, NODES: tl.constexpr, LANES: tl.constexpr, ROOM: tl.constexpr, SPARES: tl.constexpr,
):  # fmt: skip
    """Blocks are [CHUNKS, NODES, LANES]: a warp has whole nodes, where there are enough, and a thread some of their
    children."""
    user = tl.program_id(0).to(tl.int64)
    nodes += user * n_nodes
    number = tl.arange(0, NODES)[None, :, None]
    row = tl.minimum(number, n_nodes - 1)
    place = tl.arange(0, CHUNKS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    exists = (number < n_nodes) & (place < fanout)
    position = number * fanout + place
    # Addresses have one dimension, in which all compilers take the same neighbours for a warp.
    SIZE: tl.constexpr = CHUNKS * NODES * LANES
    at = tl.reshape(row * fanout + place, [SIZE])
    there = tl.reshape((place < fanout) & (number >= 0), [SIZE])
    score = tl.load(logits + user * n_nodes * fanout + at, mask=there, other=-float("inf"))
    score = tl.reshape(score, [CHUNKS, NODES, LANES])
    highest = tl.max(tl.max(score, 0), 1)[None, :, None]
    normalizer = highest + tl.log(tl.sum(tl.sum(tl.exp(score - highest), 0), 1))[None, :, None]
    score += tl.load(scores + user * n_nodes + row) - normalizer
    if SPARES:
        out = tl.load(dead + user * n_nodes * fanout + at, mask=there, other=0)
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
    """Whether `choose_children` takes so many."""
    tile = triton.next_power_of_2(n_nodes) * triton.next_power_of_2(fanout)
    return tile <= MAX_CHILDREN and count <= MAX_CHOSEN


@torch.library.custom_op("retrieval::choose_children", mutates_args=())
def choose_children(
    logits: Tensor, scores: Tensor, first_child: Tensor, nodes: Tensor, count: int, dead: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.tree.best_children` from the logits of `child_logits`; where `chooses` allows."""
    scores, nodes = scores.contiguous(), nodes.contiguous()
    users, n_nodes, fanout = logits.shape
    block, lanes = triton.next_power_of_2(fanout), min(triton.next_power_of_2(fanout), 32)
    tile = block // lanes, triton.next_power_of_2(n_nodes), lanes
    room = triton.next_power_of_2(count + count // 4)
    warps = min(max(block * tile[1] // PER_WARP, room**2 // 2048, 1), 16)
    passing = torch.empty(users, room, dtype=torch.int64, device=nodes.device)
    best = torch.empty(users, count, dtype=torch.float32, device=nodes.device)
    parents = torch.empty(users, count, dtype=torch.int64, device=nodes.device)
    children = torch.empty(users, count, dtype=torch.int32, device=nodes.device)
    if users:
        dead = dead.contiguous() if dead is not None else None
        _choose_kernel[(users,)](
            logits, scores, first_child, nodes, dead, passing, best, parents, children, n_nodes, fanout, count,
            *tile, room, dead is not None, num_warps=warps,
        )  # fmt: skip
    return best, parents, children


@choose_children.register_fake
def _(logits, scores, first_child, nodes, count, dead=None):
    best = scores.new_empty(len(nodes), count, dtype=torch.float32)
    return best, torch.empty_like(best, dtype=torch.int64), torch.empty_like(best, dtype=torch.int32)
