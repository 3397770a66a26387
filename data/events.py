"""From tables of events, who consumed what and when, to sequences."""

from typing import TYPE_CHECKING

import torch

from common.schemas import Interactions
from ops.jagged import lengths_to_offsets

if TYPE_CHECKING:
    import polars as pl


def sequences(events: "pl.DataFrame") -> tuple[list, Interactions]:
    """The users by rising `user`, and their interactions in time order; ties keep the order of the rows. events:
    columns user (anything that sorts), item (row of the catalogue), timestamp (integer, or nulls only where the rows
    are in time order already)."""
    import polars as pl

    timed = events["timestamp"].null_count() == 0
    events = events.sort("user", "timestamp", maintain_order=True)
    users = events.group_by("user", maintain_order=True).len()
    interactions = Interactions(
        torch.from_numpy(events["item"].cast(pl.Int32).to_numpy(writable=True)),
        lengths_to_offsets(torch.from_numpy(users["len"].cast(pl.Int64).to_numpy(writable=True))),
        torch.from_numpy(events["timestamp"].cast(pl.Int64).to_numpy(writable=True)) if timed else None,
    )
    return users["user"].to_list(), interactions


def k_core(events: "pl.DataFrame", k: int) -> "pl.DataFrame":
    """The largest part of the rows in which every `user` and every `item` has k rows or more, in their order."""
    import polars as pl

    while True:
        enough = (pl.len().over("user") >= k) & (pl.len().over("item") >= k)
        kept = events.filter(enough)
        if len(kept) == len(events):
            return events
        events = kept


def factorize(keys: "pl.Series") -> tuple[list, "pl.Series"]:
    """The distinct keys in the order of their first appearance, and the number of each row's key (UInt32)."""
    import polars as pl

    distinct = keys.unique(maintain_order=True)
    numbers = pl.DataFrame({"key": distinct}).with_row_index("number")
    joined = pl.DataFrame({"key": keys}).join(numbers, on="key", how="left", maintain_order="left")
    return distinct.to_list(), joined["number"]
