"""Ready vectors of items as a feature source: from another model, of images, of anything."""

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from common.files import file_sha256
from common.packed_strings import pack_strings
from common.parameters import Name, PathName, configurable
from data.corpus import Corpus
from data.items import Items, look_up, vector_table


@configurable
@dataclass
class Vectors:
    """Vectors that lie in a file, one per item.

    path: .npy or .safetensors with a matrix [N, D], whose row n belongs to item n: to row n of CustomData.items, of
    movies.csv, or to item n + 1 of the P5 archive; or .parquet with a column of ids and one of lists, in any order.
    column: the list column, or the tensor's name. key_column: the ids of a parquet file.
    Vectors are kept by item key, with the tokenizer; other items must bring theirs (`data.items.Items.vectors`), and
    digest, a hash of the file, stands for it.
    """

    from_interactions = False
    path: PathName
    column: Name = "embedding"
    key_column: Name = "item"

    digest: str | None = None

    @property
    def settings(self) -> dict:
        return asdict(self) | {"digest": self._digest}

    @property
    def identity(self) -> str:
        """A hash of the file, wherever it lies, and of the column."""
        return f"vectors-{self._digest}({self.column})"

    @cached_property
    def _digest(self) -> str:
        if self.digest:
            return self.digest
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"Vectors.path = {self.path!r}: there is no such file")
        return file_sha256(Path(self.path))[:16]

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in pack_strings(corpus.item_keys))).hexdigest()

    def fit(self, corpus: Corpus, train_lengths: Tensor) -> dict[str, Tensor]:
        """The vectors [N, D] float32 by item key. ValueError that names the file where it lacks an item's."""
        path = Path(self.path)
        readers = {".npy": self._npy, ".safetensors": self._safetensors, ".parquet": self._parquet}
        if path.suffix not in readers:
            raise ValueError(f"{path}: the file name must end with one of {', '.join(readers)}")
        values = readers[path.suffix](path, corpus.item_keys)
        if values.ndim != 2 or len(values) != corpus.n_items or values.shape[1] == 0:
            raise ValueError(f"{path} holds {list(values.shape)}, corpus {corpus.name!r} needs [{corpus.n_items}, D]")
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{path} holds {values.dtype}; vectors are of real numbers")
        with np.errstate(over="ignore"):
            values = np.array(values, dtype=np.float32)
        if not (finite := np.isfinite(values).all(1)).all():
            key = corpus.item_keys[int(finite.argmin())]
            raise ValueError(f"{path}: the vector of item {key!r} is not finite, or beyond float32")
        return vector_table(corpus.item_keys, values)

    def transform(self, state: dict[str, Tensor], items: Items) -> np.ndarray:
        """M items -> [M, D] float32. Raises ValueError where an item is not in the table and brought no vector."""
        values, known = look_up(state, items.keys)
        if items.vectors is not None and items.vectors.shape[1:] == values.shape[1:]:
            fresh = items.vectors[~known]
            values[~known], known[~known] = fresh, ~np.isnan(fresh).any(1)
        if not np.all(known):
            raise ValueError(
                f"The tokenizer has no vector of item {items.keys[int(known.argmin())]!r}: give each new item one, as "
                f"'vector', a list of {values.shape[1]} numbers."
            )
        return values

    def _npy(self, path: Path, keys: list[str]) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} can't be read as .npy, a matrix of numbers") from error

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

        from data.tables import keys as ids_of
        from data.tables import read_table

        table = read_table(path, [self.key_column, self.column])
        kind = table.schema[self.column]
        if not isinstance(kind, pl.List | pl.Array) or not kind.inner.is_numeric():
            raise ValueError(f"{path}: {self.column!r} must hold lists of numbers, not {kind}")
        table = table.select(key=ids_of(path, table, self.key_column), vector=self.column)
        if table["key"].is_duplicated().any():
            repeated = table.filter(pl.col("key").is_duplicated())["key"][0]
            raise ValueError(f"{path}: item {repeated!r} has several vectors")
        found = pl.DataFrame({"key": keys}).join(table, on="key", how="left", maintain_order="left")
        absent = found.filter(pl.col("vector").is_null())
        if len(absent):
            raise ValueError(f"{path} has no vector of item {absent['key'][0]!r}, and of {len(absent):,} items in all")
        vectors = found["vector"]
        lengths = (vectors.list.len() if vectors.dtype == pl.List else vectors.arr.len()).to_list()
        if min(lengths) != max(lengths):
            raise ValueError(f"{path}: the vectors have {min(lengths)} to {max(lengths)} numbers")
        return vectors.explode().cast(pl.Float32).to_numpy().reshape(len(keys), -1)
