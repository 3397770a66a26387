"""Item texts to vectors: the input of the tokenizer, encoded once and cached."""

import hashlib
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import gin
import numpy as np

from data.corpus import Corpus

MAX_CATEGORIES = 512
MODEL_FILES = {".json", ".txt", ".model", ".safetensors", ".bin"}


class Encoder(Protocol):
    """identity: everything that changes the output, in one string; a call: N texts -> [N, D] float32."""

    @property
    def identity(self) -> str: ...

    def __call__(self, texts: list[str]) -> np.ndarray: ...


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
class TfidfSvd:
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

    def __call__(self, texts: list[str]) -> np.ndarray:
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
class SentenceEncoder:
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

    def __call__(self, texts: list[str]) -> np.ndarray:
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
    corpus: Corpus, encoder: Encoder, dataset_folder: str, force: bool = False, categories: bool = False
) -> ItemFeatures:
    """The texts of a corpus, encoded; cached in `<dataset_folder>/processed/<corpus.name>/features`.

    force: encode again. categories: append one 0/1 column a category, sorted by name.
    The array may be written to: the file does not change.

    Raises ValueError where an encoded value is not finite, the encoder returns another number of rows, the
    cached file does not fit, or there are more than 512 categories.
    """
    folder = Path(dataset_folder) / "processed" / corpus.name / "features"
    slug = re.sub(r"[^a-z0-9.]+", "-", encoder.identity.lower()).strip("-.")[:60]
    key = hashlib.sha256(f"{encoder.identity}\0{corpus.text_hash}".encode()).hexdigest()[:16]
    values = _cached(folder / f"{slug}-{key}.npy", corpus.n_items, lambda: _encode(corpus, encoder), force)
    if not categories:
        return ItemFeatures(values, 0, encoder.identity)
    path = folder / f"categories-{corpus.hash}.npy"
    multi_hot = _cached(path, corpus.n_items, lambda: _multi_hot(corpus), force)
    values = np.concatenate([values, multi_hot], axis=1)
    return ItemFeatures(values, multi_hot.shape[1], f"{encoder.identity} + {multi_hot.shape[1]} categories")


def _encode(corpus: Corpus, encoder: Encoder) -> np.ndarray:
    """[N, D] float32, checked."""
    values = np.asarray(encoder(corpus.texts()), dtype=np.float32)
    if values.ndim != 2 or len(values) != corpus.n_items:
        raise ValueError(f"{encoder.identity} returned {values.shape} for {corpus.n_items} texts")
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        item = int(bad.argmax())
        raise ValueError(f"{encoder.identity}: item {item} ({corpus.item_keys[item]!r}) has NaN or infinity")
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
