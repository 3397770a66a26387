"""Feature sources with what they were fitted to: they describe any item, and travel with the tokenizer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load
from torch import Tensor

from common.files import file_sha256, write_file, write_tensors
from common.packed_strings import pack_strings, unpack_strings
from data.cooccurrence import CoOccurrenceSvd
from data.corpus import Corpus
from data.encoders import SentenceEncoder, TfidfSvd
from data.items import Items
from data.vectors import Vectors

FORMAT = "feature-sources-1"
SOURCES, STATES = "sources.json", "sources.safetensors"
MAX_CATEGORIES = 512


@dataclass(frozen=True)
class Categories:
    """One 0/1 column per category of the corpus, sorted by name; other categories have no column."""

    identity = "categories"
    from_interactions = False

    @property
    def settings(self) -> dict:
        return {}

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        return corpus.hash

    def fit(self, corpus: Corpus, train_lengths: Tensor) -> dict[str, Tensor]:
        """The C names. Raises ValueError where they are more than 512."""
        names = sorted({name for group in corpus.categories() for name in group})
        if len(names) > MAX_CATEGORIES:
            raise ValueError(f"{corpus.name} has {len(names)} categories, columns are for up to {MAX_CATEGORIES}")
        data, offsets = pack_strings(names)
        return {"names.bytes": data, "names.offsets": offsets}

    def transform(self, state: dict[str, Tensor], items: Items) -> np.ndarray:
        """M items -> [M, C] float32."""
        names = unpack_strings(state["names.bytes"], state["names.offsets"])
        column = {name: number for number, name in enumerate(names)}
        values = np.zeros((len(items.keys), len(names)), dtype=np.float32)
        for item, group in enumerate(items.categories):
            values[item, [column[name] for name in group if name in column]] = 1
        return values


KINDS = {kind.__name__: kind for kind in (TfidfSvd, SentenceEncoder, CoOccurrenceSvd, Vectors, Categories)}


@dataclass(frozen=True)
class FittedSources:
    """Sources side by side, as the RQ-VAE reads them; `Categories`, if there are any, are the last.

    sources, states, scales, widths, identities: of each source its settings, what `fit` returned, the number that its
    columns are divided by, how many these are, and its identity when it was fitted.
    corpus_name, split: of the data that they were fitted to.
    """

    sources: Sequence
    states: Sequence[dict[str, Tensor]]
    scales: Sequence[float]
    widths: Sequence[int]
    identities: Sequence[str]
    corpus_name: str
    split: str

    @property
    def n_cat_features(self) -> int:
        """How many trailing columns are categories."""
        return self.widths[-1] if isinstance(self.sources[-1], Categories) else 0

    @property
    def identity(self) -> str:
        """What computes the features, in one string."""
        categories = [f"{self.n_cat_features} categories"] if self.n_cat_features else []
        return " + ".join([name for name in self.identities if name != Categories.identity] + categories)

    @property
    def from_interactions(self) -> np.ndarray:
        """[D] bool: which columns are of sources that read interactions."""
        return np.repeat([source.from_interactions for source in self.sources], self.widths)

    def transform(self, items: Items) -> np.ndarray:
        """The features of any items: M items -> [M, D] float32. Columns from interactions are those of training for
        items that it knew by key, and zeros, about their mean, for others.

        Raises ValueError where a source is not the one that was fitted, or has no vector of an item.
        """
        blocks = []
        for n, source in enumerate(self.sources):
            if source.identity != self.identities[n]:
                raise ValueError(
                    f"The tokenizer was trained with {self.identities[n]}, and {source} is {source.identity}: give the "
                    "folder of the model that it was trained with as `text_model`."
                )
            block = checked(source.transform(self.states[n], items), source.identity, items.keys)
            if block.shape[1] != self.widths[n]:
                raise ValueError(f"{source.identity} gives {block.shape[1]} columns, in training {self.widths[n]}.")
            blocks.append(block)
        return self.side_by_side(blocks)

    def side_by_side(self, blocks: list[np.ndarray]) -> np.ndarray:
        """Blocks [M, D_n] of the sources, each divided by its scale -> [M, D] float32."""
        if len(blocks) == 1:
            return blocks[0]
        return np.concatenate([block / scale for block, scale in zip(blocks, self.scales, strict=True)], axis=1)

    def save(self, folder: str | Path) -> None:
        """Writes sources.json and sources.safetensors. A sentence encoder is named, with its revision; its weights are
        not copied."""
        names = ("scales", "widths", "identities", "corpus_name", "split")
        parts = {name: getattr(self, name) for name in names}
        sources = [{"kind": type(source).__name__, "settings": source.settings} for source in self.sources]
        states = {f"{n}.{name}": t for n, state in enumerate(self.states) for name, t in state.items()}
        write_tensors(Path(folder) / STATES, states)
        head = {"format": FORMAT, "states_sha256": file_sha256(Path(folder) / STATES), "sources": sources}
        content = json.dumps(head | parts, indent=2, ensure_ascii=False)
        write_file(Path(folder) / SOURCES, (content + "\n").encode())

    @staticmethod
    def load(folder: str | Path, text_model: str | None = None) -> "FittedSources":
        """Reads what `save` wrote. text_model: a folder or Hub id to load the sentence encoder from, where it no longer
        lies where it was. Raises FileNotFoundError or ValueError that names the file."""
        folder = Path(folder)
        for name in (SOURCES, STATES):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing: the tokenizer holds no fitted feature sources.")
        file = folder / SOURCES
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if (found := content.pop("format")) != FORMAT:
                raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
            sources = [KINDS[source["kind"]](**source["settings"]) for source in content.pop("sources")]
            digest = content.pop("states_sha256")
            fitted = FittedSources(sources, [{} for _ in sources], **content)
            packed = (file := folder / STATES).read_bytes()
            if hashlib.sha256(packed).hexdigest() != digest:
                raise ValueError(f"it is not the one that {SOURCES} was written with")
            for name, tensor in load(packed).items():
                number, _, part = name.partition(".")
                fitted.states[int(number)][part] = tensor
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} can't be used ({error!r}): run train_rqvae.py again to write it anew.") from error
        if text_model is None:
            return fitted
        return replace(fitted, sources=[s.at(text_model) if isinstance(s, SentenceEncoder) else s for s in sources])


def checked(values: np.ndarray, name: str, keys: list[str], start: int = 0) -> np.ndarray:
    """What a source gave, as [M, D] float32. ValueError where it has another shape, or is not finite: that names the
    item by its number, counted from start, and its key, or whatever says which one it is."""
    values = np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or len(values) != len(keys):
        raise ValueError(f"{name} returned {values.shape} for {len(keys)} items")
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        item = int(bad.argmax())
        raise ValueError(f"{name}: item {start + item} ({keys[item][:200]!r}) is not finite")
    return values
