"""Semantic IDs of a corpus: those that a tokenizer's artifact holds, or made by the tokenizer."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.corpus import Corpus
from data.stream import stream
from modules.loss import reconstruction_loss
from modules.rqvae import RqVae
from modules.tokenizer.semids import SemanticIds
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


def make_ids(model: RqVae, codes: Tensor, corpus: Corpus, features: str, split: str) -> SemanticIds:
    """Unique IDs from a catalogue's codes [N, L]; features: the identity of what the model read, of the training
    data of `split`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    identity = {
        "weights": digest.hexdigest()[:16],
        "features": features,
        "split": split,
        "config": json.dumps(model.config),
    }
    size = model.config["codebook_size"]
    return SemanticIds.from_codes(codes, size, corpus.item_keys, corpus.name, corpus.hash, identity)


@dataclass(frozen=True)
class Described:
    """values: [N, D] float32, features of a corpus; identity: what computed them; split: whose training data."""

    values: np.ndarray
    identity: str
    split: str


def load_or_make_ids(
    path: str | Path,
    revision: str | None,
    corpus: Corpus,
    features: Callable[[], Described] | None,
    device: torch.device,
) -> SemanticIds:
    """The IDs at `path` (run or tokenizer folder, IDs file, Hub id at `revision`); with features, those that the
    tokenizer there (folder, `.pt` checkpoint, Hub id) gives the corpus.

    features: computes what the tokenizer reads. Raises what `SemanticIds.load` and `RqVae.from_pretrained`
    raise, and ValueError where the IDs are of another corpus or the features are not those the tokenizer reads.
    """
    if features is None:
        if str(path).endswith(".pt"):
            raise ValueError(f"'{path}' is a tokenizer without semantic IDs: set train.features to what it reads.")
        semantic_ids = SemanticIds.load(path, revision)
        semantic_ids.check_corpus(corpus.name, corpus.hash)
        return semantic_ids
    folder = Path(path) / "tokenizer"
    model = RqVae.from_pretrained(folder if folder.is_dir() else path, revision=revision).to(device)
    described = features()
    if described.values.shape[1] != model.config["input_dim"]:
        raise ValueError(
            f"The tokenizer '{path}' reads {model.config['input_dim']} features an item, train.features "
            f"({described.identity}) gives {described.values.shape[1]}."
        )
    codes = catalogue_codes(model, torch.from_numpy(described.values))
    return make_ids(model, codes, corpus, described.identity, described.split)
