"""Evaluation against ranking every item by its own forward pass; filled and recorded batches against plain ones."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from data.schemas import Interactions
from data.splits import leave_one_out
from data.utils import SequenceSource, tokenize
from modules.generation.beam_search import beam_search
from modules.generation.trie import Trie
from tests.modules.helpers import make_batch, make_model, random_catalogue
from training.evaluate import Evaluation

N_ITEMS, N_USERS, MAX_ITEMS = 30, 19, 5
KS = (1, 3, 10)


class Filled(SequenceSource):
    """Batches as they are filled up for recording."""

    def in_order(self, batch_size, rank=0, world_size=1, filled=False):
        return super().in_order(batch_size, rank, world_size, filled=True)


def stub(device: str, half: bool = False, rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    """What the evaluation asks of an `Accelerator`."""
    return SimpleNamespace(
        device=torch.device(device),
        process_index=rank,
        num_processes=world_size,
        reduce=lambda tensor, _: tensor,
        autocast=partial(torch.autocast, device, torch.bfloat16, enabled=half),
    )


def setup(device: str = "cpu", exclude_history: bool = False, kind: type = SequenceSource):
    """Source of test samples, trie and model; each item is consumed by some users."""
    codes, sizes = random_catalogue(N_ITEMS, seed=1)
    lengths = torch.randint(3, 12, (N_USERS,))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    data = Interactions(torch.randint(0, N_ITEMS, (int(offsets[-1]),), dtype=torch.int32), offsets)
    samples = leave_one_out(data).test
    source = kind(data, samples, MAX_ITEMS, torch.device(device), exclude_history=exclude_history)
    return source, Trie.build(codes).to(device), make_model(sizes).to(device)


@torch.no_grad()
def one_by_one(source, trie, model, ks) -> tuple[float, dict[str, float]]:
    """Mean loss, and recall by the rank of each user's target among the items that are ranked."""
    losses, ranks, codes = [], [], trie.item_codes.long()
    for rows in source.interactions.items.split(source.interactions.offsets.diff().tolist()):
        *before, target = rows.tolist()
        history, user = before[-MAX_ITEMS:], len(losses)
        batches = [make_batch(codes, [history], [[item]], [user]) for item in range(N_ITEMS)]
        exact = [float(model(batch, trie).loss) for batch in batches]
        losses.append(exact[target])
        better = {item for item in range(N_ITEMS) if exact[item] < exact[target]}
        excluded = set(before) if source.exclude_history else set()
        ranks.append(N_ITEMS if target in excluded else len(better - excluded))
    recall = {f"recall@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in ks}
    return sum(losses) / len(losses), recall


@pytest.mark.parametrize("exclude_history", [False, True])
@pytest.mark.parametrize("kind", [SequenceSource, Filled])
def test_loss_and_recall_are_those_of_ranking_every_item(kind, exclude_history):
    source, trie, model = setup(exclude_history=exclude_history, kind=kind)
    loss, recall = one_by_one(source, trie, model, KS)
    for batch_size in (1, 8, 19, 64):
        evaluation = Evaluation(model, trie, N_ITEMS, batch_size, stub("cpu"), recorded=False)
        assert evaluation.loss(source) == pytest.approx(loss, rel=1e-5)
        metrics = evaluation.metrics(source, KS)
        assert {name: metrics[name] for name in recall} == pytest.approx(recall, abs=1e-12)
    assert model.training


@pytest.mark.parametrize("exclude_history", [False, True])
def test_filled_batches_give_the_same_rankings(exclude_history):
    source, trie, model = setup(exclude_history=exclude_history)
    for beams in (3, 40):
        pairs = zip(source.in_order(8), source.in_order(8, filled=True), strict=True)
        for plain, filled in pairs:
            batches = (tokenize(batch, trie.item_codes) for batch in (filled, plain))
            mine, theirs = (beam_search(model, batch, trie, beams) for batch in batches)
            users = len(plain.user)
            assert torch.equal(mine.items[:users], theirs.items)
            torch.testing.assert_close(mine.log_probs[:users], theirs.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("exclude_history", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_recordings_read_the_weights_as_they_are(half, exclude_history):
    source, trie, model = setup("cuda", exclude_history)
    recorded = Evaluation(model, trie, 9, 8, stub("cuda", half), recorded=True)
    called = Evaluation(model, trie, 9, 8, stub("cuda", half), recorded=False)
    for _ in range(3):
        assert recorded.metrics(source, KS) == pytest.approx(called.metrics(source, KS), abs=1e-12)
        assert recorded.loss(source) == pytest.approx(called.loss(source), rel=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5)
    assert all(parameter.grad is None for parameter in model.parameters())
