"""SASRec (Kang and McAuley 2018), the baseline of sequential recommendation, without padding."""

import torch
from einops import rearrange
from torch import Tensor, nn

from common.parameters import PositiveInt, ShareBelowOne, configurable
from common.schemas import SeqBatch
from ops.attention import jagged_attention
from ops.cross_entropy import linear_cross_entropy
from ops.jagged import JaggedTensor, row_indices
from ops.sums import take_rows


class Block(nn.Module):
    """Causal self-attention, then feed-forward, both pre-normalized residual branches."""

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, dim // n_heads
        self.attention_norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        wide, narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ff = nn.Sequential(wide, nn.GELU(), nn.Dropout(dropout), narrow)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: JaggedTensor) -> JaggedTensor:
        """values [T, dim] -> [T, dim]."""
        packed = self.query_key_value(self.attention_norm(x.values))
        packed = rearrange(packed, "t (n h d) -> t n h d", n=3, h=self.n_heads)
        attended = jagged_attention(x.with_values(packed), causal=True, scale=self.head_dim**-0.5).values
        hidden = x.values + self.dropout(self.out(rearrange(attended, "t h d -> t (h d)")))
        return x.with_values(hidden + self.dropout(self.ff(self.ff_norm(hidden))))


@configurable
class SasRec(nn.Module):
    """A causal transformer over item vectors, which score the next item as well: score = state . vectors[item].

    Unlike the paper's it is trained by a softmax over all items, which is known to be stronger (Klenitskiy and Vasilev
    2023), and positions are counted from the end of the history, so that the newest item always has the same one.

    n_items: N. max_items: longest history. dim: of the vectors and the residual stream. dropout: of the embeddings, of
    every residual branch and of the feed-forward's hidden layer. label_smoothing: as of `linear_cross_entropy`.
    vectors: [N, dim].
    """

    def __init__(
        self,
        n_items: PositiveInt,
        max_items: PositiveInt,
        dim: PositiveInt = 256,
        n_layers: PositiveInt = 2,
        n_heads: PositiveInt = 2,
        dropout: ShareBelowOne = 0.5,
        label_smoothing: ShareBelowOne = 0.0,
    ) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"SasRec.dim = {dim} must be a multiple of SasRec.n_heads = {n_heads}.")
        self.vectors = nn.Parameter(torch.empty(n_items, dim))
        self.positions = nn.Parameter(torch.empty(max_items, dim))  # row 0: of the newest item
        self.blocks = nn.ModuleList(Block(dim, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout, self.label_smoothing = nn.Dropout(dropout), label_smoothing
        nn.init.normal_(self.vectors, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def states(self, history: JaggedTensor) -> Tensor:
        """What is known after each item: rows of item ids, values [T] -> [T, dim]."""
        total = len(history.values)
        rows = row_indices(history.offsets, total)
        from_end = history.offsets[rows + 1] - 1 - torch.arange(total, device=rows.device)
        embedded = take_rows(self.vectors, history.values) + take_rows(self.positions, from_end)
        x = history.with_values(self.dropout(embedded))
        for block in self.blocks:
            x = block(x)
        return self.norm(x.values)

    def state(self, history: JaggedTensor) -> Tensor:
        """What is known after the last item of each row: [B, dim]. Undefined for empty rows."""
        return self.states(history)[history.offsets[1:] - 1]

    def forward(self, batch: SeqBatch) -> Tensor:
        """Mean over the targets of -log p(item), in nats: []. Every item of the histories has a target."""
        weights = batch.weights
        states = self.states(batch.history)
        losses = linear_cross_entropy(states, self.vectors, batch.targets.values, weights, self.label_smoothing)
        return losses / weights.sum()
