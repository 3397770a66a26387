"""Semantic IDs: made unique, written and read back, and refused where they don't fit."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modules.tokenizer.semids import SemanticIds, features_digest, load_item_features, rank_within_equal
from modules.tree import lexicographic_order

rows_strategy = st.integers(1, 3).flatmap(
    lambda levels: st.lists(st.tuples(*[st.integers(0, 2)] * levels), min_size=1, max_size=40)
)


CODES = [(0, 1), (2, 1), (0, 1), (0, 1), (2, 2)]


def make(rows: list[tuple[int, ...]] = CODES, **changed) -> SemanticIds:
    codes = torch.tensor(rows)
    keys = [f"ключ {n}" for n in range(len(codes))]
    made = SemanticIds.from_codes(codes, 3, keys, "tiny", "0123abcd", {"model": "rqvae", "levels": 2})
    return dataclasses.replace(made, **changed)


@settings(max_examples=50)
@given(rows_strategy)
def test_a_level_counts_the_earlier_items_with_the_same_codes_where_there_are_any(rows):
    seen, ranks = Counter(), []
    for row in rows:
        ranks.append(seen[row])
        seen[row] += 1
    assert rank_within_equal(torch.tensor(rows)).tolist() == ranks
    semantic_ids = make(rows)
    assert len(set(map(tuple, semantic_ids.codes.tolist()))) == semantic_ids.n_items == len(rows)
    if not any(ranks):
        assert semantic_ids.codes.tolist() == [[*row] for row in rows] and semantic_ids.level_sizes == (3,) * len(
            rows[0]
        )
        return
    assert semantic_ids.codes.tolist() == [[*row, rank] for row, rank in zip(rows, ranks, strict=True)]
    assert semantic_ids.level_sizes == (3,) * len(rows[0]) + (max(seen.values()),)
    assert semantic_ids.codes.dtype == torch.int64


@pytest.mark.parametrize("place", ["run/tokenizer/semantic_ids.safetensors", "run/semantic_ids.safetensors", "run"])
def test_what_is_saved_is_loaded_from_the_file_or_its_folders(tmp_path, place):
    saved, file = make(), tmp_path / place
    saved.save(file)
    for path in {file, file.parent if place != "run" else file, tmp_path / "run"}:
        for loaded in (SemanticIds.load(path), SemanticIds.load(str(path))):
            assert torch.equal(loaded.codes, saved.codes) and loaded.codes.dtype == torch.int64
            for field in ("level_sizes", "item_keys", "corpus_name", "corpus_hash", "tokenizer"):
                assert getattr(loaded, field) == getattr(saved, field)


@pytest.mark.parametrize("place", ["nothing", "empty"])
def test_a_missing_file_is_named(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="train.pretrained_rqvae_path") as raised:
        SemanticIds.load(tmp_path / place)
    assert str(tmp_path / place) in str(raised.value)


def rewrite(path, metadata: dict | None = None, **tensors) -> None:
    """Writes the file again with other parts."""
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        kept = opened.metadata()
    save_file(load_file(path) | tensors, path, kept | (metadata or {}))


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a safetensors file, but long enough to have a header"),
    "cut": truncate,
    "another file": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "another format": lambda path: rewrite(path, {"format": "semantic-ids-0"}),
    "level sizes": lambda path: rewrite(path, {"level_sizes": "[3, 3"}),
    "codes outside": lambda path: rewrite(path, codes=torch.full((5, 3), 3, dtype=torch.int32)),
    "fewer codes": lambda path: rewrite(path, codes=torch.zeros(4, 3, dtype=torch.int32)),
    "keys": lambda path: rewrite(path, key_data=torch.full_like(load_file(path)["key_data"], 255)),
    "no codes": lambda path: save_file({"x": torch.zeros(1)}, path, {"format": "semantic-ids-1"}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / "semantic_ids.safetensors"
    make().save(path)
    DAMAGE[kind](path)
    with pytest.raises(ValueError, match="Run train_rqvae.py again") as raised:
        SemanticIds.load(tmp_path)
    assert str(path) in str(raised.value)


def test_another_corpus_is_refused_by_both_names():
    semantic_ids = make()
    semantic_ids.check_corpus("tiny, under another name", "0123abcd")
    with pytest.raises(ValueError) as raised:
        semantic_ids.check_corpus("other", "ffff0000")
    for part in ("tiny", "0123abcd", "other", "ffff0000", "train_rqvae.py"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"item_keys": ["a"]},
        {"level_sizes": (3, 3)},
        {"level_sizes": (3, 3, 2)},
        {"level_sizes": (2, 3, 3)},
        {"codes": torch.full((5, 3), -1)},
    ],
)
def test_parts_that_contradict_each_other_are_refused(changed):
    with pytest.raises(ValueError, match="shape|outside its level"):
        make(**changed)


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.sampled_from([0, 1, 5, 2**30, 2**31 - 1])] * 3), max_size=30), st.booleans())
def test_lexicographic_order_is_that_of_sorted_tuples(rows, wide):
    """Codes that fit in one key together, and codes that don't."""
    if not wide:
        rows = [tuple(min(code, 6) for code in row) for row in rows]
    expected = sorted(range(len(rows)), key=lambda n: rows[n])
    assert lexicographic_order(torch.tensor(rows, dtype=torch.int64).view(-1, 3)).tolist() == expected


def with_features(folder, n_items: int = 5) -> tuple[SemanticIds, np.ndarray]:
    """IDs in a tokenizer folder of a run, with features beside them."""
    values = np.arange(n_items * 3, dtype=np.float16).reshape(n_items, 3)
    semantic_ids = make(tokenizer={"item_features": features_digest(values)})
    semantic_ids.save(folder / "tokenizer" / "semantic_ids.safetensors")
    np.save(folder / "tokenizer" / "features.npy", values)
    return semantic_ids, values


@pytest.mark.parametrize("place", ["", "tokenizer", "tokenizer/semantic_ids.safetensors"])
def test_features_are_mapped_from_beside_the_ids(tmp_path, place):
    semantic_ids, expected = with_features(tmp_path)
    values = load_item_features(tmp_path / place, None, SemanticIds.load(tmp_path / place))
    assert isinstance(values, np.memmap) and values.dtype == np.float16
    np.testing.assert_array_equal(values, expected)
    values[:] = 0
    np.testing.assert_array_equal(load_item_features(tmp_path / place, None, semantic_ids), expected)
    assert load_item_features(tmp_path / place, None, make()) is None, "as IDs that were written without them"


def test_features_that_do_not_belong_to_the_ids_are_refused(tmp_path):
    semantic_ids, values = with_features(tmp_path)
    file = tmp_path / "tokenizer" / "features.npy"
    for other in (values[:4], values + 1, values[:, :2], values.astype(np.float32)):
        np.save(file, other)
        with pytest.raises(ValueError, match=f"features of {len(other)} items .*'{tmp_path}'.* of 5 items") as raised:
            load_item_features(tmp_path, None, semantic_ids)
        assert features_digest(values) in str(raised.value) and features_digest(other) in str(raised.value)
    for damaged in (b"", file.read_bytes()[:-1], b"no array, but longer than a header"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="features.npy can't be read"):
            load_item_features(tmp_path, None, semantic_ids)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="features.npy is missing"):
        load_item_features(tmp_path, None, semantic_ids)


@pytest.mark.parametrize("n", [5, 3000])
def test_the_digest_tells_features_apart(n):
    values = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float16)
    others = [values * 2, values[:-1], values[::-1], values[:, ::-1], values.reshape(-1, 2), values.astype("f4")]
    assert len({features_digest(some) for some in (values, *others)}) == 7
    assert features_digest(np.asfortranarray(values)) == features_digest(values)
