"""Jagged attention against what torch offers, in one process.

    python -m benchmarks.attention [--quick: bfloat16 only]

Needs a CUDA GPU. The floor is the time to read and write every operand once at the measured copy bandwidth. All but the
padded rows, whose boolean masks ask the device for their size, are timed as CUDA graphs, without the host.
"""

import sys

import torch
import torch.nn.functional as F

from benchmarks.timing import copy_bandwidth, heading, quantiles, replayed, row
from ops.attention import jagged_attention
from ops.jagged import JaggedTensor, lengths_to_offsets, row_indices

# How many users of Amazon Beauty (2014, 5-core) have a test history of 1, 2, .. items, the last 20 kept.
BEAUTY = [0, 0, 0, 7162, 4221, 2680, 1811, 1366, 881, 695, 558, 439, 361, 262, 207, 213, 141, 118, 112, 1136]
HEADS, DIM, RADIUS = 6, 64, 128


def beauty_lengths(users: int) -> torch.Tensor:
    """Tokens of histories drawn as in Beauty: a user token and four codes an item. [users] int64."""
    generator = torch.Generator().manual_seed(0)
    items = torch.multinomial(torch.tensor(BEAUTY, dtype=torch.float), users, replacement=True, generator=generator)
    return 1 + 4 * (items + 1)


def backward(function, leaves: list[torch.Tensor], grad: torch.Tensor):
    """A call of the function, then its gradients."""
    return lambda: torch.autograd.grad(function(), leaves, grad)


def compare(title: str, lengths: torch.Tensor, causal: bool, dtype: torch.dtype, bandwidth: float) -> None:
    total, longest, users = int(lengths.sum()), int(lengths.max()), len(lengths)
    offsets = lengths_to_offsets(lengths).cuda()
    packed = torch.randn(total, 3, HEADS, DIM, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(total, HEADS, DIM, device="cuda", dtype=dtype)
    bias = torch.randn(HEADS, 2 * RADIUS + 1, device="cuda")
    rows = JaggedTensor(packed, offsets, longest)
    size = grad.numel() * grad.element_size()
    floors = (4 * size / bandwidth * 1e6, 12 * size / bandwidth * 1e6)
    print(f"\n{title}: {total:,} tokens in {users:,} rows, longest {longest}, {HEADS} x {DIM}, {str(dtype)[6:]}, "
          f"{'causal' if causal else 'bidirectional'}; floor {floors[0]:.0f} / {floors[1]:.0f} us")  # fmt: skip
    print(f"  {'microseconds':<52}{'p20':>10}{'p50':>10}{'p80':>10}{'of limit':>9}")

    def jagged(bias=None):
        return jagged_attention(rows, None, bias, causal=causal, scale=DIM**-0.5).values

    both("jagged", jagged, [packed], grad, floors)
    both("jagged with bias", lambda: jagged(bias), [packed], grad, floors)
    bias.requires_grad_()
    both("jagged with bias and its gradient", lambda: jagged(bias), [packed, bias], grad, floors)
    bias.requires_grad_(False)
    leaves = [t.detach().clone().requires_grad_() for t in packed.unbind(1)]
    if dtype != torch.float32:
        attempt("torch varlen attention, no bias", varlen, rows, causal, leaves, grad, floors)
    attempt("compiled flex_attention with bias", flex, rows, causal, leaves, grad, floors, bias)
    attempt("padded attention with mask", padded, rows, causal, leaves, grad, floors, bias)


def both(name: str, attend, leaves: list[torch.Tensor], grad: torch.Tensor, floors, wrap=replayed) -> None:
    """A line for the forward pass and one for both."""
    row(f"{name}, forward", quantiles(wrap(attend)), floors[0])
    row(f"{name}, forward + backward", quantiles(wrap(backward(attend, leaves, grad))), floors[1])


def attempt(name: str, compare, *args) -> None:
    """What others offer may be missing or fail on a card: the comparison goes on without it."""
    try:
        compare(name, *args)
    except Exception as error:
        print(f"  {name}: {type(error).__name__}: {str(error)[:100]}")


def varlen(name, rows, causal, leaves, grad, floors) -> None:
    from torch.nn.attention.varlen import varlen_attn

    lengths, longest = rows.offsets.int(), rows.max_length
    (q, k, v), window = leaves, (-1, 0 if causal else -1)

    def attend():
        return varlen_attn(q, k, v, lengths, lengths, longest, longest, window_size=window)

    both(name, attend, leaves, grad, floors)


def flex(name, rows, causal, leaves, grad, floors, bias) -> None:
    from torch.nn.attention.flex_attention import FlexKernelOptions, create_block_mask, flex_attention

    total = len(grad)
    document = row_indices(rows.offsets, total)

    def visible(b, h, i, j):
        same = document[i] == document[j]
        return same & (i >= j) if causal else same

    def add_bias(score, b, h, i, j):
        return score + bias[h, (j - i).clamp(-RADIUS, RADIUS) + RADIUS]

    mask = torch.compile(create_block_mask)(visible, None, None, total, total)
    compiled = torch.compile(flex_attention)
    options: FlexKernelOptions = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32}
    options |= {"BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}

    def attend():
        q, k, v = (t.transpose(0, 1)[None] for t in leaves)
        out = compiled(q, k, v, score_mod=add_bias, block_mask=mask, kernel_options=options)
        return out[0].transpose(0, 1)

    both(name, attend, leaves, grad, floors)


def padded(name, rows, causal, leaves, grad, floors, bias) -> None:
    """Scaled dot-product attention with a mask on padded rows, the time to pad and unpad by boolean masks included."""
    length = -(-rows.max_length // 8) * 8
    places = torch.arange(length, device="cuda")
    real = places < rows.lengths[:, None]  # [B, M]
    if real.shape[0] * HEADS * length**2 * 2 > 40e9:
        raise ValueError("too large")
    distance = places - places[:, None]
    mask = bias[:, distance.clamp(-RADIUS, RADIUS) + RADIUS].to(grad.dtype)
    visible = real[:, None, None, :] & (distance <= 0) if causal else real[:, None, None, :]
    mask = mask.masked_fill(~visible, torch.finfo(grad.dtype).min)

    def pad(values):
        return values.new_zeros(*real.shape, *values.shape[1:]).index_put((real,), values).transpose(1, 2)

    def attend():
        q, k, v = map(pad, leaves)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)[real]

    both(name, attend, leaves, grad, floors, wrap=lambda function: function)


def main() -> None:
    heading()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s")
    cases = [("Amazon Beauty", beauty_lengths(4096)), ("MovieLens", torch.full((256,), 800))]
    for dtype in (torch.bfloat16,) if "--quick" in sys.argv else (torch.bfloat16, torch.float16, torch.float32):
        for title, lengths in cases:
            for causal in (False, True):
                compare(title, lengths, causal, dtype, bandwidth)


if __name__ == "__main__":
    main()
