import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.embedding.id_embedder import SemIdEmbedder, UserEmbedder
from ops.reference import hash_prefixes

SIZES = (5, 4, 9, 2)
codes_strategy = st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), min_size=1, max_size=9)


def prefix_hashes(row: tuple[int, ...]) -> list[int]:
    """The recurrence of `hash_prefixes` in unbounded integers."""
    prime, state, hashes = 2**31 - 1, 0, []
    for code in row:
        state = (1_000_003 * state + code + 1) % prime
        state ^= state // 2**15
        hashes.append(48_271 * state % prime)
    return hashes


@settings(deadline=None, max_examples=25)
@given(codes_strategy, st.integers(1, 4))
def test_each_code_of_each_level_has_its_own_row(rows, levels):
    embedder = SemIdEmbedder(SIZES, dim=3, prefix_buckets=0)
    embedded = embedder(torch.tensor(rows)[:, :levels])
    assert embedded.shape == (len(rows), levels, 3)
    for row, vectors in zip(rows, embedded, strict=True):
        for level in range(levels):
            assert torch.equal(vectors[level], embedder.table.weight[sum(SIZES[:level]) + row[level]])


@settings(deadline=None, max_examples=25)
@given(codes_strategy, st.integers(1, 4), st.integers(1, 50))
def test_prefixes_of_two_or_more_codes_add_a_hashed_row(rows, levels, buckets):
    embedder = SemIdEmbedder(SIZES, dim=3, prefix_buckets=buckets)
    embedded = embedder(torch.tensor(rows)[:, :levels]) - embedder.table(
        (torch.tensor(rows) + embedder.starts)[:, :levels]
    )
    for row, vectors in zip(rows, embedded, strict=True):
        hashes = prefix_hashes(row)
        for level in range(levels):
            expected = embedder.prefix_table.weight[hashes[level] % buckets] if level else torch.zeros(3)
            torch.testing.assert_close(vectors[level], expected)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 2**20), min_size=3, max_size=3), min_size=1, max_size=9))
def test_hashes_of_prefixes_are_exact(rows):
    hashed = hash_prefixes(torch.tensor(rows))
    assert hashed.tolist() == [prefix_hashes(row) for row in rows]


def test_hashes_of_prefixes_collide_no_more_than_random_ones():
    codes = torch.cartesian_prod(torch.arange(64), torch.arange(64), torch.arange(8))
    for level, n in ((1, 64 * 64), (2, len(codes))):
        buckets = 2 * n
        hit = len(torch.unique(torch.unique(hash_prefixes(codes)[:, level]) % buckets))
        expected = buckets * (1 - (1 - 1 / buckets) ** n)
        assert hit > 0.97 * expected


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), st.integers(1, 3000))
def test_users_share_the_vector_of_their_hash(users, buckets):
    embedder = UserEmbedder(buckets, dim=2)
    embedded = embedder(torch.tensor(users))
    rows = [user * 2654435761 % 2**32 % buckets for user in users]
    assert torch.equal(embedded, embedder.table.weight[rows])
    assert torch.equal(embedded, embedder(torch.tensor(users))), "equal in every call"
    assert torch.equal(embedder(torch.tensor(users[::-1])), embedded.flip(0)), "whatever the place in the batch"


def test_users_spread_over_the_buckets():
    embedder = UserEmbedder(100, dim=1)
    with torch.no_grad():
        embedder.table.weight.copy_(torch.arange(100.0)[:, None])
        rows = embedder(torch.arange(10_000)).squeeze(1).long()
    counts = torch.bincount(rows, minlength=100)
    assert int(counts.min()) > 50 and int(counts.max()) < 150
