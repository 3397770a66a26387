"""Steps of training as CUDA graphs: recorded once for each shape, then replayed without the host in between."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARMUP = 2  # calls before a recording, in which libraries choose their kernels


class Replay:
    """Calls a function that adds to the gradients of a model, and returns tensors that the next call overwrites.

    function(shape, *inputs): all that varies from call to call comes in the input tensors, whose shapes depend on
    `shape` alone; no step of it may ask the device for a number. On a GPU every shape is recorded at its first call;
    on a CPU the function is called.
    """

    def __init__(self, function: Callable[..., Tensor], model: nn.Module, device: torch.device) -> None:
        self.function, self.model, self.device = function, model, device
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, shape: int, *inputs: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return self.function(shape, *inputs)
        if shape not in self.recorded:
            self.recorded[shape] = self._record(shape, inputs)
        graph, places, output = self.recorded[shape]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return output

    def _record(self, shape: int, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """Leaves the gradients and the random numbers to come as they were."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # the recording adds to what lies here
        gradients, random = [p.grad.clone() for p in parameters], torch.cuda.get_rng_state(self.device)
        places = [tensor.to(self.device, copy=True) for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.function(shape, *places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.recorded.values()))[0].pool() if self.recorded else None
        with torch.cuda.graph(graph, pool=pool):
            output = self.function(shape, *places)
        torch.cuda.set_rng_state(random, self.device)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)
        return graph, places, output
