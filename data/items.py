"""Items as feature sources read them, and tables of vectors by item key."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.packed_strings import pack_strings, unpack_strings
from data.corpus import Corpus
from data.lines import SURROGATE

if TYPE_CHECKING:
    import polars as pl


class Items:
    """M items. keys, texts: [M]. categories: [M] lists of names. Texts and categories may be given as functions, called
    whenever they are asked for. vectors: [M, D] float32 that came with them, rows of NaN for items without; None where
    no item has one."""

    def __init__(
        self,
        keys: list[str],
        texts: list[str] | Callable[[], list[str]],
        categories: list[list[str]] | Callable[[], list[list[str]]],
        vectors: np.ndarray | None = None,
    ) -> None:
        self.keys, self.vectors = keys, vectors
        self._texts, self._categories = texts, categories

    @property
    def texts(self) -> list[str]:
        return self._texts() if callable(self._texts) else self._texts

    @property
    def categories(self) -> list[list[str]]:
        return self._categories() if callable(self._categories) else self._categories

    @staticmethod
    def of(corpus: Corpus) -> "Items":
        """All items of a corpus, in order; what no source asks for is not read."""
        return Items(corpus.item_keys, corpus.texts, corpus.categories)

    @staticmethod
    def read(items: "pl.DataFrame | Sequence[Mapping]") -> "Items":
        """From a frame or from one mapping per item: key and text (str), and where there are any, categories (list of
        str) and vector (list of numbers, for the source `Vectors`). Raises ValueError that names item and field."""
        rows = items if isinstance(items, Sequence) else items.to_dicts()
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(f"item {number} must be a mapping with 'key' and 'text', it is {row!r}")
            for field in ("key", "text"):
                if not isinstance(row.get(field), str):
                    raise ValueError(f"item {number}: {field!r} must be a text, it is {row.get(field)!r}")
                if SURROGATE.search(row[field]):
                    raise ValueError(f"item {number}: {field!r} holds half a surrogate pair: {row[field]!r}")
            groups = row.get("categories") or []
            if isinstance(groups, str) or not all(isinstance(name, str) for name in groups):
                raise ValueError(f"item {row['key']!r}: 'categories' must be a list of texts, it is {groups!r}")
            if any(SURROGATE.search(name) for name in groups):
                raise ValueError(f"item {row['key']!r}: 'categories' holds half a surrogate pair: {groups!r}")
        keys, texts = ([row[field] for row in rows] for field in ("key", "text"))
        vectors = [row.get("vector") for row in rows]
        size = next((len(vector) for vector in vectors if vector is not None), 0)
        given = np.full((len(rows), size), np.nan, dtype=np.float32) if size else None
        for number, vector in enumerate(vectors):
            if vector is not None and len(vector) != size:
                raise ValueError(f"item {keys[number]!r}: 'vector' has {len(vector)} numbers, others have {size}")
            if vector is not None and given is not None:
                given[number] = vector
        return Items(keys, texts, [list(row.get("categories") or []) for row in rows], given)


def vector_table(keys: list[str], vectors: np.ndarray) -> dict[str, Tensor]:
    """Vectors [N, D] of items by key, as tensors for a safetensors file."""
    data, offsets = pack_strings(keys)
    return {"vectors": torch.from_numpy(np.ascontiguousarray(vectors)), "keys.bytes": data, "keys.offsets": offsets}


def look_up(table: dict[str, Tensor], keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of items [M, D], zeros where the table has none, and which it has, [M] bool. Where they are all its
    items, in order, the vectors are the table's own."""
    packed = table["keys.bytes"], table["keys.offsets"]
    if len(packed[1]) == len(keys) + 1 and all(map(torch.equal, packed, pack_strings(keys))):
        return table["vectors"].numpy(), np.ones(len(keys), dtype=bool)
    own = unpack_strings(*packed)
    row = dict(zip(own, range(len(own)), strict=True))
    rows = np.array([row.get(key, -1) for key in keys], dtype=np.int64)
    values = np.zeros((len(keys), table["vectors"].shape[1]), dtype=np.float32)
    values[rows >= 0] = table["vectors"].numpy()[rows[rows >= 0]]
    return values, rows >= 0
