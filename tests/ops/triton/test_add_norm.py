"""The fused elementwise kernels against torch in float64, with the dropout masks that they show."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

kernels = pytest.importorskip("ops.triton.add_norm")
SEED = 6_148_914_691_236_517_205


def seed(first: int = SEED) -> torch.Tensor:
    return torch.tensor([first, 77], device=DEVICE)


def masks(shape: tuple[int, ...], p: float, seed: torch.Tensor) -> list[torch.Tensor]:
    """Which numbers the branch's dropout keeps, and which that of the end."""
    ones, weight = torch.ones(shape, device=DEVICE), torch.ones(shape[-1], device=DEVICE)
    outs = (kernels.add_norm(x, ones, weight, seed, p, True, 1e-6, torch.float32) for x in (None, ones))
    return [out[n] != 0 for n, out in enumerate(outs)]


def twin(x, branch, weight, p, last, eps):
    kept, kept_last = masks(branch.shape, p, seed()) if p else (1, 1)
    hidden = branch * kept / (1 - p)
    hidden = hidden if x is None else x + hidden
    normed = F.rms_norm(hidden, weight.shape, weight, eps)
    return hidden, normed * kept_last / (1 - p) if last else normed


def close(narrow: torch.Tensor, wide: torch.Tensor, dtype: torch.dtype) -> None:
    size = max(float(wide.detach().abs().max()), 1.0) if wide.numel() else 1.0
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("has_x", [True, False])
@pytest.mark.parametrize("shape", [(1, 16), (37, 24), (3, 5, 96), (0, 32), (30, 384)])
def test_output_and_gradients(shape, has_x, p, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PARTS", 3)  # so that a program sums several parts of the weight's gradient
    for last in (False, True):
        check(shape, has_x, p, torch.float32, torch.float32, last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", DTYPES)
def test_dtypes(residual, dtype):
    check((50, 40), True, 0.2, residual, dtype)


def check(shape, has_x, p, residual, dtype, last=False) -> None:
    wide = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    wide = [t.to(kind).double().requires_grad_() for t, kind in zip(wide, (residual, dtype), strict=True)]
    weight = torch.rand(shape[-1], dtype=torch.float64, device=DEVICE).float().double().requires_grad_()
    narrow = [t.detach().to(kind).requires_grad_() for t, kind in zip(wide, (residual, dtype), strict=True)]
    gain = weight.detach().float().requires_grad_()
    results = []
    for x, branch, w, function in ((*wide, weight, None), (*narrow, gain, kernels.add_norm)):
        x = x if has_x else None
        if function is None:
            hidden, normed = twin(x, branch, w, p, last, 1e-6)
        else:
            hidden, normed = function(x, branch, w, seed() if p else None, p, last, 1e-6, dtype)
            assert hidden.dtype == (residual if has_x else dtype) and normed.dtype == dtype
        torch.manual_seed(0)
        weights = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for _ in range(2)]
        loss = sum((out.double() * by).sum() for out, by in zip((hidden, normed), weights, strict=True))
        results.append([hidden, normed, *torch.autograd.grad(loss, [*([x] if has_x else []), branch, w])])
    coarse = max(residual, dtype, key=TOLERANCE.get)
    for mine, theirs in zip(results[1], results[0], strict=True):
        close(mine, theirs, coarse)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(used):
    tensors = [torch.randn(6, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.rand(16, device=DEVICE, requires_grad=True)
    theirs = torch.autograd.grad(twin(*tensors, weight, 0.0, False, 1e-6)[used].sum(), tensors)
    out = kernels.add_norm(*tensors, weight, None, 0.0, False, 1e-6, torch.float32)
    mine = torch.autograd.grad(out[used].sum(), tensors)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (0, 8)])
def test_relu_and_dropout(shape, dtype):
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    p = 0.4
    keep = kernels.relu_dropout(torch.ones_like(x), seed(), p) > 0
    wide = x.detach().double().requires_grad_()
    expected = wide.relu() * keep / (1 - p)
    out = kernels.relu_dropout(x.T.contiguous().T, seed(), p)  # not contiguous
    by = torch.randn(shape, device=DEVICE).to(dtype)
    assert out.dtype == dtype
    close(out, expected, dtype)
    close(torch.autograd.grad((out * by).sum(), x)[0], torch.autograd.grad((expected * by).sum(), wide)[0], dtype)


def test_what_is_not_a_number_passes():
    x = torch.full((2048,), float("nan"), device=DEVICE, requires_grad=True)
    out = kernels.relu_dropout(x, seed(), 0.4)
    passed = out.isnan()
    assert 0.5 < float(passed.double().mean()) < 0.7 and not out[~passed].any()
    grad = torch.autograd.grad(out, x, torch.ones_like(out))[0]
    torch.testing.assert_close(grad, passed / 0.6)


def test_masks_drop_the_share_they_should_and_differ_by_seed_row_and_column():
    shape = 60, 500
    mask, last = masks(shape, 0.3, seed())
    flat = kernels.relu_dropout(torch.ones(shape, device=DEVICE), seed(), 0.3) > 0
    others = [masks(shape, 0.3, seed(number))[0] for number in (SEED + 1, SEED + 2**33)]
    for one in (mask, last, flat, *others):
        assert abs(float(one.double().mean()) - 0.7) < 5 * (0.21 / mask.numel()) ** 0.5
    for other in (last, flat, *others, mask.roll(1, 0), mask.roll(1, 1)):
        agree = (mask == other).double().mean()
        assert abs(float(agree) - 0.58) < 5 * (0.58 * 0.42 / mask.numel()) ** 0.5


def test_the_operators_are_registered_completely():
    x, branch = torch.randn(5, 16, device=DEVICE), torch.randn(5, 16, device=DEVICE, requires_grad=True)
    weight = torch.rand(16, device=DEVICE)
    torch.library.opcheck(kernels.add_norm, (x, branch, weight, seed(), 0.2, True, 1e-6, torch.float32))
    torch.library.opcheck(kernels.relu_dropout, (branch, seed(), 0.2))
