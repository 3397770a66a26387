"""Ready vectors of items as a feature source: from another model, of images, of anything."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gin
import numpy as np
from torch import Tensor

from data.corpus import Corpus
from data.strings import pack_strings


@gin.configurable
@dataclass
class Vectors:
    """Vectors that lie in a file, one an item.

    path: .npy or .safetensors with a matrix [N, D], whose row n belongs to item n: to row n of CustomData.items, of
    movies.csv, or to item n + 1 of the P5 archive; or .parquet with a column of ids and one of lists, in any order.
    column: the list column, or the tensor's name. key_column: the ids of a parquet file.
    """

    from_interactions = False
    path: str
    column: str = "embedding"
    key_column: str = "item"

    @cached_property
    def identity(self) -> str:
        """A hash of the file, wherever it lies, and of the column."""
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"Vectors.path = {self.path!r}: there is no such file")
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return f"vectors-{digest[:16]}({self.column})"

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in pack_strings(corpus.item_keys))).hexdigest()

    def __call__(self, corpus: Corpus, train_lengths: Tensor) -> np.ndarray:
        """[N, D] float32. Raises ValueError that names the file where it holds no vector of an item."""
        path = Path(self.path)
        readers = {".npy": self._npy, ".safetensors": self._safetensors, ".parquet": self._parquet}
        if path.suffix not in readers:
            raise ValueError(f"{path}: the file name must end with one of {', '.join(readers)}")
        values = readers[path.suffix](path, corpus.item_keys)
        if values.ndim != 2 or len(values) != corpus.n_items:
            raise ValueError(f"{path} holds {list(values.shape)}, corpus {corpus.name!r} needs [{corpus.n_items}, D]")
        return values.astype(np.float32, copy=False)

    def _npy(self, path: Path, keys: list[str]) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} can't be read as .npy ({error})") from error

    def _safetensors(self, path: Path, keys: list[str]) -> np.ndarray:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read as .safetensors ({error})") from error
        if self.column not in tensors:
            raise ValueError(f"{path} has no tensor {self.column!r}; it has {', '.join(tensors)}: bind Vectors.column")
        return tensors[self.column].float().numpy()

    def _parquet(self, path: Path, keys: list[str]) -> np.ndarray:
        import polars as pl

        from data.tables import read_table

        table = read_table(path, [self.key_column, self.column])
        table = table.select(key=pl.col(self.key_column).cast(pl.String), vector=self.column)
        if table["key"].is_duplicated().any():
            repeated = table.filter(pl.col("key").is_duplicated())["key"][0]
            raise ValueError(f"{path}: item {repeated!r} has several vectors")
        found = pl.DataFrame({"key": keys}).join(table, on="key", how="left", maintain_order="left")
        absent = found.filter(pl.col("vector").is_null())
        if len(absent):
            raise ValueError(f"{path} has no vector of item {absent['key'][0]!r}, and of {len(absent):,} items in all")
        lengths = (
            found["vector"].list.len() if found["vector"].dtype == pl.List else pl.Series([found["vector"].dtype.size])
        )
        if lengths.n_unique() != 1:
            raise ValueError(f"{path}: the vectors have {lengths.min()} to {lengths.max()} numbers")
        return found["vector"].explode().cast(pl.Float32).to_numpy().reshape(len(keys), -1)
