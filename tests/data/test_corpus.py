import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schemas import Interactions
from data.corpus import Corpus

PARTS = {
    "items": [0, 2, 1, 2, 2],
    "offsets": [0, 3, 5],
    "timestamps": [5, 5, 9, 1, 2],
    "item_keys": ["a", "b", "ö"],
    "user_keys": ["u", "v"],
    "texts": ["A red one.", "A blue one.", "日本"],
    "categories": [["x", "y"], [], ["y"]],
}


def make(**changed) -> Corpus:
    parts = PARTS | changed
    times = parts["timestamps"]
    interactions = Interactions(
        torch.tensor(parts["items"], dtype=torch.int32),
        torch.tensor(parts["offsets"]),
        None if times is None else torch.tensor(times),
    )
    rest = {key: parts[key] for key in ("item_keys", "user_keys", "texts", "categories")}
    return Corpus.build(parts.get("name", "tiny"), interactions, **rest)


def assert_equal(one: Corpus, other: Corpus) -> None:
    for field in ("name", "item_keys", "user_keys", "hash", "text_hash", "n_items", "n_users"):
        assert getattr(one, field) == getattr(other, field)
    assert one.texts() == other.texts()
    assert one.categories() == other.categories()
    for field in ("items", "offsets", "timestamps"):
        mine, theirs = getattr(one.interactions, field), getattr(other.interactions, field)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


def test_what_a_corpus_holds():
    corpus = make()
    assert (corpus.n_items, corpus.n_users) == (3, 2)
    assert corpus.categories() == PARTS["categories"]
    assert corpus.texts() == PARTS["texts"]
    columns = {"text": [[text] for text in PARTS["texts"]], "categories": PARTS["categories"]}
    assert corpus.columns(["text", "categories"]) == columns
    with pytest.raises(ValueError, match="train.item_columns names 'genre'; .* have key, text, categories"):
        corpus.columns(["genre"])


texts = st.text(max_size=8)
corpora = st.fixed_dictionaries(
    {
        "rows": st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1), min_size=1),
        "texts": st.lists(texts, min_size=4, max_size=4),
        "categories": st.lists(st.lists(texts, max_size=3), min_size=4, max_size=4),
        "timed": st.booleans(),
    }
)


@settings(max_examples=25)
@given(corpora)
def test_a_saved_corpus_loads_as_it_was(drawn):
    rows = [sorted(row, key=lambda pair: pair[1]) for row in drawn["rows"]]
    corpus = make(
        items=[item for row in rows for item, _ in row],
        offsets=[sum(map(len, rows[:n])) for n in range(len(rows) + 1)],
        timestamps=[time for row in rows for _, time in row] if drawn["timed"] else None,
        item_keys=["k", "", "日", "key"],
        user_keys=[str(n) for n in range(len(rows))],
        texts=drawn["texts"],
        categories=drawn["categories"],
    )
    with tempfile.TemporaryDirectory() as folder:
        corpus.save(f"{folder}/deep/tiny", [{"name": "raw.txt"}])
        assert_equal(Corpus.load(f"{folder}/deep/tiny"), corpus)
        assert os.listdir(f"{folder}/deep") == ["tiny"]
        header = json.loads(Path(folder, "deep/tiny/corpus.json").read_text())
    assert header["raw_files"] == [{"name": "raw.txt"}]
    assert (header["n_users"], header["n_items"]) == (len(rows), 4)


def test_the_hash_tells_every_difference():
    changes = [
        {},
        {"items": [0, 2, 1, 2, 1]},
        {"offsets": [0, 2, 5], "timestamps": [5, 5, 1, 2, 9]},
        {"timestamps": [5, 6, 9, 1, 2]},
        {"timestamps": None},
        {"item_keys": ["a", "ö", "b"]},
        {"user_keys": ["v", "u"]},
        {"texts": ["A red one.", "A blue one.", "日 本"]},
        {"texts": ["A red one.A", " blue one.", "日本"]},
        {"categories": [["x", "y"], ["y"], []]},
        {"categories": [["xy"], [], ["y"]]},
    ]
    hashes = [make(**change).hash for change in changes]
    assert len(set(hashes)) == len(changes)
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in hashes)
    assert make(name="another").hash == hashes[0]


def test_the_text_hash_follows_the_texts_only():
    corpus = make()
    same = make(items=[0, 2, 1, 2, 1], categories=[[], [], []], item_keys=["p", "q", "r"])
    assert same.text_hash == corpus.text_hash and same.hash != corpus.hash
    assert make(texts=PARTS["texts"][::-1]).text_hash != corpus.text_hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": [0, 3, 1, 2, 2]}, "item ids must be within 0 to 2, not 0 to 3"),
        ({"items": [0, -1, 1, 2, 2]}, "not -1 to 2"),
        ({"offsets": [0, 3, 4]}, "offsets must rise from 0 to 5"),
        ({"offsets": [1, 3, 5]}, "offsets must rise from 0 to 5"),
        ({"offsets": [0, 6, 5]}, "offsets must rise from 0 to 5"),
        ({"offsets": [0, 5]}, r"offsets must be \[3\] int64"),
        ({"offsets": [0.0, 3.0, 5.0]}, r"offsets must be \[3\] int64"),
        ({"offsets": [0, 5, 5]}, "user 'v' has no interactions"),
        ({"timestamps": [5, 4, 9, 1, 2]}, "timestamps must not fall within a user"),
        ({"timestamps": [5, 5, 9, 1]}, "timestamps must be"),
        ({"timestamps": [1.0, 2.0, 3.0, 4.0, 5.0]}, "timestamps must be"),
        ({"item_keys": ["a", "b", "a"]}, "item_keys must be unique, 2 of 3 are"),
        ({"user_keys": ["u", "u"]}, "user_keys must be unique"),
        ({"texts": ["A", "B"]}, "2 texts for 3 item keys"),
        ({"categories": [[]]}, "1 categories for 3 item keys"),
        ({"items": [], "offsets": [0], "timestamps": [], "user_keys": []}, "at least one item and one user"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        make(**change)
    assert "'tiny'" in str(raised.value)


def test_items_must_be_int32():
    interactions = Interactions(torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="items must be .* int32"):
        Corpus.build("tiny", interactions, ["a"], ["u"], [""], [[]])


def test_loading_nothing_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Corpus.load(tmp_path / "nowhere")


def edit_header(folder: Path, **changes) -> None:
    header = json.loads((folder / "corpus.json").read_text()) | changes
    (folder / "corpus.json").write_text(json.dumps({k: v for k, v in header.items() if v is not None}))


DAMAGES = {
    "no header": lambda folder: (folder / "corpus.json").unlink(),
    "half a header": lambda folder: os.truncate(folder / "corpus.json", 30),
    "a header of another kind": lambda folder: (folder / "corpus.json").write_text("[1]"),
    "a header without hash": lambda folder: edit_header(folder, hash=None),
    "an older format": lambda folder: edit_header(folder, format_version=0),
    "other counts": lambda folder: edit_header(folder, n_items=4),
    "no tensors": lambda folder: (folder / "tensors.safetensors").unlink(),
    "half the tensors": lambda folder: os.truncate(folder / "tensors.safetensors", 200),
    "no texts": lambda folder: (folder / "texts.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_cache_is_an_error_that_names_folder_and_fix(tmp_path, damage):
    make().save(tmp_path / "tiny")
    damage(tmp_path / "tiny")
    with pytest.raises(ValueError, match="train.force_dataset_process=True") as raised:
        Corpus.load(tmp_path / "tiny")
    assert str(tmp_path / "tiny") in str(raised.value)


def test_damaged_or_foreign_texts_are_noticed_when_they_are_read(tmp_path):
    make().save(tmp_path / "tiny")
    make(texts=["a", "b", "c"]).save(tmp_path / "other")
    corpus = Corpus.load(tmp_path / "tiny")
    shutil.copy(tmp_path / "other/texts.safetensors", tmp_path / "tiny/texts.safetensors")
    with pytest.raises(ValueError, match="not those of corpus 'tiny'.*force_dataset_process"):
        corpus.texts()
    os.truncate(tmp_path / "tiny/texts.safetensors", 20)
    with pytest.raises(ValueError, match="texts.safetensors.*force_dataset_process"):
        Corpus.load(tmp_path / "tiny").texts()


def test_a_crash_while_saving_keeps_the_old_cache_and_leaves_no_partial_one(tmp_path, monkeypatch):
    old, new = make(), make(texts=["p", "q", "r"])
    old.save(tmp_path / "tiny")

    def crash(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", crash)
        for folder in ("tiny", "fresh"):
            with pytest.raises(OSError, match="disk full"):
                new.save(tmp_path / folder)
    assert os.listdir(tmp_path) == ["tiny"]
    assert_equal(Corpus.load(tmp_path / "tiny"), old)
    new.save(tmp_path / "tiny")
    assert_equal(Corpus.load(tmp_path / "tiny"), new)
    assert os.listdir(tmp_path) == ["tiny"]


def test_leftovers_of_killed_processes_are_harmless(tmp_path):
    (tmp_path / ".tiny" / "half").mkdir(parents=True)
    make().save(tmp_path / "tiny")
    assert_equal(Corpus.load(tmp_path / "tiny"), make())


def test_others_may_read_the_cache(tmp_path):
    previous = os.umask(0o022)
    try:
        make().save(tmp_path / "tiny")
    finally:
        os.umask(previous)
    for path in (tmp_path / "tiny", *(tmp_path / "tiny").iterdir()):
        assert path.stat().st_mode & 0o044 == 0o044, path
