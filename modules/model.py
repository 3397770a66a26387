"""The retriever: encodes a user's history of semantic IDs and generates the next item's."""

from dataclasses import dataclass
from pathlib import Path

import gin
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.schemas import TokenizedSeqBatch
from modules.embedding.id_embedder import SemIdEmbedder, UserEmbedder
from modules.generation.trie import Trie
from modules.pretrained import load_pretrained, save_pretrained
from modules.transformer.model import Decoder, Encoder, MemoryView, Past, TransformerConfig
from ops.jagged import JaggedTensor, jagged_prepend, row_indices
from ops.residual import stream_dtype


@dataclass(frozen=True)
class RetrievalLoss:
    """loss: mean over the targets of -log p(item), in nats; level_losses: [L'], its parts."""

    loss: Tensor
    level_losses: Tensor


@gin.configurable
class EncoderDecoderRetrievalModel(nn.Module):
    """TIGER's transformer (Rajput et al. 2023, section 3.2) without padding.

    level_sizes: codes on each of the L' levels of a semantic ID, read from the artifact.
    The history enters as [user token, L' codes of the oldest item, ..., L' codes of the newest].
    causal_encoder: a history token sees only what came before it. One pass over a user's sequence then serves
    every prefix of it as a training example; a bidirectional encoder needs a pass per target.
    user_buckets: vectors shared by all users' tokens. prefix_buckets: see `SemIdEmbedder`.
    """

    def __init__(
        self,
        level_sizes: tuple[int, ...],
        dim: int = 128,
        ff_dim: int = 1024,
        n_heads: int = 6,
        head_dim: int = 64,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        dropout: float = 0.1,
        user_buckets: int = 2000,
        prefix_buckets: int = 65536,
        causal_encoder: bool = True,
    ) -> None:
        super().__init__()
        self.config = {
            "level_sizes": list(level_sizes),
            "dim": dim,
            "ff_dim": ff_dim,
            "n_heads": n_heads,
            "head_dim": head_dim,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "dropout": dropout,
            "user_buckets": user_buckets,
            "prefix_buckets": prefix_buckets,
            "causal_encoder": causal_encoder,
        }
        block = TransformerConfig(dim, ff_dim, n_heads, head_dim, dropout)
        self.level_sizes = tuple(level_sizes)
        self.causal_encoder = causal_encoder
        self.code_embedder = SemIdEmbedder(self.level_sizes, dim, prefix_buckets)
        self.user_embedder = UserEmbedder(user_buckets, dim)
        self.start = nn.Parameter(torch.empty(dim))
        self.encoder = Encoder(block, encoder_layers, causal_encoder)
        self.decoder = Decoder(block, decoder_layers)
        self.head = nn.Linear(dim, sum(level_sizes), bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0)
        if self.code_embedder.prefix_table is not None:
            nn.init.zeros_(self.code_embedder.prefix_table.weight)
        nn.init.normal_(self.start, std=1.0)
        nn.init.zeros_(self.encoder.bias.table.weight)
        nn.init.zeros_(self.decoder.bias.table.weight)

    def memory(self, batch: TokenizedSeqBatch) -> list[JaggedTensor]:
        """Encodes the histories once: each decoder layer's keys and values [B + T * L', 2, H, D], rows of users."""
        codes = batch.tokens.values.view(-1, len(self.level_sizes))
        embedded = self.code_embedder(codes).flatten(0, 1)  # [T * L', dim]
        history = jagged_prepend(self.user_embedder(batch.user), batch.tokens.with_values(embedded))
        return self.decoder.memory(self.encoder(history))

    def _level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """hidden [..., dim] -> logits [..., V_level], in the dtype of autocast where it is on."""
        start = sum(self.level_sizes[:level])
        return F.linear(hidden, self.head.weight[start : start + self.level_sizes[level]])

    def _target_view(self, batch: TokenizedSeqBatch) -> MemoryView:
        """Target i of a user sees the user token and the items before it."""
        levels, targets = len(self.level_sizes), batch.targets
        if not self.causal_encoder and targets.max_length != 1:
            raise ValueError(
                "A bidirectional encoder takes one target a history: set "
                "EncoderDecoderRetrievalModel.causal_encoder = True or train.every_position = False."
            )
        items = batch.tokens.lengths // levels  # [B]
        first = items - targets.lengths + 1  # items before the first target
        rows = row_indices(targets.offsets, targets.values.shape[0])
        limits = 1 + (first[rows] + targets.positions()) * levels  # [P]
        return MemoryView(targets.offsets, targets.max_length, limits.repeat_interleave(levels))

    def level_logits(self, batch: TokenizedSeqBatch, target_codes: Tensor) -> list[Tensor]:
        """Logits of every level given the target's codes before it (teacher forcing).

        Shape: target_codes [P, L'] -> L' tensors [P, V_level], in the dtype of autocast where it is on.
        """
        before = self.code_embedder(target_codes[:, :-1])  # [P, L'-1, dim]
        start = self.start.expand(len(before), 1, -1).to(before.dtype)
        view = self._target_view(batch)
        hidden, _ = self.decoder(torch.cat([start, before], 1), self.memory(batch), view)  # [P, L', dim]
        return [self._level_logits(row, level) for level, row in enumerate(hidden.unbind(1))]

    def forward(self, batch: TokenizedSeqBatch, trie: Trie) -> RetrievalLoss:
        """-log p(item), the sum over levels of the cross-entropy of its code (Rajput et al. 2023, section 3.2).

        Each level's softmax runs over the codes that continue a real item, so p is a distribution over the
        items of the trie and no capacity goes into learning which tuples exist.
        """
        items = batch.targets.values
        codes, nodes = trie.item_codes[items], trie.item_nodes[items]  # [P, L'], [P, L'+1]
        level_losses = torch.stack(
            [
                trie.cross_entropy(logits, level, nodes[:, level], nodes[:, level + 1])
                for level, logits in enumerate(self.level_logits(batch, codes))
            ]
        )  # [L', P]
        if batch.target_weights is None:
            level_losses = level_losses.mean(1)
        else:
            level_losses = (level_losses * batch.target_weights).sum(1) / batch.target_weights.sum()
        return RetrievalLoss(level_losses.sum(), level_losses)

    def next_code(self, codes: Tensor, memory: list[JaggedTensor], past: Past | None) -> tuple[Tensor, list[Tensor]]:
        """Logits of the next level's codes, one step of generation.

        codes: [B, K, level], the prefix of each beam; K = 1 at level 0. past: of the steps before, for B * K sequences.
        Returns logits [B, K, V_level] and each layer's keys and values [B * K, 2, H, D], for `Past.extend`.
        """
        batch, beams, level = codes.shape
        if level == 0:
            x = self.start.expand(batch, 1, -1).to(stream_dtype(self.start))
        else:
            x = self.code_embedder(codes.view(batch * beams, level))[:, -1:]  # [B * K, 1, dim]
        limits = memory[0].lengths.repeat_interleave(beams)
        view = MemoryView(torch.arange(batch + 1, device=x.device) * beams, beams, limits)
        hidden, tokens = self.decoder(x, memory, view, past)
        return self._level_logits(hidden[:, 0], level).unflatten(0, (batch, beams)), tokens

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into the folder."""
        save_pretrained(self, self.config, folder)

    @staticmethod
    def from_pretrained(folder: str | Path) -> "EncoderDecoderRetrievalModel":
        """Reads what `save_pretrained` wrote, in evaluation mode; see `modules.pretrained.load_pretrained`."""
        config, weights = load_pretrained(folder)
        model = EncoderDecoderRetrievalModel(**config)
        model.load_state_dict(weights)
        return model.eval()
