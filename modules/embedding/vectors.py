"""Vectors of the catalogue's items and of its tree's nodes, each a sum of parts."""

import torch
from torch import Tensor, nn

from modules.tree import Tree
from ops.residual import stream_dtype
from ops.sums import RowSums, sum_rows

ITEM_PARTS = ("free", "codes", "nodes", "features")
NODE_PARTS = ("free", "codes", "features")
FEATURE_SCALE = 0.1  # of what features say at the start, beside the rows of the table


class VectorSum(nn.Module):
    """M vectors, each the sum of some rows of a table and of a perceptron of its features.

    blocks: pairs of row numbers [M, j] and how many rows the block has; the table holds the blocks one below the other.
    features: [M, D], or None. std: of the table's rows at the start. dropout: of the features.
    """

    def __init__(
        self, blocks: list[tuple[Tensor, int]], features: Tensor | None, dim: int, std: float, dropout: float
    ) -> None:
        super().__init__()
        sizes = [size for _, size in blocks]
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        self.sums, self.table, self.features, self.mlp = None, None, features, None
        if blocks:
            rows = torch.cat([rows.long() + start for (rows, _), start in zip(blocks, starts, strict=True)], 1)
            self.sums = RowSums.of(rows)
            self.table = nn.Parameter(torch.empty(sum(sizes), dim, device=rows.device).normal_(std=std))
        if features is not None:
            self.mlp = feature_mlp(features.shape[1], dim, dropout).to(features.device)

    def forward(self) -> Tensor:
        """[M, dim], in `ops.residual.stream_dtype`."""
        parts = []
        if self.table is not None:
            parts.append(sum_rows(self.table, self.sums))
        if self.mlp is not None:
            weight = self.mlp[1].weight
            described = self.mlp(self.features.to(stream_dtype(weight)))
            parts.append(described.to(stream_dtype(weight)) * FEATURE_SCALE)
        return sum(parts[1:], parts[0])


def feature_mlp(columns: int, dim: int, dropout: float) -> nn.Sequential:
    """[.., columns] -> [.., dim]."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(columns, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


def item_vectors(
    parts: tuple[str, ...], tree: Tree, features: Tensor | None, dim: int, std: float, dropout: float
) -> VectorSum:
    """Vectors of the N items. parts: "free", one of its own; "codes", one a code of its ID; "nodes", one a node on its
    path; "features", a perceptron of its features [N, D]. ValueError for other parts, and for missing features."""
    check_parts("item_parts", parts, ITEM_PARTS, features)
    nodes = tree.item_nodes[:, 1:]
    blocks = []
    if "free" in parts:
        blocks.append((torch.arange(tree.n_items, device=nodes.device)[:, None], tree.n_items))
    for level, size in enumerate(tree.level_sizes if "codes" in parts else ()):
        blocks.append((tree.code[level][nodes[:, level].long()][:, None], size))
    for level, size in enumerate(tree.n_nodes if "nodes" in parts else ()):
        blocks.append((nodes[:, level, None], size))
    return VectorSum(blocks, features if "features" in parts else None, dim, std, dropout)


def node_vectors(
    parts: tuple[str, ...], tree: Tree, features: Tensor | None, dim: int, std: float, dropout: float
) -> nn.ModuleList:
    """Vectors of the nodes of each depth, 1 to L'. parts: "free", one of its own; "codes", one a code, shared by the
    nodes of a depth that end with it; "features", a perceptron of the mean features of the items below."""
    check_parts("node_parts", parts, NODE_PARTS, features)
    levels = nn.ModuleList()
    for level, (code, size) in enumerate(zip(tree.code, tree.level_sizes, strict=True)):
        blocks = []
        if "free" in parts:
            blocks.append((torch.arange(len(code), device=code.device)[:, None], len(code)))
        if "codes" in parts:
            blocks.append((code[:, None], size))
        means = tree.node_means(level + 1, features).to(features.dtype) if "features" in parts else None
        levels.append(VectorSum(blocks, means, dim, std, dropout))
    return levels


def check_parts(name: str, parts: tuple[str, ...], allowed: tuple[str, ...], features: Tensor | None) -> None:
    if not parts or set(parts) - set(allowed):
        raise ValueError(f"EncoderDecoderRetrievalModel.{name} is {parts}; it names one or more of {allowed}.")
    if "features" in parts and features is None:
        raise ValueError(
            f'EncoderDecoderRetrievalModel.{name} names "features", and the tokenizer holds none (features.npy): make '
            f"it anew with train_rqvae.py, or leave the part out."
        )
