"""Sums of rows, rows taken, and the gradients of their tables against dense products in float64: the kernels, and the
twins that run on a CPU."""

import pytest
import torch
import torch.nn.functional as F

import ops.sums
from ops.sums import RowSums, sum_rows, take_rows
from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

kernels = pytest.importorskip("ops.triton.sums")


@pytest.fixture(params=["kernel", "twin"])
def device(request, monkeypatch) -> str:
    """Where a test runs; the kernels run through the interpreter where there is no GPU."""
    if request.param == "twin":
        return "cpu"
    monkeypatch.setattr(ops.sums, "has_kernel", lambda device, dtype: True)
    return DEVICE


def skewed(M: int, k: int, R: int) -> torch.Tensor:
    """Rows [M, k] in [0, R), half of which are one; the last row is in none."""
    rows = torch.randint(0, max(R - 1, 1), (M, k))
    return rows.masked_fill(torch.rand(M, k) < 0.5, min(1, R - 1))


def check(operation, table, rows, dtype, expected_dtype=None) -> list[torch.Tensor]:
    """Compares with a product by the matrix that counts the rows; returns the result and the gradient."""
    wide, narrow = table.to(dtype).double().requires_grad_(), table.to(dtype).requires_grad_()
    expected = F.one_hot(rows, len(table)).sum(1).double() @ wide
    out = operation(narrow)
    weights = torch.randn(expected.shape, device=table.device).to(out.dtype)
    (theirs,) = torch.autograd.grad((expected * weights.double()).sum(), wide)
    (mine,) = torch.autograd.grad((out * weights).sum(), narrow)
    assert (out.dtype, mine.dtype) == (expected_dtype or dtype, dtype)
    for a, b in ((out, expected), (mine, theirs)):
        size = max(float(b.detach().abs().max()), 1.0) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[a.dtype] * size)
    assert not mine[theirs.eq(0).all(1)].any(), "rows that are not used get exactly zero"
    return [out, mine]


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("M", [0, 1, 150])
def test_sums_and_gradients(device, M, k):
    rows, table = skewed(M, k, 37).to(device), torch.randn(37, 24, device=device)
    check(lambda table: sum_rows(table, RowSums.of(rows)), table, rows, torch.float32)
    check(lambda table: take_rows(table, rows[:, -1]), table, rows[:, -1:], torch.float32)  # a view of a matrix


@pytest.mark.parametrize("width", [1, 130, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_widths(device, dtype, width):
    rows, table = skewed(40, 3, 11).to(device), torch.randn(11, width, device=device)
    check(lambda table: sum_rows(table, RowSums.of(rows)), table, rows, dtype)
    check(lambda table: take_rows(table, rows[:, 0].int()), table, rows[:, :1], dtype)


def test_sums_start_the_residual_stream(device):
    """In bfloat16 where that is autocast's; rows that are taken keep their dtype."""
    rows, table = skewed(40, 3, 11).to(device), torch.randn(11, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = sum_rows(table, RowSums.of(rows))
        assert out.dtype == torch.bfloat16 and take_rows(table, rows[:, 0]).dtype == torch.float32
    torch.testing.assert_close(out.float(), table[rows].sum(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("extra", [0, 1, 3, 8])
def test_runs_over_many_stretches(extra, monkeypatch):
    """Runs that end where a stretch ends, one after it, and that are longer than one round of parts."""
    monkeypatch.setattr(kernels, "STRETCH", 8)
    monkeypatch.setattr(kernels, "PARTS", 4)
    n = kernels.STRETCH * (kernels.PARTS + 2) + extra
    table = torch.randn(3, 2, device=DEVICE)
    for begins in (0, kernels.STRETCH * 3 + extra):
        rows = (torch.arange(n, device=DEVICE) >= begins).long()[:, None]
        check(lambda t, rows=rows: kernels.sum_rows(t, rows, None, None, t.dtype), table, rows, torch.float32)


def test_equal_inputs_give_equal_bits(device):
    rows, table = skewed(100, 4, 50).to(device), torch.randn(50, 16, device=device)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(check(lambda table: sum_rows(table, RowSums.of(rows)), table, rows, torch.float32))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_structure_is_sorted_once():
    sums = RowSums.of(torch.tensor([[2, 0], [0, 2], [1, 0]], device=DEVICE))
    assert sums.keys.tolist() == [0, 0, 0, 1, 2, 2] and sums.order.tolist() == [1, 2, 5, 4, 0, 3]
    assert {t.dtype for t in (sums.rows, sums.keys, sums.order)} == {torch.int32}


def test_the_operator_is_registered_completely():
    sums = RowSums.of(skewed(10, 3, 7).to(DEVICE))
    table = torch.randn(7, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels.sum_rows, (table, sums.rows, sums.keys, sums.order, torch.bfloat16))
    torch.library.opcheck(kernels.sum_rows, (table, sums.rows[:, :1], None, None, torch.float32))
