"""Evaluation against ranking every item by its own loss; filled and recorded batches against plain ones."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common.schemas import Interactions
from data.batches import SequenceSource
from data.splits import leave_one_out
from tests.modules.helpers import make_batch, make_model, random_catalogue
from training.evaluate import Evaluation

N_ITEMS, N_USERS, MAX_ITEMS = 30, 19, 5


class Filled(SequenceSource):
    """Batches as they are filled up for recording."""

    def plans(self, batch_size, rank=0, world_size=1, filled=False):
        return super().plans(batch_size, rank, world_size, filled=True)


def stub(device: str, half: bool = False, rank: int = 0, world_size: int = 1) -> SimpleNamespace:
    """What the evaluation asks of an `Accelerator`."""
    return SimpleNamespace(
        device=torch.device(device),
        process_index=rank,
        num_processes=world_size,
        reduce=lambda tensor, _: tensor,
        autocast=partial(torch.autocast, device, torch.bfloat16, enabled=half),
    )


def setup(device: str = "cpu", kind: type = SequenceSource, **changed):
    """Source of test samples and model; each item is consumed by some users, by some twice."""
    codes, _ = random_catalogue(N_ITEMS, seed=1)
    lengths = torch.randint(3, 12, (N_USERS,))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    data = Interactions(torch.randint(0, N_ITEMS, (int(offsets[-1]),), dtype=torch.int32), offsets)
    source = kind(data, leave_one_out(data).test, MAX_ITEMS, torch.device(device))
    model = make_model(codes, device=device, **changed)
    with torch.no_grad():
        model.seen.fill_(-0.05)
    return source, model


@torch.no_grad()
def one_by_one(source, model) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss, and each head's log-probability of every item for every user: [U, N]."""
    losses, scores = [], {"tree": [], "items": []}
    for rows in source.interactions.items.split(source.interactions.offsets.diff().tolist()):
        *before, target = rows.tolist()
        distinct = torch.tensor(sorted(set(before)))
        seen = torch.zeros(1, dtype=torch.int64), torch.tensor([len(distinct)]), distinct
        batches = [make_batch([before[-MAX_ITEMS:]], [[item]]) for item in range(N_ITEMS)]
        found = [model(type(batch)(batch.user, batch.history, batch.targets, seen=seen)) for batch in batches]
        losses.append(float(found[target].loss))
        scores["tree"].append([-float(loss.levels.sum()) for loss in found])
        scores["items"].append([-float(loss.items) for loss in found])
    return sum(losses) / len(losses), {name: torch.tensor(rows) for name, rows in scores.items()}


def ranks_by_hand(source, scores: torch.Tensor, new: bool) -> list[int]:
    """scores [U, N], log-probabilities, -> the rank of each user's target; N where it is consumed and new is asked."""
    ranks = []
    items = source.interactions.items.split(source.interactions.offsets.diff().tolist())
    for row, own in zip(items, scores, strict=True):
        *before, target = row.tolist()
        better = {n for n in range(N_ITEMS) if own[n] > own[target]} - (set(before) if new else set())
        ranks.append(N_ITEMS if new and target in before else len(better))
    return ranks


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", [SequenceSource, Filled])
def test_loss_and_ranks_are_those_of_ranking_every_item(kind, exact):
    source, model = setup(kind=kind)
    loss, scores = one_by_one(source, model)
    for batch_size in (1, 8, 64):
        evaluation = Evaluation(model, N_ITEMS, exact, batch_size, stub("cpu"), recorded=False)
        assert evaluation.loss(source) == pytest.approx(loss, rel=1e-5)
        ranks = evaluation.ranks(source)
        for share, own in zip(evaluation.shares, ranks, strict=True):
            both = (1 - share) * scores["tree"] + share * scores["items"]
            assert own[0].tolist() == ranks_by_hand(source, both, new=False)
            assert own[1].tolist() == ranks_by_hand(source, both, new=True)
    assert model.training


@pytest.mark.parametrize("changed", [{}, {"max_rows": 12}])  # rows of their own, and hashed ones
def test_each_evaluation_is_of_the_weights_as_they_are(changed):
    source, model = setup(**changed)
    evaluation = Evaluation(model, N_ITEMS, True, 8, stub("cpu"), recorded=False)
    before = evaluation.ranks(source)
    with torch.no_grad():
        for parameter in (*model.items.parameters(), *model.nodes.parameters()):
            parameter.normal_()
    after, fresh = evaluation.ranks(source), Evaluation(model, N_ITEMS, True, 8, stub("cpu"), recorded=False)
    assert torch.equal(after, fresh.ranks(source))
    assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_rows_are_the_shares_that_the_model_weighs_its_heads_by():
    source, model = setup()
    model.item_share.fill_(0.3)
    evaluation = Evaluation(model, N_ITEMS, True, 8, stub("cpu"), recorded=False)
    rows, ranks = evaluation.rows(source), evaluation.ranks(source)
    assert list(rows) == ["tree", "items", "fused"]
    assert torch.equal(rows["tree"]["all"], ranks[0, 0]) and torch.equal(rows["items"]["new"], ranks[-1, 1])
    assert torch.equal(rows["fused"]["new"], ranks[evaluation.shares.index(0.3), 1])


@pytest.mark.parametrize("exact", [True, False])
def test_lists_hold_the_target_at_its_rank(exact):
    source, model = setup()
    model.item_share.fill_(0.5)
    evaluation = Evaluation(model, N_ITEMS, exact, 8, stub("cpu"), recorded=False)
    for new, protocol in ((False, "all"), (True, "new")):
        ranks, lists = evaluation.rows(source)["fused"][protocol], evaluation.lists(source, N_ITEMS, new)
        for user, rank in enumerate(ranks.tolist()):
            ends = source.interactions.offsets[user + 1]
            *before, target = source.interactions.items[source.interactions.offsets[user] : ends].tolist()
            own = lists[user].tolist()
            assert (target not in own) if rank == N_ITEMS else own[rank] == target
            assert set(own) - {-1} == set(range(N_ITEMS)) - (set(before) if new else set())


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_recordings_read_the_weights_as_they_are(half, exact):
    source, model = setup("cuda")
    recorded = Evaluation(model, 9, exact, 8, stub("cuda", half), recorded=True)
    called = Evaluation(model, 9, exact, 8, stub("cuda", half), recorded=False)
    for _ in range(3):
        assert torch.equal(recorded.ranks(source), called.ranks(source))
        assert recorded.loss(source) == pytest.approx(called.loss(source), rel=1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5)
    assert all(parameter.grad is None for parameter in model.parameters())
