"""The step of the tokenizer against a loop written out; on a GPU the replayed graph against the same."""

import copy

import pytest
import torch

from modules.quantize import QuantizeMode
from modules.rqvae import RqVae
from ops.precision import matmul_precision
from training.graph import TokenizerStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "options",
    [{}, {"codebook_mode": QuantizeMode.STE}, {"codebook_update": "ema"}, {"codebook_mode": QuantizeMode.SINKHORN}],
)
def test_steps_are_those_of_a_loop_written_out(options):
    torch.manual_seed(0)
    x = torch.randn(50, 6, device=DEVICE)
    model = RqVae(6, embed_dim=4, hidden_dims=(8,), codebook_size=5, **options).to(DEVICE).train()
    model.initialize(x, torch.Generator(DEVICE).manual_seed(0))
    twin = copy.deepcopy(model)
    make = dict(weight_decay=0.1, fused=True)
    step_once = TokenizerStep(
        model, torch.optim.AdamW(model.parameters(), 1.0, **make, capturable=DEVICE == "cuda"), x, 16, max_norm=0.5
    )
    optimizer = torch.optim.AdamW(twin.parameters(), 1.0, **make)
    for step in range(5):
        index, rate = torch.randperm(50)[:16], 0.01 / (step + 1)
        losses, norm = step_once(index, rate, 0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        with matmul_precision("high" if DEVICE == "cuda" else "highest"):
            out = twin(x[index.to(DEVICE)], 0.5)
            out.loss.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        assert float(norm) == pytest.approx(float(expected_norm), rel=1e-4)
        assert losses.tolist() == pytest.approx(
            torch.stack([out.loss, out.reconstruction_loss, out.quantize_loss]).tolist()
        )
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, twin.state_dict()[name], atol=1e-5, rtol=1e-4)
        if step == 2:
            for each in (model, twin):  # weights may change between steps
                each.fit_codebooks(x, torch.Generator(DEVICE).manual_seed(1))
