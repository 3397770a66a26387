"""A trained pipeline whose catalogue changes: items come and go, IDs and vectors of all others stay."""

import hashlib
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.packed_strings import pack_strings
from data.corpus import title
from data.items import Items
from modules.model import EncoderDecoderRetrievalModel
from modules.serving.pipeline import Pipeline
from modules.tokenizer.catalogue import extended_ids
from modules.tokenizer.semids import SemanticIds, features_digest
from modules.tree import Tree

NONE = Items([], [], [])


def changed(pipeline: Pipeline, add: Items = NONE, remove: Collection[str] = ()) -> Pipeline:
    """The pipeline without the items with the keys `remove`, and with the items `add` after the others.

    New items get IDs from the pipeline's tokenizer, none of them an ID that an item has or that one that goes now had.
    Every item and node that stays keeps its vector; see `carried_over`. New items have the count 0.

    ValueError where a new key is in the catalogue or repeated, a key to remove is not, no item is left, new items lack
    a tokenizer, or their codes are all taken.
    """
    ids = pipeline.semantic_ids
    _check_keys(ids.item_keys, add.keys, remove)
    keys, gone, n_old = [*ids.item_keys, *add.keys], set(remove), ids.n_items
    codes, sizes, features = ids.codes, ids.level_sizes, pipeline.features
    if add.keys:
        codes, sizes, features = _extended(pipeline, keys, add)
    stays = torch.tensor([n for n, key in enumerate(keys) if key not in gone])
    made = dict(ids.tokenizer)
    if features is not None:
        features = features[stays.numpy()]
        made["item_features"] = features_digest(features)

    def left(old: list, new: list) -> list:
        every = [*old, *new]
        return [every[n] for n in stays.tolist()]

    left_keys = left(ids.item_keys, add.keys)
    digest = hashlib.sha256(ids.corpus_hash.encode() + pack_strings(left_keys)[0].numpy().tobytes()).hexdigest()[:16]
    new_ids = SemanticIds(codes[stays], sizes, left_keys, ids.corpus_name, digest, made)
    items = torch.where(stays < n_old, stays, -1)
    new_columns = {"text": [[text] for text in add.texts], "key": [[key] for key in add.keys]}
    new_columns["categories"] = add.categories
    return replace(
        pipeline,
        model=carried_over(pipeline.model, new_ids, features, items),
        semantic_ids=new_ids,
        features=features,
        titles=left(pipeline.titles, [title(text) for text in add.texts]),
        counts=torch.where(items < 0, 0, pipeline.counts[items.clamp_min(0)]),
        columns={name: left(column, new_columns[name]) for name, column in pipeline.columns.items()},
    )


def _check_keys(old: list[str], new: list[str], remove: Collection[str]) -> None:
    known, seen = set(old), set()
    for key in new:
        if key in known or key in seen:
            raise ValueError(f"The new item {key!r} is in the catalogue already, or twice among the new ones.")
        seen.add(key)
    if missing := [key for key in remove if key not in known]:
        raise ValueError(f"{len(missing)} keys to remove are not in the catalogue, such as {missing[0]!r}.")
    if not new and len(set(remove)) == len(old):
        raise ValueError("No item would be left.")


def _extended(pipeline: Pipeline, keys: list[str], add: Items) -> tuple[Tensor, tuple[int, ...], np.ndarray | None]:
    """Codes, level sizes and features of the old items with the new ones after them."""
    ids, tokenizer = pipeline.semantic_ids, pipeline.tokenizer
    if tokenizer is None:
        raise ValueError(
            "The pipeline holds no tokenizer, which gives new items their IDs: its folder has no tokenizer/, or it was "
            "loaded without tokenizer=True."
        )
    codes, sizes = extended_ids(tokenizer.model, ids, keys, tokenizer.features(add))
    if len(sizes) != len(ids.level_sizes):
        raise ValueError(
            f"New items share all {len(ids.level_sizes)} codes with others, and no last code near theirs is free; "
            "another level would be another model: train both stages anew."
        )
    if pipeline.features is None:
        return codes, sizes, None
    return codes, sizes, np.concatenate([pipeline.features, tokenizer.item_features(add)])


@torch.no_grad()
def carried_over(
    model: EncoderDecoderRetrievalModel, ids: SemanticIds, features: np.ndarray | None, items: Tensor
) -> EncoderDecoderRetrievalModel:
    """The model for another catalogue with as many levels: rows of codes stay, rows of items follow the item, rows of
    nodes the prefix, and rows that are new are zero, so that codes and features alone speak for what was never trained.

    What features say of a node is about all items below, and changes with them; where a node has a row of its own, the
    difference is added to it, so that the node's vector stays.
    ids, features: of the new catalogue. items: [N] the item that each was before, -1 for new ones.
    """
    old, device = model.tree, model.tree.leaf_items.device
    tree = Tree.build(ids.codes, ids.level_sizes).to(device)
    described = torch.from_numpy(features).to(device) if features is not None else None
    config = {name: value for name, value in model.config.items() if name != "tree"}
    if max(old.n_items, tree.n_items) > config["max_rows"]:
        raise ValueError(
            f"Items share hashed rows where they are more than max_rows = {config['max_rows']:,}: train anew instead."
        )
    new = EncoderDecoderRetrievalModel(tree, described, **config).eval()
    weights, nodes = model.state_dict(), old.nodes_of(tree)
    of_nodes = list(zip(old.n_nodes, nodes, strict=True))
    of_codes = []
    for before, size in zip(old.level_sizes, tree.level_sizes, strict=True):
        rows = torch.arange(size, device=device)
        of_codes.append((before, torch.where(rows < before, rows, -1)))
    if model.items is not None and model.items.table is not None:
        blocks = {"free": [(old.n_items, items.to(device))], "codes": of_codes, "nodes": of_nodes}
        blocks = [block for part, group in blocks.items() if part in config["item_parts"] for block in group]
        weights["items.table"] = _rows(model.items.table, blocks)
    for depth, level in enumerate(model.nodes):
        blocks = {"free": of_nodes[depth], "codes": of_codes[depth]}
        if level.table is not None:
            blocks = [block for part, block in blocks.items() if part in config["node_parts"]]
            weights[f"nodes.{depth}.table"] = _rows(level.table, blocks)
    new.load_state_dict(weights)
    if {"free", "features"} <= set(config["node_parts"]):
        for level, before, rows in zip(new.nodes, model.nodes, nodes, strict=True):
            stays = (rows >= 0).nonzero()[:, 0]
            level.get_parameter("table")[stays] += before()[rows[stays]] - level()[stays]
    return new


def _rows(table: Tensor, blocks: list[tuple[int, Tensor]]) -> Tensor:
    """A table from rows of another one, block by block. blocks: how many rows each had, and which of them each of its
    rows is now, -1: zeros."""
    olds = table.split([size for size, _ in blocks])
    pairs = zip(olds, blocks, strict=True)
    return torch.cat([(rows >= 0)[:, None] * old[rows.clamp_min(0)] for old, (_, rows) in pairs])
