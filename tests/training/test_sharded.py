"""AdamW shared by processes against torch's own over the whole, and its state on other numbers of processes."""

import os
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from training.flat import FlatParameters
from training.sharded import ShardedAdamW

SETTINGS = {"betas": (0.8, 0.99), "fused": True}
DECAYS, RATE, MAX_NORM, STEPS = (0.1, 0.0), 0.1, 0.5, 4


def parts(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return nn.Linear(5, 3), nn.Linear(3, 1)  # 18 and 4 numbers: three processes share them with padding


def gradients(model: tuple[nn.Module, nn.Module], step: int, process: int) -> None:
    """Each process's own, of both modules."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + process))
    model[1](model[0](x).tanh()).square().sum().backward()


def whole(processes: int) -> tuple[torch.Tensor, list[float], dict]:
    """torch's AdamW, the processes' gradients summed; weights, norms, state."""
    model = parts()
    groups = [{"params": list(part.parameters()), "weight_decay": d} for part, d in zip(model, DECAYS, strict=True)]
    optimizer, norms = torch.optim.AdamW(groups, RATE, **SETTINGS), []
    every = [p for part in model for p in part.parameters()]
    for step in range(STEPS):
        for process in range(processes):
            gradients(model, step, process)
        norms.append(float(nn.utils.clip_grad_norm_(every, MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in every]), norms, optimizer.state_dict()


def sharded(model: tuple[nn.Module, nn.Module], state: dict | None = None) -> ShardedAdamW:
    """That of the processes that there are now, which goes on from a state."""
    flats = [FlatParameters(part.parameters()) for part in model]
    optimizer = ShardedAdamW(flats, RATE, DECAYS, betas=(0.8, 0.99))
    if state is not None:
        optimizer.load_state_dict(state)
    return optimizer


def make_step(
    optimizer: ShardedAdamW, model: tuple[nn.Module, nn.Module], step: int, processes: Iterable[int]
) -> float:
    """With the gradients of some processes; the norm."""
    for process in processes:
        gradients(model, step, process)
    for flat in optimizer.flats:
        flat.collect_grads()
    return float(optimizer.update(MAX_NORM, None))


def overflow(last: bool) -> list[tuple[float, bool]]:
    """Two steps in fp16, in the first of which one number of the last process has an infinite gradient: the loss scale
    after each, and whether the weights are still those of before."""
    model = parts()
    optimizer, before = sharded(model), parts()[0].weight
    scaler, found = torch.amp.GradScaler("cpu", init_scale=4.0), []
    scaler.scale(torch.zeros(()))
    for infinite in (True, False):
        for p in (p for part in model for p in part.parameters()):
            p.grad = torch.ones_like(p)
        if infinite and last:
            model[1].bias.grad.fill_(torch.inf)
        for flat in optimizer.flats:
            flat.collect_grads()
        optimizer.update(MAX_NORM, scaler)
        found.append((scaler.get_scale(), torch.equal(model[0].weight, before)))
    return found


def run(process: int, processes: int, file: str, results: mp.SimpleQueue) -> None:
    """The first and the last step alone, those between together."""
    torch.set_num_threads(1)
    model = parts()
    optimizer = sharded(model)
    norms = [make_step(optimizer, model, 0, range(processes))]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=process, world_size=processes)
    for step in range(1, STEPS - 1):
        optimizer = sharded(model, optimizer.state_dict())
        norms.append(make_step(optimizer, model, step, [process]))
    held = [optimizer.state[flat.own]["exp_avg"].untyped_storage().nbytes() // 4 for flat in optimizer.flats]
    state, left_out = optimizer.state_dict(), overflow(process == processes - 1)
    dist.destroy_process_group()
    optimizer = sharded(model, state)
    norms.append(make_step(optimizer, model, STEPS - 1, range(processes)))
    weights = torch.cat([p.detach().flatten() for part in model for p in part.parameters()])
    moments = [optimizer.state_dict()["state"][n]["exp_avg_sq"].tolist() for n in range(2)]
    results.put((weights.tolist(), norms, held, moments, left_out))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_what_one_optimizer_would_do(tmp_path, processes):
    weights, norms, state = whole(processes)
    assert min(norms) > MAX_NORM  # it clips
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(run, (processes, str(tmp_path / "group"), results), processes, join=True)
    for found, own_norms, held, moments, left_out in [results.get() for _ in range(processes)]:
        torch.testing.assert_close(torch.tensor(found), weights)
        torch.testing.assert_close(torch.tensor(own_norms), torch.tensor(norms))
        assert held == [-(-18 // (4 * processes)) * 4, 4] and left_out == [(2.0, True), (2.0, False)]
        for n, (moment, numbers) in enumerate(zip(moments, ((0, 1), (2, 3)), strict=True)):
            expected = torch.cat([state["state"][i]["exp_avg_sq"].flatten() for i in numbers])
            torch.testing.assert_close(torch.tensor(moment), expected, msg=f"flat {n}")


def test_one_process_is_torchs_optimizer_and_one_part_can_start_anew():
    weights, norms, _ = whole(1)
    model = parts()
    optimizer = sharded(model)
    own_norms, flats = [make_step(optimizer, model, step, [0]) for step in range(STEPS)], optimizer.flats
    torch.testing.assert_close(torch.cat([flat.flat.detach() for flat in flats]), weights)
    torch.testing.assert_close(torch.tensor(own_norms), torch.tensor(norms))
    optimizer.forget(flats[0])
    first, second = (optimizer.state[flat.own] for flat in flats)
    assert not any(bool(value.any()) for value in first.values()) and bool(second["exp_avg"].any())
