import re

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from data.corpus import TEXTS, Corpus
from data.items import look_up, vector_table
from data.vectors import Vectors
from tests.data.test_features import compute, make

VALUES = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
KEYS = [f"key{n}" for n in range(7)]


def write(path, values=VALUES, keys=KEYS, column="embedding") -> str:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".safetensors":
        save_file({column: torch.from_numpy(np.asarray(values)), "other": torch.zeros(1)}, path)
    else:
        pl.DataFrame({"item": keys, column: [np.asarray(row).tolist() for row in values]}).write_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_the_vectors_of_every_kind_of_file_come_as_they_are(tmp_path, suffix):
    path = write(tmp_path / f"v{suffix}")
    features = compute(make(), [Vectors(path)], tmp_path)
    np.testing.assert_array_equal(features.values, VALUES)
    write(tmp_path / f"v{suffix}", VALUES + 1)
    np.testing.assert_array_equal(compute(make(), [Vectors(path)], tmp_path).values, VALUES + 1)


def test_half_precision_and_fixed_width_lists(tmp_path):
    halves = VALUES.astype(np.float16)
    for suffix in (".npy", ".safetensors"):
        path = write(tmp_path / f"v{suffix}", halves)
        np.testing.assert_array_equal(compute(make(), [Vectors(path)], tmp_path).values, halves.astype(np.float32))
    fixed = pl.DataFrame({"item": KEYS, "embedding": VALUES}, {"item": pl.String, "embedding": pl.Array(pl.Float32, 3)})
    fixed.write_parquet(tmp_path / "v.parquet")
    np.testing.assert_array_equal(compute(make(), [Vectors(str(tmp_path / "v.parquet"))], tmp_path).values, VALUES)


def test_a_parquet_file_is_matched_by_id_and_may_hold_more(tmp_path):
    order = [3, 0, 6, 1, 5, 4, 2]
    path = write(tmp_path / "v.parquet", [VALUES[n] for n in order] + [[9, 9, 9]], [KEYS[n] for n in order] + ["more"])
    np.testing.assert_array_equal(compute(make(), [Vectors(path)], tmp_path).values, VALUES)


def test_texts_and_categories_that_no_source_asks_for_are_not_read(tmp_path):
    make().save(tmp_path / "tiny")
    (tmp_path / "tiny" / TEXTS).write_bytes(b"damaged")
    corpus = Corpus.load(tmp_path / "tiny")
    np.testing.assert_array_equal(
        compute(corpus, [Vectors(write(tmp_path / "v.npy"))], tmp_path / "data").values, VALUES
    )
    assert corpus.columns(["key"]) == {"key": [[key] for key in KEYS]}
    for unread in (corpus.texts, corpus.categories):
        with pytest.raises(ValueError, match="can't be used"):
            unread()


def test_a_table_is_its_own_only_for_the_same_keys_in_order():
    table = vector_table(["ab", "c", "é"], VALUES[:3])
    for keys, rows in ((["ab", "c", "é"], [0, 1, 2]), (["a", "bc", "é"], [-1, -1, 2]), (["c", "ab", "é"], [1, 0, 2])):
        values, known = look_up(table, keys)
        assert known.tolist() == [row >= 0 for row in rows]
        np.testing.assert_array_equal(values, [VALUES[row] if row >= 0 else np.zeros(3) for row in rows])


BAD = [
    ("v.npy", {"values": VALUES[:6]}, "holds [6, 3], corpus 'tiny' needs [7, D]"),
    ("v.npy", {"values": VALUES[0]}, "holds [3]"),
    ("v.npy", {"values": [["a"]] * 7}, "holds <U1; vectors are of real numbers"),
    ("v.npy", {"values": [[1j]] * 7}, "holds complex128; vectors are of real numbers"),
    ("v.npy", {"values": [[1.0]] * 6 + [[np.inf]]}, "the vector of item 'key6' is not finite"),
    ("v.npy", {"values": [[1.0]] * 6 + [[1e300]]}, "the vector of item 'key6' is not finite, or beyond float32"),
    ("v.npy", {"values": np.zeros((7, 0))}, "holds [7, 0], corpus 'tiny' needs [7, D]"),
    ("v.parquet", {"keys": [[key] for key in KEYS]}, "'item' must hold ids, not List(String)"),
    ("v.parquet", {"keys": [*KEYS[:6], None]}, "row 7: 'item' is empty"),
    ("v.parquet", {"values": ["a"] * 7}, "'embedding' must hold lists of numbers, not String"),
    ("v.safetensors", {"column": "x"}, "has no tensor 'embedding'; it has other, x"),
    ("v.parquet", {"values": VALUES[:5], "keys": KEYS[:5]}, "has no vector of item 'key5', and of 2 items in all"),
    ("v.parquet", {"keys": KEYS[:6] + ["key0"]}, "item 'key0' has several vectors"),
    ("v.parquet", {"values": [*VALUES[:6], [1.0]]}, "the vectors have 1 to 3 numbers"),
    ("v.parquet", {"column": "x"}, "has no column 'embedding'; its columns are item, x"),
]


@pytest.mark.parametrize(("file", "contents", "message"), BAD)
def test_files_that_do_not_fit_are_named(tmp_path, file, contents, message):
    path = write(tmp_path / file, **contents)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        compute(make(), [Vectors(path)], tmp_path)
    assert path in str(raised.value)


@pytest.mark.parametrize("file", ["v.npy", "v.safetensors", "v.parquet", "v.pt"])
def test_damaged_missing_and_other_files_are_named(tmp_path, file):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        compute(make(), [Vectors(str(tmp_path / file))], tmp_path)
    (tmp_path / file).write_bytes(b"half of")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / file))):
        compute(make(), [Vectors(str(tmp_path / file))], tmp_path)
