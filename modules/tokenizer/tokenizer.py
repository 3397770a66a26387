"""A tokenizer as a whole: from an item's raw text to its codes, by what its folder holds alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.items import Items
from data.sources import SOURCES, STATES, FittedSources
from modules.pretrained import CONFIG, WEIGHTS, resolve
from modules.rqvae import RqVae
from modules.tokenizer.catalogue import beside, encoder_features

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Tokenizer:
    """model: the RQ-VAE. sources: what makes the features that it reads, as fitted in training."""

    model: RqVae
    sources: FittedSources

    @staticmethod
    def from_pretrained(path: str | Path, revision: str | None = None, text_model: str | None = None) -> "Tokenizer":
        """path: run or tokenizer folder, or Hub id (at revision). text_model: folder or Hub id of the sentence encoder,
        where it no longer lies where it was in training.

        Raises what `RqVae.from_pretrained` and `FittedSources.load` raise: FileNotFoundError where a file is missing,
        ValueError where one is damaged or they do not fit each other, both with the path.
        """
        folder = resolve(path, revision, (CONFIG, WEIGHTS, SOURCES, STATES))
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        model, sources = RqVae.from_pretrained(folder), FittedSources.load(folder, text_model)
        if model.config["input_dim"] != sum(sources.widths):
            raise ValueError(
                f"The model in {folder} reads {model.config['input_dim']} features an item, the sources beside it "
                f"({sources.identity}) give {sum(sources.widths)}."
            )
        return Tokenizer(model, sources)

    @staticmethod
    def found(path: str | Path, revision: str | None = None, text_model: str | None = None) -> "Tokenizer | None":
        """The same; None where there is no tokenizer with its feature sources, or it is on the Hub and out of reach."""
        path = folder if (folder := Path(path) / "tokenizer").is_dir() else path
        try:
            return Tokenizer.from_pretrained(path, revision, text_model) if beside(path, revision, SOURCES) else None
        except ConnectionError:
            return None

    def save(self, folder: str | Path) -> None:
        """Writes the model and the sources."""
        self.model.save_pretrained(folder)
        self.sources.save(folder)

    def features(self, items: "Items | pl.DataFrame | Sequence[Mapping]") -> Tensor:
        """What the model reads of M items, as `Items.read` takes them -> [M, input_dim] float32, on the CPU."""
        return torch.from_numpy(self.sources.transform(items if isinstance(items, Items) else Items.read(items)))

    def encode(self, items: "Items | pl.DataFrame | Sequence[Mapping]") -> Tensor:
        """The nearest codes of M items: [M, L] int64, on the CPU. Items may share them: `extended_ids` makes them
        unique in a catalogue, without changing the IDs of its items."""
        return self.model.codes(self.features(items))

    def item_features(self, items: "Items | pl.DataFrame | Sequence[Mapping]") -> np.ndarray | None:
        """What the retriever reads of M items: [M, D] float16, as features.npy has it; None where it reads nothing."""
        return encoder_features(self.model, self.features(items), ~self.sources.from_interactions)
