"""A T5-style encoder and decoder (Raffel et al. 2020): pre-normalized residual blocks over jagged rows.

A branch's sum into the residual stream and the next branch's normalization are one operation, `AddNorm`, so a block
takes the stream and its normalization and returns both for the block after it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.module_list import ModuleList
from modules.transformer.attention import CrossAttention, RelativePositionBias, SelfAttention
from ops.add_norm import add_norm, relu_dropout
from ops.jagged import JaggedTensor


@dataclass(frozen=True)
class TransformerConfig:
    """dim: of the residual stream; ff_dim: of the feed-forward's hidden layer; dropout: of every residual
    branch, of the feed-forward's hidden layer and of the result."""

    dim: int
    ff_dim: int
    n_heads: int
    head_dim: int
    dropout: float


@dataclass(frozen=True)
class MemoryView:
    """Which decoder sequences look at which part of whose memory. offsets: [B+1] int64; the sequences offsets[b] to
    offsets[b+1] - 1 belong to user b, at most `max_sequences`. key_limits: [S * M] int64, how many of the user's memory
    tokens each decoder position sees."""

    offsets: Tensor
    max_sequences: int
    key_limits: Tensor

    def rows(self, x: Tensor) -> JaggedTensor:
        """All positions of a user's sequences as one row: x [S, M, dim] -> values [S * M, dim]."""
        length = x.shape[1]
        return JaggedTensor(x.flatten(0, 1), self.offsets * length, self.max_sequences * length)


@dataclass(frozen=True)
class KVCache:
    """Tokens decoded before, and which of them each sequence continues. layers: each decoder layer's keys and values
    [R, 2, H, D]. places: [S, P] int64, where each sequence's tokens are."""

    layers: list[Tensor]
    places: Tensor

    @staticmethod
    def extend(cache: "KVCache | None", tokens: list[Tensor], chosen: Tensor) -> "KVCache":
        """The cache of the next step, whose sequence s continues sequence chosen[s] of the last one. tokens: each
        layer's keys and values [S, 2, H, D] of the last step, `cache` the one it had. chosen: [S'] int64."""
        if cache is None:
            return KVCache(tokens, chosen[:, None])
        places = torch.cat([cache.places[chosen], chosen[:, None] + len(cache.layers[0])], 1)
        return KVCache([torch.cat(pair) for pair in zip(cache.layers, tokens, strict=True)], places)


class AddNorm(nn.Module):
    """hidden = x + dropout(branch), and its normalization by the root mean square; see `ops.add_norm.add_norm`."""

    def __init__(self, config: TransformerConfig, last: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.dropout, self.last = config.dropout, last

    def forward(self, x: Tensor | None, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x (None at the start of the stream), branch [T, dim] -> hidden, normed [T, dim]."""
        return add_norm(x, branch, self.weight, self.dropout if self.training else 0.0, self.last)


class FeedForward(nn.Module):
    """[T, dim] -> [T, dim]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.wide = nn.Linear(config.dim, config.ff_dim, bias=False)
        self.narrow = nn.Linear(config.ff_dim, config.dim, bias=False)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(relu_dropout(self.wide(x), self.dropout if self.training else 0.0))


class Block(nn.Module):
    """Self-attention, in a decoder (`cross`) attention to the encoder's memory, then feed-forward."""

    def __init__(self, config: TransformerConfig, last: bool, cross: bool) -> None:
        super().__init__()
        self.attention = SelfAttention(config.dim, config.n_heads, config.head_dim)
        if cross:
            self.cross_norm = AddNorm(config)
            self.cross_attention = CrossAttention(config.dim, config.n_heads, config.head_dim)
        self.ff_norm = AddNorm(config)
        self.ff = FeedForward(config)
        self.out_norm = AddNorm(config, last)

    def forward(
        self,
        hidden: Tensor,
        normed: JaggedTensor,
        causal: bool,
        bias: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        cross: tuple[JaggedTensor, JaggedTensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, JaggedTensor, Tensor]:
        """hidden, normed [T, dim], bias [H, 2R+1], cache: see `SelfAttention` -> hidden, normed, and the tokens' keys
        and values [T, 2, H, D].

        cross: the same tokens as rows of users, the users' memory, its bias [H, 2R+1], and `MemoryView.key_limits`.
        """
        attended, seen = self.attention(normed, bias, causal, cache)
        if cross is not None:
            users, *memory = cross
            hidden, values = self.cross_norm(hidden, attended)
            attended = self.cross_attention(users.with_values(values), *memory)
        hidden, values = self.ff_norm(hidden, attended)
        hidden, values = self.out_norm(hidden, self.ff(values))
        return hidden, normed.with_values(values), seen


class Encoder(nn.Module):
    """n_layers blocks. The position bias is shared by all layers. causal: a token sees only itself and those before it.
    drop_output: dropout of the result, too, as T5 has it."""

    def __init__(self, config: TransformerConfig, n_layers: int, causal: bool, drop_output: bool) -> None:
        super().__init__()
        self.causal = causal
        self.bias = RelativePositionBias(config.n_heads, bidirectional=not causal)
        self.input_norm = AddNorm(config)
        lasts = (drop_output and n == n_layers - 1 for n in range(n_layers))
        self.blocks: ModuleList[Block] = ModuleList(Block(config, last, cross=False) for last in lasts)

    def forward(self, x: JaggedTensor) -> JaggedTensor:
        """x [T, dim] -> [T, dim], normalized."""
        bias = self.bias()
        hidden, values = self.input_norm(None, x.values)
        normed = x.with_values(values)
        for block in self.blocks:
            hidden, normed, _ = block(hidden, normed, self.causal, bias)
        return normed


class Decoder(nn.Module):
    """n_layers blocks.

    Unlike T5's, its self-attention over the few codes of one item has no position bias (each level has vectors of
    its own), and its attention to the memory has a position bias (shared by all layers) by how far a token lies
    before the last visible one: the encoder of a prefix cannot know where the prefix will be cut.
    """

    def __init__(self, config: TransformerConfig, n_layers: int) -> None:
        super().__init__()
        self.bias = RelativePositionBias(config.n_heads, bidirectional=False)
        self.input_norm = AddNorm(config)
        lasts = (n == n_layers - 1 for n in range(n_layers))
        self.blocks: ModuleList[Block] = ModuleList(Block(config, last, cross=True) for last in lasts)

    def memory(self, encoded: JaggedTensor) -> list[JaggedTensor]:
        """Each layer's keys and values [T, 2, H, D] of the encoded history [T, dim], computed once per user."""
        return CrossAttention.memories(encoded, [block.cross_attention for block in self.blocks])

    def forward(
        self, x: Tensor, memory: list[JaggedTensor], view: MemoryView, cache: KVCache | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The last M positions of S sequences, where some sequences belong to each user. x: [S, M, dim]. cache: of the
        positions before, where M = 1. Returns the normalized stream [S, M, dim] and each layer's keys and values [S *
        M, 2, H, D] of its positions."""
        normed, users, bias = JaggedTensor.uniform(x), view.rows(x), self.bias()
        hidden, values = self.input_norm(None, normed.values)
        normed, tokens = normed.with_values(values), []
        for i, block in enumerate(self.blocks):
            before = (cache.layers[i], cache.places) if cache is not None else None
            cross = users, memory[i], bias, view.key_limits
            hidden, normed, seen = block(hidden, normed, normed.max_length > 1, cache=before, cross=cross)
            tokens.append(seen)
        return normed.values.view(x.shape), tokens
