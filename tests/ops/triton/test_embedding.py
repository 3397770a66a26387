"""The embedding of codes and its gradient against the twin in float64."""

import pytest
import torch

from ops import reference
from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

kernels = pytest.importorskip("ops.triton.embedding")

SIZES = (9, 256, 2, 70)
STARTS = [0, 9, 265, 267]


def draw(tokens: int, levels: int, width: int, buckets: int) -> tuple[torch.Tensor, ...]:
    """Codes [T, l] of which most of a level are one, starts, and both tables in float64."""
    codes = torch.stack([torch.randint(0, size, (tokens,), device=DEVICE) for size in SIZES[:levels]], 1)
    codes[torch.rand(codes.shape, device=DEVICE) < 0.5] = 1
    table = torch.randn(sum(SIZES), width, dtype=torch.float64, device=DEVICE)
    prefixes = torch.randn(buckets, width, dtype=torch.float64, device=DEVICE) if buckets else None
    return codes, torch.tensor(STARTS, device=DEVICE), table, prefixes


def check(codes, starts, table, prefixes, dtype, stream=None) -> list[torch.Tensor]:
    """Compares, and returns the kernel's vectors, in the dtype `stream`, and the gradients."""
    stream = stream or dtype
    tables = [t for t in (table, prefixes) if t is not None]
    wide = [t.to(dtype).double().requires_grad_() for t in tables]
    narrow = [t.to(dtype).requires_grad_() for t in tables]
    pad = [None] * (2 - len(tables))
    expected = reference.embed_codes(codes, starts, *wide, *pad)
    out = kernels.embed_codes(codes, starts, *narrow, *pad, stream)[0]
    weights = torch.randn(expected.shape, dtype=torch.float64, device=DEVICE).to(stream)
    theirs = torch.autograd.grad((expected * weights.double()).sum(), wide, allow_unused=True)
    mine = torch.autograd.grad((out * weights).sum(), narrow)
    for a, b in zip((out, *mine), (expected, *theirs), strict=True):
        assert a.dtype == (stream if a is out else dtype)
        b = torch.zeros_like(a).double() if b is None else b
        size = max(float(b.detach().abs().max()), 1.0) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[a.dtype] * size)
        if a is not out:
            assert not a[(b == 0).all(1)].any(), "rows of no code are exactly zero"
    return [out, *mine]


@pytest.mark.parametrize("buckets", [0, 1, 37, 1000])
@pytest.mark.parametrize("tokens", [0, 1, 50])
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_vectors_and_gradients(levels, tokens, buckets):
    torch.manual_seed(0)
    check(*draw(tokens, levels, 24, buckets), dtype=torch.float32)


@pytest.mark.parametrize("width", [1, 130, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_widths(dtype, width):
    check(*draw(40, 3, width, 11), dtype=dtype)


@pytest.mark.parametrize("stream", DTYPES)
def test_vectors_may_be_narrower_than_the_tables(stream):
    check(*draw(40, 3, 24, 11), dtype=torch.float32, stream=stream)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_codes_may_be_views_of_any_integers(dtype):
    codes, *others = draw(33, 4, 8, 19)
    check(codes.to(dtype)[:, :-1], *others, dtype=torch.float32)
    check(codes.to(dtype).T.contiguous().T, *others, dtype=torch.float32)


@pytest.mark.parametrize("extra", [0, 1, 3, 64])
def test_runs_over_many_stretches(extra):
    """Runs that end where a stretch ends, one after it, and that are longer than one round of parts."""
    tokens = kernels.STRETCH * (kernels.PARTS + 2) + extra
    check(torch.ones(tokens, 1, dtype=torch.int64, device=DEVICE), *draw(1, 1, 3, 0)[1:], dtype=torch.float32)
    codes = (torch.arange(tokens, device=DEVICE) >= kernels.STRETCH * 3 + extra).long()[:, None]
    check(codes, *draw(1, 1, 3, 0)[1:], dtype=torch.float32)


@pytest.mark.parametrize("buckets", [65_536, 1_000_003, 1])
def test_buckets_are_those_of_the_hash(buckets):
    """Over codes whose products need 64 bits; the table is all that has to be small."""
    codes = torch.randint(0, 2**20, (200, 3), device=DEVICE)
    table = torch.zeros(1, 1, device=DEVICE).expand(2**20, 1)
    prefixes = torch.zeros(1, 1, device=DEVICE).expand(buckets, 1)
    starts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    rows = kernels.embed_codes(codes, starts, table, prefixes, table.dtype)[1]
    expected = reference.hash_prefixes(codes)[:, 1:] % buckets
    assert torch.equal(rows[:, 3:].long(), 2**20 + expected) and torch.equal(rows[:, :3].long(), codes)


def test_equal_inputs_give_equal_bits():
    arguments = draw(300, 4, 16, 50)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(check(*arguments, dtype=torch.float32))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_operator_is_registered_completely():
    codes, starts, *tables = draw(10, 3, 8, 19)
    table, prefixes = (t.float().requires_grad_() for t in tables)
    torch.library.opcheck(kernels.embed_codes, (codes, starts, table, prefixes, torch.bfloat16))
    torch.library.opcheck(kernels.embed_codes, (codes, starts, table, None, torch.float32))
