"""One level of residual quantization: the nearest codebook vector, and a gradient through that choice."""

from dataclasses import dataclass
from enum import Enum

import gin
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.kmeans import squared_distances
from modules.loss import quantize_loss


@gin.constants_from_enum
class QuantizeMode(Enum):
    """How the gradient passes the choice of a code."""

    STE = "ste"
    """Straight-through: the gradient of the code goes to the input unchanged (van den Oord et al. 2017)."""
    ROTATION_TRICK = "rotation_trick"
    """The gradient is rotated and scaled as the input was to reach the code (Fifty et al. 2024)."""
    GUMBEL_SOFTMAX = "gumbel_softmax"
    """A soft mixture of codes, sharpened by the temperature (Jang et al. 2017)."""


@dataclass(frozen=True)
class Quantized:
    """ids [B] int64; embeddings [B, D], through which the gradient flows; loss [B] float32."""

    ids: Tensor
    embeddings: Tensor
    loss: Tensor


def rotation_trick(x: Tensor, embedding: Tensor) -> Tensor:
    """Returns `embedding` in value; as a function of x it is lambda R x with a constant rotation R and scale.

    R turns x to the direction of the embedding: with u = x/|x|, q = e/|e| and r = (u+q)/|u+q|,
    R x = x - 2 r r'x + 2 q u'x and lambda = |e|/|x| (Fifty et al. 2024, eq. 4). Where x and e point in opposite
    directions (or one of them is zero) r is undefined and the straight-through gradient takes its place.

    Shape: x [B, D], embedding [B, D] -> [B, D].
    """
    with torch.no_grad():
        norm_x = x.norm(dim=-1, keepdim=True)
        norm_e = embedding.norm(dim=-1, keepdim=True)
        u = x / norm_x.clamp_min(1e-8)
        q = embedding / norm_e.clamp_min(1e-8)
        total = u + q
        norm_total = total.norm(dim=-1, keepdim=True)
        r = total / norm_total.clamp_min(1e-8)
        scale = norm_e / norm_x.clamp_min(1e-8)
        defined = (norm_total > 1e-4) & (norm_x > 1e-8) & (norm_e > 1e-8)
        target = embedding.detach()
    rotated = scale * (x - 2 * r * (r * x).sum(-1, keepdim=True) + 2 * q * (u * x).sum(-1, keepdim=True))
    passed = torch.where(defined, rotated, x)
    return target + (passed - passed.detach())  # the value is exactly the code's: the bracket is zero


class Quantize(nn.Module):
    """A codebook of `codebook_size` vectors of `dim` numbers."""

    def __init__(self, dim: int, codebook_size: int, mode: QuantizeMode, commitment_weight: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, dim)
        self.mode = mode
        self.commitment_weight = commitment_weight

    @property
    def codebook(self) -> Tensor:
        """[V, D]."""
        return self.embedding.weight

    def nearest(self, x: Tensor) -> Tensor:
        """Code with the smallest Euclidean distance; of equal ones the first. Shape: [B, D] -> [B] int64."""
        return squared_distances(x.float(), self.codebook.float()).argmin(-1)

    def forward(self, x: Tensor, temperature: float = 1.0) -> Quantized:
        """x [B, D]. Outside training every mode returns the nearest code's vector.

        temperature: of the Gumbel-softmax; the other modes don't read it.
        """
        ids = self.nearest(x.detach())
        hard = self.embedding(ids)  # [B, D]
        if not self.training:
            return Quantized(ids, hard, quantize_loss(x, hard, self.commitment_weight))
        if self.mode is QuantizeMode.GUMBEL_SOFTMAX:
            logits = -squared_distances(x.float(), self.codebook.float())
            with torch.autocast(x.device.type, enabled=False):
                soft = F.gumbel_softmax(logits, tau=temperature) @ self.codebook.float()
            return Quantized(ids, soft.to(x.dtype), quantize_loss(x, soft, self.commitment_weight))
        loss = quantize_loss(x, hard, self.commitment_weight)
        if self.mode is QuantizeMode.ROTATION_TRICK:
            return Quantized(ids, rotation_trick(x, hard), loss)
        return Quantized(ids, hard.detach() + (x - x.detach()), loss)
