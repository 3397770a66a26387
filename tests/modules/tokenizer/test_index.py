"""IDs as index.json: read by key or by number, made unique, written and read back, and refused where they don't fit."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.schemas import Interactions
from data.corpus import Corpus
from data.encoders import TfidfSvd
from data.features import ItemFeatures
from data.sources import FittedSources
from modules.tokenizer.catalogue import load_or_make_ids
from modules.tokenizer.index import main, read_index
from modules.tokenizer.semids import SemanticIds, features_digest
from tests.pipeline import run, write_raw

CPU = torch.device("cpu")
KEYS = ["x", "2", "0", "ключ"]
ROWS = [(183, 70, 5), (0, 1, 2), (183, 70, 5), (9, 0, 300)]


def corpus(keys: list[str] = KEYS) -> Corpus:
    one = Interactions(torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1]))
    return Corpus.build("tiny", one, keys, ["u"], keys, [[]] * len(keys))


def write(folder: Path, index: object) -> Path:
    path = folder / "tiny.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    return path


def tokens(row: tuple[int, ...] = (1, 2, 3)) -> list[str]:
    return [f"<{letter}_{code}>" for letter, code in zip("abc", row, strict=True)]


INDEX = dict(zip(KEYS, map(tokens, ROWS), strict=True))


@pytest.mark.parametrize("names", [KEYS, ["0", "1", "2", "3"]])
def test_items_are_named_by_key_or_by_their_number_and_equal_ones_are_told_apart(tmp_path, names):
    pairs = list(zip(names, map(tokens, ROWS), strict=True))
    ids = read_index(write(tmp_path, dict(pairs[::-1])), corpus())
    assert ids.codes.tolist() == [[183, 70, 5, 0], [0, 1, 2, 0], [183, 70, 5, 1], [9, 0, 300, 0]]
    assert ids.level_sizes == (184, 71, 301, 2)
    ids.check_corpus("tiny", corpus().hash)


def test_keys_that_are_the_numbers_in_another_order_are_keys(tmp_path):
    keys = ["3", "1", "0", "2"]
    ids = read_index(write(tmp_path, {str(n): tokens((n, 0, 0)) for n in range(4)}), corpus(keys))
    assert ids.codes[:, 0].tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize("flags", [[], ["--numbers"]])
def test_the_command_writes_what_is_read_back(tmp_path, monkeypatch, capsys, flags):
    codes, item_keys = torch.tensor([(0, 1), (2, 1), (0, 1), (2, 2)]), corpus().item_keys
    SemanticIds.from_codes(codes, 3, item_keys, "tiny", corpus().hash, {}).save(tmp_path / "semantic_ids.safetensors")
    monkeypatch.setattr(sys, "argv", ["index", str(tmp_path), str(tmp_path / "out.json"), *flags])
    main()
    assert "4 items, levels (3, 3, 2)" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == (["0", "1", "2", "3"] if flags else KEYS)
    assert [*written.values()][2] == ["<a_0>", "<b_1>", "<c_1>"]
    read = read_index(tmp_path / "out.json", corpus())
    assert read.codes.tolist() == [[0, 1, 0], [2, 1, 0], [0, 1, 1], [2, 2, 0]] and read.level_sizes == (3, 3, 2)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({name: INDEX[name] for name in KEYS[:3]}, "has 3 items, corpus 'tiny' 4; 1 are in one of them only, such as "
                                                   "'ключ' in the corpus. The names must be the item keys"),
        (INDEX | {"y": tokens()}, "has 5 items, corpus 'tiny' 4; 1 are in one of them only, such as 'y' in the file"),
        ({str(n + 1): tokens() for n in range(4)}, "such as '0' in the corpus. The names must be the item keys, such "
                                                   "as 'x', or 0 to 3 in the order of the corpus"),
        (INDEX | {"2": ["<a_1>", "<b_x>", "<c_1>"]}, """item '2' has ["<a_1>", "<b_x>", "<c_1>"], not ["<a_183>", """),
        (INDEX | {"2": ["<a_1>", "<c_1>", "<b_1>"]}, "item '2' has "),
        (INDEX | {"2": ["<a_1>", "<b_-1>", "<c_1>"]}, "item '2' has "),
        (INDEX | {"2": [1, 2, 3]}, "item '2' has [1, 2, 3], not "),
        (INDEX | {"2": []}, "item '2' has [], not "),
        (INDEX | {"2": "<a_1>"}, "item '2' has \"<a_1>\", not "),
        (INDEX | {"2": tokens()[:2]}, "item '2' has 2 tokens, item 'x' has 3"),
        ([tokens()], "must hold an object of tokens by item"),
        ('{"0": ', "can't be read as JSON: "),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(tmp_path, index, message):
    path = write(tmp_path, index)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_index(path, corpus())
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no file '{path}': correct train.pretrained_rqvae_path"):
        read_index(path, corpus())


def test_there_is_no_tokenizer_behind_it(tmp_path):
    path = write(tmp_path, INDEX)
    for options in ({"revision": "main"}, {"revision": None, "encode": True}):
        with pytest.raises(ValueError, match="is a file of IDs: unset train.encode_catalogue"):
            load_or_make_ids(path, corpus=corpus(), features=None, device=CPU, **options)


@pytest.mark.parametrize("from_interactions", [(False, False, True), (True, True, True)])
def test_features_beside_it_are_standardized_as_a_tokenizer_does(tmp_path, monkeypatch, from_interactions):
    values = np.random.default_rng(0).normal(3, 5, (4, 3)).astype(np.float32)
    fitted = FittedSources([TfidfSvd(3)], [{}], [1.0], [3], ["words"], "tiny", "a split")
    monkeypatch.setattr(FittedSources, "from_interactions", np.array(from_interactions))
    ids, seen = load_or_make_ids(write(tmp_path, INDEX), None, corpus(), lambda: ItemFeatures(values, fitted), CPU)
    assert torch.equal(ids.codes, read_index(tmp_path / "tiny.index.json", corpus()).codes)
    if all(from_interactions):
        assert seen is None and "item_features" not in ids.tokenizer
        return
    centred = values.astype(np.float64) - values.mean(0, dtype=np.float64)
    np.testing.assert_allclose(seen, (centred / np.sqrt((centred**2).mean()))[:, :2], rtol=2**-10, atol=1e-5)
    assert ids.tokenizer["item_features"] == features_digest(seen) and seen.dtype == np.float16


def test_the_retriever_trains_on_it(tmp_path):
    write_raw(tmp_path)
    index = {str(n): [f"<a_{n % 6}>", f"<b_{n // 12}>"] for n in range(30)}
    path = f'train.pretrained_rqvae_path = "{write(tmp_path, index)}"'
    parts = [f'EncoderDecoderRetrievalModel.{name}_parts = ("free", "codes")' for name in ("item", "node")]
    metrics = run(tmp_path, "decoder", path, *parts, "train.iterations = 100")
    assert metrics["test/recall@10"] > 0.5
    kept = SemanticIds.load(tmp_path / "out" / "decoder" / "pipeline" / "semantic_ids.safetensors")
    assert kept.level_sizes == (6, 3, 2) and kept.item_keys[7] == "item07"
