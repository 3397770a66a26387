"""The statistics in docs/datasets.md are those of the real files."""

from pathlib import Path

import pytest

from data.processed import RecDataset, load_corpus
from tests.data.real import REAL, needs_real

DOCUMENT = Path(__file__).parents[2] / "docs" / "datasets.md"


@pytest.mark.parametrize(
    ("title", "dataset", "split", "source"),
    [
        pytest.param("Amazon Beauty", RecDataset.AMAZON, "beauty", "amazon/raw", marks=needs_real("amazon")),
        pytest.param("Amazon Toys", RecDataset.AMAZON, "toys", "amazon/raw", marks=needs_real("amazon")),
        pytest.param("MovieLens 1M", RecDataset.ML_1M, "", "ml-1m", marks=needs_real("ml-1m")),
        ("MovieLens latest-small", RecDataset.SAMPLE, "", ""),
    ],
)
def test_the_table(tmp_path, title, dataset, split, source):
    if source:
        (tmp_path / "raw").symlink_to(REAL / source)
    corpus = load_corpus(dataset, str(tmp_path), split)
    lengths = corpus.interactions.offsets.diff()
    rows = [
        line.strip("| ").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {title} |")
    ]
    assert rows == [
        [
            title,
            f"{corpus.n_users:,}",
            f"{corpus.n_items:,}",
            f"{len(corpus.interactions.items.unique()):,}",
            f"{len(corpus.interactions):,}",
            f"{lengths.min():,}",
            f"{lengths.median():,}",
            f"{lengths.double().mean():.1f}",
            f"{lengths.max():,}",
        ]
    ]
