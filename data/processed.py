"""The data sets by name: raw files in, `Corpus` out, cached on disk."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gin

from common.files import file_sha256, lock
from common.parameters import NamedEnum
from data import amazon, ml1m, ml32m
from data.corpus import Corpus, read_header
from data.custom import CustomData
from data.download import RemoteFile, ensure_raw_files

logger = logging.getLogger(__name__)


@gin.constants_from_enum
class RecDataset(NamedEnum):
    """In a gin file: `%data.processed.RecDataset.AMAZON`."""

    AMAZON = "amazon"
    ML_1M = "ml1m"
    ML_32M = "ml32m"
    SAMPLE = "sample"
    CUSTOM = "custom"


class _RawData(NamedTuple):
    """Where a corpus comes from: its name, the folder of its raw files, and what reads them.

    sources: the sets of files that serve, and where each is downloaded; empty for files that can't be.
    files: the names where there is nothing to choose. options: parameters of `read` that shape the
    corpus; None: not known, a cached corpus serves as it is.
    """

    name: str
    folder: Path
    read: Callable[[tuple[str, ...]], Corpus]
    sources: Sequence[Sequence[RemoteFile]] = ()
    files: tuple[str, ...] = ()
    options: dict | None = {}


def load_corpus(
    dataset: RecDataset,
    dataset_folder: str,
    dataset_split: str = "",
    force_process: bool = False,
    as_cached: bool = False,
) -> Corpus:
    """The corpus of a data set, cached in `<dataset_folder>/processed/<name>`.

    AMAZON: split "beauty", "sports" or "toys"; its files are in `<dataset_folder>/raw/<split>`.
    ML_1M, ML_32M: MovieLens; its files are in `<dataset_folder>/raw`; no split.
    SAMPLE: MovieLens latest-small, which comes with the code; no split.
    CUSTOM: your own files, see `data.custom.CustomData`; no split.
    force_process: read the raw files even if the cache fits. as_cached: your own files are read as they were for the
    cache, if there is one, whatever is not bound.

    Raw files that are not there are downloaded (`data.download`). A cache whose raw files are not there is used as it
    is; one whose raw files or options have changed is built anew. Of several processes that ask at once, one builds.

    Raises ValueError on an unknown split, malformed raw files, or a damaged cache; FileNotFoundError that names what
    to put where, if there is neither the cache nor a raw file nor a way to download it.
    """
    source = _source(dataset, Path(dataset_folder), dataset_split, as_cached)
    cache = Path(dataset_folder) / "processed" / source.name
    if not force_process and _changed(source, cache) == []:
        return Corpus.load(cache)
    with lock(Path(dataset_folder) / f".{source.name}.lock"):
        changed = None if force_process else _changed(source, cache)
        if changed == []:  # another process has built it meanwhile
            return Corpus.load(cache)
        files, archives = source.files, Path(dataset_folder) / "raw"
        if source.sources:
            files = ensure_raw_files(source.sources, source.folder, archives)
        raw_files = [_fingerprint(source.folder, file) for file in files]
        corpus = source.read(files)
        corpus.save(cache, raw_files, source.options)
        if changed:
            logger.info(f"{cache}: built anew, because {', '.join(changed)} changed")
    return corpus


def _source(dataset: RecDataset, dataset_folder: Path, split: str, as_cached: bool) -> _RawData:
    allowed = tuple(amazon.CATEGORIES) if dataset is RecDataset.AMAZON else ("",)
    if split not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"train.dataset_split = {split!r} must be {choices} for {dataset}")
    raw = dataset_folder / "raw"
    if dataset is RecDataset.AMAZON:
        name = f"amazon_{split}"
        return _RawData(name, raw / split, partial(_read_amazon, raw / split, name), amazon.sources(split))
    if dataset is RecDataset.ML_1M:
        return _RawData("ml1m", raw, lambda _: ml1m.read_ml1m(raw, "ml1m"), ((ml1m.ARCHIVE,),))
    if dataset is RecDataset.ML_32M:
        return _RawData("ml32m", raw, lambda _: ml32m.read_movielens(raw, "ml32m"), ((ml32m.ARCHIVE,),))
    if dataset is RecDataset.SAMPLE:
        sample = Path(__file__).parent / "sample"
        return _RawData("sample", sample, lambda _: ml32m.read_movielens(sample, "sample"), files=ml32m.FILES)
    data = CustomData()
    if as_cached and (cache := dataset_folder / "processed" / data.name).is_dir():
        data = CustomData.as_cached(cache)
    return _RawData(data.name, Path(), lambda _: data.read(), files=data.files, options=data.options)


def _read_amazon(folder: Path, name: str, files: tuple[str, ...]) -> Corpus:
    if files == amazon.FILES:
        return amazon.read_amazon(folder, name)
    reviews, metadata = files
    return amazon.read_reviews(folder / reviews, folder / metadata, name)


def _changed(source: _RawData, cache: Path) -> list[str] | None:
    """The raw files and options that are not those of the cached corpus; None where none is cached."""
    if not (cache / "corpus.json").exists():
        return None
    header = read_header(cache)
    changed = [entry["name"] for entry in header["raw_files"] if _has_changed(source.folder, entry)]
    before = header.get("options", {})
    if source.options is not None:
        names = sorted({*before, *source.options})
        changed += [name for name in names if before.get(name) != source.options.get(name)]
    return changed


def _fingerprint(folder: Path, name: str) -> dict:
    """What tells whether a raw file has changed; the time spares reading it again."""
    stat = (folder / name).stat()
    return {"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_sha256(folder / name)}


def _has_changed(folder: Path, recorded: dict) -> bool:
    """False as well where the file is not there."""
    path = folder / recorded["name"]
    if not path.exists():
        return False
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (recorded["size"], recorded["mtime_ns"]):
        return False
    return stat.st_size != recorded["size"] or file_sha256(path) != recorded["sha256"]
