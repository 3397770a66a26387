import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from common.schemas import Interactions
from data.corpus import Corpus
from data.encoders import TfidfSvd
from data.features import FeatureSource, ItemFeatures, item_features
from data.items import Items
from data.processed import RecDataset, load_corpus

REPOSITORY = Path(__file__).parents[2]
TEXTS = [
    "red ball game",
    "red red ball",
    "blue ball",
    "blue game of chess",
    "chess game",
    "red chess",
    "unique",
]


def make(texts: list[str] = TEXTS, categories: list[list[str]] | None = None, name: str = "tiny") -> Corpus:
    interactions = Interactions(torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1]))
    keys = [f"key{n}" for n in range(len(texts))]
    return Corpus.build(name, interactions, keys, ["u"], texts, categories or [[] for _ in texts])


def compute(corpus: Corpus, sources: list[FeatureSource], folder: Path, **options) -> ItemFeatures:
    train_lengths = corpus.interactions.offsets.diff()
    return item_features(corpus, sources, str(folder), train_lengths, **options)


@dataclass
class Lengths:
    """A source that counts its calls."""

    from_interactions = False
    identity: str = "lengths"
    output: np.ndarray | None = None
    calls: list[list[str]] = field(default_factory=list)

    def content(self, corpus: Corpus, train_lengths: torch.Tensor) -> str:
        return corpus.text_hash

    def fit(self, corpus: Corpus, train_lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor(corpus.n_items)}

    def transform(self, state: dict[str, torch.Tensor], items: Items) -> np.ndarray:
        self.calls.append(items.texts)
        if self.output is not None:
            return self.output
        return np.array([[len(text), text.count(" ")] for text in items.texts], dtype=np.float32)


def test_features_are_encoded_once_and_memory_mapped(tmp_path):
    encoder = Lengths()
    first = compute(make(), [encoder], tmp_path)
    second = compute(make(), [encoder], tmp_path)
    assert encoder.calls == [TEXTS]
    assert isinstance(second.values, np.memmap) and second.values.dtype == np.float32
    assert (second.fitted.n_cat_features, second.fitted.identity) == (0, "lengths")
    np.testing.assert_array_equal(first.values, [[len(text), text.count(" ")] for text in TEXTS])
    np.testing.assert_array_equal(second.values, first.values)
    compute(make(), [encoder], tmp_path, force=True)
    assert len(encoder.calls) == 2
    files = sorted(path.name for path in (tmp_path / "features/tiny").iterdir())
    assert re.fullmatch(r"lengths-([0-9a-f]{16})\.npy lengths-\1\.safetensors", " ".join(files))
    (tmp_path / "features/tiny" / files[1]).unlink()
    assert compute(make(), [encoder], tmp_path).fitted.states[0]["rows"] == 7 and len(encoder.calls) == 3


def test_a_corpus_that_is_built_again_keeps_its_features(tmp_path):
    encoder = Lengths()
    for _ in range(2):
        corpus = make()
        corpus.save(tmp_path / "processed/tiny")
        compute(corpus, [encoder], tmp_path)
    assert len(encoder.calls) == 1


def test_torch_takes_the_values_and_the_file_stays_as_it_is(tmp_path, recwarn):
    values = compute(make(), [Lengths()], tmp_path).values
    tensor = torch.from_numpy(values)
    tensor.zero_()
    assert not recwarn.list
    assert compute(make(), [Lengths()], tmp_path).values[0, 0] == len(TEXTS[0])


def test_other_texts_or_another_encoder_are_not_served_the_old_features(tmp_path):
    compute(make(), [Lengths()], tmp_path)
    other = compute(make(["longer " + text for text in TEXTS]), [Lengths()], tmp_path)
    assert other.values[0, 0] == len(TEXTS[0]) + 7
    encoder = Lengths("Lengths of/another kind")
    compute(make(), [encoder], tmp_path)
    assert len(encoder.calls) == 1
    names = sorted(path.name for path in (tmp_path / "features/tiny").iterdir())
    assert len(names) == 6 and names[-1].startswith("lengths-of-another-kind-")


@dataclass
class Lookup:
    """A source that records what it is called with."""

    identity: str
    output: np.ndarray
    from_interactions: bool = False
    calls: list[tuple[Corpus, torch.Tensor]] = field(default_factory=list)

    def content(self, corpus: Corpus, train_lengths: torch.Tensor) -> str:
        return f"{corpus.hash} {train_lengths.tolist()}"

    def fit(self, corpus: Corpus, train_lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls.append((corpus, train_lengths))
        return {}

    def transform(self, state: dict[str, torch.Tensor], items: Items) -> np.ndarray:
        return self.output


def test_a_source_gets_the_corpus_and_the_training_lengths(tmp_path):
    corpus, source = make(), Lookup("lookup", np.ones((7, 2)))
    for lengths in ([1], [1], [0]):  # other lengths are other content: computed anew
        item_features(corpus, [source], str(tmp_path), torch.tensor(lengths))
    assert [(called is corpus, lengths.tolist()) for called, lengths in source.calls] == [(True, [1]), (True, [0])]


def test_several_sources_stand_side_by_side_with_equal_total_variance(tmp_path):
    generator = np.random.default_rng(0)
    loud, quiet = 100 * generator.normal(size=(7, 3)) + 5, 0.01 * generator.normal(size=(7, 2))
    constant = np.full((7, 1), 3)
    sources = [Lookup("loud", loud), Lookup("quiet", quiet, True), Lookup("constant", constant)]
    groups = [["b", "a"], [], ["c"], ["a"], ["b", "b"], ["Z"], []]
    built = compute(make(categories=groups), sources, tmp_path, categories=True)
    assert built.fitted.identity == "loud + quiet + constant + 4 categories" and built.fitted.n_cat_features == 4
    assert built.values.shape == (7, 3 + 2 + 1 + 4) and np.isfinite(built.values).all()
    for block, source in ((built.values[:, :3], loud), (built.values[:, 3:5], quiet)):
        assert np.trace(np.cov(block.T, bias=True)) == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(block / block[0, 0], source / source[0, 0], rtol=1e-4)  # one number for all
    assert np.ptp(built.values[:, 5]) == 0
    assert built.fitted.from_interactions.tolist() == 3 * [False] + 2 * [True] + 5 * [False]
    assert set(np.unique(built.values[:, 6:])) == {0, 1}, "categories are not scaled"
    np.testing.assert_array_equal(compute(make(), sources[:1], tmp_path).values, loud.astype(np.float32))


def test_no_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train.features is empty"):
        compute(make(), [], tmp_path)


def test_categories_are_trailing_columns_sorted_by_name(tmp_path):
    groups = [["b", "a"], [], ["c"], ["a"], ["b", "b"], ["Z"], []]
    for _ in range(2):
        features = compute(make(categories=groups), [Lengths()], tmp_path, categories=True)
        assert features.values.shape == (7, 2 + 4) and features.values.dtype == np.float32
        assert features.fitted.n_cat_features == 4
        expected = [[name in group for name in ("Z", "a", "b", "c")] for group in groups]
        np.testing.assert_array_equal(features.values[:, 2:], expected)
        np.testing.assert_array_equal(features.values[:, 0], [len(text) for text in TEXTS])
    changed = make(categories=[["b"], *groups[1:]])
    assert compute(changed, [Lengths()], tmp_path, categories=True).values[0, 3] == 0
    plain = compute(changed, [Lengths()], tmp_path)
    assert plain.fitted.identity != features.fitted.identity and plain.values.shape == (7, 2)


def test_no_categories_are_no_columns(tmp_path):
    features = compute(make(), [Lengths()], tmp_path, categories=True)
    assert features.fitted.n_cat_features == 0 and features.values.shape == (7, 2)


def test_too_many_categories_are_refused(tmp_path):
    groups = [[f"c{n}" for n in range(513)], *([[]] * 6)]
    with pytest.raises(ValueError, match="tiny has 513 categories.*512"):
        compute(make(categories=groups), [Lengths()], tmp_path, categories=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_item(tmp_path, value):
    output = np.zeros((7, 2), dtype=np.float32)
    output[[5, 3], 1] = value
    with pytest.raises(ValueError, match=r"lengths: item 3 \('key3'\)"):
        compute(make(), [Lengths(output=output)], tmp_path)
    assert not (tmp_path / "features/tiny").exists()


@pytest.mark.parametrize("shape", [(6, 2), (7,), (7, 2, 1)])
def test_outputs_of_another_shape_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=re.escape(f"lengths returned {shape} for 7 items")):
        compute(make(), [Lengths(output=np.zeros(shape))], tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, small_disk):
    with small_disk(130), pytest.raises(OSError, match="File too large: '.*.npy'"):
        compute(make(), [Lengths()], tmp_path)
    assert not list((tmp_path / "features/tiny").iterdir())


@pytest.mark.parametrize("content", [b"", b"half", "cut", "other rows", "other dtype"])
def test_a_damaged_cached_file_is_named(tmp_path, content):
    compute(make(), [Lengths()], tmp_path)
    (path,) = (tmp_path / "features/tiny").glob("*.npy")
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif content in ("other rows", "other dtype"):
        np.save(path, np.zeros((6, 2), np.float32) if content == "other rows" else np.zeros((7, 2)))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="delete it") as raised:
        compute(make(), [Lengths()], tmp_path)
    assert str(path) in str(raised.value)
    path.unlink()
    (state,) = (tmp_path / "features/tiny").glob("*.safetensors")
    compute(make(), [Lengths()], tmp_path)
    state.write_bytes(b"half")
    with pytest.raises(ValueError, match=f"{state} can't be read .*delete it"):
        compute(make(), [Lengths()], tmp_path)


def test_cached_features_need_no_library_that_made_them(tmp_path):
    corpus = load_corpus(RecDataset.SAMPLE, str(tmp_path))
    built = compute(corpus, [TfidfSvd(dim=4, ngrams=1, min_df=50)], tmp_path, categories=True)
    assert built.values.shape == (9742, 4 + 19) and built.fitted.n_cat_features == 19
    code = f"""
import sys
for module in ("polars", "sklearn", "scipy", "sentence_transformers", "transformers"):
    sys.modules[module] = None  # importing it raises ImportError
from data.encoders import TfidfSvd
from data.features import item_features
from data.processed import RecDataset, load_corpus
corpus = load_corpus(RecDataset.SAMPLE, {str(tmp_path)!r})
encoder = TfidfSvd(dim=4, ngrams=1, min_df=50)
lengths = corpus.interactions.offsets.diff()
print(item_features(corpus, [encoder], {str(tmp_path)!r}, lengths, categories=True).values.sum(dtype="float64"))
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    assert float(output.stdout) == pytest.approx(built.values.sum(dtype="float64"))


TWO_RUNS = """
import sys
import numpy as np
from tests.data.test_features import Lengths, compute, make
from training.cli import show_log

show_log()

class Slow(Lengths):
    chunk_items = 2

    def encode(self, texts):
        if not self.calls:
            print("encoding", flush=True)
            sys.stdin.readline()
        self.calls.append(texts)
        return np.ones((len(texts), 2), np.float32)

source = Slow()
compute(make(), [source], sys.argv[1])
print(len(source.calls), flush=True)
"""


def test_two_runs_that_need_the_same_features_encode_them_once(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": REPOSITORY, "text": True}
    command = [sys.executable, "-c", TWO_RUNS, str(tmp_path)]
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as two:
        said = {process.stdout.readline(): process for process in (one, two)}
        one, [(line, two)] = said.pop("encoding\n"), said.items()
        assert f"features: waiting for process {one.pid} on" in line
        outputs = [one.communicate("\n")[0], two.communicate()[0]]
    assert [output.splitlines()[-1] for output in outputs] == ["4", "0"]  # chunks of 2 texts
