"""A trained retriever with all that recommending needs, as one folder: `pipeline/` of a run, or a Hub repository."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save
from torch import Tensor

from data.files import write_file
from data.strings import pack_strings
from modules.model import EncoderDecoderRetrievalModel
from modules.pretrained import CONFIG, WEIGHTS, resolve
from modules.tokenizer.semids import FEATURES, IDS, SemanticIds

FORMAT = "pipeline-1"
PIPELINE, CATALOGUE = "pipeline.json", "catalogue.safetensors"
NEEDED, OPTIONAL = {CONFIG, WEIGHTS, IDS, CATALOGUE}, {FEATURES}


def save_pipeline(
    folder: str | Path,
    model: EncoderDecoderRetrievalModel,
    semantic_ids: SemanticIds,
    features: np.ndarray | None,
    titles: Sequence[str],
    counts: Tensor,
    max_items: int,
) -> None:
    """Writes what `Recommender.from_pretrained` reads; `pipeline.json`, which names the other files, comes last.

    features: [N, D], those the model was made with. titles: [N]. counts: [N] integers,
    how often each item occurs in the training data. max_items: the longest history of training.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    semantic_ids.save(folder / IDS)
    if features is not None:
        with open(aside := folder / f".{FEATURES}", "wb") as file:
            np.save(file, features)
        os.replace(aside, folder / FEATURES)
    data, offsets = pack_strings(titles)
    tensors = {"title_data": data, "title_offsets": offsets, "counts": counts.long().cpu()}
    write_file(folder / CATALOGUE, save(tensors))
    names = sorted(NEEDED | (OPTIONAL if features is not None else set()))
    files = {name: _sha256(folder / name) for name in names}
    header = {"format": FORMAT, "corpus": semantic_ids.corpus_name, "max_items": max_items, "files": files}
    write_file(folder / PIPELINE, (json.dumps(header, indent=2) + "\n").encode())


def open_pipeline(path: str | Path, revision: str | None) -> tuple[Path, dict]:
    """The folder behind a run, a folder or a Hub id, once all its files are there and whole, and its header."""
    folder = resolve(path, revision, (PIPELINE,))
    folder = folder / "pipeline" if (folder / "pipeline").is_dir() else folder
    file = folder / PIPELINE
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no pipeline in '{path}': expected {PIPELINE} or pipeline/{PIPELINE}, which train_decoder.py "
            "writes at the end of a run."
        )
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        found = header["format"]
        names = set(header["files"]) if found == FORMAT else set()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): copy the folder again, or train anew.") from error
    if found != FORMAT:
        raise ValueError(f"{file} has the format {found!r}, this code reads {FORMAT!r}: take the code that wrote it.")
    if not NEEDED <= names <= NEEDED | OPTIONAL or not isinstance(header.get("max_items"), int):
        raise ValueError(f"{file} is damaged: it does not name the files of a pipeline. Copy the folder again.")
    if not Path(path).expanduser().exists():
        resolve(path, folder.name, tuple(names))  # of the commit that the header is of
    for name, digest in header["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: copy the whole folder.")
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged, or of another pipeline: copy the whole folder again.")
    return folder, header


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
