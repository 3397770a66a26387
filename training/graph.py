"""The tokenizer's training step; on a GPU one CUDA graph, replayed without asking the host."""

import torch
from torch import Tensor

from modules.rqvae import RqVae

WARMUP = 3  # steps that libraries and allocators need before a capture


class TokenizerStep:
    """Draws rows, runs the model forward and backward, clips, updates the weights and clears the gradients.

    x: [N, D], on the model's device. optimizer: on a GPU with `capturable=True`. The learning rate is a tensor that the
    graph reads. `__call__` returns the losses (total, reconstruction, quantization) as a tensor [3] and the norm
    of the gradient, which the next call overwrites, so that nothing waits for the device. Weights may be changed in
    place between two calls.
    """

    def __init__(
        self, model: RqVae, optimizer: torch.optim.Optimizer, x: Tensor, batch_size: int, max_norm: float
    ) -> None:
        self.model, self.optimizer, self.x, self.max_norm = model, optimizer, x, max_norm
        self.index = torch.zeros(batch_size, dtype=torch.int64, device=x.device)
        self.rate = torch.zeros((), device=x.device)
        self.temperature = torch.ones((), device=x.device)
        self.graph = torch.cuda.CUDAGraph() if x.device.type == "cuda" else None
        if self.graph is not None:
            self._capture()

    def __call__(self, index: Tensor, rate: float, temperature: float) -> tuple[Tensor, Tensor]:
        """index: [B] int64, rows of the batch, on any device."""
        self.index.copy_(index, non_blocking=True)
        self.temperature.fill_(temperature)
        if self.graph is None:
            return self._step(rate)
        self.rate.fill_(rate)
        self.graph.replay()
        return self.output

    def _step(self, rate: Tensor | float) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        out = self.model(self.x[self.index], self.temperature)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([out.loss, out.reconstruction_loss, out.quantize_loss]).detach(), norm

    def _capture(self) -> None:
        """Warms up, captures, and puts weights and moments back as they were."""
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        moments = [tensor.clone() for tensor in self._moments()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._step(self.rate)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.output = self._step(self.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # a number again, for those who save the optimizer
        self.model.load_state_dict(weights)
        for n, tensor in enumerate(self._moments()):
            tensor.copy_(moments[n] if moments else torch.zeros_like(tensor))  # new ones start at zero

    def _moments(self) -> list[Tensor]:
        return [tensor for state in self.optimizer.state.values() for tensor in state.values()]
