"""Jagged attention against what torch offers, in one process.

    python -m benchmarks.attention [--quick: bfloat16 only]

Needs a CUDA GPU. The floor is the time to read and write every operand once at the measured copy bandwidth.
"""

import sys

import torch
import torch.nn.functional as F

from benchmarks.timing import copy_bandwidth, heading, quantiles, row
from ops.jagged import JaggedTensor, jagged_attention, lengths_to_offsets, row_indices

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
    q, k, v, grad = (torch.randn(total, HEADS, DIM, device="cuda", dtype=dtype) for _ in range(4))
    bias = torch.randn(HEADS, 2 * RADIUS + 1, device="cuda")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    rows = JaggedTensor(q, offsets, longest)
    size = total * HEADS * DIM * q.element_size()
    floor, floor_both = 4 * size / bandwidth * 1e6, 12 * size / bandwidth * 1e6
    print(f"\n{title}: {total:,} tokens in {users:,} rows, longest {longest}, {HEADS} x {DIM}, {str(dtype)[6:]}, "
          f"{'causal' if causal else 'bidirectional'}; floor {floor:.0f} / {floor_both:.0f} us")  # fmt: skip
    print(f"  {'microseconds':<52}{'p20':>10}{'p50':>10}{'p80':>10}{'of limit':>9}")

    def jagged(bias):
        return jagged_attention(rows, rows.with_values(k), v, bias, causal=causal, scale=DIM**-0.5).values

    row("jagged, forward", quantiles(lambda: jagged(None)), floor)
    row("jagged, forward + backward", quantiles(backward(lambda: jagged(None), leaves, grad)), floor_both)
    row("jagged with bias, forward", quantiles(lambda: jagged(bias)), floor)
    row("jagged with bias, forward + backward", quantiles(backward(lambda: jagged(bias), leaves, grad)), floor_both)
    bias.requires_grad_()
    both = quantiles(backward(lambda: jagged(bias), [*leaves, bias], grad))
    row("jagged with bias, forward + backward, bias gradient", both, floor_both)
    bias.requires_grad_(False)
    if dtype != torch.float32:
        varlen(offsets, longest, causal, q, k, v, grad, leaves, floor, floor_both)
    flex(offsets, causal, q, k, v, bias, grad, leaves, floor, floor_both)
    padded(rows, causal, q, k, v, bias, grad, leaves, floor, floor_both)


def varlen(offsets, longest, causal, q, k, v, grad, leaves, floor, floor_both) -> None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        print("  torch varlen attention: not in this version")
        return
    lengths = offsets.int()
    options = {"window_size": (-1, 0)} if causal else {}

    def attend():
        return varlen_attn(q, k, v, lengths, lengths, longest, longest, **options)

    try:
        row("torch varlen attention, no bias, forward", quantiles(attend), floor)
        row(
            "torch varlen attention, no bias, forward + backward", quantiles(backward(attend, leaves, grad)), floor_both
        )
    except Exception as error:  # the comparison goes on without it
        print(f"  torch varlen attention: {type(error).__name__}: {str(error)[:100]}")


def flex(offsets, causal, q, k, v, bias, grad, leaves, floor, floor_both) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = row_indices(offsets, q.shape[0])

    def visible(b, h, i, j):
        same = document[i] == document[j]
        return same & (i >= j) if causal else same

    def add_bias(score, b, h, i, j):
        return score + bias[h, (j - i).clamp(-RADIUS, RADIUS) + RADIUS]

    try:
        mask = torch.compile(create_block_mask)(visible, None, None, q.shape[0], q.shape[0])
        compiled = torch.compile(flex_attention)

        def attend():
            heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
            return compiled(*heads, score_mod=add_bias, block_mask=mask)[0].transpose(0, 1)

        row("compiled flex_attention with bias, forward", quantiles(attend), floor)
        both = quantiles(backward(attend, leaves, grad))
        row("compiled flex_attention with bias, forward + backward", both, floor_both)
    except Exception as error:
        print(f"  flex_attention: {type(error).__name__}: {str(error)[:100]}")


def padded(rows, causal, q, k, v, bias, grad, leaves, floor, floor_both) -> None:
    """Scaled dot-product attention with a mask on padded rows, the time to pad and unpad by boolean masks included."""
    length = -(-rows.max_length // 8) * 8
    places = torch.arange(length, device="cuda")
    real = places < rows.lengths[:, None]  # [B, M]
    if real.shape[0] * HEADS * length**2 * 2 > 40e9:
        print("  padded attention with mask: too large")
        return
    distance = places - places[:, None]
    mask = bias[:, distance.clamp(-RADIUS, RADIUS) + RADIUS].to(q.dtype)
    visible = real[:, None, None, :] & (distance <= 0) if causal else real[:, None, None, :]
    mask = mask.masked_fill(~visible, torch.finfo(q.dtype).min)

    def pad(values):
        return values.new_zeros(*real.shape, *values.shape[1:]).index_put((real,), values).transpose(1, 2)

    def attend():
        return F.scaled_dot_product_attention(pad(q), pad(k), pad(v), mask).transpose(1, 2)[real]

    row("padded attention with mask, forward", quantiles(attend), floor)
    row("padded attention with mask, forward + backward", quantiles(backward(attend, leaves, grad)), floor_both)


def main() -> None:
    heading()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s")
    cases = [("Amazon Beauty", beauty_lengths(4096)), ("MovieLens", torch.full((256,), 800))]
    for dtype in (torch.bfloat16,) if "--quick" in sys.argv else (torch.bfloat16, torch.float32):
        for title, lengths in cases:
            for causal in (False, True):
                compare(title, lengths, causal, dtype, bandwidth)


if __name__ == "__main__":
    main()
