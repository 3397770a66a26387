"""Losses of the autoencoder against numpy, scikit-learn and gradients by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from modules.loss import quantize_loss, reconstruction_loss


def test_reconstruction_sums_squares_over_the_columns_of_a_row():
    predicted, x = np.random.default_rng(0).normal(size=(2, 5, 7))
    loss = reconstruction_loss(torch.tensor(predicted), torch.tensor(x), n_cat_features=0)
    np.testing.assert_allclose(loss, ((predicted - x) ** 2).sum(1), rtol=1e-6)


def test_trailing_categories_are_logits():
    generator = np.random.default_rng(1)
    values, logits = generator.normal(size=(5, 3)), 3 * generator.normal(size=(5, 4))
    x, labels = generator.normal(size=(5, 3)), generator.integers(0, 2, size=(5, 4))
    predicted = torch.tensor(np.concatenate([values, logits], 1))
    loss = reconstruction_loss(predicted, torch.tensor(np.concatenate([x, labels], 1)), n_cat_features=4)
    for row in range(5):
        entropy = log_loss(labels[row], 1 / (1 + np.exp(-logits[row])), normalize=False, labels=[0, 1])
        assert float(loss[row]) == pytest.approx(((values[row] - x[row]) ** 2).sum() + entropy, rel=1e-5)


def test_extreme_logits_stay_finite():
    predicted, x = torch.tensor([[1000.0, -1000.0]]), torch.tensor([[0.0, 1.0]])
    assert float(reconstruction_loss(predicted, x, n_cat_features=2)) == pytest.approx(2000)


def test_quantize_loss_pulls_code_and_input_apart_from_each_other():
    x, embedding = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = quantize_loss(x, embedding, commitment_weight=0.25)
    difference = (x - embedding).detach()
    torch.testing.assert_close(loss.double(), 1.25 * difference.square().sum(1), atol=1e-5, rtol=1e-5)
    grad_x, grad_embedding = torch.autograd.grad(loss.sum(), (x, embedding))
    torch.testing.assert_close(grad_x, 0.5 * difference, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad_embedding, -2 * difference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_accumulate_in_float32(dtype):
    x = torch.full((1, 4096), 8.0, dtype=dtype)  # the sum of squares passes the largest float16
    assert float(reconstruction_loss(torch.zeros_like(x), x, 0)) == 4096 * 64
    assert float(quantize_loss(x, torch.zeros_like(x), 0.0)) == 4096 * 64
