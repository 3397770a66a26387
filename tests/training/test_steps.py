"""What happens around a step. Signals, and several processes, are tested with the runs themselves."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.schemas import Interactions
from data.batches import SequenceSource, bucket_size, padding_rows
from data.shuffle import Shuffler
from data.splits import windows
from ops.jagged import lengths_to_offsets
from training.checkpoint import Checkpoints
from training.steps import Steps, deal_out


def make(root, processes: int = 1, rank: int = 0, **settings) -> tuple[Steps, list, list]:
    """Steps of 11 samples each, the rows they log, and the steps they save."""
    logged, saved = [], []
    accelerator = SimpleNamespace(
        num_processes=processes,
        process_index=rank,
        device=torch.device("cpu"),
        scaler=None,
        reduce=lambda tensor, _: tensor,
        gather=lambda tensor: tensor,
    )
    run = SimpleNamespace(
        settings={"iterations": 7, "gradient_accumulate_every": 3, "log_every": 3, "save_model_every": 4, **settings},
        accelerator=accelerator,
        checkpoints=Checkpoints(root),
        is_main=False,
        log=lambda step, split, values: logged.append((step, split, values)),
        save=lambda step, model, optimizer, best, improved: saved.append((step, best, improved)),
    )
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    return Steps(run, model, optimizer, Shuffler(50, 11, seed=0), ("loss", "part"), 0), logged, saved


def test_what_is_due_is_logged_and_saved(tmp_path):
    around, logged, saved = make(tmp_path)
    with around as steps:
        for step in range(7):
            steps.start(learning_rate=0.5 * step)
            steps.made(step + 1, torch.tensor([2.0 * step, step]), torch.tensor(0.25))
            steps.end(step + 1, last=7, best={"step": 2}, improved=step == 1)
    assert [(step, split) for step, split, _ in logged] == [(3, "train"), (6, "train"), (7, "train")]
    values = {"loss": 4.0, "part": 2.0, "gradient_norm": 0.25, "learning_rate": 1.0}
    assert logged[0][2].items() >= values.items()
    assert saved == [(2, {"step": 2}, True), (4, {"step": 2}, False), (7, {"step": 2}, False)]


def test_a_loss_that_is_not_finite_is_not_saved(tmp_path):
    around, _, saved = make(tmp_path)
    with pytest.raises(FloatingPointError, match="in step 1"), around as steps:
        for step in range(7):
            steps.start(0.1)
            steps.made(step + 1, torch.tensor([float("nan"), 0.0]), torch.tensor(1.0))
            steps.end(step + 1, last=7)
    assert saved == []


def test_a_batch_is_shared_out_among_micro_steps(tmp_path):
    first, second = torch.arange(11), torch.arange(11) * 2.0
    shares = make(tmp_path)[0].shares(first)
    assert [len(index) for index in shares] == [4, 4, 3]
    assert torch.equal(torch.cat(shares), first)
    sizes = torch.tensor([9, 1, 2, 8, 3, 7, 4, 6, 5, 5, 10])
    shares = make(tmp_path)[0].even_shares(sizes, first, second)
    assert [(largest, int(own.sum())) for largest, own, *_ in shares] == [(20, 20)] * 3
    assert all(own.equal(sizes[index]) and other.equal(second[index]) for _, own, index, other in shares)
    assert torch.cat([index for _, _, index, _ in shares]).sort().values.equal(first)
    ((largest, *whole),) = make(tmp_path, gradient_accumulate_every=1)[0].even_shares(sizes, first)
    assert largest == 60 and whole[0].equal(sizes) and whole[1].equal(first)
    with pytest.raises(ValueError, match="is too small for 12 shares"):
        make(tmp_path, gradient_accumulate_every=12)


@pytest.mark.parametrize(("processes", "micro_steps"), [(2, 1), (3, 2), (2, 3)])
def test_processes_that_step_at_once_know_the_most_that_one_of_them_has(tmp_path, monkeypatch, processes, micro_steps):
    monkeypatch.setattr("training.steps.StopSignal", lambda processes: None)
    sizes, every = torch.tensor([9, 1, 2, 30, 3, 7, 4, 6, 5, 5, 10]), []
    for rank in range(processes):
        steps = make(tmp_path, processes, rank, gradient_accumulate_every=micro_steps)[0]
        every.append(steps.even_shares(sizes, torch.arange(11)))
    assert sorted(int(n) for shares in every for *_, index in shares for n in index) == list(range(11))
    for at_once in zip(*every, strict=True):
        sums = [int(sizes[index].sum()) for _, _, index in at_once]
        assert [largest for largest, *_ in at_once] == [max(sums)] * processes


@settings(max_examples=50)
@given(st.integers(2, 8), st.integers(1, 20), st.integers(1, 40), st.integers(0, 2**31))
def test_the_largest_shares_size_holds_all_and_one_padding_row_more_fills_it(n, max_items, each, seed):
    lengths = torch.randint(2, max_items + 2, (n * each,), generator=torch.Generator().manual_seed(seed))
    interactions = Interactions(torch.zeros(int(lengths.sum()), dtype=torch.int32), lengths_to_offsets(lengths))
    source = SequenceSource(interactions, windows(lengths, max_items), max_items, torch.device("cpu"), True)
    sizes, padding = source.lengths(torch.arange(n * each)), padding_rows(each)
    shares, sums = deal_out(sizes, n)
    size = bucket_size(int(sums.max()), padding, max_items)
    for share in shares:
        batch = source.batch(share, None, size, padding + 1)
        assert len(batch.history.values) == int(batch.history.offsets[-1]) == size
        assert int(batch.weights.sum()) == source.n_targets(sizes[share])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 6))
def test_samples_are_dealt_out_into_shares_of_equal_sums(values, n):
    sizes = torch.tensor(values)
    shares, sums = deal_out(sizes, n)
    assert [int(sizes[share].sum()) for share in shares] == sums.tolist()
    assert int(sums.max() - sums.min()) <= max(values)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert torch.cat(shares).sort().values.equal(torch.arange(len(values)))
