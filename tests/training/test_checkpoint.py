import os

import pytest
import torch
from torch import nn

from training.checkpoint import Checkpoints, load_model, load_state


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    groups = [{"params": [model[0].weight, model[1].weight]}, {"params": [model[0].bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(steps):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_model_and_optimizer_continue_as_if_never_saved(tmp_path):
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, model, optimizer, {"best": 0.5})
    restored, fresh = trained(0)
    load_model(checkpoints.marked("LAST"), restored)
    state = load_state(checkpoints.marked("LAST"), fresh)
    assert (state["step"], state["best"]) == (3, 0.5)
    train_step(model, optimizer)
    train_step(restored, fresh)
    for one, two in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(one, two)


def test_last_and_best_are_kept_and_the_others_removed(tmp_path):
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path)
    for step, best in [(1, True), (2, False), (3, True), (4, False), (5, False)]:
        checkpoints.save(step, model, optimizer, {}, best)
    assert {path.name for path in tmp_path.iterdir()} == {"LAST", "BEST", "step_00000003", "step_00000005"}
    assert checkpoints.marked("BEST").name == "step_00000003"
    assert checkpoints.marked("LAST").name == "step_00000005"


def test_nothing_is_marked_where_nothing_was_saved(tmp_path):
    assert Checkpoints(tmp_path / "none").marked("LAST") is None


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_full_disk_at_any_write_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, failing):
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, model, optimizer, {})
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(2, model, optimizer, {})
    assert checkpoints.marked("LAST").name == "step_00000001"
    load_model(checkpoints.marked("LAST"), model)
    assert load_state(checkpoints.marked("LAST"), optimizer)["step"] == 1
    monkeypatch.undo()
    checkpoints.save(2, model, optimizer, {})
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_00000002"}
