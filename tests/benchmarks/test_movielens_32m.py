"""Drawn MovieLens data: both forms against each other, and the oracle against what it expects."""

import sys

import numpy as np
import pytest

from benchmarks.movielens_32m import LEAST, MOST, corpus, draw_data, main, write_files
from data.ml32m import read_movielens


@pytest.fixture(scope="module")
def data():
    return draw_data(0.01)


def test_the_files_are_read_as_the_corpus_that_is_written_without_them(data, tmp_path):
    write_files(data, tmp_path / "raw")
    read, made = read_movielens(tmp_path / "raw", "ml32m"), corpus(data)
    assert read.hash == made.hash and read.text_hash == made.text_hash
    ratings = np.loadtxt(tmp_path / "raw/ratings.csv", delimiter=",", skiprows=1)
    assert len(ratings) == 320_002 and (np.diff(ratings[:, 0]) >= 0).all()
    assert ((0.5 <= ratings[:, 2]) & (ratings[:, 2] <= 5)).all()


def test_sizes_and_no_movie_twice(data):
    assert (len(data.counts), len(data.titles), len(data.items), len(data.tags)) == (2009, 876, 320_002, 20_001)
    assert data.counts.min() >= LEAST and data.counts.max() <= MOST * 876
    users = np.repeat(np.arange(2009), data.counts)
    assert len(np.unique(users * 876 + data.items)) == len(data.items)
    assert (np.diff(data.times)[np.diff(users) == 0] > 0).all()


def test_the_oracle_gets_what_it_expects_and_the_baselines_get_less(data):
    recall = data.recall
    deviation = np.sqrt(0.25 / 2009)
    assert abs(recall["oracle"] - recall["oracle, expected"]) < 3 * deviation
    assert recall["MostPopular"] < recall["Transition"] / 2 < recall["Transition"] < recall["oracle"] / 1.5


def test_a_seed_draws_the_same_and_another_one_other_data(data):
    assert corpus(draw_data(0.01)).hash == corpus(data).hash != corpus(draw_data(0.01, seed=1)).hash


@pytest.mark.parametrize(("arguments", "message"), [(["--scale", ".001"], "--scale must be .01 to 1"), ([], "exists")])
def test_bad_arguments_are_named(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "raw").mkdir()
    monkeypatch.setattr(sys, "argv", ["movielens_32m", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=message):
        main()
