"""Items to vectors, the input of the tokenizer: computed once by each source and cached."""

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import gin
import numpy as np
from torch import Tensor

from data.corpus import Corpus

MAX_CATEGORIES = 512
MODEL_FILES = {".json", ".txt", ".model", ".safetensors", ".bin"}


class FeatureSource(Protocol):
    """Something that describes the items of a corpus by vectors.

    identity: everything about the source that changes its output, in one string.
    """

    @property
    def identity(self) -> str: ...

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        """A hash of what the source reads of the corpus: features are computed anew when it changes."""
        ...

    def __call__(self, corpus: Corpus, train_lengths: Tensor) -> np.ndarray:
        """train_lengths: [U] int64, leading interactions of each user that are training data -> [N, D] float32."""
        ...


class TextEncoder:
    """A source that reads the item texts only; subclasses write `encode`."""

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        return corpus.text_hash

    def __call__(self, corpus: Corpus, train_lengths: Tensor) -> np.ndarray:
        return self.encode(corpus.texts())


@dataclass(frozen=True)
class ItemFeatures:
    """values [N, D + n_cat_features] float32, row n is item n; memory-mapped where n_cat_features is 0.

    n_cat_features: how many trailing columns are multi-hot categories.
    identity: what computed them.
    """

    values: np.ndarray
    n_cat_features: int
    identity: str


@gin.configurable
@dataclass(frozen=True)
class TfidfSvd(TextEncoder):
    """Latent semantic analysis (Deerwester et al. 1990): tf-idf, projected on its largest components.

    dim: D. ngrams: longest run of words that counts as a term. min_df: texts a term must be in to count.

    Term frequencies enter as 1 + log tf. Rows have length 1, like those of most sentence encoders; a text
    without any term that the components know is all zeros. ARPACK solves to machine precision from a fixed
    start, so that the result depends on the texts alone.
    """

    dim: int = 256
    ngrams: int = 2
    min_df: int = 2

    @property
    def identity(self) -> str:
        return f"tfidf-svd(dim={self.dim}, ngrams={self.ngrams}, min_df={self.min_df})"

    def encode(self, texts: list[str]) -> np.ndarray:
        """N texts -> [N, dim] float32. Raises ValueError where dim is more than the texts allow."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(ngram_range=(1, self.ngrams), min_df=self.min_df, sublinear_tf=True)
        try:
            terms = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ValueError(f"{self.identity} finds no terms in {len(texts)} texts: {error}") from error
        if not 1 <= self.dim < min(terms.shape):
            raise ValueError(
                f"TfidfSvd.dim = {self.dim} does not fit {terms.shape[0]} texts with {terms.shape[1]} terms: "
                f"the largest possible value is {min(terms.shape) - 1}"
            )
        values = TruncatedSVD(self.dim, algorithm="arpack", random_state=0).fit_transform(terms)
        # Rows of `terms` have length 1: a projection shorter than 1e-6 is rounding error, not to be blown up.
        values /= np.linalg.norm(values, axis=1, keepdims=True).clip(min=1e-6)
        return values.astype(np.float32)


@gin.configurable
@dataclass
class SentenceEncoder(TextEncoder):
    """A sentence-transformers model.

    model: its name on the Hugging Face Hub, or a local folder. device: None takes a GPU where there is one.
    """

    model: str = "sentence-transformers/sentence-t5-base"
    batch_size: int = 64
    device: str | None = None

    @cached_property
    def identity(self) -> str:
        """The name on the Hub; for a folder, a hash of the files that make the model, wherever it lies."""
        folder = Path(self.model).expanduser()
        if not folder.is_dir():
            return self.model
        files = [path for path in sorted(folder.rglob("*")) if path.suffix in MODEL_FILES and path.is_file()]
        digest = hashlib.sha256()
        for path in files:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
        return f"sentence-encoder-{digest.hexdigest()[:16]}"

    def encode(self, texts: list[str]) -> np.ndarray:
        """N texts -> [N, D] float32. Raises ValueError where the model can't be loaded."""
        from sentence_transformers import SentenceTransformer

        folder = Path(self.model).expanduser()
        try:
            model = SentenceTransformer(str(folder) if folder.is_dir() else self.model, device=self.device)
        except Exception as error:  # the Hub client, the network and the model formats raise dozens of types
            raise ValueError(
                f"SentenceEncoder.model = {self.model!r} can't be loaded ({type(error).__name__}: {error}). "
                "Give the path of a downloaded model instead, or take TfidfSvd, which needs none."
            ) from error
        return model.encode(texts, batch_size=self.batch_size, show_progress_bar=True)


def item_features(
    corpus: Corpus,
    sources: Sequence[FeatureSource],
    dataset_folder: str,
    train_lengths: Tensor,
    force: bool = False,
    categories: bool = False,
) -> ItemFeatures:
    """The vectors of all sources side by side; each cached in `<dataset_folder>/features/<corpus.name>`.

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
        blocks.append(_cached(path, corpus.n_items, partial(_compute, source, corpus, train_lengths), force))
    if len(blocks) > 1:
        deviations = [float(block.var(0, dtype=np.float64).sum()) ** 0.5 for block in blocks]
        blocks = [block / (size if size > 1e-6 else 1) for block, size in zip(blocks, deviations, strict=True)]
    identity, n_cat_features = " + ".join(source.identity for source in sources), 0
    if categories:
        path = folder / f"categories-{corpus.hash}.npy"
        blocks.append(_cached(path, corpus.n_items, partial(_multi_hot, corpus), force))
        n_cat_features = blocks[-1].shape[1]
        identity += f" + {n_cat_features} categories"
    values = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
    return ItemFeatures(values, n_cat_features, identity)


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


def _cached(path: Path, n_items: int, compute: Callable[[], np.ndarray], force: bool) -> np.ndarray:
    """The array in `path`, memory-mapped; where it isn't there, computed, written aside and renamed."""
    if force or not path.exists():
        values = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}.npy")
        try:
            np.save(aside, values)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    try:
        values = np.load(path, mmap_mode="c")  # copy on write: torch takes only arrays that it may write to
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} can't be read ({error}): delete it") from error
    if values.dtype != np.float32 or values.ndim != 2 or len(values) != n_items:
        raise ValueError(f"{path} holds {values.shape} {values.dtype}, not ({n_items}, D) float32: delete it")
    return values
