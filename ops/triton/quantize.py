"""Residual quantization of all levels in one kernel, and its gradient in another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # numbers of a codebook that a program compares its rows with at a time


@triton.jit
def _forward(
    x_ptr, books_ptr, total_ptr, ids_ptr, loss_ptr, B, V, D, beta,
    L: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ids_l = argmin_v |e_v|^2 - 2 r_l'e_v, of equal ones the first; r_(l+1) = r_l - e_l; total = sum of e_l;
    loss = (1 + beta) * sum of |r_(l+1)|^2."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < B) & (columns[None, :] < D)
    left = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    loss = tl.zeros([BLOCK_B], tl.float32)
    for level in range(L):
        book = books_ptr + level * V * D
        best = tl.full([BLOCK_B], float("inf"), tl.float32)
        ids = tl.zeros([BLOCK_B], tl.int32)
        for start in range(0, V, BLOCK_V):
            numbers = start + tl.arange(0, BLOCK_V)
            mask = (numbers[:, None] < V) & (columns[None, :] < D)
            codes = tl.load(book + numbers[:, None] * D + columns[None, :], mask=mask, other=0.0)
            products = tl.dot(left, tl.trans(codes), input_precision="ieee")
            distance = tl.sum(codes * codes, 1)[None, :] - 2 * products
            distance = tl.where(numbers[None, :] < V, distance, float("inf"))
            nearest = tl.min(distance, 1)
            number = tl.argmin(distance, 1, tie_break_left=True) + start
            ids = tl.where(nearest < best, number, ids)
            best = tl.minimum(nearest, best)
        code = tl.load(book + ids[:, None] * D + columns[None, :], mask=inside, other=0.0)
        left -= code
        total += code
        loss += (1 + beta) * tl.sum(left * left, 1)
        tl.store(ids_ptr + rows * L + level, ids.to(tl.int64), mask=rows < B)
    tl.store(total_ptr + rows[:, None] * D + columns[None, :], total, mask=inside)
    tl.store(loss_ptr + rows, loss, mask=rows < B)


@triton.jit
def _backward(
    x_ptr, books_ptr, ids_ptr, grad_total_ptr, grad_loss_ptr, grad_x_ptr, grad_books_ptr, B, V, D, beta,
    L: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With g the gradient of total, c that of loss, and M_l the constant map of r_l to its code (a scaled
    rotation, the identity where none is defined):
    G_l = G_(l+1) + M_l' (g - G_(l+1)) + 2 beta c r_(l+1), and d e_l = -2 c r_(l+1)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < B) & (columns[None, :] < D)
    place = rows[:, None] * D + columns[None, :]
    left = tl.load(x_ptr + place, mask=inside, other=0.0)
    for level in range(L):
        ids = tl.load(ids_ptr + rows * L + level, mask=rows < B, other=0)
        left -= tl.load(books_ptr + level * V * D + ids[:, None] * D + columns[None, :], mask=inside, other=0.0)
    grad = tl.load(grad_total_ptr + place, mask=inside, other=0.0)
    c = tl.load(grad_loss_ptr + rows, mask=rows < B, other=0.0)[:, None]
    grad_r = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for back in range(L):
        level = L - 1 - back
        ids = tl.load(ids_ptr + rows * L + level, mask=rows < B, other=0)
        at = level * V * D + ids[:, None] * D + columns[None, :]
        code = tl.load(books_ptr + at, mask=inside, other=0.0)
        r = left + code
        tl.atomic_add(grad_books_ptr + at, -2 * c * left, mask=inside, sem="relaxed")
        passed = grad - grad_r
        norm_r = tl.sqrt(tl.sum(r * r, 1))[:, None]
        norm_e = tl.sqrt(tl.sum(code * code, 1))[:, None]
        u = r / tl.maximum(norm_r, 1e-8)
        q = code / tl.maximum(norm_e, 1e-8)
        norm_w = tl.sqrt(tl.sum((u + q) * (u + q), 1))[:, None]
        w = (u + q) / tl.maximum(norm_w, 1e-8)
        turned = passed - 2 * w * tl.sum(w * passed, 1)[:, None] + 2 * u * tl.sum(q * passed, 1)[:, None]
        defined = (norm_w > 1e-4) & (norm_r > 1e-8) & (norm_e > 1e-8)
        passed = tl.where(defined, norm_e / tl.maximum(norm_r, 1e-8) * turned, passed)
        grad_r += passed + 2 * beta * c * left
        left = r
    tl.store(grad_x_ptr + place, grad_r, mask=inside)


def _rows(batch: int) -> int:
    """Rows of a program: few while not every multiprocessor has work, more where reading the codebooks counts."""
    return 4 if batch < 2048 else 16


@torch.library.custom_op("retrieval::residual_quantize", mutates_args=())
def residual_quantize(x: Tensor, books: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `modules.rqvae.RqVae.quantize` computes in training, with the nearest codes and the rotation trick.

    x: [B, D]; books: [L, V, D], codebooks; both float32 and contiguous. beta: commitment weight.
    Returns total [B, D], the sum of the codes; ids [B, L] int64; loss [B], summed over levels. The gradient of the
    codebooks is summed by atomics, so its last bits vary.
    """
    B, D = x.shape
    L, V, _ = books.shape
    total, loss = torch.empty_like(x), x.new_empty(B)
    ids = torch.empty(B, L, dtype=torch.int64, device=x.device)
    block_d = max(16, triton.next_power_of_2(D))
    block_v = max(16, min(TILE // block_d, 256, triton.next_power_of_2(V)))
    grid = (triton.cdiv(B, _rows(B)),)
    _forward[grid](x, books, total, ids, loss, B, V, D, beta, L, _rows(B), block_v, block_d, num_warps=8)
    return total, ids, loss


@residual_quantize.register_fake
def _(x: Tensor, books: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.empty(len(x), len(books), dtype=torch.int64, device=x.device)
    return torch.empty_like(x), ids, x.new_empty(len(x))


@torch.library.custom_op("retrieval::residual_quantize_backward", mutates_args=())
def residual_quantize_backward(
    x: Tensor, books: Tensor, ids: Tensor, grad_total: Tensor, grad_loss: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, D] and books [L, V, D]; arguments and results of `residual_quantize`."""
    B, D = x.shape
    L, V, _ = books.shape
    grad_x, grad_books = torch.empty_like(x), torch.zeros_like(books)
    block_d = max(16, triton.next_power_of_2(D))
    grid = (triton.cdiv(B, _rows(B)),)
    arguments = (x, books, ids, grad_total, grad_loss, grad_x, grad_books)
    _backward[grid](*arguments, B, V, D, beta, L, _rows(B), block_d)
    return grad_x, grad_books


@residual_quantize_backward.register_fake
def _(x: Tensor, books: Tensor, *_) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(books)


def _save(ctx, inputs, output) -> None:
    x, books, ctx.beta = inputs
    ctx.save_for_backward(x, books, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_total: Tensor, _, grad_loss: Tensor):
    grads = (grad_total.contiguous(), grad_loss.contiguous())
    return *residual_quantize_backward(*ctx.saved_tensors, *grads, ctx.beta), None


residual_quantize.register_autograd(_gradients, setup_context=_save)
