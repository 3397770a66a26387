from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data.shuffle import Shuffler
from training.checkpoint import Checkpoints
from training.guard import NonFiniteGuard

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def guarded(tmp_path, scaler=None) -> NonFiniteGuard:
    accelerator = SimpleNamespace(scaler=scaler, device=torch.device("cpu"), gather=lambda tensor: tensor)
    return NonFiniteGuard(accelerator, Shuffler(50, 4, seed=3), Checkpoints(tmp_path))


@pytest.mark.parametrize(("loss", "norm"), [(BAD, GOOD), (GOOD, BAD), (GOOD, torch.tensor(float("inf")))])
def test_the_first_bad_step_and_its_samples_are_named(tmp_path, loss, norm):
    watched = guarded(tmp_path)
    for step in range(1, 10):
        watched.watch(step, *((loss, norm) if step in (5, 7) else (GOOD, GOOD)))
    samples = " ".join(map(str, Shuffler(50, 4, seed=3).draw(4)[0].tolist()))
    with pytest.raises(FloatingPointError, match=rf"step 5\. .* 4 training samples {samples} .*checkpoint is none"):
        watched.check(nn.Linear(2, 2))


def test_finite_steps_and_weights_pass(tmp_path):
    watched = guarded(tmp_path)
    watched.watch(1, GOOD, GOOD)
    watched.check(nn.Linear(2, 2))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_weights_that_are_not_finite_are_noticed(tmp_path, value, dtype):
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = 1e30  # whose square float32 does not hold
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("none", torch.empty(0))
    model.register_buffer("share", torch.tensor([0.5, 1.0], dtype=dtype))
    guarded(tmp_path).check(model)
    model.share[1] = value
    with pytest.raises(FloatingPointError, match="The weights are not finite"):
        guarded(tmp_path).check(model)


def test_in_fp16_a_gradient_may_overflow_but_a_loss_may_not(tmp_path):
    watched = guarded(tmp_path, torch.amp.GradScaler("cpu"))
    watched.watch(1, GOOD, BAD)
    watched.check(nn.Linear(2, 2))
    watched.watch(2, BAD, GOOD)
    with pytest.raises(FloatingPointError, match="step 2"):
        watched.check(nn.Linear(2, 2))
