"""Semantic IDs of a catalogue and the features they were made from: all that the second stage takes from the first."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.files import write_tensors
from common.packed_strings import pack_strings, unpack_strings
from modules.pretrained import resolve
from modules.tokenizer.collisions import number_groups

FORMAT = "semantic-ids-1"
IDS, FEATURES = "semantic_ids.safetensors", "features.npy"


@dataclass(frozen=True)
class SemanticIds:
    """Unique code tuples of N items.

    codes: [N, L'] int64: the tokenizer's L codes, and where some items share all of these one more that tells them
    apart.
    level_sizes: number of codes of each of the L' levels.
    item_keys: [N] raw item ids, in the order of the rows.
    corpus_name, corpus_hash: the corpus whose items these are. tokenizer: what produced the codes; "item_features" in
    it is the `features_digest` of the features that lie beside them.
    """

    codes: Tensor
    level_sizes: tuple[int, ...]
    item_keys: list[str]
    corpus_name: str
    corpus_hash: str
    tokenizer: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.codes.shape != (len(self.item_keys), len(self.level_sizes)):
            raise ValueError(
                f"Semantic IDs have shape {tuple(self.codes.shape)}; there are {len(self.item_keys)} items "
                f"and {len(self.level_sizes)} levels."
            )
        sizes = torch.tensor(self.level_sizes)
        if bool(((self.codes < 0) | (self.codes >= sizes)).any()):
            raise ValueError(f"A code is outside its level; the level sizes are {self.level_sizes}.")

    @property
    def digest(self) -> str:
        """16 hex digits that identify the codes."""
        return _digest(self.codes)[:16]

    @property
    def n_items(self) -> int:
        return self.codes.shape[0]

    @staticmethod
    def from_codes(
        codes: Tensor, codebook_size: int, item_keys: list[str], corpus_name: str, corpus_hash: str, tokenizer: dict
    ) -> "SemanticIds":
        """From codes [N, L], on any device, which get one more level unless they are unique: the item's rank among
        those with its codes, by item id."""
        rank, sizes = rank_within_equal(codes).cpu(), (codebook_size,) * codes.shape[1]
        codes = codes.long().cpu()
        if bool(rank.any()):
            codes, sizes = torch.cat([codes, rank[:, None]], 1), (*sizes, int(rank.max()) + 1)
        return SemanticIds(codes, sizes, item_keys, corpus_name, corpus_hash, tokenizer)

    def check_corpus(self, corpus_name: str, corpus_hash: str) -> None:
        """ValueError that names both sides where these IDs belong to another corpus."""
        if corpus_hash != self.corpus_hash:
            raise ValueError(
                f"The semantic IDs were made for corpus '{self.corpus_name}' ({self.corpus_hash}), the data is corpus "
                f"'{corpus_name}' ({corpus_hash}). Train a tokenizer on this corpus with train_rqvae.py, point "
                "train.pretrained_rqvae_path at the one that belongs to it, or set train.encode_catalogue = True, by "
                "which this tokenizer gives the items of this corpus their IDs."
            )

    def save(self, path: str | Path) -> None:
        """One safetensors file."""
        data, offsets = pack_strings(self.item_keys)
        metadata = {
            "format": FORMAT,
            "level_sizes": json.dumps(self.level_sizes),
            "corpus_name": self.corpus_name,
            "corpus_hash": self.corpus_hash,
            "tokenizer": json.dumps(self.tokenizer),
            "codes_sha256": _digest(self.codes),
        }
        tensors = {"codes": self.codes.to(torch.int32).contiguous(), "key_data": data, "key_offsets": offsets}
        write_tensors(Path(path), tensors, metadata)

    @staticmethod
    def load(path: str | Path, revision: str | None = None) -> "SemanticIds":
        """path: the file, a tokenizer or run folder that holds it, or a Hub id (`owner/name`) at `revision`.
        FileNotFoundError where there is none, ValueError where it is damaged; both name the path."""
        file = _find(path, revision)
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if metadata["codes_sha256"] != _digest(tensors["codes"]):
                raise ValueError("the codes are not those that were written")
            codes, sizes = tensors["codes"].long(), tuple(json.loads(metadata["level_sizes"]))
            keys = unpack_strings(tensors["key_data"], tensors["key_offsets"])
            made_of = metadata["corpus_name"], metadata["corpus_hash"], json.loads(metadata["tokenizer"])
            return SemanticIds(codes, sizes, keys, *made_of)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(
                f"{file} holds no usable semantic IDs ({error}). Run train_rqvae.py again to write it anew."
            ) from error


def _digest(codes: Tensor) -> str:
    return hashlib.sha256(codes.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


def features_digest(values: np.ndarray) -> str:
    """16 hex digits that tell features [N, D] from those of other items or another model: by their shape and some
    thousand rows spread evenly."""
    rows = np.ascontiguousarray(values[:: max(1, len(values) // 1024)])
    return hashlib.sha256(str((values.shape, values.dtype)).encode() + rows.tobytes()).hexdigest()[:16]


def load_item_features(path: str | Path, revision: str | None, semantic_ids: SemanticIds) -> np.memmap | None:
    """The item features [N, D] float16 that lie beside semantic IDs, memory-mapped: row n is item n, as the encoder of
    the RQ-VAE sees it. The array may be written to, the file does not change.

    path, revision: what `semantic_ids` was loaded from. None where the IDs were written without features.
    Raises FileNotFoundError where the file is gone, ValueError where it is damaged or belongs to other IDs.
    """
    if "item_features" not in semantic_ids.tokenizer:
        return None
    file = _find(path, revision, FEATURES).with_name(FEATURES)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the semantic IDs at '{path}' belong to it. Copy both.")
    try:
        values = np.load(file, mmap_mode="c")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} can't be read ({error}). Run train_rqvae.py again to write it anew.") from error
    found = (len(values), features_digest(values))
    if found != (expected := (semantic_ids.n_items, semantic_ids.tokenizer["item_features"])):
        raise ValueError(
            f"{file} holds the features of {found[0]} items ({found[1]}), the semantic IDs at '{path}' were made of "
            f"those of {expected[0]} items ({expected[1]}). Run train_rqvae.py again to write both anew."
        )
    return values


def _find(path: str | Path, revision: str | None, *beside: str) -> Path:
    """The file of semantic IDs; from the Hub, the files `beside` it come too."""
    missing = (
        f"No semantic IDs at '{path}': expected a file, a folder with {IDS} or tokenizer/{IDS}, or a Hub "
        "repository (owner/name) with it. Train a tokenizer first (train_rqvae.py), correct "
        "train.pretrained_rqvae_path, or set train.encode_catalogue = True if a tokenizer without IDs lies there."
    )
    try:
        local = resolve(path, revision, (IDS, *beside))
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(f"{missing} {error}") from error
    for file in (local, local / IDS, local / "tokenizer" / IDS):
        if file.is_file():
            return file
    raise FileNotFoundError(missing)


def rank_within_equal(codes: Tensor) -> Tensor:
    """For each row, how many earlier rows equal it. Shape: codes [N, L] -> [N] int64."""
    groups, order = number_groups(codes).sort(stable=True)
    rank = torch.arange(len(codes), device=codes.device) - torch.searchsorted(groups, groups)
    return torch.empty_like(order).index_copy(0, order, rank)
