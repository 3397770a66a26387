"""Item texts to vectors."""

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from common.files import file_sha256
from common.packed_strings import pack_strings, unpack_strings
from common.parameters import Name, PathName, PositiveInt, configurable
from data.corpus import Corpus
from data.items import Items

MODEL_FILES = {".json", ".txt", ".model", ".safetensors", ".bin"}


@configurable
@dataclass(frozen=True)
class TfidfSvd:
    """Latent semantic analysis (Deerwester et al. 1990): tf-idf, projected on its largest components.

    dim: D. ngrams: longest run of words that counts as a term. min_df: texts a term must be in to count.

    Term frequencies enter as 1 + log tf. Rows have length 1, like those of most sentence encoders; a text
    without any term that the components know is all zeros. ARPACK solves to machine precision from a fixed
    start, so that the result depends on the texts alone.
    """

    from_interactions = False
    dim: PositiveInt = 256
    ngrams: PositiveInt = 2
    min_df: PositiveInt = 2

    @property
    def identity(self) -> str:
        return f"tfidf-svd(dim={self.dim}, ngrams={self.ngrams}, min_df={self.min_df})"

    @property
    def settings(self) -> dict:
        return asdict(self)

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        return corpus.text_hash

    def fit(self, corpus: Corpus, train_lengths: Tensor) -> dict[str, Tensor]:
        """Terms, idf [V] float64 and components [dim, V] float32. ValueError where dim is more than the texts allow."""
        from sklearn.decomposition import TruncatedSVD

        texts, vectorizer = corpus.texts(), self._vectorizer(min_df=self.min_df)
        try:
            terms = vectorizer.fit_transform(texts)
        except ValueError as error:
            rule = f"no word is in that many of the {len(texts)} texts; lower it if it is above 1"
            raise ValueError(f"TfidfSvd.min_df = {self.min_df}: {rule}") from error
        if self.dim >= min(terms.shape):
            raise ValueError(
                f"TfidfSvd.dim = {self.dim} does not fit {terms.shape[0]} texts with {terms.shape[1]} terms: "
                f"the largest possible value is {min(terms.shape) - 1}"
            )
        components = TruncatedSVD(self.dim, algorithm="arpack", random_state=0).fit(terms).components_
        names, offsets = pack_strings(vectorizer.get_feature_names_out().tolist())
        numbers = {"idf": vectorizer.idf_, "components": np.ascontiguousarray(components, np.float32)}
        tensors = {name: torch.from_numpy(values) for name, values in numbers.items()}
        return {**tensors, "terms.bytes": names, "terms.offsets": offsets}

    def transform(self, state: dict[str, Tensor], items: Items) -> np.ndarray:
        """M items -> [M, dim] float32."""
        if not items.texts:
            return np.zeros((0, self.dim), np.float32)
        vectorizer = self._vectorizer(vocabulary=unpack_strings(state["terms.bytes"], state["terms.offsets"]))
        vectorizer.idf_ = state["idf"].numpy()
        values = vectorizer.transform(items.texts) @ state["components"].numpy().T
        # Rows of the product's left side have length 1: one shorter than 1e-6 is rounding error, not to be blown up.
        values /= np.linalg.norm(values, axis=1, keepdims=True).clip(min=1e-6)
        return values.astype(np.float32)

    def _vectorizer(self, **options):
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(ngram_range=(1, self.ngrams), sublinear_tf=True, **options)


@configurable
@dataclass
class SentenceEncoder:
    """A sentence-transformers model.

    model: its name on the Hugging Face Hub (at revision), or a local folder. precision: of weights and arithmetic.
    normalize: to length 1. prompt: written before every text. device: None takes each process's GPU if it has one.
    Under `accelerate launch` all processes encode their share of the chunks. Nothing is fitted.
    """

    from_interactions = False
    model: PathName = "sentence-transformers/sentence-t5-base"
    revision: Name | None = None
    batch_size: PositiveInt = 64
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    normalize: bool = False
    prompt: str | None = None
    device: Name | None = None
    chunk_items: PositiveInt = 8192

    @property
    def settings(self) -> dict:
        """What loads the same model again: one of the Hub with the commit that was read, a folder by its whole path."""
        from huggingface_hub import try_to_load_from_cache

        settings = asdict(self) | {"device": None}
        if (folder := Path(self.model).expanduser()).is_dir():
            return settings | {"model": str(folder.resolve())}
        try:
            file = try_to_load_from_cache(self._repository, "modules.json", revision=self.revision)
        except ValueError:  # a folder that is no longer there
            file = None
        return settings | {"revision": Path(file).parent.name if isinstance(file, str) else self.revision}

    @property
    def _repository(self) -> str:
        return self.model if "/" in self.model else f"sentence-transformers/{self.model}"

    def at(self, model: str) -> "SentenceEncoder":
        """The same encoder, its model read from another place: a folder, or a Hub id."""
        return replace(self, model=model, revision=None)

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        return corpus.text_hash + (self.revision or "")

    def fit(self, corpus: Corpus, train_lengths: Tensor) -> dict[str, Tensor]:
        return {}

    def transform(self, state: dict[str, Tensor], items: Items) -> np.ndarray:
        """M items -> [M, D] float32."""
        return self.encode(items.texts)

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
            digest.update(f"{path.relative_to(folder).as_posix()}\0{file_sha256(path)}\n".encode())
        return f"sentence-encoder-{digest.hexdigest()[:16]}"

    @cached_property
    def _loaded(self):
        from huggingface_hub import snapshot_download
        from sentence_transformers import SentenceTransformer

        folder = Path(self.model).expanduser()
        device = self.device or str(PartialState().device)
        try:
            place = (str(folder), None) if folder.is_dir() else (self.model, self.revision)
            if not folder.is_dir():  # without a network this fails at once
                snapshot_download(self._repository, revision=self.revision, allow_patterns=["modules.json"])
            model = SentenceTransformer(place[0], revision=place[1], device=device)
        except Exception as error:  # the Hub client, the network and the model formats raise dozens of types
            short = " ".join(str(error).split())[:300]
            raise ValueError(
                f"SentenceEncoder.model = {self.model!r} can't be loaded ({type(error).__name__}: {short}). "
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
