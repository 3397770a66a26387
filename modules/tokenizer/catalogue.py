"""Semantic IDs and item features of a corpus: those that a tokenizer's artifact holds, or made by the tokenizer."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import write_rows
from common.prefetch import stream
from data.corpus import Corpus
from data.features import ItemFeatures
from data.items import Items
from data.sources import SOURCES, STATES, FittedSources
from modules.loss import reconstruction_loss
from modules.pretrained import resolve
from modules.rqvae import RqVae
from modules.tokenizer.collisions import colliding_items, number_groups, resolve_collisions
from modules.tokenizer.index import read_index
from modules.tokenizer.semids import IDS, SemanticIds, features_digest, load_item_features, rank_within_equal

MAX_CANDIDATES = 32  # nearest last codes that an item may be moved to


@torch.no_grad()
def catalogue_codes(model: RqVae, x: Tensor, batch_size: int | None = None) -> Tensor:
    """Codes of all items of a catalogue: the nearest ones, as `RqVae.codes`; with the model's `separate_collisions`,
    of the items that share all of them only the nearest keeps them, the others take the first free of their 32 nearest
    last codes.

    This costs some accuracy (`reconstruction_error`) and suits catalogues that fill a small part of the code space:
    where most items would move, the last level says little. New items get the nearest codes from `RqVae.codes`.
    The features are read once, in order, batch_size rows at a time: how many changes nothing.
    Shape: x [N, input_dim] -> [N, L] int64, on the model's device.
    """
    if not model.config["separate_collisions"]:
        return model.codes(x, batch_size).to(model.device)
    codes, distance, candidates = nearest_codes(model, x, batch_size)
    items = colliding_items(codes, distance)
    return resolve_collisions(codes, items, candidates[items], model.config["codebook_size"])


@torch.no_grad()
def nearest_codes(model: RqVae, x: Tensor, batch_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of `RqVae.codes`, the distance to the last of them, and the K nearest last codes, on the model's
    device. Shape: x [N, input_dim] -> [N, L] int64, [N] int64, [N, K] int32."""
    exact, parts = model.exact(), []
    for chunk in stream(x, batch_size or model.chunk_rows, exact.device):
        out = exact.get_semantic_ids(chunk.double())
        count = min(MAX_CANDIDATES, model.config["codebook_size"])
        distances, candidates = exact.layers[-1].ranked(out.residuals[..., -1], count)
        parts.append((out.sem_ids, distances[:, 0], candidates.to(torch.int32)))
    codes, distance, candidates = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, distance, candidates


@torch.no_grad()
def reconstruction_error(model: RqVae, x: Tensor, codes: Tensor, batch_size: int | None = None) -> float:
    """Mean reconstruction loss of items x [N, input_dim] decoded from given codes [N, L]."""
    total, batch_size = 0.0, batch_size or model.chunk_rows
    for rows, chunk in zip(stream(x, batch_size, model.device), codes.split(batch_size), strict=True):
        ids, seen = chunk.to(model.device), model.normalized(rows)
        latent = sum(layer.codebook[ids[:, level]] for level, layer in enumerate(model.layers))
        total += float(reconstruction_loss(model.decoder(latent), seen, model.n_cat_features).double().sum())
    return total / len(x)


@torch.no_grad()
def encoder_features(
    model: RqVae, x: Tensor, columns: np.ndarray, path: Path | None = None, batch_size: int | None = None
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
    size, chosen = batch_size or model.chunk_rows, torch.from_numpy(columns).to(model.device)

    def parts() -> Iterator[np.ndarray]:
        for start, chunk in zip(range(0, len(x), size), stream(x, size, model.device), strict=True):
            seen = model.normalized(chunk)[:, chosen].half()
            if not (finite := seen.isfinite().all(1)).all():
                raise ValueError(
                    f"The features of item {start + int(finite.int().argmin())} reach beyond 65504, the largest "
                    "float16: scale them, or set RqVae.standardize."
                )
            yield seen.cpu().numpy()

    if path is None:
        return np.concatenate([*parts()])
    write_rows(path, len(x), parts())
    return np.load(path, mmap_mode="c")


@torch.no_grad()
def extended_ids(model: RqVae, ids: SemanticIds, item_keys: list[str], x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Codes of a catalogue that has changed since `ids`: items that were there keep theirs, the others get the nearest.

    New items that share all L codes with another move as in `catalogue_codes`, if the model separates or `ids` has no
    extra level; those that still do get the next free number on the extra level, which is added if `ids` has none.
    Shape: item_keys [N], x [M, input_dim] features of those that are new, in order -> codes [N, L'] int64 on the CPU,
    and the level sizes.
    """
    row = {key: n for n, key in enumerate(ids.item_keys)}
    rows = torch.tensor([row.get(key, -1) for key in item_keys])
    n_levels, new = model.config["n_layers"], (rows < 0).nonzero()[:, 0]
    codes, rank = ids.codes[rows.clamp_min(0), :n_levels], torch.zeros(len(rows), dtype=torch.int64)
    if ids.codes.shape[1] > n_levels:
        rank = ids.codes[rows.clamp_min(0), n_levels]
    if len(new):
        codes[new], near, candidates = (found.cpu() for found in nearest_codes(model, x))
        if model.config["separate_collisions"] or ids.codes.shape[1] == n_levels:
            moving = colliding_items(codes, torch.full_like(rows, -1).index_copy(0, new, near))
            moving = moving[rows[moving] < 0]
            own = candidates[torch.searchsorted(new, moving)]
            codes = resolve_collisions(codes, moving, own, model.config["codebook_size"])
    group, old = number_groups(codes), rows >= 0
    highest = torch.full((len(rows),), -1).scatter_reduce(0, group[old], rank[old], "amax")
    rank[new] = highest[group[new]] + 1 + rank_within_equal(codes[new])
    sizes = (model.config["codebook_size"],) * n_levels
    last = max([*ids.level_sizes[n_levels:], int(rank.max()) + 1])
    return (torch.cat([codes, rank[:, None]], 1), (*sizes, last)) if last > 1 else (codes, sizes)


def make_ids(
    model: RqVae, codes: Tensor, corpus: Corpus, features: str, split: str, item_features: np.ndarray | None
) -> SemanticIds:
    """Unique IDs from a catalogue's codes [N, L]; features, split, item_features: see `identity_of`."""
    identity = identity_of(model, features, split, item_features)
    size = model.config["codebook_size"]
    return SemanticIds.from_codes(codes, size, corpus.item_keys, corpus.name, corpus.hash, identity)


def identity_of(model: RqVae, features: str, split: str, item_features: np.ndarray | None) -> dict[str, str]:
    """What made IDs. features: the identity of what the model read, of the training data of `split`; item_features:
    [N, D], its `encoder_features`, or None."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    identity = {"weights": digest.hexdigest()[:16], "features": features, "split": split}
    identity["config"] = json.dumps(model.config)
    return identity if item_features is None else identity | {"item_features": features_digest(item_features)}


def load_or_make_ids(
    path: str | Path,
    revision: str | None,
    corpus: Corpus,
    features: Callable[[], ItemFeatures] | None,
    device: torch.device,
    encode: bool = False,
    text_model: str | None = None,
) -> tuple[SemanticIds, np.ndarray | None]:
    """The IDs at `path` (run or tokenizer folder, IDs file, index.json, Hub id at `revision`); with encode or features,
    those that the tokenizer there (folder, `.pt` checkpoint, Hub id) gives the corpus. Beside them the item features
    that they were made of, [N, D] float16 as the tokenizer's encoder sees them, without those from interactions; None
    where there are none. An index.json keeps its IDs, and `features` are only what lies beside them.

    encode: by the tokenizer's own feature sources; see `encode_corpus`, and for text_model `FittedSources.load`.
    features: computes what a tokenizer without sources of its own reads. Raises what `SemanticIds.load`,
    `load_item_features`, `RqVae.from_pretrained` and `FittedSources.load` raise, and ValueError where the IDs are of
    another corpus or the features are not those that the tokenizer reads.
    """
    if str(path).endswith(".json"):
        if encode or revision:
            raise ValueError(
                f"'{path}' is a file of IDs: unset train.encode_catalogue, train.pretrained_rqvae_revision."
            )
        ids = read_index(path, corpus)
        return with_features(ids, features()) if features else (ids, None)
    if features is None and not encode:
        if str(path).endswith(".pt"):
            raise ValueError(f"'{path}' is a tokenizer without semantic IDs: set train.features to what it reads.")
        semantic_ids = SemanticIds.load(path, revision)
        semantic_ids.check_corpus(corpus.name, corpus.hash)
        return semantic_ids, load_item_features(path, revision, semantic_ids)
    path = folder if (folder := Path(path) / "tokenizer").is_dir() else path
    model = RqVae.from_pretrained(path, revision=revision).to(device)
    ids = SemanticIds.load(path, revision) if beside(path, revision, IDS) else None
    sources = None
    if beside(path, revision, SOURCES):
        sources = FittedSources.load(resolve(path, revision, (SOURCES, STATES)), text_model)
    elif features is None:
        raise ValueError(f"The tokenizer '{path}' brings no feature sources: set train.features to what it reads.")
    made = ids.tokenizer if ids else {}
    if features is not None:
        read = features()
        check_features(path, model, sources.identity if sources else made.get("features"), read)
    if sources is not None:
        return encode_corpus(model, sources, ids, corpus)
    x = torch.from_numpy(read.values)
    codes, seen = catalogue_codes(model, x), encoder_features(model, x, ~read.fitted.from_interactions)
    return make_ids(model, codes, corpus, read.fitted.identity, made.get("split", read.fitted.split), seen), seen


def with_features(ids: SemanticIds, read: ItemFeatures) -> tuple[SemanticIds, np.ndarray | None]:
    """IDs from elsewhere with features as an RQ-VAE's encoder would see them; what `load_or_make_ids` returns."""
    x = torch.from_numpy(read.values)
    model = RqVae(x.shape[1], hidden_dims=None, codebook_size=1, n_layers=1, codebook_kmeans_init=False)
    model.initialize(x, torch.Generator())
    seen = encoder_features(model, x, ~read.fitted.from_interactions)
    digest = {} if seen is None else {"item_features": features_digest(seen)}
    return replace(ids, tokenizer={**ids.tokenizer, "features": read.fitted.identity, **digest}), seen


def encode_corpus(
    model: RqVae, sources: FittedSources, ids: SemanticIds | None, corpus: Corpus
) -> tuple[SemanticIds, np.ndarray | None]:
    """What `load_or_make_ids` returns, by the tokenizer's own sources; ids: those it came with. In a corpus of the same
    name, items with IDs keep them. Another corpus' items are all new, whatever their keys."""
    items, same = Items.of(corpus), corpus.name == sources.corpus_name
    if not same:  # equal keys mean other items there
        items.keys = [f"{corpus.name}/{key}" for key in items.keys]
    x = torch.from_numpy(sources.transform(items))
    seen = encoder_features(model, x, ~sources.from_interactions)
    if ids is None or not same:
        return make_ids(model, catalogue_codes(model, x), corpus, sources.identity, sources.split, seen), seen
    new = ~np.isin(corpus.item_keys, ids.item_keys)
    codes, sizes = extended_ids(model, ids, corpus.item_keys, x[torch.from_numpy(new)])
    identity = identity_of(model, sources.identity, sources.split, seen)
    return SemanticIds(codes, sizes, corpus.item_keys, corpus.name, corpus.hash, identity), seen


def beside(path: str | Path, revision: str | None, name: str) -> bool:
    """Whether a local folder or a Hub repository holds a file."""
    try:
        return (resolve(path, revision, (name,)) / name).is_file()
    except FileNotFoundError:
        return False


def check_features(path: str | Path, model: RqVae, trained_with: str | None, given: ItemFeatures) -> None:
    """ValueError that names both sides where a tokenizer was trained with other features than those given."""
    if trained_with not in (None, given.fitted.identity):
        raise ValueError(
            f"The tokenizer '{path}' was trained with {trained_with}, train.features is {given.fitted.identity}: bind "
            "what the tokenizer was trained with."
        )
    if given.values.shape[1] != model.config["input_dim"]:
        raise ValueError(
            f"The tokenizer '{path}' reads {model.config['input_dim']} features an item, train.features "
            f"({given.fitted.identity}) gives {given.values.shape[1]}."
        )
