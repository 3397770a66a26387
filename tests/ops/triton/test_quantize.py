"""The fused quantizer against the levels of `RqVae`, one after another."""

import pytest
import torch

from modules.rqvae import RqVae
from ops.triton.quantize import residual_quantize
from tests.ops.triton.device import DEVICE


@pytest.mark.parametrize(
    ("batch", "size", "dim", "levels"),
    [(1, 1, 1, 1), (37, 70, 20, 3), (16, 64, 32, 2), (9, 300, 100, 2), (33, 256, 32, 3), (2051, 20, 3, 2)],
)
def test_the_fused_quantizer_is_that_of_the_levels(batch, size, dim, levels):
    torch.manual_seed(0)
    model = RqVae(3, dim, (4,), size, levels, commitment_weight=0.3).to(DEVICE).train()
    x = torch.randn(batch, dim, device=DEVICE, requires_grad=True)
    with torch.no_grad():
        x[0] = model.layers[0].codebook[0]  # a residual of zero: no rotation is defined
    books = torch.stack([layer.embedding.weight for layer in model.layers])
    weights, row_weights = torch.randn(batch, dim, device=DEVICE), torch.rand(batch, device=DEVICE)
    expected = model.quantize(x)
    total, ids, loss = residual_quantize(x, books, 0.3)
    assert torch.equal(ids, expected.sem_ids)
    torch.testing.assert_close(total, expected.embeddings.sum(-1))
    torch.testing.assert_close(loss, expected.quantize_loss, atol=1e-5, rtol=1e-5)
    inputs = [x, *(layer.embedding.weight for layer in model.layers)]
    pairs = [(total, loss), (expected.embeddings.sum(-1), expected.quantize_loss)]
    mine, theirs = (
        torch.autograd.grad((value * weights).sum() + (part * row_weights).sum(), inputs) for value, part in pairs
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_of_equal_codes_the_first_is_taken():
    books = torch.ones(2, 130, 5, device=DEVICE)
    x = torch.randint(-9, 9, (9, 5), device=DEVICE).float()  # whose products are exact
    _, ids, _ = residual_quantize(x, books, 0.25)
    assert not ids.any()


def test_the_operator_is_registered_completely():
    x, books = torch.randn(4, 3, device=DEVICE, requires_grad=True), torch.randn(2, 5, 3, device=DEVICE)
    torch.library.opcheck(residual_quantize, (x, books, 0.25))
