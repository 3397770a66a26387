"""The step of the tokenizer against a loop written out; on a GPU the replayed graph against the same."""

import copy

import pytest
import torch

from modules.quantize import QuantizeMode
from modules.rqvae import RqVae
from ops.precision import matmul_precision
from train_rqvae import refit
from training.graph import TokenizerStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(x: torch.Tensor, model: RqVae, batch: int, steps: int, begun: int, tolerance: float) -> None:
    """Each step alone: both begin it with the same weights and moments. Among them is a refit of the codebooks.

    begun: steps that torch's optimizer has made before.
    """
    model.initialize(x, torch.Generator(DEVICE).manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, weight_decay=0.1, fused=True)

    def written_out(model: RqVae, optimizer: torch.optim.AdamW, index: torch.Tensor, rate: float) -> tuple:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        with matmul_precision("high" if DEVICE == "cuda" else "highest"):
            out = model(x[index.to(DEVICE)], 0.5)
            out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return torch.stack([out.loss, out.reconstruction_loss, out.quantize_loss]), norm

    for step in range(begun):
        written_out(model, optimizer, torch.arange(batch) + step, 0.01)
    twin = copy.deepcopy(model)
    twins = torch.optim.AdamW(twin.parameters(), 1.0, weight_decay=0.1, fused=True)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()
    step_once = TokenizerStep(model, optimizer, x, batch, max_norm=0.5)
    for step in range(steps):
        index, rate = torch.randperm(len(x))[:batch], 0.002 / (1 + step % 2)
        losses, norm = step_once(index, rate, 0.5)
        expected_losses, expected_norm = written_out(twin, twins, index, rate)
        torch.testing.assert_close(norm, expected_norm, atol=0, rtol=10 * tolerance)
        torch.testing.assert_close(losses, expected_losses, atol=0, rtol=10 * tolerance)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, twin.state_dict()[name], atol=tolerance, rtol=10 * tolerance)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            for name, moment in twins.state[other].items():
                torch.testing.assert_close(optimizer.state[one][name], moment, atol=tolerance, rtol=10 * tolerance)
                optimizer.state[one][name].copy_(moment)
        if step == steps // 2:
            for each, its in ((model, optimizer), (twin, twins)):
                refit(each, x, its, seed=1)
            assert float(optimizer.state[model.layers[0].embedding.weight].get("step", 0)) == 0
        model.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"codebook_mode": QuantizeMode.STE}, {"codebook_update": "ema"}, {"codebook_mode": QuantizeMode.SINKHORN}],
)
def test_steps_are_those_of_a_loop_written_out(options, begun):
    x = torch.randn(50, 6, device=DEVICE)
    model = RqVae(6, embed_dim=4, hidden_dims=(8,), codebook_size=5, **options).to(DEVICE).train()
    compare(x, model, 16, 5, begun, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_of_a_whole_model_are_those_of_a_loop_written_out():
    model = RqVae(768, embed_dim=32).to(DEVICE).train()
    compare(torch.randn(4000, 768, device=DEVICE), model, 640, 8, 2, 1e-4)
