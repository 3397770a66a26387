"""The retriever: encodes a user's history of items and generates the next one down the tree of semantic IDs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import InstanceOf
from torch import Tensor, nn

from common.module_list import ModuleList
from common.parameters import NonNegativeInt, PositiveFloat, PositiveInt, Rate, ShareBelowOne, configurable
from common.schemas import SeqBatch
from data.batches import history_items
from modules.embedding import ItemParts, NodeParts, Vectors, VectorSum, item_vectors, node_vectors
from modules.pretrained import load_pretrained, save_pretrained
from modules.transformer.model import Decoder, Encoder, KVCache, MemoryView, TransformerConfig
from modules.tree import Tree
from ops.cross_entropy import Seen, linear_cross_entropy
from ops.jagged import JaggedTensor, jagged_to_padded, row_indices
from ops.precision import stream_dtype
from ops.sampled import RowItems, sampled_cross_entropy, sampled_tree_cross_entropy
from ops.sums import take_rows
from ops.tree import tree_cross_entropy

SAMPLED_ITEMS, SAMPLED_CHILDREN = 8192, (8, 64)  # whose logits stand for all, of a catalogue with hashed rows
NO_SETTINGS = ("self", "features", "counts", "__class__")
SEEN_SCALE = 10.0  # of the parameter behind the bias of consumed items, so that it can move as far as logits do


@dataclass(frozen=True)
class RetrievalLoss:
    """Means over the targets, in nats. loss: what is trained on, the weighted sum of the others. items: -log p(item) of
    the item head; levels: [L'], -log p(node | parent) of the tree head on each level. 0 where the head is not
    trained."""

    loss: Tensor
    items: Tensor
    levels: Tensor


@dataclass(frozen=True)
class Encoded:
    """Histories. state: [B, dim], of the last token of each. memory: each decoder layer's keys and values."""

    state: Tensor
    memory: list[JaggedTensor]


@configurable
class EncoderDecoderRetrievalModel(nn.Module):
    """A causal jagged transformer over items with two heads: a softmax down the tree, and one over all items.

    The tree head (hierarchical softmax: Morin and Bengio 2005; generative retrieval: Rajput et al. 2023) has a query
    for each level, and a vector for each node: p(node | parent) is the softmax over the parent's children of query x
    vector, and p(item) the product along its path. The item head's logits are state x the item's vector, with which the
    item also enters the history (Kang and McAuley 2018), and a learned bias if the user has consumed it: where nobody
    comes back to an item it falls until consumed items take no part (repeat and explore: Ren et al. 2019).

    tree, features: of the catalogue, on the device to train on; features [N, D], None where nothing names them.
    item_tokens: a history item is one token, its item vector; off, it is L' tokens, the vectors of the nodes on its
    path, as in TIGER. item_parts, node_parts: see `modules.embedding`.
    decoder_layers: 0 makes the level queries from the encoder's state; otherwise a decoder makes them from the nodes
    above, attending to the encoded history, as in TIGER.
    item_loss, tree_loss: weights of the item head's loss and of each level's; 0 leaves the head out.
    label_smoothing: of both. feature_dim: width of the perceptrons of features. vector_std: deviation of the vectors'
    rows at the start. end_positions: places before a window's end that have a vector of their own, added to the token.
    max_rows: items, or nodes of a depth, up to which each has a row of its own and takes part in every softmax; with
    more, rows are hashed and the softmax is over the history's items, SAMPLED_ITEMS items drawn by `counts` (half of
    them: uniformly) and the children of most nodes of the depth, but within SAMPLED_CHILDREN, with the log-q
    correction, without smoothing; drawn items are not told from consumed ones.
    counts: [N], how often each item occurs in the training data; only drawn from.
    causal_encoder: off, every history serves one target only (`train.every_position = False`).
    """

    def __init__(
        self,
        tree: InstanceOf[Tree],
        features: InstanceOf[Tensor] | None = None,
        counts: InstanceOf[Tensor] | None = None,
        dim: PositiveInt = 256,
        ff_dim: PositiveInt = 1024,
        n_heads: PositiveInt = 2,
        head_dim: PositiveInt = 128,
        encoder_layers: PositiveInt = 2,
        decoder_layers: NonNegativeInt = 0,
        dropout: ShareBelowOne = 0.5,
        feature_dim: PositiveInt = 512,
        causal_encoder: bool = True,
        item_tokens: bool = True,
        item_parts: ItemParts = ("free", "features"),
        node_parts: NodeParts = ("free", "codes", "features"),
        item_loss: Rate = 1.0,
        tree_loss: Rate = 0.33,
        label_smoothing: ShareBelowOne = 0.0,
        vector_std: PositiveFloat = 0.2,
        end_positions: NonNegativeInt = 0,
        max_rows: PositiveInt = 1_000_000,
    ) -> None:
        given: dict[str, Any] = {name: value for name, value in locals().items() if name not in NO_SETTINGS}
        super().__init__()
        self.config = {**given, "tree": tree.digest, "item_parts": list(item_parts), "node_parts": list(node_parts)}
        if not (item_tokens and item_loss > 0) and tree_loss <= 0:
            raise ValueError(
                "EncoderDecoderRetrievalModel has no head to train: tree_loss must be positive, or item_loss with "
                "item_tokens = True."
            )
        if tree.n_items > max_rows and not item_tokens:
            raise ValueError(
                f"EncoderDecoderRetrievalModel.item_tokens = False takes up to max_rows = {max_rows:,} items; this "
                f"catalogue has {tree.n_items:,}."
            )
        if tree.n_nodes[0] > max_rows:
            raise ValueError(
                f"EncoderDecoderRetrievalModel.max_rows = {max_rows:,} must be at least the number of first codes, "
                f"{tree.n_nodes[0]:,}, whose softmax is whole."
            )
        block = TransformerConfig(dim, ff_dim, n_heads, head_dim, dropout)
        device = tree.leaf_items.device
        self.tree, self.causal_encoder = tree, causal_encoder
        self.tokens_per_item = 1 if item_tokens else tree.n_levels
        self.item_loss, self.tree_loss = item_loss if item_tokens else 0.0, tree_loss
        self.label_smoothing = label_smoothing
        common = tree, features, dim, vector_std, feature_dim, max_rows
        self.items = item_vectors(item_parts, *common) if item_tokens else None
        has_nodes = tree_loss > 0 or not item_tokens
        self.nodes: ModuleList[VectorSum] = node_vectors(node_parts, *common) if has_nodes else ModuleList()
        self.encoder = Encoder(block, encoder_layers, causal_encoder, drop_output=decoder_layers > 0)
        self.positions = (
            nn.Parameter(torch.empty(end_positions, dim).normal_(std=vector_std)) if end_positions else None
        )
        firsts = torch.tensor([0, *tree.n_nodes[:-1]], device=device).cumsum(0)  # of each depth among all nodes
        self.first_nodes = nn.Buffer(firsts, persistent=False)
        self.decoder, self.start = None, None
        self.queries: ModuleList[LevelQuery] = ModuleList()
        if tree_loss > 0 and decoder_layers > 0:
            self.decoder = Decoder(block, decoder_layers)
            self.start = nn.Parameter(torch.empty(dim).normal_(std=vector_std))
        elif tree_loss > 0:
            self.queries.extend(LevelQuery(dim, dropout) for _ in range(tree.n_levels))
        self.seen = nn.Parameter(torch.zeros(())) if self.item_loss > 0 else None
        drawn = torch.empty(0, dtype=torch.float64)
        if tree.n_items > max_rows and self.item_loss > 0:
            drawn = counts.double() if counts is not None else torch.ones(tree.n_items, dtype=torch.float64)
            drawn = ((drawn / drawn.sum() + 1 / tree.n_items) / 2).to(device)
        self.drawn = nn.Buffer(drawn, persistent=False)  # [N] with what probability; empty: none are drawn
        self.drawn_below = nn.Buffer(self.drawn.cumsum(0), persistent=False)
        # The item head's share in the score, chosen on validation.
        self.item_share = nn.Buffer(torch.tensor(1.0 if tree_loss <= 0 else 0.5 if self.item_loss > 0 else 0.0))
        self.to(device)

    @property
    def heads(self) -> tuple[str, ...]:
        """Which of "tree" and "items" the model has."""
        return ("tree",) * (self.tree_loss > 0) + ("items",) * (self.item_loss > 0)

    @property
    def seen_bias(self) -> Tensor:
        """What the item head's logits of consumed items differ by, []: learned, whether users come back to items."""
        assert self.seen is not None  # there is an item head
        return self.seen * SEEN_SCALE

    def vectors(self, training: bool = False) -> Vectors:
        """Of all items and nodes, in `ops.precision.stream_dtype`; for many searches they are made once. training:
        without those that are made as they are needed."""
        every = (self.items, *self.nodes)
        made = [of() if of is not None and (of.all_at_once or not training) else None for of in every]
        whole = not training and self.decoder is None and all(of is None or of.all_at_once for of in every)
        pairs = zip(made[1:], self.tree.siblings, strict=False) if whole else ()  # no nodes without a tree head
        return Vectors(made[0], made[1:], [nodes[own] for nodes, (own, *_) in pairs if nodes is not None])

    @torch.no_grad()
    def remake(self, vectors: Vectors) -> None:
        """Puts what the weights now say in the place of earlier `vectors`, one matrix after another."""
        for of, made in zip((self.items, *self.nodes), (vectors.items, *vectors.nodes), strict=True):
            if of is not None and made is not None:
                made.copy_(of())
        for made, nodes, (own, *_) in zip(vectors.siblings, vectors.made_nodes, self.tree.siblings, strict=False):
            torch.index_select(nodes, 0, own, out=made)

    def _encoder_output(self, history: JaggedTensor, vectors: Vectors) -> tuple[JaggedTensor, Tensor]:
        """[T * tokens_per_item, dim], normalized, of history rows of item ids [T], and of the same shape the vectors
        that it is made of: with `item_tokens` those of the items."""
        if self.items is not None:
            x = self.items.take(history.values, vectors.items)
        else:
            nodes = self.tree.item_nodes[history.values, 1:] + self.first_nodes  # [T, L']
            x = take_rows(torch.cat(vectors.made_nodes), nodes.flatten())
        levels = self.tokens_per_item
        tokens = JaggedTensor(x, history.offsets * levels, history.max_length * levels)
        if self.positions is not None:
            rows = row_indices(tokens.offsets, len(x))
            place = tokens.offsets[rows + 1] - 1 - torch.arange(len(x), device=x.device)
            place = place.clamp_max(len(self.positions) - 1)
            tokens = tokens.with_values(x + take_rows(self.positions, place).to(x.dtype))
        return self.encoder(tokens), x

    def _limits(self, batch: SeqBatch) -> Tensor:
        """How many tokens of its row each target sees, [P]: those of the items before it."""
        if not self.causal_encoder and batch.targets.max_length != 1:
            raise ValueError(
                "A bidirectional encoder takes one target per history: set "
                "EncoderDecoderRetrievalModel.causal_encoder = True or train.every_position = False."
            )
        return batch.n_before * self.tokens_per_item

    def forward(self, batch: SeqBatch) -> RetrievalLoss:
        """-log p(target) of both heads; each level's softmax runs over the children of the target's node alone."""
        vectors, targets, items = self.vectors(training=True), batch.targets, batch.targets.values
        (encoded, taken), limits = self._encoder_output(batch.history, vectors), self._limits(batch)
        rows = row_indices(targets.offsets, len(items))
        aligned = targets.offsets is batch.history.offsets and self.tokens_per_item == 1  # target i follows token i
        state = encoded.values if aligned else take_rows(encoded.values, encoded.offsets[rows] + limits - 1)  # [P, dim]
        weights = batch.weights.to(torch.promote_types(state.dtype, torch.float32))
        total = weights.sum()
        item_loss, levels = total.new_zeros(()), total.new_zeros(self.tree.n_levels)
        if self.item_loss > 0 and vectors.items is not None:
            seen = Seen(*batch.seen, self.seen_bias) if batch.seen is not None else None
            item_loss = linear_cross_entropy(state, vectors.items, items, weights, self.label_smoothing, seen) / total
        elif self.item_loss > 0 and self.items is not None:
            known, *seen = history_items(batch)  # few drawn items would be ones that the user has consumed
            rows_of = jagged_to_padded(taken, encoded.offsets, encoded.max_length)
            own = RowItems(known, rows_of, *(mask * self.seen_bias for mask in seen))
            drawn = self.drawn, self.drawn_below, SAMPLED_ITEMS
            losses = sampled_cross_entropy(targets.with_values(state), self.items.take, items, *drawn, own)
            item_loss = (losses * weights).sum() / total
        if self.tree_loss > 0:
            path = self.tree.item_nodes[items]  # [P, L' + 1]
            if self.decoder is None or self.start is None:
                queries = [query(state) for query in self.queries]
            else:
                view = MemoryView(targets.offsets, targets.max_length, limits.repeat_interleave(self.tree.n_levels))
                above = [self.nodes[d].take(path[:, d + 1], made) for d, made in enumerate(vectors.nodes[:-1])]
                x = torch.stack([self.start.to(state.dtype).expand_as(state), *(v.to(state.dtype) for v in above)], 1)
                hidden, _ = self.decoder(x, self.decoder.memory(encoded), view)  # [P, L', dim]
                queries = hidden.unbind(1)
            smoothing, order = self.label_smoothing, path[:, -1].argsort(stable=True)  # by leaf: by node of each depth
            first = vectors.made_nodes[0]
            losses = [linear_cross_entropy(queries[0], first, path[:, 1].long(), weights, smoothing)]
            for depth in range(1, self.tree.n_levels):
                level = self.tree.first_child[depth], path[:, depth], path[:, depth + 1], self.tree.fanout[depth]
                if (nodes := vectors.nodes[depth]) is None:
                    take = self.nodes[depth].take
                    size = min(max(self.tree.usual_fanout[depth], SAMPLED_CHILDREN[0]), SAMPLED_CHILDREN[1])
                    loss = sampled_tree_cross_entropy(queries[depth], take, *level, size)
                else:
                    loss = tree_cross_entropy(queries[depth], nodes, *level, smoothing, order)
                losses.append((loss * weights).sum())
            levels = torch.stack(losses) / total
        return RetrievalLoss(self.item_loss * item_loss + self.tree_loss * levels.sum(), item_loss, levels)

    def encode(self, history: JaggedTensor, vectors: Vectors) -> Encoded:
        """history: rows of item ids, none empty."""
        encoded, _ = self._encoder_output(history, vectors)
        state = encoded.values[encoded.offsets[1:] - 1]
        return Encoded(state, self.decoder.memory(encoded) if self.decoder is not None else [])

    def next_query(
        self, encoded: Encoded, depth: int, nodes: Tensor, vectors: Vectors, cache: KVCache | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Queries for the children of nodes [B, K] of a depth, one step of generation; K = 1 at depth 0. cache: of the
        steps before, for B * K sequences. Returns queries [B, K, dim], or [B, 1, dim] where they don't depend on the
        node, and each decoder layer's keys and values [B * K, 2, H, D], for `KVCache.extend`."""
        if self.decoder is None or self.start is None:
            return self.queries[depth](encoded.state)[:, None], []
        users, beams = nodes.shape
        if depth == 0:
            x = self.start.to(stream_dtype(self.start)).expand(users, 1, -1)
        else:
            x = vectors.made_nodes[depth - 1][nodes.flatten()][:, None]  # [B * K, 1, dim]
        limits = encoded.memory[0].lengths.repeat_interleave(beams)
        view = MemoryView(torch.arange(users + 1, device=x.device) * beams, beams, limits)
        hidden, tokens = self.decoder(x, encoded.memory, view, cache)
        return hidden[:, 0].unflatten(0, (users, beams)), tokens

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into the folder."""
        save_pretrained(self, self.config, folder)

    @staticmethod
    def from_pretrained(
        folder: str | Path, tree: Tree, features: Tensor | None = None
    ) -> "EncoderDecoderRetrievalModel":
        """Reads what `save_pretrained` wrote, in evaluation mode; tree and features as the model was trained with.
        ValueError where the model is of another tree or was saved by an earlier version; see also
        `modules.pretrained.load_pretrained`."""
        config, weights = load_pretrained(folder)
        trained, earlier = config.pop("tree", None), f"The model in {folder} was saved by an earlier version"
        if trained is None:
            raise ValueError(f"{earlier}, of another design: train it anew.")
        if trained != tree.digest:
            raise ValueError(f"The model in {folder} generates the IDs of tree {trained}, these are of {tree.digest}.")
        model = EncoderDecoderRetrievalModel(tree, features, **config)
        if other := sorted(weights.keys() ^ model.state_dict().keys()):
            raise ValueError(f"{earlier}, which differs in {other[0]}: train it anew.")
        model.load_state_dict(weights)
        return model.eval()


class LevelQuery(nn.Module):
    """state [.., dim] -> the query of one level [.., dim]: the state, and a perceptron of it."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))

    def forward(self, state: Tensor) -> Tensor:
        return state + self.mlp(state)
