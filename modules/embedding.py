"""Vectors of the catalogue's items and of its tree's nodes, each a sum of parts."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.module_list import ModuleList
from modules.tree import Tree
from ops.precision import stream_dtype
from ops.sums import RowSums, sum_rows, take_rows, take_sums

ItemParts = Annotated[tuple[Literal["free", "codes", "nodes", "features"], ...], Field(min_length=1)]
NodeParts = Annotated[tuple[Literal["free", "codes", "features"], ...], Field(min_length=1)]
ALIGNED = 8  # what columns of features are padded to a multiple of: a GPU's products of odd widths are slow
CHUNK = 2**18  # vectors that are made at a time of a catalogue with hashed rows
FACTORS = (0x2545F4914F6CDD1D, 0x1B873593CC9E2D51)  # odd, of the two hash functions


class VectorSum(nn.Module):
    """M vectors, each the sum of some rows of a table and of a perceptron of its features. rows: [M, k] int32, of the
    table, which has n_rows; None: no table. features: [M, D], or None. std: of the table's rows at the start. hidden:
    width of the perceptron. all_at_once: off, only those asked for are made in training. common: whether the perceptron
    ends with a bias, a part of all vectors."""

    def __init__(
        self,
        rows: Tensor | None,
        n_rows: int,
        features: Tensor | None,
        dim: int,
        std: float,
        hidden: int,
        all_at_once: bool,
        common: bool,
    ) -> None:
        super().__init__()
        self.all_at_once, self.features = all_at_once, features
        if features is not None and features.is_cuda and features.shape[1] % ALIGNED:
            self.features = F.pad(features, (0, -features.shape[1] % ALIGNED))
        self.table, self.mlp, self.rows, self.sums = None, None, rows, None
        if rows is not None:
            self.sums = RowSums.of(rows) if all_at_once else None
            self.table = nn.Parameter(torch.empty(n_rows, dim, device=rows.device).normal_(std=std))
        if features is not None:
            self.mlp = nn.Sequential(nn.Linear(features.shape[1], hidden), nn.GELU(), nn.Linear(hidden, dim, common))
            self.mlp.to(features.device)

    def __len__(self) -> int:
        return next(len(parts) for parts in (self.rows, self.features) if parts is not None)

    def forward(self) -> Tensor:
        """All: [M, dim], in `ops.precision.stream_dtype`. Where they are not made at once, without gradient."""
        if self.all_at_once:
            whole = sum_rows(self.table, self.sums) if self.table is not None and self.sums is not None else None
            return self._sum(whole, self.features)
        places = torch.arange(len(self), device=next(self.parameters()).device)
        with torch.no_grad():
            one = self.take(places[:1])
            made = one.new_empty(len(self), one.shape[1])
            for chunk in places.split(CHUNK):
                made[chunk] = self.take(chunk)
        return made

    def take(self, index: Tensor, made: Tensor | None = None) -> Tensor:
        """Some: index [T] integers -> [T, dim]. made: all of them, if they are made already."""
        if made is not None:
            return take_rows(made, index)
        rows = take_sums(self.table, self.rows[index]) if self.table is not None and self.rows is not None else None
        return self._sum(rows, self.features[index] if self.features is not None else None)

    def _sum(self, rows: Tensor | None, features: Tensor | None) -> Tensor:
        if features is None or self.mlp is None:
            assert rows is not None
            return rows
        dtype = stream_dtype(next(self.mlp.parameters()))
        wide, activation, narrow = self.mlp
        assert isinstance(wide, nn.Linear)
        spare = features.shape[1] - wide.in_features
        weight = F.pad(wide.weight, (0, spare)) if spare else wide.weight
        described = narrow(activation(F.linear(features.to(dtype), weight, wide.bias))).to(dtype)
        return described if rows is None else rows + described


@dataclass(frozen=True)
class Vectors:
    """What ranking needs of the catalogue. items: [N, dim] or None; nodes: [n_d, dim] of depths 1 to L', or []. In
    training None also stands for those that are made as they are needed. siblings: those of `nodes` that are not only
    children, which have probability 1; [] in training, and where a whole catalogue is not to be ranked."""

    items: Tensor | None
    nodes: list[Tensor | None]
    siblings: list[Tensor]

    @property
    def made_nodes(self) -> list[Tensor]:
        """Outside training all of `nodes`; in training at least the first."""
        return [made for made in self.nodes if made is not None]


def item_vectors(
    parts: ItemParts, tree: Tree, features: Tensor | None, dim: int, std: float, hidden: int, max_rows: int
) -> VectorSum:
    """Vectors of the N items. parts: "free", one of its own; "codes", one per code of its ID; "nodes", one per node on
    its path; "features", a perceptron of its features [N, D]. ValueError where features are missing.

    Where items or nodes of a depth are more than max_rows, two of max_rows hashed rows take the place of each own row
    (Tito Svenstrup et al. 2017, without weights), and vectors are made as they are needed.
    """
    check_features("item_parts", parts, features)
    nodes = tree.item_nodes[:, 1:]
    blocks = []
    if "free" in parts:
        blocks.append(_own(torch.arange(tree.n_items, device=nodes.device), tree.n_items, max_rows))
    for level, size in enumerate(tree.level_sizes if "codes" in parts else ()):
        blocks.append((tree.code[level][nodes[:, level].long()][:, None], size))
    for level, size in enumerate(tree.n_nodes if "nodes" in parts else ()):
        blocks.append(_own(nodes[:, level], size, max_rows))
    described = features if "features" in parts else None
    return VectorSum(*_below(blocks), described, dim, std, hidden, tree.n_items <= max_rows, True)


def node_vectors(
    parts: NodeParts, tree: Tree, features: Tensor | None, dim: int, std: float, hidden: int, max_rows: int
) -> ModuleList[VectorSum]:
    """Vectors of the nodes of each depth, 1 to L'. parts: "free", one of its own; "codes", one per code, shared by the
    nodes of a depth that end with it; "features", a perceptron of the mean features of the items below. max_rows: see
    `item_vectors`.

    The perceptron has no bias at its end: a softmax over siblings is blind to what they share. The bias's gradient
    would be what rounding leaves, the same way in every step, which Adam makes a step of full size: it grew until
    logits in bfloat16 could no longer tell siblings apart.
    """
    check_features("node_parts", parts, features)
    levels: ModuleList[VectorSum] = ModuleList()
    described = features if "features" in parts else None
    for level, (code, size) in enumerate(zip(tree.code, tree.level_sizes, strict=True)):
        blocks = []
        if "free" in parts:
            blocks.append(_own(torch.arange(len(code), device=code.device), len(code), max_rows))
        if "codes" in parts:
            blocks.append((code[:, None], size))
        means = tree.node_means(level + 1, described).to(described.dtype) if described is not None else None
        levels.append(VectorSum(*_below(blocks), means, dim, std, hidden, len(code) <= max_rows, False))
    return levels


def _own(index: Tensor, size: int, max_rows: int) -> tuple[Tensor, int]:
    """Rows [M, 1], or [M, 2] hashed ones, and how many there are. index: [M], below size."""
    if size <= max_rows:
        return index[:, None], size
    mixed = torch.stack([(index.long() + 1) * factor for factor in FACTORS], 1)
    return (mixed ^ (mixed >> 29)) % max_rows, max_rows


def _below(blocks: list[tuple[Tensor, int]]) -> tuple[Tensor | None, int]:
    """Blocks of rows in one table, one below the other: [M, k] int32, and how many rows it has."""
    starts = [sum(size for _, size in blocks[:n]) for n in range(len(blocks) + 1)]
    rows = [(rows + start).int() for (rows, _), start in zip(blocks, starts, strict=False)]
    return (torch.cat(rows, 1) if rows else None), starts[-1]


def check_features(name: str, parts: tuple[str, ...], features: Tensor | None) -> None:
    if "features" in parts and features is None:
        raise ValueError(
            f'EncoderDecoderRetrievalModel.{name} names "features", and the tokenizer holds none (features.npy): make '
            f"it anew with train_rqvae.py, set train.features beside an index.json, or leave the part out."
        )
