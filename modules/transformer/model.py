"""A T5-style encoder and decoder (Raffel et al. 2020): pre-normalized residual blocks over jagged rows."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.transformer.attention import Attention, KeyValue, RelativePositionBias
from ops.jagged import JaggedTensor


@dataclass(frozen=True)
class TransformerConfig:
    """dim: of the residual stream; ff_dim: of the feed-forward's hidden layer; dropout: of every residual
    branch and of the feed-forward's hidden layer."""

    dim: int
    ff_dim: int
    n_heads: int
    head_dim: int
    dropout: float


KeyValueCache = tuple[Tensor, Tensor]  # keys and values [S, P, H, D]


@dataclass(frozen=True)
class MemoryView:
    """Which decoder sequences look at which part of whose memory.

    offsets: [B+1] int64; the sequences offsets[b] to offsets[b+1] - 1 belong to user b, at most `max_sequences`.
    key_limits: [S * M] int64, how many of the user's memory tokens each decoder position sees.
    """

    offsets: Tensor
    max_sequences: int
    key_limits: Tensor

    def rows(self, x: Tensor) -> JaggedTensor:
        """All positions of a user's sequences as one row: x [S, M, dim] -> values [S * M, dim]."""
        length = x.shape[1]
        return JaggedTensor(x.flatten(0, 1), self.offsets * length, self.max_sequences * length)


class FeedForward(nn.Module):
    """[T, dim] -> [T, dim]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.wide = nn.Linear(config.dim, config.ff_dim, bias=False)
        self.narrow = nn.Linear(config.ff_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.dropout(self.wide(x).relu()))


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config.dim, config.n_heads, config.head_dim)
        self.ff_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: JaggedTensor, bias: Tensor, causal: bool) -> JaggedTensor:
        """x [T, dim], bias [H, 2R+1]."""
        normed = x.with_values(self.attention_norm(x.values))
        attended = self.attention(normed, self.attention.key_values(normed), bias, causal=causal)
        hidden = x.values + self.dropout(attended)
        hidden = hidden + self.dropout(self.ff(self.ff_norm(hidden)))
        return x.with_values(hidden)


class Encoder(nn.Module):
    """n_layers blocks and a final normalization. The position bias is shared by all layers.

    causal: a token sees only itself and those before it.
    """

    def __init__(self, config: TransformerConfig, n_layers: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.bias = RelativePositionBias(config.n_heads, bidirectional=not causal)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: JaggedTensor) -> JaggedTensor:
        """x [T, dim] -> [T, dim]."""
        bias = self.bias()
        x = x.with_values(self.dropout(x.values))
        for block in self.blocks:
            x = block(x, bias, self.causal)
        return x.with_values(self.dropout(self.norm(x.values)))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder's memory, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config.dim, config.n_heads, config.head_dim)
        self.cross_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.cross_attention = Attention(config.dim, config.n_heads, config.head_dim)
        self.ff_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, memory: KeyValue, view: MemoryView, bias: Tensor, past: KeyValueCache | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """The last M positions of S sequences, where some sequences belong to each user.

        x: [S, M, dim]. bias: [H, 2R+1], of the memory's tokens.
        past: keys and values [S, P, H, D] of the P positions before. Either P = 0 or M = 1.
        Returns x and the keys and values of all P + M positions.
        """
        rows = JaggedTensor.uniform(self.attention_norm(x))
        own = self.attention.key_values(rows)
        keys = own.keys.values.unflatten(0, x.shape[:2])  # [S, M, H, D]
        values = own.values.unflatten(0, x.shape[:2])
        if past is not None:
            keys, values = torch.cat([past[0], keys], 1), torch.cat([past[1], values], 1)
        seen = KeyValue(JaggedTensor.uniform(keys), values.flatten(0, 1))
        hidden = x + self.dropout(self.attention(rows, seen, causal=x.shape[1] > 1)).view_as(x)
        rows = view.rows(self.cross_norm(hidden))
        attended = self.cross_attention(rows, memory, bias, view.key_limits)
        hidden = hidden + self.dropout(attended).view_as(x)
        return hidden + self.dropout(self.ff(self.ff_norm(hidden))), (keys, values)


class Decoder(nn.Module):
    """n_layers blocks and a final normalization.

    Unlike T5's, its self-attention over the few codes of one item has no position bias (each level has vectors of
    its own), and its attention to the memory has a position bias (shared by all layers) by how far a token lies
    before the last visible one: the encoder of a prefix cannot know where the prefix will be cut.
    """

    def __init__(self, config: TransformerConfig, n_layers: int) -> None:
        super().__init__()
        self.bias = RelativePositionBias(config.n_heads, bidirectional=False)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.dropout = nn.Dropout(config.dropout)

    def memory(self, encoded: JaggedTensor) -> list[KeyValue]:
        """Each layer's keys and values of the encoded history [T, dim], computed once per user."""
        return [block.cross_attention.key_values(encoded) for block in self.blocks]

    def forward(
        self, x: Tensor, memory: list[KeyValue], view: MemoryView, past: list[KeyValueCache] | None = None
    ) -> tuple[Tensor, list[KeyValueCache]]:
        """x [S, M, dim] -> the same shape, and each layer's keys and values; see `DecoderBlock.forward`."""
        x, cache, bias = self.dropout(x), [], self.bias()
        for i, block in enumerate(self.blocks):
            x, seen = block(x, memory[i], view, bias, past[i] if past is not None else None)
            cache.append(seen)
        return self.dropout(self.norm(x)), cache
