"""The elementwise work between two matrix products of a transformer block, in one pass over memory.

    hidden = x + dropout(branch),   normed = weight * hidden / sqrt(mean(hidden^2) + eps)

(Zhang and Sennrich 2019, eq. 4.) At the end of a stack normed is dropped out as well.
Forward reads x and branch and writes hidden and normed; backward reads both gradients and hidden and writes the
gradients of x and branch. Each is bound by those bytes. Masks are not stored: both directions draw them from a seed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FLAT = 1024  # numbers that one key of the random bits serves where a tensor is taken as flat
MAX_PARTS = 528  # programs that sum the weight's gradient, each into a part of its own


@triton.jit
def _mix(x):
    """A hash of 32 bits that flips every bit of its result with probability 1/2 (Wellons 2018, lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(seed, rows, columns, threshold):
    """Whether dropout keeps each number: its random 32 bits are not below the threshold. A number's bits are a hash of
    its column and of a key, a hash of its row; both mix in half of the seed."""
    seed = tl.load(seed)
    key = _mix(rows.to(tl.uint32) ^ seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32)
    return _mix(_mix(key) + columns.to(tl.uint32) * 0x9E3779B9) >= threshold


@triton.jit
def _forward(
    x, branch, weight, seed, hidden, normed, n_rows, width, threshold, kept_scale, eps,
    HAS_X: tl.constexpr, DROPOUT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < n_rows) & (columns < width)
    place = rows * width + columns
    total = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        total = tl.where(_kept(seed, rows, columns, threshold), total * kept_scale, 0.0)
    if HAS_X:
        total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    total = total.to(hidden.dtype.element_ty)  # what the backward pass will read
    tl.store(hidden + place, total, mask=inside)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 1) / width + eps)
    gain = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    total = total * scale[:, None] * gain
    if DROPOUT and LAST:
        total = tl.where(_kept(seed + 1, rows, columns, threshold), total * kept_scale, 0.0)
    tl.store(normed + place, total.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    hidden, weight, seed, grad_hidden, grad_normed, grad_x, grad_branch, parts,
    n_rows, width, threshold, kept_scale, eps,
    HAS_X: tl.constexpr, HAS_GRAD: tl.constexpr, DROPOUT: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With y = hidden * s, s = 1 / sqrt(mean(hidden^2) + eps), g = grad_normed * weight:
    dhidden = grad_hidden + s (g - y mean(g y)), dweight = sum over rows of grad_normed * y."""
    columns = tl.arange(0, BLOCK)[None, :]
    gain = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    grad_gain = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (rows < n_rows) & (columns < width)
        place = rows * width + columns
        h = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        dn = tl.load(grad_normed + place, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT and LAST:
            dn = tl.where(_kept(seed + 1, rows, columns, threshold), dn * kept_scale, 0.0)
        scale = tl.rsqrt(tl.sum(h * h, 1) / width + eps)[:, None]
        y = h * scale
        grad_gain += dn * y
        g = dn * gain
        grad = scale * (g - y * (tl.sum(g * y, 1) / width)[:, None])
        if HAS_GRAD:
            grad += tl.load(grad_hidden + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_X:
            tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=inside)
        if DROPOUT:
            grad = tl.where(_kept(seed, rows, columns, threshold), grad * kept_scale, 0.0)
        tl.store(grad_branch + place, grad.to(grad_branch.dtype.element_ty), mask=inside)
    columns = tl.arange(0, BLOCK)
    tl.store(parts + tl.program_id(0) * width + columns, tl.sum(grad_gain, 0), mask=columns < width)


def _tiles(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "ROWS": max(1, 2048 // block), "num_warps": 4 if block <= 2048 else 8}


def _dropout(p: float) -> tuple[int, float]:
    """The random numbers below which a number is dropped, and what the others are multiplied by."""
    return min(round(p * 2**32), 2**32 - 1), 1 / (1 - p)


@torch.library.custom_op("retrieval::add_norm", mutates_args=())
def add_norm(
    x: Tensor | None, branch: Tensor, weight: Tensor, seed: Tensor | None, p: float, last: bool, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """hidden, in the dtype of x (of branch without x), and normed in `dtype`; both [..., D]; see `ops.add_norm`. seed:
    [2] int64, None for no dropout."""
    branch = branch.contiguous()
    x = x.contiguous() if x is not None else None
    hidden = torch.empty_like(branch if x is None else x)
    normed = torch.empty(branch.shape, dtype=dtype, device=branch.device)
    width = branch.shape[-1]
    if n_rows := branch.numel() // width:
        tiles = _tiles(width)
        arguments = (x, branch, weight, seed, hidden, normed, n_rows, width, *_dropout(p), eps)
        _forward[(triton.cdiv(n_rows, tiles["ROWS"]),)](
            *arguments, HAS_X=x is not None, DROPOUT=seed is not None, LAST=last, **tiles
        )
    return hidden, normed


@add_norm.register_fake
def _(x, branch, weight, seed, p, last, eps, dtype):
    return (branch if x is None else x).new_empty(branch.shape), branch.new_empty(branch.shape, dtype=dtype)


@torch.library.custom_op("retrieval::add_norm_backward", mutates_args=())
def add_norm_backward(
    hidden: Tensor, weight: Tensor, seed: Tensor | None, grad_hidden: Tensor | None, grad_normed: Tensor, p: float,
    last: bool, eps: float, branch_dtype: torch.dtype, has_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty without it), branch and weight."""
    width = hidden.shape[-1]
    n_rows = hidden.numel() // width
    grad_hidden = grad_hidden.contiguous() if grad_hidden is not None else None
    grad_x = torch.empty_like(hidden) if has_x else hidden.new_empty(0)
    grad_branch = torch.empty(hidden.shape, dtype=branch_dtype, device=hidden.device)
    tiles = _tiles(width)
    programs = min(triton.cdiv(n_rows, tiles["ROWS"]), MAX_PARTS)
    parts = torch.empty(programs, width, dtype=torch.float32, device=hidden.device)
    if n_rows:
        _backward[(programs,)](
            hidden, weight, seed, grad_hidden, grad_normed.contiguous(), grad_x, grad_branch, parts,
            n_rows, width, *_dropout(p), eps,
            HAS_X=has_x, HAS_GRAD=grad_hidden is not None, DROPOUT=seed is not None, LAST=last, **tiles,
        )  # fmt: skip
    return grad_x, grad_branch, parts.sum(0).to(weight.dtype)


@add_norm_backward.register_fake
def _(hidden, weight, seed, grad_hidden, grad_normed, p, last, eps, branch_dtype, has_x):
    grad_x = hidden.new_empty(hidden.shape if has_x else 0)
    return grad_x, hidden.new_empty(hidden.shape, dtype=branch_dtype), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    x, branch, weight, seed, ctx.p, ctx.last, ctx.eps, _ = inputs
    ctx.branch_dtype, ctx.has_x = branch.dtype, x is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], weight, seed)


def _gradients(ctx, grad_hidden: Tensor | None, grad_normed: Tensor | None):
    hidden, weight, seed = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(hidden)
    options = (ctx.p, ctx.last, ctx.eps, ctx.branch_dtype, ctx.has_x)
    grad_x, *others = add_norm_backward(hidden, weight, seed, grad_hidden, grad_normed, *options)
    return grad_x if ctx.has_x else None, *others, *(None,) * 5


add_norm.register_autograd(_gradients, setup_context=_save)


@triton.jit
def _relu_forward(x, out, seed, size, threshold, kept_scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    place = row * BLOCK + columns
    values = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
    values = tl.where(values < 0, 0.0, values * kept_scale)  # what is not a number stays so
    values = tl.where(_kept(seed, row, columns, threshold), values, 0.0)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < size)


@triton.jit
def _relu_backward(out, grad_out, grad_x, size, kept_scale, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stopped = tl.load(out + place, mask=place < size, other=0.0) <= 0
    grad = tl.load(grad_out + place, mask=place < size, other=0.0).to(tl.float32) * kept_scale
    tl.store(grad_x + place, tl.where(stopped, 0.0, grad).to(grad_x.dtype.element_ty), mask=place < size)


@torch.library.custom_op("retrieval::relu_dropout", mutates_args=())
def relu_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """dropout(relu(x)), same shape and dtype; seed: [2] int64, the first of which counts. Its gradient passes where the
    output is positive."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _relu_forward[(triton.cdiv(x.numel(), FLAT),)](x, out, seed, x.numel(), *_dropout(p), FLAT)
    return out


@relu_dropout.register_fake
def _(x, seed, p):
    return x.new_empty(x.shape)


@torch.library.custom_op("retrieval::relu_dropout_backward", mutates_args=())
def relu_dropout_backward(out: Tensor, grad_out: Tensor, p: float) -> Tensor:
    grad_out, grad_x = grad_out.contiguous(), torch.empty_like(out)
    if out.numel():
        _relu_backward[(triton.cdiv(out.numel(), FLAT),)](out, grad_out, grad_x, out.numel(), _dropout(p)[1], FLAT)
    return grad_x


@relu_dropout_backward.register_fake
def _(out, grad_out, p):
    return out.new_empty(out.shape)


def _save_output(ctx, inputs, output) -> None:
    ctx.p = inputs[2]
    ctx.save_for_backward(output)


def _relu_gradient(ctx, grad: Tensor):
    return relu_dropout_backward(*ctx.saved_tensors, grad, ctx.p), None, None


relu_dropout.register_autograd(_relu_gradient, setup_context=_save_output)
