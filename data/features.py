"""Items of a corpus to vectors, the input of the tokenizer: sources are fitted and applied once, and cached."""

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol, cast

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from pydantic import Field, PlainValidator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.files import in_turn, lock, write_rows, write_tensors
from data.chunks import encode_chunks
from data.corpus import Corpus
from data.items import Items
from data.sources import Categories, FittedSources, checked


class FeatureSource(Protocol):
    """Something that describes items by vectors, after it was fitted to a corpus.

    identity: everything about the source that changes its output, in one string.
    settings: the arguments that make it again.
    from_interactions: whether it reads what users did. Such features shape the semantic IDs, but the retriever does not
    get them: it trains on the very interactions that they are made of, and recommends worse with them.
    """

    @property
    def identity(self) -> str: ...

    @property
    def settings(self) -> dict: ...

    @property
    def from_interactions(self) -> bool: ...

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        """A hash of what `fit` reads of the corpus: features are computed anew when it changes."""
        ...

    def fit(self, corpus: Corpus, train_lengths: Tensor) -> dict[str, Tensor]:
        """train_lengths: [U] int64, leading interactions of each user that are training data -> what it learned."""
        ...

    def transform(self, state: dict[str, Tensor], items: Items) -> np.ndarray:
        """What `fit` returned, and M items, of the corpus or not -> [M, D] float32."""
        ...


class TextEncoder(FeatureSource, Protocol):
    """A source that fits nothing: `encode` takes texts, `chunk_items` at a time, shared by all processes."""

    chunk_items: int

    def encode(self, texts: list[str]) -> np.ndarray: ...


def _made(source: FeatureSource) -> FeatureSource:
    if not hasattr(type(source), "transform"):
        raise ValueError("Input should be a feature source with brackets, such as @TfidfSvd()")
    return source


Sources = Annotated[tuple[Annotated[FeatureSource, PlainValidator(_made)], ...], Field(min_length=1)]


@dataclass(frozen=True)
class ItemFeatures:
    """values [N, D] float32, row n is item n; memory-mapped where one source makes them all. fitted: what made them."""

    values: np.ndarray
    fitted: FittedSources


def item_features(
    corpus: Corpus,
    sources: Sequence[FeatureSource],
    dataset_folder: str,
    train_lengths: Tensor,
    force: bool = False,
    categories: bool = False,
    split: str = "",
) -> ItemFeatures:
    """The vectors of all sources side by side; each cached in `<dataset_folder>/features/<corpus.name>`, a fitted one
    with its state beside it. Where there are several processes, all of them call it: some sources are computed by all,
    the others by the first.

    Of several sources, each is divided by the deviation of its rows (one number per source), so that all have
    the same say; a constant source stays as it is. train_lengths: [U] int64, what a source may read of the
    interactions, the training data of `split`.
    force: compute again. categories: append one 0/1 column per category, sorted by name. The array may be
    written to, the files do not change.

    Raises ValueError where a value is not finite, a source returns another number of rows, a cached file
    does not fit, there is no source or there are more than 512 categories.
    """
    if not sources:
        raise ValueError("train.features is empty: name at least one source, such as @TfidfSvd()")
    folder = Path(dataset_folder) / "features" / corpus.name
    sources, blocks, states = [*sources, *([Categories()] if categories else [])], [], []
    for source in sources:
        slug = re.sub(r"[^a-z0-9.]+", "-", source.identity.lower()).strip("-.")[:60]
        content = source.content(corpus, train_lengths)
        key = hashlib.sha256(f"{source.identity}\0{content}".encode()).hexdigest()[:16]
        path = folder / f"{slug}-{key}.npy"
        fits = getattr(source, "chunk_items", None) is None
        files = [path, path.with_suffix(".safetensors")] if fits else [path]
        write = partial(_write, files, source, corpus, train_lengths, force)
        blocks.append(_cached(files, corpus.n_items, write, force))
        states.append(_read_state(files[1]) if fits else {})
    n_scaled = len(sources) - categories if len(sources) - categories > 1 else 0
    deviations = [float(block.var(0, dtype=np.float64).sum()) ** 0.5 for block in blocks[:n_scaled]]
    scales = [size if size > 1e-6 else 1.0 for size in deviations] + [1.0] * (len(sources) - n_scaled)
    widths, identities = [block.shape[1] for block in blocks], [source.identity for source in sources]
    fitted = FittedSources(sources, states, scales, widths, identities, corpus.name, split)
    return ItemFeatures(fitted.side_by_side(blocks), fitted)


def _write(files: list[Path], source: FeatureSource, corpus: Corpus, train_lengths: Tensor, force: bool) -> None:
    """Computes a source, [N, D], into a file, and its state into another one; every process takes part."""
    if len(files) == 1:
        encoder = cast(TextEncoder, source)
        encode_chunks(encoder.encode, corpus.texts(), encoder.chunk_items, files[0], force)
    else:
        with in_turn():
            if PartialState().is_local_main_process and (force or not all(path.exists() for path in files)):
                state = source.fit(corpus, train_lengths)
                values = checked(source.transform(state, Items.of(corpus)), source.identity, corpus.item_keys)
                write_rows(files[0], len(values), [values])
                write_tensors(files[1], state)


def _cached(files: list[Path], n_items: int, write: Callable[[], None], force: bool) -> np.ndarray:
    """The array in the first file, memory-mapped; where a file isn't there, all processes call `write` first."""
    path, main = files[0], PartialState().is_main_process

    def missing() -> bool:  # the same answer for all, before anyone writes
        return any(gather_object([force or not all(file.exists() for file in files)]))

    if missing():
        with lock(path.parent.with_name(f".{path.parent.name}-{path.stem}.lock")) if main else nullcontext():
            if missing():  # and no other run has written it meanwhile
                write()
    if not all(file.exists() for file in files):
        raise FileNotFoundError(
            f"{path} was written on another machine: processes that encode texts together must share a disk. Run with "
            "one process first, and copy the file to the machines of the others."
        )
    try:
        values = np.load(path, mmap_mode="c")  # copy on write: torch takes only arrays that it may write to
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} can't be read ({error}): delete it") from error
    if values.dtype != np.float32 or values.ndim != 2 or len(values) != n_items:
        raise ValueError(f"{path} holds {values.shape} {values.dtype}, not ({n_items}, D) float32: delete it")
    return values


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} can't be read ({error}): delete it") from error
