"""Normalization of features."""

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """(x - mean) / scale with constants that travel in the model's weights.

    The scale is one number per feature column, or one for all columns: dividing every column of a sentence
    embedding by its own deviation makes noise as loud as signal, a single scale keeps the geometry.
    Starts as the identity; `fit` sets the constants once.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    @torch.no_grad()
    def fit(self, x: Tensor, per_column: bool) -> None:
        """x [N, D]. A constant column keeps scale 1."""
        self.mean.copy_(x.mean(0))
        variance = (x - self.mean).square().mean(0)
        if not per_column:
            variance = variance.mean().expand_as(variance)
        deviation = variance.sqrt()
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.scale + self.mean
