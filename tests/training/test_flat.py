"""Parameters and AdamW on flat memory against torch's optimizer and clipping of the parameters one by one."""

import copy

import pytest
import torch
from torch import nn

from tests.ops.triton.device import DEVICE
from training.flat import FlatParameters

SETTINGS = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1, "fused": True}


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_flat_parameters_are_trained_as_its_parts_would_be(micro_steps):
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 1)).to(DEVICE)
    twin = copy.deepcopy(model)
    flat = FlatParameters(model.parameters())
    optimizers = [torch.optim.AdamW(each, 0.1, **SETTINGS) for each in ([flat.flat], twin.parameters())]
    clipped = []
    for step in range(4):
        for micro in range(micro_steps):
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * step + micro)).to(DEVICE)
            for each in (model, twin):
                each[:3](x).square().sum().backward()  # the last layer has no gradient
            flat.collect_grads()
        for parameter in twin[3].parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert all(p.grad is None for p in model.parameters())
        norms = [torch.nn.utils.clip_grad_norm_(each, 2.0) for each in ([flat.flat], twin.parameters())]
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
    assert bool((flat.flat == 0.5).all())
    model.double()
    with pytest.raises(RuntimeError, match="moved or cast"):
        flat.collect_grads()


def test_what_needs_no_gradient_stays_where_it_is():
    model = nn.Linear(2, 3).requires_grad_(False)
    flat = FlatParameters(model.parameters())
    flat.collect_grads()
    optimizer = torch.optim.AdamW([flat.flat], 0.1, fused=True)
    optimizer.step()
    assert len(flat.flat) == 0 and flat.flat.grad is None and optimizer.state_dict()["state"] == {}
