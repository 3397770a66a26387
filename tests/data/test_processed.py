import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gin
import pytest
import torch

from data.corpus import Corpus
from data.processed import RecDataset, load_corpus

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set folder with two users and three items as Amazon Beauty."""
    raw = tmp_path / "raw" / "beauty"
    raw.mkdir(parents=True)
    (raw / "sequential_data.txt").write_text("1 1 2 3\n2 3 1\n")
    maps = {"user2id": {"u": "1", "v": "2"}, "item2id": {"a": "1", "b": "2", "c": "3"}}
    (raw / "datamaps.json").write_text(json.dumps(maps))
    (raw / "meta.json.gz").write_bytes(gzip.compress(b"{'asin': 'b', 'title': 'Blue'}\n"))
    return tmp_path


def load(folder: Path, **kwargs) -> Corpus:
    return load_corpus(RecDataset.AMAZON, str(folder), "beauty", **kwargs)


def test_the_enum_is_a_gin_constant():
    @gin.configurable
    def takes_dataset(dataset=gin.REQUIRED):
        return dataset

    with gin.unlock_config():
        gin.parse_config("takes_dataset.dataset = %data.processed.RecDataset.AMAZON")
    assert takes_dataset() is RecDataset.AMAZON
    gin.clear_config()


def test_the_second_time_comes_from_the_cache(folder, capsys, monkeypatch):
    built = load(folder)
    monkeypatch.setattr("data.amazon.read_amazon", None)  # would fail if it were called
    cached = load(folder)
    assert (cached.name, cached.hash, cached.texts()) == (built.name, built.hash, built.texts())
    assert built.name == "amazon_beauty" and (folder / "processed/amazon_beauty/corpus.json").exists()
    assert capsys.readouterr().out == ""


def test_a_cache_without_raw_files_is_used(folder):
    built = load(folder)
    shutil.rmtree(folder / "raw")
    assert load(folder).hash == built.hash


def test_changed_raw_files_are_read_anew_and_it_is_said(folder, capsys):
    built = load(folder)
    (folder / "raw/beauty/sequential_data.txt").write_text("1 1 2 3\n2 3 2\n")  # as many bytes as before
    changed = load(folder)
    assert changed.hash != built.hash and changed.interactions.items.tolist() == [0, 1, 2, 2, 1]
    assert "sequential_data.txt" in capsys.readouterr().out
    assert load(folder).hash == changed.hash
    assert capsys.readouterr().out == ""


def test_another_time_alone_is_no_change(folder, capsys):
    load(folder)
    for path in (folder / "raw/beauty").iterdir():
        os.utime(path, (time.time() + 100, time.time() + 100))
    load(folder)
    assert capsys.readouterr().out == ""


def test_force_reads_the_raw_files_and_replaces_the_folder(folder):
    built = load(folder)
    cache = folder / "processed/amazon_beauty"
    (cache / "corpus.json").write_text("damaged")
    (cache / "stale").touch()
    with pytest.raises(ValueError, match="train.force_dataset_process=True"):
        load(folder)
    assert load(folder, force_process=True).hash == built.hash == load(folder).hash
    assert not (cache / "stale").exists()
    assert os.listdir(folder / "processed") == ["amazon_beauty"]


@pytest.mark.parametrize(
    ("dataset", "split", "allowed"),
    [
        (RecDataset.AMAZON, "", "'beauty' or 'sports' or 'toys'"),
        (RecDataset.AMAZON, "Beauty", "'beauty' or 'sports' or 'toys'"),
        (RecDataset.SAMPLE, "beauty", "must be ''"),
        (RecDataset.ML_1M, "small", "must be ''"),
        (RecDataset.CUSTOM, "beauty", "must be ''"),
    ],
)
def test_an_unknown_split_is_refused(tmp_path, dataset, split, allowed):
    with pytest.raises(ValueError, match=allowed) as raised:
        load_corpus(dataset, str(tmp_path), split)
    assert repr(split) in str(raised.value)


@pytest.mark.parametrize("file", ["sequential_data.txt", "datamaps.json", "meta.json.gz"])
def test_a_missing_raw_file_is_named_with_its_layout(folder, file):
    (folder / "raw/beauty" / file).unlink()
    reviews = ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz")
    gin.parse_config(f"Downloads.mirrors = { {name: ['http://no.invalid/'] for name in ('P5_data.zip', *reviews)} }")
    try:
        with pytest.raises(FileNotFoundError) as raised:
            load(folder)
    finally:
        gin.clear_config()
    assert str(folder / "raw/beauty" / file) in str(raised.value)
    for name in ("sequential_data.txt", "datamaps.json", "meta.json.gz"):
        assert name in str(raised.value)
    assert not (folder / "processed").exists()


def test_a_cached_corpus_needs_neither_polars_nor_raw_files(folder):
    built = load(folder)
    shutil.rmtree(folder / "raw")
    code = f"""
import sys
for module in ("polars", "sklearn", "sentence_transformers", "pandas", "pyarrow"):
    sys.modules[module] = None  # importing it raises ImportError
from data.processed import RecDataset, load_corpus
corpus = load_corpus(RecDataset.AMAZON, {str(folder)!r}, "beauty")
print(corpus.hash, corpus.texts()[0], corpus.categories()[0])
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert output.stdout.strip() == f"{built.hash} {built.texts()[0]} {built.categories()[0]}", output.stderr


def test_the_sample_loads_from_the_repository(tmp_path):
    built = load_corpus(RecDataset.SAMPLE, str(tmp_path))
    cached = load_corpus(RecDataset.SAMPLE, str(tmp_path))
    assert (tmp_path / "processed/sample").is_dir() and built.name == "sample"
    assert torch.equal(built.interactions.timestamps, cached.interactions.timestamps)
    assert built.hash == cached.hash
