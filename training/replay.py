"""Steps of training as CUDA graphs: recorded once for each shape, then replayed without the host in between."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Recording = tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]  # the graph, where it reads, and its output
WARMUP = 2  # calls before a recording, in which libraries choose their kernels


class Replay:
    """Calls a function that adds to the gradients of a model, and returns a tensor that the next call overwrites.

    model: None where the function leaves gradients alone.
    function(size, *inputs): all else that varies from call to call comes in the inputs, and no step of it may ask the
    device for a number. recorded: record every size and shape at its first call, which needs a GPU; otherwise the
    function is called.
    """

    def __init__(
        self, function: Callable[..., Tensor], model: nn.Module | None, device: torch.device, recorded: bool
    ) -> None:
        self._function, self._model, self._device = function, model, device
        self._recordings: dict[tuple, Recording] | None = {} if recorded else None

    def __call__(self, size: int, *inputs: Tensor) -> Tensor:
        """inputs: on any device."""
        if self._recordings is None:
            return self._function(size, *(tensor.to(self._device) for tensor in inputs))
        key = (size, *(tensor.shape for tensor in inputs))
        if key not in self._recordings:
            self._recordings[key] = self._record(size, inputs)
        graph, places, output = self._recordings[key]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return output

    def _record(self, size: int, inputs: tuple[Tensor, ...]) -> Recording:
        """Leaves the gradients and the random numbers to come as they were."""
        parameters = [p for p in self._model.parameters() if p.requires_grad] if self._model is not None else []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # the recording adds to what lies here
        gradients, random = [p.grad.clone() for p in parameters], torch.cuda.get_rng_state(self._device)
        places = [tensor.to(self._device, copy=True) for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._function(size, *places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._recordings.values()))[0].pool() if self._recordings else None
        with torch.cuda.graph(graph, pool=pool):
            output = self._function(size, *places)
        torch.cuda.set_rng_state(random, self._device)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)
        return graph, places, output
