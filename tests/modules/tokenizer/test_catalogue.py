"""Codes and features of whole catalogues: only colliding items move, to near codes, wherever the features lie."""

import numpy as np
import pytest
import torch

from common.schemas import Interactions
from data.cooccurrence import CoOccurrenceSvd
from data.corpus import Corpus
from data.encoders import TfidfSvd
from data.features import ItemFeatures
from data.sources import FittedSources
from modules.rqvae import RqVae
from modules.tokenizer.catalogue import (
    catalogue_codes,
    encoder_features,
    extended_ids,
    load_or_make_ids,
    reconstruction_error,
)
from modules.tokenizer.semids import SemanticIds, features_digest, load_item_features
from training.metrics import collisions


def make(n: int = 300, **options) -> tuple[RqVae, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(12, 6)[torch.arange(n) % 12] + 0.2 * torch.randn(n, 6)
    model = RqVae(6, embed_dim=4, hidden_dims=(16,), codebook_size=16, **options).eval()
    model.initialize(x, torch.Generator().manual_seed(0))
    return model, x


def test_only_items_that_collide_move_and_only_on_the_last_level():
    model, x = make()
    nearest, codes = model.codes(x), catalogue_codes(model, x)
    assert collisions(nearest)["unique_share"] < 0.9 and collisions(codes)["unique_share"] == 1
    assert torch.equal(codes[:, :-1], nearest[:, :-1])
    moved = (codes != nearest).any(1)
    _, group, counts = nearest.unique(dim=0, return_inverse=True, return_counts=True)
    assert int(moved.sum()) == len(x) - len(counts), "of each group one item stays"
    out = model.get_semantic_ids(x)
    left = (out.residuals[..., -1] - out.embeddings[..., -1]).detach().square().sum(1)
    for number in (counts > 1).nonzero()[:, 0].tolist():
        members = (group == number).nonzero()[:, 0]
        assert int(members[left[members].argmin()]) in members[~moved[members]].tolist(), "the nearest stays"


def test_where_it_is_off_the_codes_are_the_nearest():
    model, x = make(separate_collisions=False)
    assert torch.equal(catalogue_codes(model, x), model.codes(x))


@pytest.mark.parametrize("batch_size", [7, 300, 65536])
def test_features_may_be_a_file_read_in_chunks(tmp_path, batch_size):
    model, x = make()
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    assert torch.equal(catalogue_codes(model, mapped, batch_size), catalogue_codes(model, x))


@pytest.mark.parametrize("options", [{}, {"standardize": "column", "n_cat_features": 2}, {"standardize": "none"}])
@pytest.mark.parametrize("batch_size", [7, 300, 65536])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [1, 4, 5]])
def test_features_are_those_the_encoder_sees(tmp_path, options, batch_size, chosen):
    model, x = make(**options)
    columns = np.isin(np.arange(6), chosen)
    fitted = 6 - options.get("n_cat_features", 0)
    expected = x.double().clone()
    if options.get("standardize") != "none":
        expected[:, :fitted] -= expected[:, :fitted].mean(0)
        square = expected[:, :fitted].square().mean(0)
        expected[:, :fitted] /= (square if options else square.mean()).sqrt()
    for path in (None, tmp_path / "features.npy"):
        values = encoder_features(model, x, columns, path, batch_size)
        assert values.dtype == np.float16 and values.shape == (300, len(chosen))
        np.testing.assert_allclose(values, expected[:, chosen].numpy(), rtol=2**-10, atol=1e-5)
    assert np.array_equal(np.load(path), values) and [*tmp_path.iterdir()] == [path], "nothing else is left"
    assert encoder_features(model, x, np.zeros(6, bool), path) is None
    assert not [*tmp_path.iterdir()], "no features, no file"


def test_features_beyond_float16_are_refused():
    model, x = make(standardize="none")
    x[17, 3] = 65520
    with pytest.raises(ValueError, match="features of item 17 reach beyond 65504"):
        encoder_features(model, x, np.ones(6, bool), batch_size=10)


@pytest.mark.parametrize("batch_size", [1, 7, 33, 64])
def test_rounding_does_not_order_items_with_equal_features(batch_size):
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(40, 24)[torch.randint(0, 40, (500,))]
        model = RqVae(24, embed_dim=8, hidden_dims=(32,), codebook_size=16)
        model.initialize(x, torch.Generator().manual_seed(0))
        assert torch.equal(catalogue_codes(model, x, batch_size), catalogue_codes(model, x))


@pytest.mark.gpu
def test_a_gpu_gives_the_codes_of_the_cpu():
    model, x = make(5000)
    expected = catalogue_codes(model, x)
    for batch_size in (65536, 777):
        assert torch.equal(catalogue_codes(model.cuda(), x, batch_size).cpu(), expected)
        assert torch.equal(catalogue_codes(model, x.cuda(), batch_size).cpu(), expected)


def test_the_error_of_codes_is_that_of_decoding_them():
    model, x = make()
    losses = model.losses(x)
    nearest = reconstruction_error(model, x, model.codes(x), batch_size=70)
    assert nearest == pytest.approx(losses["reconstruction_loss"], rel=1e-5)
    assert nearest < reconstruction_error(model, x, catalogue_codes(model, x)) < 1.5 * nearest


def test_a_checkpoint_without_ids_needs_features():
    with pytest.raises(ValueError, match="set train.features"):
        load_or_make_ids("old.pt", None, None, None, torch.device("cpu"))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("dead", [0, 40])
def test_new_items_get_free_ids_near_their_own_and_old_ones_keep_theirs(separate, dead):
    """Against a loop that gives one new item after the other its ID."""
    model, x = make(separate_collisions=separate)
    old, new = list(range(dead, 200)), list(range(200, 300))
    ids = SemanticIds.from_codes(catalogue_codes(model, x[:200]), 16, [f"i{n}" for n in range(200)], "tiny", "", {})
    keys = [f"i{n}" for n in [*new[:50], *old, *new[50:]]]
    codes, sizes = extended_ids(model, ids, keys, x[new])
    assert bool((codes >= 0).all()) and bool((codes < torch.tensor(sizes)).all())
    assert len(codes.unique(dim=0)) == len(keys)
    now, nearest = {key: tuple(row) for key, row in zip(keys, codes.tolist(), strict=True)}, model.codes(x)
    extra = (0,) * (codes.shape[1] - ids.codes.shape[1])
    assert all(now[f"i{n}"] == (*ids.codes[n].tolist(), *extra) for n in old)
    taken = [now[f"i{n}"] for n in old]
    for n in new:
        assert now[f"i{n}"][:2] == tuple(nearest[n, :2].tolist())
        if now[f"i{n}"][2] != nearest[n, 2]:
            assert separate and [*now.values()].count((*nearest[n].tolist(), *now[f"i{n}"][3:])) == 1
    if not separate:
        for n in new:
            group = [row[3] for row in taken if row[:3] == tuple(nearest[n].tolist())]
            assert now[f"i{n}"][3] == max(group, default=-1) + 1
            taken.append(now[f"i{n}"])


@pytest.mark.parametrize("chosen", [[], [0, 3], [0, 1, 2, 3, 4, 5]])
def test_ids_made_of_features_come_with_those_that_describe_the_items(tmp_path, chosen):
    model, x = make()
    model.save_pretrained(tmp_path)
    keys = [f"i{n}" for n in range(len(x))]
    interactions = Interactions(torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1]))
    corpus = Corpus.build("tiny", interactions, keys, ["u"], keys, [[]] * len(x))
    sources = [CoOccurrenceSvd(1) if n not in chosen else TfidfSvd(1) for n in range(6)]
    names = [source.identity for source in sources]
    features = ItemFeatures(x.numpy(), FittedSources(sources, [{}] * 6, [1.0] * 6, [1] * 6, names, "tiny", "a split"))
    ids, seen = load_or_make_ids(tmp_path, None, corpus, lambda: features, torch.device("cpu"))
    assert torch.equal(ids.codes[:, :3], catalogue_codes(model, x)), "all columns make the IDs"
    assert (ids.tokenizer["features"], ids.tokenizer["split"]) == (" + ".join(names), "a split")
    if chosen:
        np.testing.assert_allclose(seen, model.normalized(x)[:, chosen], rtol=2**-10, atol=1e-5)
        assert ids.tokenizer["item_features"] == features_digest(seen)
    else:
        assert seen is None
        ids.save(tmp_path / "semantic_ids.safetensors")
        assert load_item_features(tmp_path, None, SemanticIds.load(tmp_path)) is None
