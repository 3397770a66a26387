"""Clipping and AdamW for all parameters in two kernels.

torch's fused optimizer works on stretches of 65,536 numbers, one program each: a model of a million parameters keeps 20
multiprocessors busy. Here the parameters lie back to back, and a program takes 512 numbers. Both kernels are bound by
memory: they read five numbers a parameter and write three.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # numbers of a program
PARTS = 256  # programs that sum the squares of the gradient, each into a part of its own


@triton.jit
def _squares(grads, parts, steps, N, P, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """parts: sums of grads^2. Raises the steps, which no program reads here."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, N, PARTS * BLOCK):
        places = start + tl.arange(0, BLOCK)
        grad = tl.load(grads + places, mask=places < N, other=0.0)
        total += grad * grad
    tl.store(parts + tl.program_id(0), tl.sum(total, 0))
    if tl.program_id(0) == 0:
        numbers = tl.arange(0, BLOCK_P)
        step = tl.load(steps + numbers, mask=numbers < P)
        tl.store(steps + numbers, step + 1, mask=numbers < P)


@triton.jit
def _adamw(
    state, grads, parts, norm, rate, steps, ends, N, P, max_norm,
    DECAY: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """norm = sqrt(sum of parts). With t the step of the parameter that a number w belongs to, and c = min(1, max_norm /
    (norm + 1e-6)):
    w -= rate DECAY w,  m = BETA1 m + (1 - BETA1) c g,  v = BETA2 v + (1 - BETA2) (c g)^2,
    w -= rate / (1 - BETA1^t) m / (sqrt(v) / sqrt(1 - BETA2^t) + EPS)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    places = tl.arange(0, BLOCK)
    inside = places < N - start
    weights = state + start + places
    firsts = weights + N
    seconds = firsts + N
    weight = tl.load(weights, mask=inside)
    first = tl.load(firsts, mask=inside)
    second = tl.load(seconds, mask=inside)
    grad = tl.load(grads + start + places, mask=inside)
    length = tl.sqrt(tl.sum(tl.load(parts + tl.arange(0, PARTS)), 0))
    if start == 0:
        tl.store(norm, length)
    scale = max_norm / (length + 1e-6)
    grad *= tl.where(scale > 1, 1.0, scale)  # a norm that is not a number stays one
    rate = tl.load(rate)

    numbers = tl.arange(0, BLOCK_P)
    before = tl.load(ends + numbers, mask=numbers < P, other=N) <= start
    parameter = tl.sum(before.to(tl.int32), 0)  # that of the first place
    begin = start
    size, root = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], 1.0, tl.float32)
    while begin < tl.minimum(start + BLOCK, N):  # the parameters of these places, nearly always one
        step = tl.load(steps + parameter).to(tl.float64)
        here = places >= (begin - start).to(tl.int32)
        size = tl.where(here, rate / (1 - tl.exp(step * LOG_BETA1)).to(tl.float32), size)
        root = tl.where(here, tl.sqrt((1 - tl.exp(step * LOG_BETA2)).to(tl.float32)), root)
        begin = tl.load(ends + parameter)
        parameter += 1

    first = BETA1 * first + (1 - BETA1) * grad
    second = BETA2 * second + (1 - BETA2) * grad * grad
    weight -= rate * DECAY * weight
    weight -= size * first / (tl.sqrt(second) / root + EPS)
    tl.store(weights, weight, mask=inside)
    tl.store(firsts, first, mask=inside)
    tl.store(seconds, second, mask=inside)


@torch.library.custom_op("retrieval::clipped_adamw", mutates_args=("state", "steps"))
def clipped_adamw(
    state: Tensor,
    steps: Tensor,
    ends: Tensor,
    grads: Tensor,
    rate: Tensor,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Tensor:
    """Clips the gradient's norm to max_norm, then makes one step of AdamW (Loshchilov and Hutter 2019, algorithm 2).

    The operations are those of `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW`, in their order, but the
    gradients stay unclipped.

    state: [3, N], the numbers of all parameters back to back, their first moments and their second moments; steps:
    [P], how many steps each parameter has made; both are overwritten. ends: [P] int64, where each parameter ends among
    the N numbers. grads: [N]. rate: [], the learning rate. All but ends float32, contiguous, on one device, which
    nothing waits for. Returns the norm [] before clipping.
    """
    norm, parts = grads.new_empty(()), grads.new_empty(PARTS)
    n, p = len(grads), len(steps)
    block_p = triton.next_power_of_2(p)
    _squares[(PARTS,)](grads, parts, steps, n, p, PARTS, BLOCK, block_p)
    _adamw[(triton.cdiv(n, BLOCK),)](
        state, grads, parts, norm, rate, steps, ends, n, p, max_norm,
        weight_decay, beta1, beta2, eps, math.log(beta1), math.log(beta2), PARTS, BLOCK, block_p,
    )  # fmt: skip
    return norm


@clipped_adamw.register_fake
def _(state: Tensor, steps: Tensor, ends: Tensor, grads: Tensor, *_) -> Tensor:
    return grads.new_empty(())
