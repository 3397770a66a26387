"""Steps of training as CUDA graphs: recorded once for each shape, then replayed without the host in between."""

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WARMUP = 3  # calls before a recording, in which libraries choose their kernels


def record(function: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what the function does on the GPU, and what it returns, which each replay overwrites. The function is
    called some times before, with all its effects. pool: that of another graph, to share its memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, as one of NCCL's, may ask the device for something meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = function()
    return graph, output


@dataclass(frozen=True)
class Recording:
    """A graph, the tensors that it reads, the one that it returns, and the gradients that it writes."""

    graph: torch.cuda.CUDAGraph
    places: list[Tensor]
    output: Tensor
    gradients: list[Tensor | None]


class Replay:
    """Calls a function that adds to the gradients of parameters, and returns a tensor that the next call overwrites.

    parameters: those whose gradients it leaves changed. state: other tensors that it changes, as moving averages.
    function(size, *inputs): all else that varies from call to call comes in the inputs, and no step of it may ask the
    device for a number. recorded: record every size and shape at its first call, which needs a GPU; otherwise the
    function is called. Recorded passes write gradients of their own, which cost nothing to clear: let
    `zero_grad(set_to_none=True)` do that.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        recorded: bool,
        state: Iterable[Tensor] = (),
    ) -> None:
        self._function, self._parameters, self._device = function, list(parameters), device
        self._state = list(state)
        self._recordings: dict[tuple, Recording] | None = {} if recorded else None
        self.recording = 0.0  # seconds spent on it

    def __call__(self, size: Hashable, *inputs: Tensor) -> Tensor:
        """inputs: on any device."""
        if self._recordings is None:
            return self._function(size, *(tensor.to(self._device) for tensor in inputs))
        before = [p.grad.clone() if p.grad is not None else None for p in self._parameters]  # of passes before
        key = (size, *(tensor.shape for tensor in inputs))
        if key not in self._recordings:
            start = time.perf_counter()
            self._recordings[key] = self._record(size, inputs)
            self.recording += time.perf_counter() - start
        recording = self._recordings[key]
        for place, tensor in zip(recording.places, inputs, strict=True):
            place.copy_(tensor, non_blocking=True)
        recording.graph.replay()
        for parameter, gradient, old in zip(self._parameters, recording.gradients, before, strict=True):
            parameter.grad = gradient if old is None else gradient.add_(old) if gradient is not None else old
        return recording.output

    def _record(self, size: Hashable, inputs: tuple[Tensor, ...]) -> Recording:
        """Leaves the random numbers to come and the state as they were, and no gradients."""
        random, before = torch.cuda.get_rng_state(self._device), [tensor.clone() for tensor in self._state]
        places = [tensor.to(self._device, copy=True) for tensor in inputs]

        def passes() -> Tensor:
            for parameter in self._parameters:
                parameter.grad = None
            return self._function(size, *places)

        pool = next(iter(self._recordings.values())).graph.pool() if self._recordings else None
        graph, output = record(passes, pool)
        torch.cuda.set_rng_state(random, self._device)
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        return Recording(graph, places, output, [p.grad for p in self._parameters])
