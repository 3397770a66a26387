"""Beam search against ranking every item by its own forward pass."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.schemas import TokenizedSeqBatch
from modules.generation.beam_search import beam_search
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel
from ops.jagged import JaggedTensor
from tests.modules.helpers import make_batch, make_model, random_catalogue

CATALOGUES = [  # items, codebook size, levels: many collisions, some, none
    (9, 2, 1),
    (20, 3, 2),
    (10, 50, 2),
    (20, 4, 3),
    (1, 3, 2),
]


def setup(catalogue: tuple[int, int, int], seed: int = 0, **options):
    """Codes, trie, model, and four users' histories."""
    n_items, size, levels = catalogue
    codes, sizes = random_catalogue(n_items, seed, size, levels)
    options = dict(encoder_layers=1) | options
    generator = torch.Generator().manual_seed(seed)
    histories = [torch.randint(0, n_items, (length,), generator=generator).tolist() for length in (1, 6, 3, 4)]
    return codes, Trie.build(codes), make_model(sizes, seed, **options), histories


@torch.no_grad()
def log_probs_one_by_one(model: EncoderDecoderRetrievalModel, codes: Tensor, trie: Trie, histories) -> Tensor:
    """[B, N]: -loss of every item as the only target of each history."""
    return torch.tensor(
        [
            [-float(model(make_batch(codes, [row], [[item]], [user]), trie).loss) for item in range(len(codes))]
            for user, row in enumerate(histories)
        ]
    )


def search(model, codes, trie, histories, beams, users=None):
    return beam_search(model, make_batch(codes, histories, [[0]] * len(histories), users), trie, beams)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("catalogue", CATALOGUES)
def test_with_a_beam_for_each_item_the_search_is_the_full_ranking(catalogue, causal):
    codes, trie, model, histories = setup(catalogue, causal_encoder=causal)
    expected = log_probs_one_by_one(model, codes, trie, histories)
    torch.testing.assert_close(expected.exp().sum(1), torch.ones(4), rtol=0, atol=1e-5)
    for beams in (len(codes), len(codes) + 7):
        ranked = search(model, codes, trie, histories, beams)
        assert ranked.items.shape == ranked.log_probs.shape == (4, len(codes))
        assert ranked.items.dtype == torch.int64 and ranked.log_probs.dtype == torch.float32
        torch.testing.assert_close(ranked.log_probs, expected.gather(1, ranked.items), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ranked.log_probs, expected.sort(descending=True).values, rtol=1e-5, atol=1e-5)
        assert all(sorted(row) == list(range(len(codes))) for row in ranked.items.tolist())


def greedy_beams(exact: Tensor, codes: Tensor, beams: int) -> list[int]:
    """Beam search over a given p(item) [N]: the prefixes that keep the most mass, level by level."""
    rows, kept = codes.tolist(), [[]]
    for level in range(codes.shape[1]):
        mass: dict[tuple[int, ...], float] = {}
        for row, p in zip(rows, exact.exp().tolist(), strict=True):
            if row[:level] in kept:
                mass[tuple(row[: level + 1])] = mass.get(tuple(row[: level + 1]), 0) + p
        kept = [list(prefix) for prefix in sorted(mass, key=lambda prefix: -mass[prefix])[:beams]]
    return [rows.index(row) for row in kept]


@pytest.mark.parametrize("catalogue", [(24, 4, 2), (30, 3, 3)])
def test_few_beams_keep_the_prefixes_with_the_most_mass(catalogue):
    codes, trie, model, histories = setup(catalogue, seed=5)
    expected = log_probs_one_by_one(model, codes, trie, histories)
    for beams in (1, 2, 3, 6, 11):
        ranked = search(model, codes, trie, histories, beams)
        assert ranked.items.tolist() == [greedy_beams(exact, codes, beams) for exact in expected]
        torch.testing.assert_close(ranked.log_probs, expected.gather(1, ranked.items), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(1, 50), st.integers(0, 1000))
def test_every_beam_is_a_distinct_item(n_items, size, levels, beams, seed):
    codes, trie, model, histories = setup((n_items, size, levels), seed)
    ranked = search(model, codes, trie, histories, beams)
    assert ranked.items.shape == ranked.log_probs.shape == (4, min(beams, n_items))
    for items, log_probs in zip(ranked.items.tolist(), ranked.log_probs.tolist(), strict=True):
        assert len(set(items)) == len(items) and set(items) <= set(range(n_items))
        assert log_probs == sorted(log_probs, reverse=True) and sum(map(math.exp, log_probs)) < 1 + 1e-5


@pytest.mark.parametrize("catalogue", CATALOGUES)
def test_consumed_items_are_left_out_and_their_places_stay_empty(catalogue):
    codes, trie, model, histories = setup(catalogue)
    n_items = len(codes)
    consumed = [[], list(range(n_items)), list(range(0, n_items, 2)), [0, 0, n_items - 1]]
    batch = make_batch(codes, histories, [[0]] * 4)
    consumed_rows = JaggedTensor.from_rows([torch.tensor(row, dtype=torch.int64) for row in consumed])
    batch = dataclasses.replace(batch, consumed=consumed_rows)
    expected = log_probs_one_by_one(model, codes, trie, histories)
    ranked = beam_search(model, batch, trie, beams=n_items)
    for items, log_probs, exact, gone in zip(ranked.items.tolist(), ranked.log_probs, expected, consumed, strict=True):
        best = [item for item in exact.argsort(descending=True).tolist() if item not in gone]
        empty = n_items - len(best)
        assert items == best + [-1] * empty
        torch.testing.assert_close(log_probs, torch.cat([exact[best], torch.full((empty,), -torch.inf)]))
    for items, gone in zip(beam_search(model, batch, trie, beams=3).items.tolist(), consumed, strict=True):
        assert not set(items) & set(gone)


def test_the_search_is_deterministic():
    codes, trie, model, histories = setup((40, 4, 2))
    one, other = (search(model, codes, trie, histories, 10) for _ in range(2))
    assert torch.equal(one.items, other.items) and torch.equal(one.log_probs, other.log_probs)


def test_a_user_gets_the_same_items_in_any_batch():
    codes, trie, model, histories = setup((40, 4, 2))
    together = search(model, codes, trie, histories, 10)
    for user, history in enumerate(histories):
        alone = search(model, codes, trie, [history], 10, [user])
        assert alone.items[0].tolist() == together.items[user].tolist()
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[user], rtol=1e-5, atol=1e-5)


def test_users_without_a_history_are_served():
    codes, trie, model, _ = setup((15, 4, 2))
    histories = [[], [3], []]
    ranked = search(model, codes, trie, histories, 15)
    expected = log_probs_one_by_one(model, codes, trie, histories)
    torch.testing.assert_close(ranked.log_probs, expected.gather(1, ranked.items), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("catalogue", CATALOGUES)
def test_on_a_gpu_the_search_is_the_full_ranking(catalogue):
    """The same with the kernels; half of the items are consumed by the second user."""
    codes, trie, model, histories = setup(catalogue)
    expected = log_probs_one_by_one(model, codes, trie, histories)
    consumed = list(range(0, len(codes), 2))
    expected[1, consumed] = -torch.inf
    batch = make_batch(codes, histories, [[0]] * 4)
    rows = [torch.tensor(row, dtype=torch.int64) for row in ([], consumed, [], [])]
    batch = TokenizedSeqBatch(
        batch.user.cuda(), batch.tokens.to("cuda"), batch.targets.to("cuda"), JaggedTensor.from_rows(rows).to("cuda")
    )
    ranked = beam_search(model.cuda(), batch, trie.to("cuda"), len(codes))
    items, log_probs = ranked.items.cpu(), ranked.log_probs.cpu()
    best = expected.sort(descending=True).values
    torch.testing.assert_close(log_probs, best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        expected.gather(1, items.clamp_min(0))[items >= 0], best[items >= 0], rtol=1e-4, atol=1e-4
    )
    assert torch.equal(items < 0, best == -torch.inf)
