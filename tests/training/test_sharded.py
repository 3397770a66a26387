"""AdamW shared by processes against torch's own over the whole, and its state on other numbers of processes."""

import os

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


def run(process: int, processes: int, file: str, results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=process, world_size=processes)
    model = parts()
    flats = [FlatParameters(part.parameters()) for part in model]
    optimizer, norms = ShardedAdamW(flats, RATE, DECAYS, betas=(0.8, 0.99)), []
    for step in range(STEPS):
        gradients(model, step, process)
        for flat in flats:
            flat.collect_grads()
        norms.append(float(optimizer.update(MAX_NORM, None)))
        state = optimizer.state_dict()
        again = ShardedAdamW(flats, RATE, DECAYS, betas=(0.8, 0.99))  # goes on from what the one before left
        again.load_state_dict(state)
        optimizer = again
    weights = torch.cat([p.detach().flatten() for part in model for p in part.parameters()])
    held = [int(optimizer.state[flat.own]["exp_avg"].numel()) for flat in flats]
    state = optimizer.state_dict()["state"]
    moments = [state[n]["exp_avg_sq"].tolist() for n in range(2)]
    results.put((process, weights.tolist(), norms, held, moments))
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_what_one_optimizer_would_do(tmp_path, processes):
    weights, norms, state = whole(processes)
    assert min(norms) > MAX_NORM  # it clips
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(run, (processes, str(tmp_path / "group"), results), processes, join=True)
    for _, found, own_norms, held, moments in [results.get() for _ in range(processes)]:
        torch.testing.assert_close(torch.tensor(found), weights)
        torch.testing.assert_close(torch.tensor(own_norms), torch.tensor(norms))
        assert held == [-(-18 // processes), -(-4 // processes)]
        for n, (moment, numbers) in enumerate(zip(moments, ((0, 1), (2, 3)), strict=True)):
            expected = torch.cat([state["state"][i]["exp_avg_sq"].flatten() for i in numbers])
            torch.testing.assert_close(torch.tensor(moment), expected, msg=f"flat {n}")


def test_one_process_is_torchs_optimizer_and_one_part_can_start_anew():
    weights, norms, _ = whole(1)
    model = parts()
    flats = [FlatParameters(part.parameters()) for part in model]
    optimizer, own_norms = ShardedAdamW(flats, RATE, DECAYS, betas=(0.8, 0.99)), []
    for step in range(STEPS):
        gradients(model, step, 0)
        for flat in flats:
            flat.collect_grads()
        own_norms.append(float(optimizer.update(MAX_NORM, None)))
    torch.testing.assert_close(torch.cat([flat.flat.detach() for flat in flats]), weights)
    torch.testing.assert_close(torch.tensor(own_norms), torch.tensor(norms))
    optimizer.forget(flats[0])
    first, second = (optimizer.state[flat.own] for flat in flats)
    assert not any(bool(value.any()) for value in first.values()) and bool(second["exp_avg"].any())
