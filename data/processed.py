"""The data sets by name: raw files in, `Corpus` out, cached on disk."""

import hashlib
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import gin

from data import amazon, ml32m
from data.corpus import Corpus, read_header


@gin.constants_from_enum
class RecDataset(Enum):
    """In a gin file: `%data.processed.RecDataset.AMAZON`."""

    AMAZON = "amazon"
    SAMPLE = "sample"


class _Source(NamedTuple):
    """Where a corpus comes from: its name, folder and names of its raw files, and what reads them."""

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path, str], Corpus]


def load_corpus(
    dataset: RecDataset, dataset_folder: str, dataset_split: str = "", force_process: bool = False
) -> Corpus:
    """The corpus of a data set, cached in `<dataset_folder>/processed/<name>`.

    AMAZON: read from `<dataset_folder>/raw/<split>`; split "beauty", "sports" or "toys".
    SAMPLE: MovieLens latest-small, which comes with the code; no split.
    force_process: read the raw files even if the cache fits.

    A cache whose raw files are not there is used as it is; one whose raw files have changed is built anew.

    Raises ValueError on an unknown split, malformed raw files, or a damaged cache; FileNotFoundError where
    neither the cache nor a raw file is there.
    """
    source = _source(dataset, Path(dataset_folder), dataset_split)
    cache = Path(dataset_folder) / "processed" / source.name
    if (cache / "corpus.json").exists() and not force_process:
        recorded = read_header(cache)["raw_files"]
        changed = [entry["name"] for entry in recorded if _has_changed(source.folder, entry)]
        if not changed:
            return Corpus.load(cache)
        print(f"{cache}: built anew, because {', '.join(changed)} in {source.folder} changed", flush=True)
    for file in source.files:
        if not (source.folder / file).is_file():
            needed = ", ".join(source.files)
            raise FileNotFoundError(f"{source.folder / file} is missing: that folder must hold {needed}")
    raw_files = [_fingerprint(source.folder / file) for file in source.files]
    corpus = source.read(source.folder, source.name)
    corpus.save(cache, raw_files)
    return corpus


def _source(dataset: RecDataset, dataset_folder: Path, split: str) -> _Source:
    allowed = amazon.SPLITS if dataset is RecDataset.AMAZON else ("",)
    if split not in allowed:
        choices = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"dataset_split of {dataset} must be {choices}, not {split!r}")
    if dataset is RecDataset.AMAZON:
        return _Source(f"amazon_{split}", dataset_folder / "raw" / split, amazon.FILES, amazon.read_amazon)
    return _Source("sample", Path(__file__).parent / "sample", ml32m.FILES, ml32m.read_movielens)


def _fingerprint(path: Path) -> dict:
    """What tells whether a raw file has changed; the time spares reading it again."""
    stat = path.stat()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}


def _has_changed(folder: Path, recorded: dict) -> bool:
    """False as well where the file is not there."""
    path = folder / recorded["name"]
    if not path.exists():
        return False
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (recorded["size"], recorded["mtime_ns"]):
        return False
    return stat.st_size != recorded["size"] or _fingerprint(path)["sha256"] != recorded["sha256"]
