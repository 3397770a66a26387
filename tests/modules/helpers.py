"""Small catalogues, batches from lists, and a padded twin of the retriever."""

import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from common.schemas import SeqBatch
from modules.model import EncoderDecoderRetrievalModel
from modules.transformer.attention import RelativePositionBias, SelfAttention
from modules.transformer.model import AddNorm
from modules.tree import Tree
from tests.ops.rows import jagged


def random_catalogue(
    n_items: int, seed: int, codebook_size: int = 3, levels: int = 2
) -> tuple[Tensor, tuple[int, ...]]:
    """Codes [N, levels + 1] of which the last tells apart items that share the others, and the level sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, codebook_size, (n_items, levels), generator=generator).tolist()
    codes = [[*row, rows[:n].count(row)] for n, row in enumerate(rows)]
    return torch.tensor(codes), (codebook_size,) * levels + (max(row[-1] for row in codes) + 1,)


def make_model(
    codes: Tensor, seed: int = 0, features: int = 5, device: str | torch.device = "cpu", **changed
) -> EncoderDecoderRetrievalModel:
    """In evaluation mode, with noise for all weights, even those that start at zero or one. features: columns, or 0."""
    generator = torch.Generator().manual_seed(seed)
    described = torch.randn(len(codes), features, generator=generator, dtype=torch.float64) if features else None
    described = described.to(device) if described is not None else None
    options = dict(dim=12, ff_dim=20, n_heads=2, head_dim=5, encoder_layers=2)
    model = EncoderDecoderRetrievalModel(Tree.build(codes).to(device), described, **options | changed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model.eval()


def make_batch(histories: list[list[int]], targets: list[list[int]], users=None) -> SeqBatch:
    """From item ids; users are numbered if not given."""
    users = list(range(len(histories))) if users is None else users
    rows = ([torch.tensor(row, dtype=torch.int64) for row in part] for part in (histories, targets))
    return SeqBatch(torch.tensor(users), *(jagged(part) for part in rows))


def dense_attention(layer, x: Tensor, memory: Tensor, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """x [B, Q, dim], memory [B, K, dim], visible [B, Q, K] bool, bias [B or 1, H, Q, K] -> [B, Q, dim]."""
    heads, width = layer.n_heads, layer.n_heads * layer.head_dim
    if isinstance(layer, SelfAttention):
        matrices = layer.query_key_value.weight.split(width)
    else:
        matrices = (layer.query.weight, *layer.key_value.weight.split(width))
    inputs = zip((x, memory, memory), matrices, strict=True)
    query, key, value = ((rows @ matrix.T).unflatten(-1, (heads, -1)) for rows, matrix in inputs)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / layer.head_dim**0.5 + bias
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2) @ layer.out.weight.T


def dense_norm(norm: AddNorm, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def dense_ff(block, x: Tensor) -> Tensor:
    return (dense_norm(block.ff_norm, x) @ block.ff.wide.weight.T).clamp_min(0) @ block.ff.narrow.weight.T


def dense_bias(bias: RelativePositionBias, distance: Tensor, bidirectional: bool) -> Tensor:
    """distance key - query [B, Q, K] -> [B, H, Q, K]."""
    buckets = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets=32, max_distance=128)
    return bias.table.weight[buckets].movedim(-1, 1)


def described(mlp, features: Tensor) -> Tensor:
    """What a perceptron adds to vectors: features [M, D] -> [M, dim]."""
    hidden = features @ mlp[0].weight.T + mlp[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ mlp[2].weight.T + (mlp[2].bias if mlp[2].bias is not None else 0)


def dense_sum(vectors, blocks: list[tuple[list[int], int]], features: Tensor | None) -> Tensor:
    """A `VectorSum` from what its table holds: of each block the row of each vector, and how many rows it has."""
    total, start = 0, 0
    for rows, size in blocks:
        total, start = total + vectors.table[start : start + size][rows], start + size
    return total + described(vectors.mlp, features) if vectors.mlp is not None else total


def dense_vectors(model: EncoderDecoderRetrievalModel, codes: Tensor, features: Tensor | None):
    """Items' vectors [N, dim], or None, and of each depth {prefix: vector}."""
    rows, sizes = [tuple(row) for row in codes.tolist()], (codes.amax(0) + 1).tolist()
    prefixes = [sorted({row[: depth + 1] for row in rows}) for depth in range(len(sizes))]
    parts, blocks, items, nodes = model.config["item_parts"], [], None, []
    if "free" in parts:
        blocks.append((list(range(len(rows))), len(rows)))
    for level, size in enumerate(sizes if "codes" in parts else []):
        blocks.append(([row[level] for row in rows], size))
    for level, own in enumerate(prefixes if "nodes" in parts else []):
        blocks.append(([own.index(row[: level + 1]) for row in rows], len(own)))
    if model.items is not None:
        items = dense_sum(model.items, blocks, features)
    for level, own in enumerate(prefixes if len(model.nodes) else []):
        parts, blocks = model.config["node_parts"], []
        if "free" in parts:
            blocks.append((list(range(len(own))), len(own)))
        if "codes" in parts:
            blocks.append(([prefix[-1] for prefix in own], sizes[level]))
        below = [[n for n, row in enumerate(rows) if row[: level + 1] == prefix] for prefix in own]
        means = torch.stack([features[items].mean(0) for items in below]) if features is not None else None
        nodes.append(dict(zip(own, dense_sum(model.nodes[level], blocks, means), strict=True)))
    return items, nodes


def dense_encoder(model: EncoderDecoderRetrievalModel, codes: Tensor, histories, items, nodes) -> tuple[Tensor, Tensor]:
    """Encoded histories, padded with noise [B, M, dim], and which of their tokens are real [B, M]."""
    rows = []
    for history in histories:
        if items is not None:
            rows.append(items[history])
            continue
        paths = [tuple(codes[item].tolist()) for item in history]
        rows.append(torch.stack([nodes[d][path[: d + 1]] for path in paths for d in range(len(path))]))
    longest = max(map(len, rows))
    x = torch.stack([torch.cat([row, torch.randn(longest - len(row), row.shape[1]).to(row)]) for row in rows])
    place = torch.arange(longest)
    real = place < torch.tensor([[len(row)] for row in rows])  # [B, M]
    visible = (real | (place == 0))[:, None].expand(-1, longest, -1)
    if model.causal_encoder:
        visible = visible & (place <= place[:, None])
    bias = dense_bias(model.encoder.bias, (place - place[:, None])[None], not model.causal_encoder)
    norm = model.encoder.input_norm
    for block in model.encoder.blocks:
        normed = dense_norm(norm, x)
        x = x + dense_attention(block.attention, normed, normed, visible, bias)
        x = x + dense_ff(block, x)
        norm = block.out_norm
    return dense_norm(norm, x), real


def dense_queries(
    model, codes: Tensor, histories, targets, features
) -> tuple[Tensor, Tensor, Tensor | None, list[dict]]:
    """For each target its state [P, dim] and its level queries [P, L', dim], from a padded copy of its user's history;
    then the vectors of `dense_vectors`."""
    items, nodes = dense_vectors(model, codes, features)
    encoded, real = dense_encoder(model, codes, histories, items, nodes)
    levels, sequences, limits = codes.shape[1], [], []
    for row, (history, own) in enumerate(zip(histories, targets, strict=True)):
        for i in range(len(own)):
            sequences.append(row)
            limits.append((len(history) - len(own) + 1 + i) * (1 if items is not None else levels))
    memory, limit = encoded[sequences], torch.tensor(limits)  # [P, M, dim], [P]
    state = memory[torch.arange(len(limit)), limit - 1]
    if model.decoder is None:
        queries = [state + query.mlp[3](torch.nn.functional.gelu(query.mlp[0](state))) for query in model.queries]
        return state, torch.stack(queries, 1) if queries else state[:, None], items, nodes
    paths = [tuple(codes[item].tolist()) for own in targets for item in own]
    above = [torch.stack([model.start, *(nodes[d][path[: d + 1]] for d in range(levels - 1))]) for path in paths]
    x, place = torch.stack(above), torch.arange(encoded.shape[1])
    visible = (real[sequences] & (place < limit[:, None]))[:, None].expand(-1, levels, -1)
    bias = dense_bias(model.decoder.bias, place - (limit[:, None, None] - 1), bidirectional=False)
    causal = torch.ones(levels, levels, dtype=torch.bool).tril().expand(len(x), -1, -1)
    norm = model.decoder.input_norm
    for block in model.decoder.blocks:
        normed = dense_norm(norm, x)
        x = x + dense_attention(block.attention, normed, normed, causal)
        x = x + dense_attention(block.cross_attention, dense_norm(block.cross_norm, x), memory, visible, bias)
        x = x + dense_ff(block, x)
        norm = block.out_norm
    return state, dense_norm(norm, x), items, nodes


def dense_log_probs(queries: Tensor, codes: Tensor, nodes: list[dict]) -> Tensor:
    """log p(item) of each level, given the item's node above: queries [P, L', dim] -> [P, N, L']. For queries that do
    not depend on the path, or of one target's path."""
    rows = [tuple(row) for row in codes.tolist()]
    result = []
    for row in rows:
        own = []
        for depth in range(len(row)):
            siblings = [prefix for prefix in nodes[depth] if prefix[:depth] == row[:depth]]
            logits = queries[:, depth] @ torch.stack([nodes[depth][prefix] for prefix in siblings]).T
            own.append(logits.log_softmax(1)[:, siblings.index(row[: depth + 1])])
        result.append(torch.stack(own, 1))
    return torch.stack(result, 1)
