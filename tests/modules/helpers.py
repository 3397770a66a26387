"""Small catalogues, batches from lists, and a padded twin of the retriever."""

import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from data.schemas import TokenizedSeqBatch
from modules.model import EncoderDecoderRetrievalModel
from modules.transformer.attention import RelativePositionBias, SelfAttention
from modules.transformer.model import AddNorm
from ops.jagged import JaggedTensor


def random_catalogue(
    n_items: int, seed: int, codebook_size: int = 3, levels: int = 2
) -> tuple[Tensor, tuple[int, ...]]:
    """Codes [N, levels + 1] of which the last tells apart items that share the others, and the level sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, codebook_size, (n_items, levels), generator=generator).tolist()
    codes = [[*row, rows[:n].count(row)] for n, row in enumerate(rows)]
    return torch.tensor(codes), (codebook_size,) * levels + (max(row[-1] for row in codes) + 1,)


def make_model(level_sizes: tuple[int, ...], seed: int = 0, **changed) -> EncoderDecoderRetrievalModel:
    """In evaluation mode, with noise for all weights: also those that start at zero or one."""
    options = dict(dim=12, ff_dim=20, n_heads=2, head_dim=5, encoder_layers=2, decoder_layers=2)
    model = EncoderDecoderRetrievalModel(level_sizes, **options | dict(user_buckets=7, prefix_buckets=11) | changed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model.eval()


def make_batch(codes: Tensor, histories: list[list[int]], targets: list[list[int]], users=None) -> TokenizedSeqBatch:
    """From item ids; users are numbered if not given."""
    users = list(range(len(histories))) if users is None else users
    tokens = [codes[torch.tensor(history, dtype=torch.int64)].flatten() for history in histories]
    rows = [torch.tensor(target, dtype=torch.int64) for target in targets]
    return TokenizedSeqBatch(torch.tensor(users), JaggedTensor.from_rows(tokens), JaggedTensor.from_rows(rows))


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


def dense_encoder(model: EncoderDecoderRetrievalModel, codes: Tensor, histories, users) -> tuple[Tensor, Tensor]:
    """Encoded histories, padded with noise [B, M, dim], and which of their tokens are real [B, M]."""
    rows = []
    for user, history in zip(users, histories, strict=True):
        items = model.code_embedder(codes[torch.tensor(history, dtype=torch.int64)]).flatten(0, 1)
        rows.append(torch.cat([model.user_embedder(torch.tensor([user])), items]))
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


def dense_logits(model: EncoderDecoderRetrievalModel, codes: Tensor, histories, targets, users) -> list[Tensor]:
    """Logits [P, V_level] of each level: every target is decoded from a padded copy of its user's history."""
    encoded, real = dense_encoder(model, codes, histories, users)
    levels, sequences, limits = codes.shape[1], [], []
    for row, (history, items) in enumerate(zip(histories, targets, strict=True)):
        for i in range(len(items)):
            sequences.append(row)
            limits.append(1 + (len(history) - len(items) + 1 + i) * levels)  # the user, and the items it follows
    memory, limit = encoded[sequences], torch.tensor(limits)[:, None, None]  # [P, M, dim], [P, 1, 1]
    place = torch.arange(encoded.shape[1])
    visible = (real[sequences][:, None] & (place < limit)).expand(-1, levels, -1)
    bias = dense_bias(model.decoder.bias, place - (limit - 1), bidirectional=False)
    target_codes = codes[torch.tensor([item for items in targets for item in items])]
    before = model.code_embedder(target_codes)[:, :-1]
    x = torch.cat([model.start.expand(len(before), 1, -1), before], 1)
    causal = torch.ones(levels, levels, dtype=torch.bool).tril().expand(len(x), -1, -1)
    norm = model.decoder.input_norm
    for block in model.decoder.blocks:
        normed = dense_norm(norm, x)
        x = x + dense_attention(block.attention, normed, normed, causal)
        x = x + dense_attention(block.cross_attention, dense_norm(block.cross_norm, x), memory, visible, bias)
        x = x + dense_ff(block, x)
        norm = block.out_norm
    logits = dense_norm(norm, x) @ model.head.weight.T  # [P, L', sum of the level sizes]
    starts = [sum(model.level_sizes[:level]) for level in range(levels)]
    return [logits[:, n, start : start + model.level_sizes[n]] for n, start in enumerate(starts)]


def dense_losses(logits: list[Tensor], codes: Tensor, targets: list[list[int]]) -> Tensor:
    """-log p of each target's code on each level, among the codes with which an item continues: [P, L']."""
    rows, losses = codes.tolist(), []
    for place, item in enumerate(item for items in targets for item in items):
        losses.append([])
        for level, code in enumerate(rows[item]):
            siblings = sorted({row[level] for row in rows if row[:level] == rows[item][:level]})
            losses[-1].append(-logits[level][place][siblings].log_softmax(0)[siblings.index(code)])
    return torch.stack([torch.stack(row) for row in losses])
