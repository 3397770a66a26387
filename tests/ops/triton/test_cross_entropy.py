"""The cross-entropy over a catalogue of vectors against torch's own in float64, over a matrix of logits: the kernel,
and the twin that runs on a CPU."""

import pytest
import torch
import torch.nn.functional as F

import ops.cross_entropy
from ops.cross_entropy import Seen, linear_cross_entropy
from tests.ops.triton.device import DEVICE, DTYPES, TOLERANCE

kernels = pytest.importorskip("ops.triton.cross_entropy")


@pytest.fixture(params=["kernel", "twin"])
def device(request, monkeypatch) -> str:
    """Where a test runs; the kernel runs through the interpreter where there is no GPU. Chunks are of a few targets."""
    monkeypatch.setattr(ops.cross_entropy, "CHUNK", 1000)
    if request.param == "twin":
        return "cpu"
    monkeypatch.setattr(ops.cross_entropy, "has_kernel", lambda device, dtype: True)
    return DEVICE


def draw(P: int, N: int, d: int, device: str) -> tuple[torch.Tensor, ...]:
    """x, vectors, targets, and weights of which every third is 0."""
    x, vectors = torch.randn(P, d, device=device), torch.randn(N, d, device=device)
    weights = torch.rand(P, device=device) / max(P, 1)
    weights[::3] = 0
    return x, vectors, torch.randint(0, N, (P,), device=device), weights


def draw_seen(targets: torch.Tensor, N: int, longest: int = 20, bias: float = -2.5) -> Seen:
    """Ranges of different items, none of every fourth target; of every third the first item is the target itself. Every
    fifth number is negative, and others lie between the ranges."""
    items, first, last = [], [], []
    for p, target in enumerate(targets.tolist()):
        own = torch.randperm(N)[: longest - p % 3].tolist()
        if p % 3 == 1:
            own = [target, *(n for n in own if n != target)]
        own[4::5] = [-1 - p] * len(own[4::5])
        first.append(len(items) + 2)
        items += [0, N - 1, *(own if p % 4 else [])]
        last.append(len(items))
    numbers = [torch.tensor(n, dtype=torch.int32, device=targets.device) for n in (first, last, items)]
    return Seen(*numbers, torch.tensor([bias], device=targets.device))


def oracle(x, vectors, bias, targets, weights, smoothing=0.0, seen=None) -> torch.Tensor:
    logits = x @ vectors.T
    if seen is not None:
        mask = torch.zeros_like(logits)
        for p, (first, last) in enumerate(zip(seen.first.tolist(), seen.last.tolist(), strict=True)):
            mask[p, [n for n in seen.items[first:last].tolist() if n >= 0]] = 1
        logits = logits + bias * mask
    return weights @ F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")


def check(
    x, vectors, targets, weights, smoothing=0.0, seen=None, dtype=torch.float32, scale=1.0, tolerance=None
) -> list[torch.Tensor]:
    """Compares the loss and, where it is scaled before the backward pass, the gradients; returns them. All must be the
    same bit for bit if they are computed once more."""
    narrow = [t.detach().to(dtype).requires_grad_() for t in (x, vectors)]
    bias = (seen.bias if seen is not None else torch.zeros(1, device=x.device)).detach().requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (*narrow, bias)]
    given = Seen(seen.first, seen.last, seen.items, bias) if seen is not None else None

    def once() -> list[torch.Tensor]:
        loss = linear_cross_entropy(*narrow, targets, weights, smoothing, given)
        return [loss, *torch.autograd.grad(loss * scale, [*narrow, bias][: 3 if seen is not None else 2])]

    mine = once()
    expected = oracle(*wide, targets, weights.double(), smoothing, seen)
    theirs = torch.autograd.grad(expected * scale, wide, allow_unused=True)
    assert mine[0].dtype == torch.promote_types(dtype, torch.float32) and mine[0].shape == ()
    for a, b in zip(mine, (expected, *theirs), strict=False):
        size = max(float(b.detach().abs().max()), scale * float(weights.max()))
        torch.testing.assert_close(a.double(), b, rtol=0, atol=(tolerance or 2 * TOLERANCE[dtype]) * size)
    assert [t.dtype for t in mine[1:]] == [dtype, dtype, bias.dtype][: len(mine) - 1]
    assert not mine[1][weights == 0].any(), "a weight of 0 gives no gradient"
    assert all(torch.equal(a, b) for a, b in zip(mine, once(), strict=True))
    return mine


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("P", [1, 13])
@pytest.mark.parametrize("N", [1, 77, 300])
def test_loss_and_gradients(device, N, P, smoothing):
    x, vectors, targets, weights = draw(P, N, 17, device)
    weights[0] = 1
    check(x, vectors, targets, weights, smoothing)
    check(x, vectors, targets, weights, smoothing, draw_seen(targets, N))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_rows_of_several_blocks(device, smoothing):
    x, vectors, targets, weights = draw(5, kernels.BLOCK + 1001, 16, device)
    check(x, vectors, targets, weights, smoothing, draw_seen(targets, len(vectors), 2 * kernels.ITEMS + 7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_scaled_gradients(device, dtype):
    """A loss scaler's factor reaches gradients that float16 could not hold without it."""
    x, vectors, targets, weights = draw(20, 130, 24, device)
    arguments = (targets, weights / 1e5, 0.1, draw_seen(targets, 130))
    check(x, vectors, *arguments, dtype=dtype, scale=65_536.0)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_leaves_out_what_all_vectors_share(device, dtype):
    """Logits of thousands lose nothing to rounding, and the gradient has no part that all vectors share."""
    x, vectors, targets, weights = draw(40, 130, 24, device)
    shifted = (vectors + 300).requires_grad_()
    with torch.autocast(device, dtype):
        loss = linear_cross_entropy(x, shifted, targets, weights, 0.1)
    expected = oracle(x.double(), vectors.double(), None, targets, weights.double(), 0.1)
    torch.testing.assert_close(loss.double(), expected, rtol=2 * TOLERANCE[dtype], atol=0)
    [gradient] = torch.autograd.grad(loss, shifted)
    assert float(gradient.sum(0).abs().max()) < 1e-5 * float(gradient.abs().max())


def test_the_twin_in_float64(monkeypatch):
    monkeypatch.setattr(ops.cross_entropy, "CHUNK", 1000)
    x, vectors, targets, weights = draw(20, 130, 24, "cpu")
    seen = draw_seen(targets, 130)
    seen = Seen(seen.first, seen.last, seen.items, seen.bias[0].double())
    check(x, vectors, targets, weights, 0.1, seen, dtype=torch.float64, tolerance=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_stay_finite(device, dtype):
    """Products that float16 rounds to infinity are taken as its largest number, with and without a bias."""
    x, vectors = 400 * torch.eye(3, 16, device=device), 400 * torch.eye(9, 16, device=device)
    vectors[8] = -vectors[1]
    weights, targets = torch.ones(3, device=device), torch.tensor([0, 2, 8], device=device)
    first = torch.tensor([0, 3, 5], device=device)
    items = torch.tensor([0, 1, 2, 1, 8, 2], device=device)
    centred = vectors - vectors.mean(0) if dtype == torch.float16 else vectors  # no difference where all is held
    logits = (x @ centred.T).double().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    expected = F.cross_entropy(logits, targets, reduction="sum").item()
    for value in (-30.0, 30.0):
        leaves = [t.to(dtype).requires_grad_() for t in (x, vectors)]
        bias = torch.tensor(value, device=device, requires_grad=True)
        for seen in (None, Seen(first, first + torch.tensor([3, 2, 1], device=device), items, bias)):
            loss = linear_cross_entropy(*leaves, targets, weights, 0.0, seen)
            loss.backward()
            torch.testing.assert_close(loss.item(), expected, rtol=1e-2, atol=0)
        assert all(t.grad.isfinite().all() for t in (*leaves, bias))


def test_garbage_of_weight_zero_does_no_harm(device):
    x, vectors, targets, weights = draw(12, 50, 16, device)
    loss, dx, dvectors = check(x, vectors, targets, weights)
    x[::3] = 1e4
    assert all(
        torch.equal(a, b) for a, b in zip(check(x, vectors, targets, weights), (loss, dx, dvectors), strict=True)
    )


def test_no_targets(device):
    x, vectors, targets, weights = draw(0, 50, 16, device)
    leaves, seen = [x.requires_grad_(), vectors.requires_grad_()], draw_seen(targets, 50)
    seen.bias.requires_grad_()
    loss = linear_cross_entropy(*leaves, targets, weights, 0.1, seen)
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 16) and not vectors.grad.any() and seen.bias.grad == 0


def test_without_gradients_the_loss_is_the_same(device):
    x, vectors, targets, weights = draw(20, 50, 16, device)
    others = vectors, targets, weights, 0.1, draw_seen(targets, 50)
    expected = linear_cross_entropy(x.clone().requires_grad_(), *others)
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), *others)
    assert not loss.requires_grad and torch.equal(loss, expected)


def test_one_leaf(device):
    x, vectors, targets, weights = draw(20, 50, 16, device)
    seen = draw_seen(targets, 50)
    expected = check(x, vectors, targets, weights, 0.1, seen)
    for leaf, gradient in ((vectors.clone(), expected[2]), (seen.bias, expected[3])):
        leaf.requires_grad_()
        linear_cross_entropy(x, leaf if leaf is not seen.bias else vectors, targets, weights, 0.1, seen).backward()
        assert torch.equal(leaf.grad, gradient)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_their_own(device):
    dtype = DTYPES[-1]
    x, vectors, targets, weights = draw(20, 50, 16, device)
    leaves = [x.requires_grad_(), vectors.requires_grad_()]
    with torch.autocast(device, dtype):
        loss = linear_cross_entropy(*leaves, targets, weights)
    mine = torch.autograd.grad(loss, leaves)
    theirs = torch.autograd.grad(oracle(*leaves, None, targets, weights), leaves)
    assert loss.dtype == torch.float32 and [t.dtype for t in mine] == [torch.float32] * 2
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2 * TOLERANCE[dtype] * float(b.abs().max()))


def test_the_operator_is_registered_completely():
    _, _, targets, _ = draw(6, 47, 16, DEVICE)
    logits = torch.randn(6, 50, device=DEVICE)
    seen = draw_seen(targets, 47)
    ranges = seen.first, seen.last, seen.items, seen.bias
    torch.library.opcheck(kernels.cross_entropy_, (logits, 47, targets, 0.1, *ranges, True))
    torch.library.opcheck(kernels.cross_entropy_, (logits, 47, targets, 0.0, *(None,) * 4, False))
