"""From item keys, and from what the columns of items say, to the items of a catalogue."""

import re
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import chain, repeat
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.histories import as_key
from ops.jagged import JaggedTensor

if TYPE_CHECKING:
    import polars as pl

Keys = Collection[str | int]
PREDICATE = re.compile(r"\s*(\w+)\s*(=|contains\b)\s*(\S.*?)\s*")
QUOTED = re.compile(r"""^(["'])(.+)\1$""", re.DOTALL)
JOINED = re.compile(r"\s(and|or)\s")
KINDS = (str, int, float, np.integer, np.floating)


class Lookup:
    """keys, titles: [N]; index: {key: item}; columns: {name: [N] lists of texts}, beside the titles."""

    def __init__(self, keys: list[str], titles: list[str], columns: dict[str, list[list[str]]]) -> None:
        self.keys, self._titles, self._columns = keys, titles, columns
        self.index: dict[str | int, int] = dict(zip(keys, range(len(keys)), strict=True))

    def rows(self, rows: "Sequence[Keys] | pl.Series") -> tuple[JaggedTensor, np.ndarray]:
        """The items with these keys, row by row, without those that the catalogue lacks; how many each row has of them.
        rows: B collections of keys, or a polars Series of B lists. Returns rows of item ids and [B] int64. ValueError
        where a row is no collection of keys."""
        is_series = hasattr(rows, "explode")  # polars stays unloaded for lists
        lengths, items = self._from_series(rows) if is_series else self._from_lists(rows)  # type: ignore[arg-type]
        known = items >= 0
        ends = np.append(0, lengths.cumsum())
        offsets = np.append(0, known.cumsum())[ends]
        found = np.diff(offsets)
        tensors = torch.from_numpy(items[known]), torch.from_numpy(offsets)
        return JaggedTensor(*tensors, int(found.max(initial=0))), lengths - found

    def _from_lists(self, rows: Sequence[Keys]) -> tuple[np.ndarray, np.ndarray]:
        """Lengths [B], and the item of each key, -1 where there is none, int64."""
        for row in rows:
            if row is None or isinstance(row, KINDS):
                raise ValueError(f"Items are given as a list of their keys, not as {row!r}.")
        keys = list(chain.from_iterable(rows))
        kinds = set(map(type, keys))
        if not all(issubclass(kind, KINDS) for kind in kinds):
            wrong = next(key for key in keys if not isinstance(key, KINDS))
            raise ValueError(f"An item's key is a text or a number, not {wrong!r}.")
        texts = keys if kinds <= {str} else map(as_key, keys)
        items = np.fromiter(map(self.index.get, texts, repeat(-1)), np.int64, len(keys))
        return np.fromiter(map(len, rows), np.int64, len(rows)), items

    def _from_series(self, rows: "pl.Series") -> tuple[np.ndarray, np.ndarray]:
        keys = rows.explode(empty_as_null=False, keep_nulls=False).alias("key").to_frame()
        items = keys.join(self._table, on="key", how="left", maintain_order="left")["item"]
        return rows.list.len().fill_null(0).cast(int).to_numpy(), items.fill_null(-1).to_numpy()

    @cached_property
    def _table(self) -> "pl.DataFrame":
        import polars as pl

        return pl.DataFrame({"key": self.keys, "item": np.arange(len(self.keys))})

    def mask(self, wanted: Keys | str) -> Tensor:
        """Which items are meant, [N] bool: by their keys, or by `column = value` or `column contains value`. Case does
        not count, nor do quotes around the value; of a column with several values one that fits is enough. ValueError
        where a predicate is of another form, names a column that is not there, or fits no item."""
        result = torch.zeros(len(self.keys), dtype=torch.bool)
        if not isinstance(wanted, str):
            result[self.rows([wanted])[0].values] = True
            return result
        if (found := PREDICATE.fullmatch(wanted)) is None:
            raise ValueError(f"{wanted!r} is neither a list of keys nor a predicate: column = value, or .. contains ..")
        name, operator, value = found.group(1), found.group(2), QUOTED.sub(r"\2", found.group(3)).casefold()
        columns = {"title": zip(self._titles, strict=True), **self._columns}
        if name not in columns:
            raise ValueError(
                f"{wanted!r}: the pipeline has no column {name!r}, but {', '.join(columns)}; train.item_columns "
                "puts columns into it."
            )
        for item, texts in enumerate(columns[name]):
            texts = map(str.casefold, texts)
            result[item] = value in texts if operator == "=" else any(value in text for text in texts)
        if not result.any():
            hint = " A predicate has one value: for several give a file of keys, in Python a list."
            raise ValueError(f"{wanted!r} fits no item.{hint if JOINED.search(value) else ''}")
        return result
