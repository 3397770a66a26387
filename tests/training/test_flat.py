"""Parameters and AdamW on flat memory against torch's optimizer and clipping of the parameters one by one."""

import copy

import pytest
import torch
from torch import nn

from ops.triton.adamw import clipped_adamw
from tests.ops.triton.device import DEVICE
from training.checkpoint import Checkpoints, load, load_optimizer
from training.flat import FlatAdamW, FlatParameters

SHAPES = [(7,), (700, 3), (1,), (), (512,), (3, 5), (2, 600)]  # some share a program, some have several
SETTINGS = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "fused": True}


def make() -> tuple[nn.ParameterList, torch.optim.AdamW]:
    model = nn.ParameterList([torch.randn(shape, device=DEVICE) for shape in SHAPES])
    return model, torch.optim.AdamW(model.parameters(), 1.0, **SETTINGS)


def set_gradients(step: int, *models: nn.ParameterList) -> None:
    """None for the second parameter."""
    torch.manual_seed(step)
    for n, (parameter, *others) in enumerate(zip(*models, strict=True)):
        parameter.grad = None if n == 1 else torch.randn_like(parameter) / (n + 1)
        for other in others:
            other.grad = None if n == 1 else parameter.grad.clone()


def torch_step(model: nn.ParameterList, optimizer: torch.optim.AdamW, rate: float, max_norm: float) -> torch.Tensor:
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    return norm


def assert_same(models: list[nn.ParameterList], optimizers: list[torch.optim.AdamW]) -> None:
    for one, other in zip(*models, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        mine, theirs = (optimizer.state[p] for optimizer, p in zip(optimizers, (one, other), strict=True))
        assert set(mine) == set(theirs)
        for name, moment in theirs.items():
            torch.testing.assert_close(mine[name], moment, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_the_whole_is_trained_as_its_parts_would_be(micro_steps):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 1)).to(DEVICE)
    twin = copy.deepcopy(model)
    flat = FlatParameters(model.parameters())
    optimizers = [torch.optim.AdamW(each, 0.1, **SETTINGS) for each in ([flat.whole], twin.parameters())]
    clipped = []
    for step in range(4):
        for micro in range(micro_steps):
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * step + micro)).to(DEVICE)
            for each in (model, twin):
                each[:3](x).square().sum().backward()  # the last layer has no gradient
            flat.gather()
        for parameter in twin[3].parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert all(p.grad is None for p in model.parameters())
        norms = [torch.nn.utils.clip_grad_norm_(each, 2.0) for each in ([flat.whole], twin.parameters())]
        clipped.append(float(norms[1]) > 2)
        torch.testing.assert_close(*norms)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert any(clipped)
    weights = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    assert bool((flat.whole == 0.5).all())
    model.double()
    with pytest.raises(RuntimeError, match="moved or cast"):
        flat.gather()


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize("done", [0, 3])
def test_steps_are_those_of_torch(max_norm, done):
    model, optimizer = make()
    for step in range(done):
        set_gradients(step, model)
        torch_step(model, optimizer, 0.02, max_norm)
    twin = copy.deepcopy(model)
    reference = torch.optim.AdamW(twin.parameters(), 1.0, **SETTINGS)
    reference.load_state_dict(optimizer.state_dict())
    set_gradients(0, model)
    flat = FlatAdamW(optimizer, max_norm)
    for step in range(done, done + 6):
        set_gradients(step, model, twin)
        rate = 0.01 * (1 + step)
        norm = flat.step(torch.tensor(rate, device=DEVICE))
        expected = torch_step(twin, reference, rate, max_norm)
        torch.testing.assert_close(norm, expected)
        assert_same([model, twin], [optimizer, reference])
        if step == done + 2:  # a parameter begins anew, with other values
            for parameters, each in ((model, optimizer), (twin, reference)):
                for n in (3, 5):
                    with torch.no_grad():
                        parameters[n].fill_(0.5)
                    for moment in each.state[parameters[n]].values():
                        moment.zero_()


def test_a_checkpoint_of_it_is_gone_on_from_by_torch(tmp_path):
    model, optimizer = make()
    set_gradients(0, model)
    flat = FlatAdamW(optimizer, 0.5)
    flat.step(torch.tensor(0.1, device=DEVICE))
    Checkpoints(tmp_path).save(1, model, optimizer, {})
    other, restored = make()
    content = load(tmp_path / "step_00000001")
    other.load_state_dict(content.weights)
    load_optimizer(restored, content)
    assert_same([model, other], [optimizer, restored])
    set_gradients(1, model, other)
    flat.step(torch.tensor(0.1, device=DEVICE))
    torch_step(other, restored, 0.1, 0.5)
    assert_same([model, other], [optimizer, restored])


def test_a_gradient_that_is_not_finite_shows_in_all_weights():
    model, optimizer = make()
    twin = copy.deepcopy(model)
    set_gradients(0, model, twin)
    for each in (model, twin):
        each[0].grad[3] = float("nan")
    norm = FlatAdamW(optimizer, 0.5).step(torch.tensor(0.1, device=DEVICE))
    torch_step(twin, torch.optim.AdamW(twin.parameters(), 1.0, **SETTINGS), 0.1, 0.5)
    assert norm.isnan()
    for one, other in zip(model, twin, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


def test_what_it_does_not_do_is_refused():
    model = nn.Linear(3, 2).to(DEVICE)
    model(torch.ones(3, device=DEVICE)).sum().backward()
    with pytest.raises(ValueError, match="amsgrad"):
        FlatAdamW(torch.optim.AdamW(model.parameters(), amsgrad=True), 1.0)


def test_the_operator_is_registered_completely():
    state, steps = torch.rand(3, 10, device=DEVICE), torch.zeros(2, device=DEVICE)
    ends = torch.tensor([4, 10], device=DEVICE)
    rate = torch.tensor(0.1, device=DEVICE)
    arguments = (state, steps, ends, torch.randn(10, device=DEVICE), rate, 1.0, 0.9, 0.999, 1e-8, 0.01)
    torch.library.opcheck(clipped_adamw, arguments)
