"""Item texts to vectors."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import gin
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from data.corpus import Corpus

MODEL_FILES = {".json", ".txt", ".model", ".safetensors", ".bin"}


class TextEncoder:
    """A source that reads the item texts only; subclasses write `encode`.

    chunk_items: encode so many at a time, shared by all processes; None: all at once, in the main process.
    """

    from_interactions = False
    chunk_items: int | None = None

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        return corpus.text_hash

    def __call__(self, corpus: Corpus, train_lengths: Tensor) -> np.ndarray:
        return self.encode(corpus.texts())


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

    model: its name on the Hugging Face Hub, or a local folder. precision: of weights and arithmetic. normalize: to
    length 1. prompt: written before every text. device: None takes each process's own GPU where there is one.
    Under `accelerate launch` all processes encode their share of the chunks.
    """

    model: str = "sentence-transformers/sentence-t5-base"
    batch_size: int = 64
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    normalize: bool = False
    prompt: str | None = None
    device: str | None = None
    chunk_items: int = 8192

    def __post_init__(self) -> None:
        if self.precision not in (known := get_args(SentenceEncoder.__annotations__["precision"])):
            raise ValueError(f"SentenceEncoder.precision must be one of {', '.join(known)}, not {self.precision!r}")

    @cached_property
    def identity(self) -> str:
        """The model's identity, and what else changes the vectors."""
        changes = {"precision": "float32", "normalize": False, "prompt": None}
        changed = [f"{name}={getattr(self, name)!r}" for name, usual in changes.items() if getattr(self, name) != usual]
        return self._model_identity() + (f"({', '.join(changed)})" if changed else "")

    def _model_identity(self) -> str:
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

    @cached_property
    def _loaded(self):
        from sentence_transformers import SentenceTransformer

        folder = Path(self.model).expanduser()
        device = self.device or str(PartialState().device)
        try:
            model = SentenceTransformer(str(folder) if folder.is_dir() else self.model, device=device)
        except Exception as error:  # the Hub client, the network and the model formats raise dozens of types
            raise ValueError(
                f"SentenceEncoder.model = {self.model!r} can't be loaded ({type(error).__name__}: {error}). "
                "Give the path of a downloaded model instead, or take TfidfSvd, which needs none."
            ) from error
        return model.to(getattr(torch, self.precision))

    def encode(self, texts: list[str]) -> np.ndarray:
        """N texts -> [N, D] float32. Raises ValueError where the model can't be loaded."""
        values = self._loaded.encode(
            texts,
            prompt=self.prompt,
            batch_size=self.batch_size,
            normalize_embeddings=self.normalize,
            show_progress_bar=PartialState().is_main_process,
            convert_to_tensor=True,
        )
        return values.float().cpu().numpy()
