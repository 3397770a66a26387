"""One level of residual quantization: the nearest codebook vector, and a gradient through that choice."""

from dataclasses import dataclass
from enum import Enum

import gin
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.parameters import NamedEnum
from modules.kmeans import kmeans, squared_distances
from modules.loss import quantize_loss

EMA_DECAY = 0.99


@gin.constants_from_enum
class QuantizeMode(NamedEnum):
    """How a code is chosen in training, and how the gradient passes that choice."""

    STE = "ste"
    """Straight-through: the gradient of the code goes to the input unchanged (van den Oord et al. 2017)."""
    ROTATION_TRICK = "rotation_trick"
    """The gradient is rotated and scaled as the input was to reach the code (Fifty et al. 2024)."""
    GUMBEL_SOFTMAX = "gumbel_softmax"
    """A soft mixture of codes, sharpened by the temperature (Jang et al. 2017)."""


class QuantizeForwardMode(Enum):
    """The modes as the original project numbers and pickles them."""

    GUMBEL_SOFTMAX = 1
    STE = 2
    ROTATION_TRICK = 3


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


def first_smallest(distances: Tensor) -> Tensor:
    """Column of the smallest value of each row; of equal ones the first, on every device. In float64 values that differ
    by rounding (1e-12 of the largest in the row) are equal. Shape: [B, V] -> [B] int64."""
    slack = 1e-12 * distances.amax(1, keepdim=True) if distances.dtype == torch.float64 else 0.0
    smallest = distances <= distances.amin(1, keepdim=True) + slack
    columns = torch.arange(distances.shape[1], device=distances.device)
    return torch.where(smallest, columns, distances.shape[1] - 1).amin(1)


class Quantize(nn.Module):
    """A codebook of `codebook_size` vectors of `dim` numbers.

    update: "gradient", or "ema": each code is the moving average of its inputs (van den Oord et al. 2017, appendix
    A.1). sim_vq: the codes are a learned linear map of the stored vectors, so that a step moves all of them (Zhu et al.
    2024). normalize: codes of length 1.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        mode: QuantizeMode,
        commitment_weight: float,
        update: str = "gradient",
        sim_vq: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if update == "ema" and (sim_vq or mode is QuantizeMode.GUMBEL_SOFTMAX):
            raise ValueError("RqVae.codebook_update = 'ema' goes with neither codebook_sim_vq nor Gumbel-softmax.")
        self.embedding = nn.Embedding(codebook_size, dim)
        self.out_proj = nn.Sequential(nn.Linear(dim, dim, bias=False)) if sim_vq else None
        self.mode, self.update, self.normalize = mode, update, normalize
        self.commitment_weight = commitment_weight
        if update == "ema":
            self.embedding.weight.requires_grad_(False)
            self.ema_count = nn.Buffer(torch.ones(codebook_size))
            self.ema_sum = nn.Buffer(torch.zeros(codebook_size, dim))

    @property
    def codebook(self) -> Tensor:
        """[V, D]."""
        codes = self.embedding.weight
        if self.out_proj is not None:
            with torch.autocast(codes.device.type, enabled=False):
                codes = self.out_proj(codes)
        return F.normalize(codes, dim=-1) if self.normalize else codes

    @torch.no_grad()
    def fit(self, x: Tensor, generator: torch.Generator) -> None:
        """Makes the codes the k-means centroids of x [N, D], N >= V; generator: on the device of x. SimVQ's map becomes
        the identity, moving averages start anew."""
        codes = kmeans(x, len(self.embedding.weight), generator)
        self.embedding.weight.copy_(codes)
        if self.out_proj is not None:
            nn.init.eye_(next(self.out_proj.parameters()))
        if self.update == "ema":
            self.ema_count.fill_(1.0)
            self.ema_sum.copy_(codes)

    def distances(self, x: Tensor, codebook: Tensor) -> Tensor:
        """Squared, in float32 or float64. Shape: x [B, D], codebook [V, D] -> [B, V]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return squared_distances(x.to(dtype), codebook.to(dtype))

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest code; of equally near ones the first. Shape: [B, D] -> [B] int64."""
        return first_smallest(self.distances(x.detach(), self.codebook.detach()))

    def ranked(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest codes, nearest first; of equally near ones the lower first, on every device.

        So that rounding decides nothing, distances are whole multiples of 2^-24 of the codebook's scale, the square
        of its largest entry. Shape: x [B, D] float64 -> distances, codes [B, k] int64.
        """
        codebook = self.codebook.to(x.dtype)
        scale = codebook.abs().max().square().clamp_min(1e-30)
        multiples = (self.distances(x, codebook) / scale * 2**24).round().clamp_max(2**40).long()
        size = len(codebook)
        keys = (multiples * size + torch.arange(size, device=x.device)).topk(k, largest=False).values
        return keys // size, keys % size

    def forward(self, x: Tensor, temperature: float | Tensor = 1.0) -> Quantized:
        """x [B, D]. Outside training every mode returns the nearest code's vector. temperature: of the Gumbel-softmax;
        the other modes don't read it."""
        codebook = self.codebook
        distances = self.distances(x, codebook)
        ids = distances.detach().argmin(-1) if self.training else first_smallest(distances.detach())
        hard = F.embedding(ids, codebook)  # [B, D]
        loss = quantize_loss(x, hard, self.commitment_weight)
        if not self.training:
            return Quantized(ids, hard, loss)
        if self.update == "ema":
            self._average(x.detach().float(), ids)
        if self.mode is QuantizeMode.GUMBEL_SOFTMAX:
            with torch.autocast(x.device.type, enabled=False):
                weights = F.gumbel_softmax(-distances, temperature)  # type: ignore[arg-type]  # takes a tensor, too
                soft = weights @ codebook.to(distances.dtype)
            return Quantized(ids, soft.to(x.dtype), quantize_loss(x, soft, self.commitment_weight))
        if self.mode is QuantizeMode.ROTATION_TRICK:
            return Quantized(ids, rotation_trick(x, hard), loss)
        return Quantized(ids, hard.detach() + (x - x.detach()), loss)

    @torch.no_grad()
    def _average(self, x: Tensor, ids: Tensor) -> None:
        counts = torch.zeros_like(self.ema_count).index_add_(0, ids, torch.ones_like(x[:, 0]))
        sums = torch.zeros_like(self.ema_sum).index_add_(0, ids, x)
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.ema_count.lerp_(counts, 1 - EMA_DECAY)
        self.ema_sum.lerp_(sums, 1 - EMA_DECAY)
        alive = (self.ema_count > 1e-3)[:, None]
        means = self.ema_sum / self.ema_count.clamp_min(1e-3)[:, None]
        self.embedding.weight.copy_(torch.where(alive, means, self.embedding.weight))
