"""Items to vectors, the input of the tokenizer: computed once by each source and cached."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from data.chunks import encode_chunks, save_array
from data.corpus import Corpus

MAX_CATEGORIES = 512


class FeatureSource(Protocol):
    """Something that describes the items of a corpus by vectors.

    identity: everything about the source that changes its output, in one string.
    from_interactions: whether it reads what users did. Such features shape the semantic IDs, but the retriever does not
    get them: it trains on the very interactions that they are made of, and recommends worse with them.
    """

    @property
    def identity(self) -> str: ...

    @property
    def from_interactions(self) -> bool: ...

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        """A hash of what the source reads of the corpus: features are computed anew when it changes."""
        ...

    def __call__(self, corpus: Corpus, train_lengths: Tensor) -> np.ndarray:
        """train_lengths: [U] int64, leading interactions of each user that are training data -> [N, D] float32."""
        ...


@dataclass(frozen=True)
class ItemFeatures:
    """values [N, D + n_cat_features] float32, row n is item n; memory-mapped where n_cat_features is 0.

    n_cat_features: how many trailing columns are multi-hot categories.
    identity: what computed them.
    from_interactions: [D + n_cat_features] bool, which columns are of sources that read interactions.
    """

    values: np.ndarray
    n_cat_features: int
    identity: str
    from_interactions: np.ndarray


def item_features(
    corpus: Corpus,
    sources: Sequence[FeatureSource],
    dataset_folder: str,
    train_lengths: Tensor,
    force: bool = False,
    categories: bool = False,
) -> ItemFeatures:
    """The vectors of all sources side by side; each cached in `<dataset_folder>/features/<corpus.name>`. Where there
    are several processes, all of them call it: some sources are computed by all, the others by the first.

    Of several sources, each is divided by the deviation of its rows (one number a source), so that all have
    the same say; a constant source stays as it is. train_lengths: [U] int64, what a source may read of the
    interactions.
    force: compute again. categories: append one 0/1 column a category, sorted by name. The array may be
    written to, the files do not change.

    Raises ValueError where a value is not finite, a source returns another number of rows, a cached file
    does not fit, there is no source or there are more than 512 categories.
    """
    if not sources:
        raise ValueError("train.features is empty: name at least one source, such as @TfidfSvd()")
    folder = Path(dataset_folder) / "features" / corpus.name
    blocks = []
    for source in sources:
        slug = re.sub(r"[^a-z0-9.]+", "-", source.identity.lower()).strip("-.")[:60]
        content = source.content(corpus, train_lengths)
        key = hashlib.sha256(f"{source.identity}\0{content}".encode()).hexdigest()[:16]
        path = folder / f"{slug}-{key}.npy"
        write = partial(_write, path, source, corpus, train_lengths, force)
        blocks.append(_cached(path, corpus.n_items, write, force))
    if len(blocks) > 1:
        deviations = [float(block.var(0, dtype=np.float64).sum()) ** 0.5 for block in blocks]
        blocks = [block / (size if size > 1e-6 else 1) for block, size in zip(blocks, deviations, strict=True)]
    identity, n_cat_features = " + ".join(source.identity for source in sources), 0
    from_interactions = [source.from_interactions for source in sources]
    if categories:
        path = folder / f"categories-{corpus.hash}.npy"
        write = partial(_save_in_turn, path, partial(_multi_hot, corpus), force)
        blocks.append(_cached(path, corpus.n_items, write, force))
        n_cat_features = blocks[-1].shape[1]
        identity += f" + {n_cat_features} categories"
        from_interactions.append(False)
    values = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    from_interactions = np.repeat(from_interactions, [block.shape[1] for block in blocks])
    return ItemFeatures(values, n_cat_features, identity, from_interactions)


def _write(path: Path, source: FeatureSource, corpus: Corpus, train_lengths: Tensor, force: bool) -> None:
    """Computes a source, [N, D], into a file; every process takes part."""
    chunk_items = getattr(source, "chunk_items", None)
    if chunk_items is not None:
        encode_chunks(source.encode, corpus.texts(), chunk_items, path, force)
    else:
        _save_in_turn(path, partial(_compute, source, corpus, train_lengths), force)


def _save_in_turn(path: Path, compute: Callable[[], np.ndarray], force: bool) -> None:
    """Once where the nodes share a disk, and once a node where they don't, or if it is forced."""
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        if state.is_local_main_process and (force or not path.exists()):
            save_array(path, compute())


def _compute(source: FeatureSource, corpus: Corpus, train_lengths: Tensor) -> np.ndarray:
    """[N, D] float32, checked."""
    values = np.asarray(source(corpus, train_lengths), dtype=np.float32)
    if values.ndim != 2 or len(values) != corpus.n_items:
        raise ValueError(f"{source.identity} returned {values.shape} for {corpus.n_items} items")
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        item = int(bad.argmax())
        raise ValueError(f"{source.identity}: item {item} ({corpus.item_keys[item]!r}) is not finite")
    return values


def _multi_hot(corpus: Corpus) -> np.ndarray:
    """[N, C] float32: 1 where item n has the category, categories sorted by name."""
    groups = corpus.items["categories"].to_list()
    names = sorted({name for group in groups for name in group})
    if len(names) > MAX_CATEGORIES:
        raise ValueError(f"{corpus.name} has {len(names)} categories, columns are for up to {MAX_CATEGORIES}")
    column = {name: number for number, name in enumerate(names)}
    values = np.zeros((len(groups), len(names)), dtype=np.float32)
    for item, group in enumerate(groups):
        values[item, [column[name] for name in group]] = 1
    return values


def _cached(path: Path, n_items: int, write: Callable[[], None], force: bool) -> np.ndarray:
    """The array in `path`, memory-mapped; where it isn't there, all processes call `write` first."""
    if any(gather_object([force or not path.exists()])):  # the same answer for all, before anyone writes
        write()
    if not path.exists():
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
