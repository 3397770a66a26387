"""Multi-head attention over jagged rows, and T5's relative-position bias."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ops.attention import jagged_attention
from ops.cached_attention import cached_attention
from ops.jagged import JaggedTensor


class RelativePositionBias(nn.Module):
    """A learned number per head and bucket of distances key - query (Raffel et al. 2020, section 2.1).

    bidirectional: half of the buckets serve each direction; otherwise all serve distances <= 0. Half of a
    direction's buckets hold one distance each, the rest grow logarithmically up to `max_distance`, beyond
    which all distances share the last.
    """

    def __init__(self, n_heads: int, bidirectional: bool, n_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.table = nn.Embedding(n_buckets, n_heads)
        nn.init.zeros_(self.table.weight)
        distance = torch.arange(-max_distance, max_distance + 1)  # key - query
        buckets = n_buckets // 2 if bidirectional else n_buckets  # of one direction
        exact = buckets // 2
        magnitude = distance.abs() if bidirectional else (-distance).clamp_min(0)
        growth = torch.log(magnitude.clamp_min(1) / exact) / math.log(max_distance / exact)
        logarithmic = (exact + (growth * (buckets - exact)).long()).clamp_max(buckets - 1)
        bucket = torch.where(magnitude < exact, magnitude, logarithmic)
        if bidirectional:
            bucket = bucket + buckets * (distance > 0)
        self.bucket = nn.Buffer(bucket, persistent=False)

    def forward(self) -> Tensor:
        """[H, 2 * max_distance + 1]: the bias by distance."""
        return self.table(self.bucket).T


class SelfAttention(nn.Module):
    """n_heads heads of head_dim; projections without bias."""

    def __init__(self, dim: int, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, head_dim
        self.query_key_value = nn.Linear(dim, 3 * n_heads * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(
        self,
        x: JaggedTensor,
        bias: Tensor | None = None,
        causal: bool = False,
        cache: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [T, dim], bias [H, 2R+1] -> [T, dim], and the tokens' keys and values [T, 2, H, D].

        cache: where x is one token for each of S rows, the keys and values [R, 2, H, D] of earlier tokens, and which of
        them [S, P] are those before each; they are seen as well, without bias.
        """
        packed = rearrange(self.query_key_value(x.values), "t (n h d) -> t n h d", n=3, h=self.n_heads)
        scale = self.head_dim**-0.5
        if cache is None:
            attended = jagged_attention(x.with_values(packed), None, bias, None, causal, scale).values
        else:
            attended = cached_attention(packed, *cache, scale)
        return self.out(rearrange(attended, "t h d -> t (h d)")), packed[:, 1:]


class _Products(torch.autograd.Function):
    """x @ w.T for several w. Each product of the way back adds to the gradient of x as it is made: no sums are left."""

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(x @ weight.T for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        grad_x = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.addmm_(grad, weight)
        return grad_x, *(grad.T @ x for grad in grads)


def products(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """x @ w.T for several w, in the dtype of autocast where it is on. Shape: x [T, dim], w [n, dim] -> each [T, n]."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weights = x.to(dtype), [weight.to(dtype) for weight in weights]
    with torch.autocast(kind, enabled=False):
        return _Products.apply(x, *weights)


class CrossAttention(nn.Module):
    """Attention to the tokens of another sequence; heads and projections as in `SelfAttention`."""

    def __init__(self, dim: int, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, head_dim
        self.query = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * n_heads * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=False)

    @staticmethod
    def memories(x: JaggedTensor, layers: list["CrossAttention"]) -> list[JaggedTensor]:
        """The keys and values that each layer's `forward` looks at. Values [T, dim] -> [T, 2, H, D] of each."""
        made = products(x.values, [layer.key_value.weight for layer in layers])
        heads = layers[0].n_heads
        return [x.with_values(rearrange(pair, "t (n h d) -> t n h d", n=2, h=heads)) for pair in made]

    def forward(self, x: JaggedTensor, memory: JaggedTensor, bias: Tensor | None, key_limits: Tensor) -> Tensor:
        """x [T, dim], bias [H, 2R+1], key_limits [T] -> [T, dim]; see `ops.attention.jagged_attention`."""
        query = x.with_values(rearrange(self.query(x.values), "t (h d) -> t h d", h=self.n_heads))
        attended = jagged_attention(query, memory, bias, key_limits, scale=self.head_dim**-0.5)
        return self.out(rearrange(attended.values, "t h d -> t (h d)"))
