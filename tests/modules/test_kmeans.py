"""k-means against scikit-learn, and its seeding against the probabilities of the paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from modules import kmeans as module
from modules.kmeans import kmeans, plus_plus, squared_distances


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(n_blobs: int, spread: float, n_rows: int = 400, dim: int = 5) -> Tensor:
    generator = seeded(n_blobs)
    centres = 10 * torch.randn(n_blobs, dim, generator=generator)
    rows = centres[torch.arange(n_rows) % n_blobs]
    return rows + spread * torch.randn(n_rows, dim, generator=generator)


def grouped(x: Tensor, centroids: Tensor) -> tuple[Tensor, float]:
    """The nearest centroid of each row, and the sum of the squared distances to it."""
    squares, groups = (x.double()[:, None] - centroids.double()).square().sum(-1).min(1)
    return groups, float(squares.sum())


@pytest.mark.parametrize(("n_blobs", "spread", "k"), [(6, 0.5, 6), (4, 0.5, 12), (1, 1.0, 16)])
def test_inertia_is_near_that_of_sklearn(n_blobs, spread, k):
    x = blobs(n_blobs, spread)
    best = SklearnKMeans(k, n_init=5, random_state=0).fit(x.numpy()).inertia_
    inertia = min(grouped(x, kmeans(x, k, seeded(seed)))[1] for seed in range(5))
    assert inertia == pytest.approx(best, rel=0.05)


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(0, 1000), st.data())
def test_more_iterations_never_bring_rows_farther_from_their_centroids(n, seed, data):
    k = data.draw(st.integers(1, n))
    x = torch.randn(n, 3, generator=seeded(seed))
    found = [kmeans(x, k, seeded(seed), iterations) for iterations in (0, 1, 3)]
    assert all(centroids.shape == (k, 3) for centroids in found)
    inertias = [grouped(x, centroids)[1] for centroids in found]
    assert inertias[0] + 1e-4 >= inertias[1] >= inertias[2] - 1e-4


def test_converged_centroids_are_the_means_of_their_groups():
    x = blobs(6, 0.5)
    centroids = kmeans(x, 6, seeded(0))
    groups, _ = grouped(x, centroids)
    for group, centroid in enumerate(centroids):
        torch.testing.assert_close(centroid, x[groups == group].mean(0), atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_squared_distances_are_those_of_differences(n, k, seed):
    x, centroids = (torch.randn(rows, 4, generator=seeded(seed + rows)) for rows in (n, k))
    expected = (x[:, None].double() - centroids[None].double()).square().sum(-1)
    distances = squared_distances(x, centroids)
    torch.testing.assert_close(distances.double(), expected, atol=1e-5, rtol=1e-5)
    assert float(squared_distances(x, x).min()) >= 0


def test_seeds_are_drawn_by_squared_distance():
    """Three places, the first with most of the rows: from there, 1 is drawn with 1/10 and 3 with 9/10."""
    x, generator = torch.tensor([[0.0]] * 10_000 + [[1.0], [3.0]]), seeded(0)
    seconds = [float(plus_plus(x, 2, generator)[1]) for _ in range(1000)]
    assert 0 not in seconds  # at distance 0
    share = seconds.count(3.0) / len(seconds)
    assert abs(share - 0.9) < 4 * (0.9 * 0.1 / len(seconds)) ** 0.5


def test_the_first_seed_is_any_row():
    x, generator = torch.arange(4.0)[:, None], seeded(0)
    counts = torch.bincount(torch.tensor([int(plus_plus(x, 1, generator)) for _ in range(800)]), minlength=4)
    assert bool(((counts - 200).abs() < 4 * (800 * 0.25 * 0.75) ** 0.5).all())


def test_as_many_seeds_as_places_are_all_places():
    places = torch.randn(7, 3, generator=seeded(0))
    for seed in range(10):
        seeds = plus_plus(places.repeat(5, 1), 7, seeded(seed))
        assert sorted(map(tuple, seeds.tolist())) == sorted(map(tuple, places.tolist()))


def test_groups_that_empty_restart(monkeypatch):
    """All seeds at one place: without restarts one group would have all rows."""
    monkeypatch.setattr(module, "plus_plus", lambda x, k, generator: x[:1].repeat(k, 1))
    x = blobs(6, 0.5)
    groups, inertia = grouped(x, kmeans(x, 6, seeded(0)))
    assert int(torch.bincount(groups, minlength=6).min()) > 0
    assert inertia < 0.8 * float((x - x.mean(0)).square().sum())  # which local optimum depends on rounding


def test_fewer_places_than_centroids_are_all_hit():
    places = torch.tensor([[0.0, 0.0], [1.0, 5.0], [-3.0, 2.0]])
    rows = places.repeat(4, 1)
    centroids = kmeans(rows, 5, seeded(0))
    assert grouped(rows, centroids)[1] == 0 and bool(centroids.isfinite().all())


def test_as_many_centroids_as_rows_leave_no_distance():
    x = torch.randn(9, 4, generator=seeded(0))
    groups, inertia = grouped(x, kmeans(x, 9, seeded(1)))
    assert sorted(groups.tolist()) == list(range(9)) and inertia == pytest.approx(0, abs=1e-4)


def test_the_generator_decides():
    x = torch.randn(200, 4, generator=seeded(0))
    one, same, other = (kmeans(x, 20, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_fewer_rows_than_centroids_are_refused():
    with pytest.raises(ValueError, match="k-means of 4 centroids needs at least 4 rows; there are 3"):
        kmeans(torch.randn(3, 2), 4, seeded(0))
