"""Losses of the autoencoder. All are per row: summed over features, not averaged (a mean collapses codebooks)."""

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(predicted: Tensor, x: Tensor, n_cat_features: int) -> Tensor:
    """Summed squares, and binary cross-entropy on the logits of the `n_cat_features` trailing columns. Shape: predicted
    [B, D], x [B, D] -> [B] float32."""
    split = x.shape[-1] - n_cat_features
    predicted, x = predicted.float(), x.float()
    if n_cat_features == 0:
        return F.mse_loss(predicted, x, reduction="none").sum(-1)
    squares = F.mse_loss(predicted[:, :split], x[:, :split], reduction="none").sum(-1)
    logits, labels = predicted[:, split:], x[:, split:]
    return squares + F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1)


def quantize_loss(x: Tensor, embedding: Tensor, commitment_weight: float) -> Tensor:
    """||sg[x] - e||^2 + beta ||x - sg[e]||^2 (van den Oord et al. 2017, eq. 3). Shape: x [B, D], embedding [B, D] ->
    [B] float32."""
    x, embedding = x.float(), embedding.float()
    codebook = (x.detach() - embedding).square().sum(-1)
    commitment = (x - embedding.detach()).square().sum(-1)
    return codebook + commitment_weight * commitment
