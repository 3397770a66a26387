"""Normalization of features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Standardize(nn.Module):
    """(x - mean) / scale with constants that travel in the model's weights.

    The scale is one number per feature column, or one for all columns: dividing every column of a sentence
    embedding by its own deviation makes noise as loud as signal, a single scale keeps the geometry.
    Starts as the identity; `fit` sets the constants once. Columns after the first `dim` stay as they are.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean, self.scale = nn.Buffer(torch.zeros(dim)), nn.Buffer(torch.ones(dim))

    @torch.no_grad()
    def fit(self, x: Tensor, per_column: bool) -> None:
        """x [N, D]. A constant column keeps scale 1."""
        x = x[:, : len(self.mean)]
        self.mean.copy_(x.mean(0))
        variance = (x - self.mean).square().mean(0)
        if not per_column:
            variance = variance.mean().expand_as(variance)
        deviation = variance.sqrt()
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        others = 0, x.shape[-1] - len(self.mean)
        return (x - F.pad(self.mean, others)) / F.pad(self.scale, others, value=1.0)

    def inverse(self, x: Tensor) -> Tensor:
        others = 0, x.shape[-1] - len(self.mean)
        return x * F.pad(self.scale, others, value=1.0) + F.pad(self.mean, others)
