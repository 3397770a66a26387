"""Words that users wrote beside items, of which a split decides what the texts may say."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.packed_strings import pack_strings, unpack_strings
from data.splits import Splits, in_training
from ops.jagged import row_indices

MAX_TAGS = 10


@dataclass(frozen=True)
class Tags:
    """user, item, name, time: [K] int64. user is -1 for those without interactions. name is a place in `names`, which
    are sorted."""

    user: Tensor
    item: Tensor
    name: Tensor
    time: Tensor
    names: list[str]

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        data, offsets = pack_strings(self.names)
        columns = {name: getattr(self, name) for name in ("user", "item", "name", "time")}
        return {f"tags.{name}": tensor for name, tensor in (columns | {"bytes": data, "offsets": offsets}).items()}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> "Tags | None":
        """What `tensors` was put among; None where there is nothing of it."""
        if "tags.user" not in tensors:
            return None
        columns = {name: tensors[f"tags.{name}"] for name in ("user", "item", "name", "time")}
        return Tags(**columns, names=unpack_strings(tensors["tags.bytes"], tensors["tags.offsets"]))

    def known(self, splits: Splits, n_items: int) -> Tensor:
        """[K] bool: which lie before the split's cut in time, if it has one, and are not by a user on an item that they
        are evaluated with."""
        interactions = splits.interactions
        pairs = row_indices(interactions.offsets, len(interactions)) * n_items + interactions.items
        held_out = pairs[~in_training(interactions, splits.train_lengths)]
        known = ~torch.isin(self.user * n_items + self.item, held_out)
        return known if splits.cut is None else known & (self.time < splits.cut)

    def append(self, texts: list[str], known: Tensor) -> list[str]:
        """Texts [N] of items with the most frequent known tags after them, ties by alphabet: "Toy Story (1995). Tags:
        pixar, fun."."""
        pairs, counts = torch.unique((self.item * len(self.names) + self.name)[known], return_counts=True)
        item, name = pairs // len(self.names), pairs % len(self.names)
        by_count = counts.argsort(descending=True, stable=True)
        order = by_count[item[by_count].argsort(stable=True)]
        most: list[list[str]] = [[] for _ in texts]
        for row, place in zip(item[order].tolist(), name[order].tolist(), strict=True):
            if len(most[row]) < MAX_TAGS:
                most[row].append(self.names[place])
        return [f"{text} Tags: {', '.join(tags)}." if tags else text for text, tags in zip(texts, most, strict=True)]
