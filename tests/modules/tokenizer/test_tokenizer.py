"""A tokenizer's folder alone gives any item its codes, and a changed catalogue keeps its IDs."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from common.schemas import Interactions
from data.corpus import Corpus
from data.encoders import SentenceEncoder
from data.features import ItemFeatures
from data.items import Items
from data.processed import RecDataset, load_corpus
from data.sources import FittedSources
from data.vectors import Vectors
from modules.tokenizer.catalogue import load_or_make_ids
from modules.tokenizer.semids import SemanticIds, load_item_features
from modules.tokenizer.tokenizer import Tokenizer
from tests.pipeline import run, write_raw

REPOSITORY, CPU = Path(__file__).parents[3], torch.device("cpu")
SOURCES = ("train.features = [@TfidfSvd(), @CoOccurrenceSvd()]", "CoOccurrenceSvd.dim = 6", "train.categories = True")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Corpus]:
    """A tokenizer's folder with nothing around it, and the corpus that it was trained on."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_raw(folder)
    run(folder, "rqvae", *SOURCES, "RqVae.drop_interactions = 0.2")
    corpus = load_corpus(RecDataset.AMAZON, str(folder), "beauty")
    corpus.texts(), corpus.categories()  # read before their file is gone
    shutil.move(folder / "out" / "rqvae" / "tokenizer", folder / "alone")
    for other in ("raw", "processed", "features", "out"):
        shutil.rmtree(folder / other)
    return folder / "alone", corpus


def rows_of(corpus: Corpus) -> list[dict]:
    """One mapping an item, as a tokenizer takes them."""
    columns = zip(corpus.item_keys, corpus.texts(), corpus.categories(), strict=True)
    return [dict(zip(("key", "text", "categories"), row, strict=True)) for row in columns]


def changed(corpus: Corpus, kept: list[int], new: list[str] = (), name: str | None = None) -> Corpus:
    """Some of its items, then new ones of these texts; nobody's interactions but one."""
    rows = [rows_of(corpus)[n] for n in kept]
    keys = [row["key"] for row in rows] + [f"new{n}" for n in range(len(new))]
    one = Interactions(torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1]))
    groups = [row["categories"] for row in rows] + [["ball", "unheard of"]] * len(new)
    return Corpus.build(name or corpus.name, one, keys, ["u"], [row["text"] for row in rows] + list(new), groups)


def test_another_process_gives_old_items_their_codes_from_raw_text_alone(made):
    folder, corpus = made
    code = f"""
import sys, json
for module in ("polars", "sentence_transformers", "wandb", "matplotlib"):
    sys.modules[module] = None  # importing it raises ImportError
from modules.tokenizer.tokenizer import Tokenizer
items = json.load(sys.stdin)
print(Tokenizer.from_pretrained({str(folder)!r}).encode(items).tolist())
"""
    items = json.dumps(rows_of(corpus)[::-1])
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, input=items, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[::-1] == SemanticIds.load(folder).codes[:, :2].tolist()


def test_item_features_are_those_of_training(made):
    folder, corpus = made
    tokenizer = Tokenizer.from_pretrained(folder)
    expected = load_item_features(folder, None, SemanticIds.load(folder))
    assert expected.shape == (30, 8 + 5)
    np.testing.assert_array_equal(tokenizer.item_features(rows_of(corpus)), expected)
    np.testing.assert_array_equal(tokenizer.item_features(pl.DataFrame(rows_of(corpus)[3:5])), expected[3:5])


def test_what_a_new_item_lacks_is_zero(made):
    folder, corpus = made
    tokenizer = Tokenizer.from_pretrained(folder)
    old = tokenizer.features(Items.of(corpus))
    rows = [{"key": "new", "text": corpus.texts()[4], "categories": ["unheard of", "lamp"]}, {"key": "x", "text": "?"}]
    new = tokenizer.features(rows)
    assert torch.equal(new[0, :8], old[4, :8]) and bool(old[4, 8:14].any()) and not bool(new[:, 8:14].any())
    assert new[0, 14:].tolist() == [0, 0, 0, 1, 0] and not bool(new[1].any()), "balls to shoes, by name"
    assert tokenizer.encode(pl.DataFrame(rows[:1])).shape == (1, 2) and tokenizer.encode([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"key": 5, "text": "a"}, "item 1: 'key' must be a text, it is 5"),
        ({"key": "a"}, "item 1: 'text' must be a text, it is None"),
        ({"key": "\ud800", "text": "a"}, "item 1: 'key' holds half a surrogate pair"),
        ({"key": "a", "text": "b", "categories": "c"}, "item 'a': 'categories' must be a list of texts, it is 'c'"),
        ({"key": "a", "text": "b", "categories": ["\ud800"]}, "item 'a': 'categories' holds half a surrogate pair"),
    ],
)
def test_items_that_are_none_are_named(made, row, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(made[0]).encode([{"key": "ok", "text": "red ball"}, row])


def test_a_catalogue_that_loses_and_gains_items_keeps_the_ids_of_the_others(made):
    folder, corpus = made
    ids = SemanticIds.load(folder)
    kept = [n for n in range(30) if n not in (0, 17)]
    seen = load_item_features(folder, None, ids)
    for new in ([], ["red ball", "red ball", "green lamp"]):
        now = changed(corpus, kept, new)
        made_ids, features = load_or_make_ids(folder, None, now, None, CPU, encode=True)
        shared = min(made_ids.codes.shape[1], ids.codes.shape[1])
        assert torch.equal(made_ids.codes[: len(kept), :shared], ids.codes[kept, :shared])
        assert not made_ids.codes[: len(kept), shared:].any()
        assert len(made_ids.codes.unique(dim=0)) == len(now.item_keys)
        np.testing.assert_array_equal(features[: len(kept)], seen[kept])
        rows = [{"key": f"new{n}", "text": text, "categories": ["ball"]} for n, text in enumerate(new)]
        nearest = Tokenizer.from_pretrained(folder).encode(rows)
        assert torch.equal(made_ids.codes[len(kept) :, :2], nearest)
        assert (made_ids.tokenizer["split"], made_ids.tokenizer["features"]) == (
            "leave-one-out",
            ids.tokenizer["features"],
        )
        made_ids.check_corpus(now.name, now.hash)


def test_equal_keys_of_another_corpus_are_other_items(made):
    folder, corpus = made
    made_ids, _ = load_or_make_ids(folder, None, changed(corpus, [*range(30)], name="mine"), None, CPU, encode=True)
    rows = [row | {"key": f"unknown{n}"} for n, row in enumerate(rows_of(corpus))]
    assert torch.equal(made_ids.codes[:, :2], Tokenizer.from_pretrained(folder).encode(rows))
    assert (made_ids.corpus_name, made_ids.tokenizer["split"]) == ("mine", "leave-one-out")


def test_a_foreign_catalogue_and_foreign_sources_are_refused_by_both_names(made, tmp_path):
    folder, corpus = made
    now = changed(corpus, [*range(29)])
    with pytest.raises(ValueError, match=f"{corpus.hash}.*{now.hash}.*train.encode_catalogue = True"):
        load_or_make_ids(folder, None, now, None, CPU)
    fitted = Tokenizer.from_pretrained(folder).sources
    values = np.zeros((30, 19), np.float32)
    given = ItemFeatures(values, replace(fitted, identities=["words(dim=8)", *fitted.identities[1:]]))
    both = r"was trained with tfidf-svd\(dim=8.* 5 categories, train.features is words\(dim=8\) \+ co-occ"
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "sources.json").unlink()
    for place in (folder, old):  # one whose IDs alone tell what it was trained with
        with pytest.raises(ValueError, match=both):
            load_or_make_ids(place, None, corpus, lambda: given, CPU)
    with pytest.raises(ValueError, match="brings no feature sources: set train.features"):
        load_or_make_ids(old, None, corpus, None, CPU, encode=True)
    other = ItemFeatures(values, replace(fitted, split="another split"))
    ids, _ = load_or_make_ids(old, None, corpus, lambda: other, CPU)
    assert ids.tokenizer["split"] == "leave-one-out"


DAMAGE = {
    "sources.json": [lambda c: b"", lambda c: c[:-9], lambda c: c.replace(b"sources-1", b"sources-0")]
    + [lambda c: c.replace(b"TfidfSvd", b"Popen"), lambda c: c.replace(b'"dim": 8', b'"dims": 8')],
    "sources.safetensors": [lambda c: b"", lambda c: c[:-1], lambda c: c[:-1] + bytes([c[-1] ^ 1])],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in DAMAGE for damage in DAMAGE[name]])
def test_damaged_files_are_named(made, tmp_path, name, damage):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{folder / name} can't be used"):
        Tokenizer.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder / name} is missing"):
        Tokenizer.from_pretrained(folder)


def test_a_model_and_sources_of_other_widths_are_refused(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "copy")
    sources = FittedSources.load(folder)
    replace(sources, sources=sources.sources[:1], states=sources.states[:1], widths=[8]).save(folder)
    with pytest.raises(ValueError, match=r"reads 19 features an item, the sources beside it .* give 8"):
        Tokenizer.from_pretrained(folder)


def test_a_sentence_encoder_that_is_another_one_is_refused(tmp_path):
    encoder = SentenceEncoder("somebody/model")
    FittedSources([encoder], [{}], [1.0], [4], [encoder.identity], "tiny", "leave-one-out").save(tmp_path)
    assert FittedSources.load(tmp_path).sources == [encoder]
    other = FittedSources.load(tmp_path, text_model="another/model")
    with pytest.raises(ValueError, match="trained with somebody/model.* is another/model: .*text_model"):
        other.transform(Items(["a"], ["text"], [[]]))


def test_new_items_bring_their_ready_vectors(made, tmp_path):
    corpus, values = made[1], np.arange(60, dtype=np.float32).reshape(30, 2)
    np.save(tmp_path / "v.npy", values)
    source = Vectors(str(tmp_path / "v.npy"))
    FittedSources([source], [source.fit(corpus, None)], [1.0], [2], [source.identity], "tiny", "").save(tmp_path)
    (tmp_path / "v.npy").unlink()
    fitted = FittedSources.load(tmp_path)
    rows = [{"key": corpus.item_keys[7], "text": ""}, {"key": "new", "text": "", "vector": [0.5, 1]}]
    with pytest.raises(ValueError, match="has no vector of item 'new'.* a list of 2 numbers"):
        fitted.transform(Items.read([*rows[:1], {"key": "new", "text": ""}]))
    rows[0]["vector"] = [9, 9]
    np.testing.assert_array_equal(fitted.transform(Items.read(rows)), [values[7], [0.5, 1]])
