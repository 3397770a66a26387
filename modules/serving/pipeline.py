"""A trained retriever with all that recommending needs, as one folder: `pipeline/` of a run, or a Hub repository."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.files import file_sha256, write_file, write_rows, write_tensors
from common.packed_strings import pack_lists, pack_strings, unpack_lists, unpack_strings
from data.sources import SOURCES, STATES
from modules.model import EncoderDecoderRetrievalModel
from modules.pretrained import CONFIG, WEIGHTS, anew, resolve
from modules.tokenizer.semids import FEATURES, IDS, SemanticIds, load_item_features
from modules.tokenizer.tokenizer import Tokenizer
from modules.tree import Tree

FORMAT = "pipeline-1"
PIPELINE, CATALOGUE, TOKENIZER = "pipeline.json", "catalogue.safetensors", "tokenizer"
NEEDED = {CONFIG, WEIGHTS, IDS, CATALOGUE}
TOKENIZER_FILES = {f"{TOKENIZER}/{name}" for name in (CONFIG, WEIGHTS, SOURCES, STATES)}


@dataclass(frozen=True)
class Pipeline:
    """All that recommending needs.

    features: [N, D], those the model was made with, or None. titles: [N]. counts: [N] integers, how often each item
    occurs in the training data. max_items: the longest history of training. tokenizer: what gives new items their IDs,
    None where it is not needed or brought no feature sources. columns: what `Lookup` has, for filters.
    """

    model: EncoderDecoderRetrievalModel
    semantic_ids: SemanticIds
    features: np.ndarray | None
    titles: list[str]
    counts: Tensor
    max_items: int
    tokenizer: Tokenizer | None = None
    columns: dict[str, list[list[str]]] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Writes what `load` reads; `pipeline.json`, which names the other files, comes last."""
        folder, names = Path(folder), set(NEEDED)
        self.model.save_pretrained(folder)
        self.semantic_ids.save(folder / IDS)
        if self.features is not None:
            write_rows(folder / FEATURES, len(self.features), [self.features])
            names.add(FEATURES)
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER)
            names |= TOKENIZER_FILES
        data, offsets = pack_strings(self.titles)
        tensors = {"title_data": data, "title_offsets": offsets, "counts": self.counts.long().cpu()}
        for name, lists in self.columns.items():
            parts = zip(("data", "offsets", "lengths"), pack_lists(lists), strict=True)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts}
        write_tensors(folder / CATALOGUE, tensors)
        header = {"format": FORMAT, "corpus": self.semantic_ids.corpus_name, "max_items": self.max_items}
        header["files"] = {name: file_sha256(folder / name) for name in sorted(names)}
        write_file(folder / PIPELINE, (json.dumps(header, indent=2) + "\n").encode())

    @staticmethod
    def load(
        path: str | Path,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        tokenizer: bool = False,
        text_model: str | None = None,
    ) -> "Pipeline":
        """path: a run of train_decoder.py, its pipeline folder, or a Hub id (`owner/name`) at `revision`. tokenizer:
        whether to load it, too; text_model: see `Tokenizer.from_pretrained`.

        FileNotFoundError or ValueError names what is missing, damaged or of another format; see `resolve`, too.
        """
        folder, header = open_pipeline(path, revision)
        semantic_ids, catalogue = SemanticIds.load(folder), load_file(folder / CATALOGUE)
        features = load_item_features(folder, None, semantic_ids)
        described = torch.from_numpy(features).to(device) if features is not None else None
        tree = Tree.build(semantic_ids.codes, semantic_ids.level_sizes).to(device)
        model = EncoderDecoderRetrievalModel.from_pretrained(folder, tree, described)
        titles = unpack_strings(catalogue["title_data"], catalogue["title_offsets"])
        columns = {
            name: unpack_lists(*(catalogue[f"{name}.{part}"] for part in ("data", "offsets", "lengths")))
            for name, _, part in (key.partition(".") for key in catalogue)
            if part == "lengths"
        }
        found = None
        if tokenizer and TOKENIZER_FILES <= set(header["files"]):
            found = Tokenizer.from_pretrained(folder / TOKENIZER, text_model=text_model)
        return Pipeline(model, semantic_ids, features, titles, catalogue["counts"], header["max_items"], found, columns)


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
        raise ValueError(f"{file} is damaged ({error!r}): {anew(folder)}.") from error
    if found != FORMAT:
        raise ValueError(f"{file} has the format {found!r}, this code reads {FORMAT!r}: take the code that wrote it.")
    counted = type(header.get("max_items")) is int and header["max_items"] > 0
    if not NEEDED <= names <= NEEDED | TOKENIZER_FILES | {FEATURES} or not counted:
        raise ValueError(f"{file} is damaged: it does not name the files of a pipeline. To mend it, {anew(folder)}.")
    if not Path(path).expanduser().exists():
        resolve(path, folder.name, tuple(names))  # of the commit that the header is of
    for name, digest in header["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {anew(folder)}.")
        if file_sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged, or of another pipeline: {anew(folder)}.")
    return folder, header
