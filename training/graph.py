"""The tokenizer's training step; on a GPU one CUDA graph, replayed without asking the host."""

import torch
from torch import Tensor

from modules.rqvae import RqVae
from ops.precision import matmul_precision
from training.flat import FlatAdamW
from training.replay import record


class TokenizerStep:
    """Draws rows, runs the model forward and backward, clips, updates the weights and clears the gradients.

    x: [N, D], on the model's device; a standardized copy of it is kept. optimizer: with one group of parameters. On a
    GPU the step's matrix products are in TF32, weights and the optimizer's state move into stretches of memory of their
    own (`training.flat`), and the graph reads the learning rate from the device.
    `__call__` returns the losses (total, reconstruction, quantization) as a tensor [3] and the norm of the
    gradient, which the next call overwrites, so that nothing waits for the device. Weights and the optimizer's state
    may be changed in place between two calls, but not the constants of the standardization.
    """

    def __init__(self, model: RqVae, optimizer: torch.optim.AdamW, x: Tensor, batch_size: int, max_norm: float) -> None:
        self.model, self.optimizer, self.x, self.max_norm = model, optimizer, model.normalized(x), max_norm
        self.index = torch.zeros(batch_size, dtype=torch.int64, device=x.device)
        self.shares = torch.full((batch_size,), 1 / batch_size, device=x.device)  # of the rows in the mean loss
        self.settings = torch.tensor([0.0, 1.0], device=x.device)  # learning rate, temperature
        self.graph = self._capture() if x.is_cuda else None

    def __call__(self, index: Tensor, rate: float, temperature: float) -> tuple[Tensor, Tensor]:
        """index: [B] int64, rows of the batch, on any device."""
        self.index.copy_(index, non_blocking=True)
        if self.graph is None:
            return self._step(rate, temperature)
        self.settings.copy_(torch.tensor([rate, temperature]), non_blocking=True)
        self.graph.replay()
        return self.output

    def _step(self, rate: float, temperature: float) -> tuple[Tensor, Tensor]:
        losses = self._passes(temperature)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses, norm

    def _passes(self, temperature: Tensor | float) -> Tensor:
        """Forward, and backward from the mean over rows. Returns the losses [3]."""
        rows = self.model.row_losses(self.x.index_select(0, self.index), temperature)[:2]
        torch.autograd.backward(rows, [self.shares, self.shares])
        reconstruction, quantization = (part.detach() for part in rows)
        return torch.stack([reconstruction + quantization, reconstruction, quantization]).mean(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Puts weights and moments back as they were."""
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        rate, temperature = self.settings
        self._passes(temperature)  # shows which parameters have a gradient
        self.flat = flat = FlatAdamW(self.optimizer, self.max_norm)  # kept: the graph reads its tensors
        self.optimizer.zero_grad(set_to_none=True)
        before = flat.state.clone(), flat.steps.clone()

        def step() -> tuple[Tensor, Tensor]:
            losses = self._passes(temperature)
            norm = flat.step(rate)
            self.optimizer.zero_grad(set_to_none=True)
            return losses, norm

        with matmul_precision("high"):
            graph, self.output = record(step)
        flat.state.copy_(before[0])
        flat.steps.copy_(before[1])
        self.model.load_state_dict(weights)  # moving averages as well
        return graph
