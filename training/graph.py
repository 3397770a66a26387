"""The tokenizer's training step; on a GPU one CUDA graph, replayed without asking the host."""

import torch
from torch import Tensor

from modules.rqvae import RqVae
from ops.precision import matmul_precision
from training.replay import record


class TokenizerStep:
    """Draws rows, runs the model forward and backward, clips, updates the weights and clears the gradients.

    x: [N, D], on the model's device; a standardized copy of it is kept. optimizer: on a GPU with `capturable=True`.
    There the step's matrix products are in TF32, and the learning rate is a tensor that the graph reads.
    `__call__` returns the losses (total, reconstruction, quantization) as a tensor [3] and the norm of the
    gradient, which the next call overwrites, so that nothing waits for the device. Weights may be changed in place
    between two calls, but not the constants of the standardization.
    """

    def __init__(
        self, model: RqVae, optimizer: torch.optim.Optimizer, x: Tensor, batch_size: int, max_norm: float
    ) -> None:
        self.model, self.optimizer, self.x, self.max_norm = model, optimizer, model.normalized(x), max_norm
        self.index = torch.zeros(batch_size, dtype=torch.int64, device=x.device)
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

    def _step(self, rate: Tensor | float, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        out = self.model.autoencode(self.x.index_select(0, self.index), temperature)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([out.loss, out.reconstruction_loss, out.quantize_loss]).detach(), norm

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Puts weights and moments back as they were."""
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        moments = [tensor.clone() for tensor in self._moments()]
        with matmul_precision("high"):
            graph, self.output = record(lambda: self._step(*self.settings))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # a number again, for those who save the optimizer
        self.model.load_state_dict(weights)
        for n, tensor in enumerate(self._moments()):
            tensor.copy_(moments[n] if moments else torch.zeros_like(tensor))  # new ones start at zero
        return graph

    def _moments(self) -> list[Tensor]:
        return [tensor for state in self.optimizer.state.values() for tensor in state.values()]
