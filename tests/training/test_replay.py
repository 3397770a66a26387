"""Recorded passes are the passes themselves."""

import pytest
import torch
from torch import nn

from common.schemas import Samples
from data.batches import SequenceSource
from tests.data.test_batches import to_interactions
from tests.modules.helpers import make_model as make_retriever
from tests.modules.helpers import random_catalogue
from training.replay import Replay


def passes(model: nn.Module, calls: list[int] | None = None):
    """A forward and backward pass with dropout, for rows of a table and a weight."""
    table = torch.linspace(-1, 1, 80, device=model[0].weight.device).view(20, 4)

    def function(size: int, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if calls is not None:
            calls.append(size)
        loss = model(table[index[:size]]).square().mean()
        (loss * weight).backward()
        return loss.detach()

    return function


def make_model(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).to(device)


def inputs(step: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    return 3 + step % 2, torch.arange(step, step + 5), torch.tensor(0.5 + step)


def run(replay: Replay, model: nn.Module, clear: bool = False) -> list[torch.Tensor]:
    """Losses of each step, and the gradients in the end, of the last step if the others are cleared."""
    results = []
    for step in range(6):
        torch.manual_seed(step)
        if clear:
            model.zero_grad(set_to_none=True)
        results.append(replay(*inputs(step)).clone())
    return [*results, *(p.grad.clone() for p in model.parameters())]


def test_without_recording_the_function_is_called():
    calls, model = [], make_model("cpu")
    results = run(Replay(passes(model, calls), model.parameters(), torch.device("cpu"), recorded=False), model)
    assert calls == [3, 4] * 3
    twin = make_model("cpu")
    function = passes(twin)
    for step in range(6):
        torch.manual_seed(step)
        assert torch.equal(function(*inputs(step)), results[step])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(twin.parameters(), results[6:], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("clear", [True, False], ids=["cleared", "accumulated"])
def test_recorded_passes_give_the_losses_and_gradients_of_called_ones(clear):
    device, calls = torch.device("cuda"), []
    called, recorded = make_model("cuda"), make_model("cuda")
    expected = run(Replay(passes(called), called.parameters(), device, recorded=False), called, clear)
    actual = run(Replay(passes(recorded, calls), recorded.parameters(), device, recorded=True), recorded, clear)
    assert len(calls) < 12 and set(calls) == {3, 4}
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def training_steps(device: torch.device, recorded: bool) -> list[torch.Tensor]:
    """Losses and gradients of the retriever over some steps with dropout, as train_decoder.py makes them."""
    codes, _ = random_catalogue(30, seed=1)
    rows = [[(7 * user + n) % 30 for n in range(2 + user % 6)] for user in range(20)]
    last = torch.tensor([len(row) - 1 for row in rows])
    samples = Samples(torch.arange(20), last, torch.zeros_like(last))
    source = SequenceSource(to_interactions(rows), samples, 5, device, every_position=True)
    model = make_retriever(codes, dropout=0.1, head_dim=16, device=device).train()

    def passes(size: int, index: torch.Tensor) -> torch.Tensor:
        loss = model(source.batch(index, None, size, padding=12)).loss
        loss.backward()
        return loss.detach()

    replay, results = Replay(passes, model.parameters(), device, recorded), []
    for step in range(4):
        torch.manual_seed(step)
        model.zero_grad(set_to_none=True)
        index = torch.arange(step, step + 12)
        loss = replay(60 + 30 * (step % 2), index)
        results += [loss.clone(), *(p.grad.clone() for p in model.parameters())]
    return results


def test_steps_of_the_retriever_are_reproducible():
    first, again = (training_steps(torch.device("cpu"), recorded=False) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert len({float(grad.abs().sum()) for grad in first}) > len(first) // 2


@pytest.mark.gpu
def test_recorded_steps_of_the_retriever_are_the_called_ones():
    called, recorded = (training_steps(torch.device("cuda"), kind) for kind in (False, True))
    for mine, theirs in zip(recorded, called, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
