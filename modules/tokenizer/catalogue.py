"""Semantic IDs and item features of a corpus: those that a tokenizer's artifact holds, or made by the tokenizer."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.corpus import Corpus
from data.features import ItemFeatures
from data.stream import stream
from modules.loss import reconstruction_loss
from modules.rqvae import RqVae
from modules.tokenizer.semids import SemanticIds, features_digest, load_item_features
from modules.tokenizer.separate import separate, surplus

MAX_CANDIDATES = 32  # nearest last codes that an item may be moved to


@torch.no_grad()
def catalogue_codes(model: RqVae, x: Tensor, batch_size: int = 8192) -> Tensor:
    """Codes of all items of a catalogue: the nearest ones, as `RqVae.codes`; with the model's `separate_collisions`,
    of the items that share all of them only the nearest keeps them, the others take the first free of their 32 nearest
    last codes.

    This costs some accuracy (`reconstruction_error`) and suits catalogues that fill a small part of the code space:
    where most items would move, the last level says little. New items get the nearest codes from `RqVae.codes`.
    The features are read once, in order. Shape: x [N, input_dim] -> [N, L] int64, on the model's device.
    """
    if not model.config["separate_collisions"]:
        return model.codes(x, batch_size).to(model.device)
    size = model.config["codebook_size"]
    exact, parts = model.exact(), []
    for chunk in stream(x, batch_size, exact.device):
        out = exact.get_semantic_ids(chunk.double())
        distances, candidates = exact.layers[-1].ranked(out.residuals[..., -1], min(MAX_CANDIDATES, size))
        parts.append((out.sem_ids, distances[:, 0], candidates.to(torch.int32)))
    codes, distance, candidates = (torch.cat(part) for part in zip(*parts, strict=True))
    items = surplus(codes, distance)
    return separate(codes, items, candidates[items], size)


@torch.no_grad()
def reconstruction_error(model: RqVae, x: Tensor, codes: Tensor, batch_size: int = 8192) -> float:
    """Mean reconstruction loss of items x [N, input_dim] decoded from given codes [N, L]."""
    total = 0.0
    for rows, chunk in zip(stream(x, batch_size, model.device), codes.split(batch_size), strict=True):
        ids, seen = chunk.to(model.device), model.normalized(rows)
        latent = sum(layer.codebook[ids[:, level]] for level, layer in enumerate(model.layers))
        total += float(reconstruction_loss(model.decoder(latent), seen, model.n_cat_features).double().sum())
    return total / len(x)


@torch.no_grad()
def encoder_features(
    model: RqVae, x: Tensor, columns: np.ndarray, path: Path | None = None, batch_size: int = 8192
) -> np.ndarray | None:
    """Some columns of the item features as the RQ-VAE's encoder sees them, chunk by chunk; None where there are none.

    Shape: x [N, input_dim] float32, columns [input_dim] bool -> [N, D] float16, D how many columns are true.
    path: a .npy file to write them to, aside and then renamed; the result is memory-mapped, and memory holds one chunk.
    Without columns the file is removed. Raises ValueError where a value is beyond the range of float16.
    """
    if not columns.any():
        if path:
            path.unlink(missing_ok=True)
        return None
    aside, shape = path and path.with_name(f".{path.name}"), (len(x), int(columns.sum()))
    values = np.lib.format.open_memmap(aside, "w+", np.float16, shape) if aside else np.empty(shape, np.float16)
    for start, chunk in zip(range(0, len(x), batch_size), stream(x, batch_size, model.device), strict=True):
        values[start : start + batch_size] = seen = model.normalized(chunk).half().cpu().numpy()[:, columns]
        if not (finite := np.isfinite(seen).all(axis=1)).all():
            raise ValueError(
                f"The features of item {start + int(finite.argmin())} reach beyond 65504, the largest float16: scale "
                "them, or set RqVae.standardize."
            )
    if aside:
        values.flush()
        os.replace(aside, path)
    return values


def make_ids(
    model: RqVae, codes: Tensor, corpus: Corpus, features: str, split: str, item_features: np.ndarray | None
) -> SemanticIds:
    """Unique IDs from a catalogue's codes [N, L]; features: the identity of what the model read, of the training
    data of `split`; item_features: [N, D], its `encoder_features`, or None."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    identity = {
        "weights": digest.hexdigest()[:16],
        "features": features,
        "split": split,
        "config": json.dumps(model.config),
    }
    if item_features is not None:
        identity["item_features"] = features_digest(item_features)
    size = model.config["codebook_size"]
    return SemanticIds.from_codes(codes, size, corpus.item_keys, corpus.name, corpus.hash, identity)


@dataclass(frozen=True)
class Described:
    """Features of a corpus, and the split whose training data they are of."""

    features: ItemFeatures
    split: str


def load_or_make_ids(
    path: str | Path,
    revision: str | None,
    corpus: Corpus,
    features: Callable[[], Described] | None,
    device: torch.device,
) -> tuple[SemanticIds, np.ndarray | None]:
    """The IDs at `path` (run or tokenizer folder, IDs file, Hub id at `revision`); with features, those that the
    tokenizer there (folder, `.pt` checkpoint, Hub id) gives the corpus. Beside them the item features that they were
    made of, [N, D] float16 as the tokenizer's encoder sees them, without those from interactions; None where there are
    none.

    features: computes what the tokenizer reads. Raises what `SemanticIds.load`, `load_item_features` and
    `RqVae.from_pretrained` raise, and ValueError where the IDs are of another corpus or the features are not those the
    tokenizer reads.
    """
    if features is None:
        if str(path).endswith(".pt"):
            raise ValueError(f"'{path}' is a tokenizer without semantic IDs: set train.features to what it reads.")
        semantic_ids = SemanticIds.load(path, revision)
        semantic_ids.check_corpus(corpus.name, corpus.hash)
        return semantic_ids, load_item_features(path, revision, semantic_ids)
    folder = Path(path) / "tokenizer"
    model = RqVae.from_pretrained(folder if folder.is_dir() else path, revision=revision).to(device)
    described = features()
    read = described.features
    if read.values.shape[1] != model.config["input_dim"]:
        raise ValueError(
            f"The tokenizer '{path}' reads {model.config['input_dim']} features an item, train.features "
            f"({read.identity}) gives {read.values.shape[1]}."
        )
    x = torch.from_numpy(read.values)
    codes, seen = catalogue_codes(model, x), encoder_features(model, x, ~read.from_interactions)
    return make_ids(model, codes, corpus, read.identity, described.split, seen), seen
