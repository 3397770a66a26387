"""Several processes: how they start, what the main process sends to the others, and the sum of their gradients."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list
from torch import Tensor, nn

from training.checkpoint import Content

PATIENCE = timedelta(hours=2)  # how long processes wait for one that prepares the data, or writes to a slow disk


def start(amp: bool, mixed_precision_type: str, gradient_accumulate_every: int) -> Accelerator:
    """Joins the processes of the launch; alone, it is one process. mixed_precision_type: "fp16", "bf16", if amp."""
    return Accelerator(
        mixed_precision=mixed_precision_type if amp else "no",
        gradient_accumulation_steps=gradient_accumulate_every,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def end(accelerator: Accelerator) -> None:
    """Leaves the processes of the launch once all have come here: its launcher ends all when one has ended.

    The barrier also lets gloo's threads finish with the interpreter, which destroying the group would wait for.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()


@contextmanager
def in_turn(accelerator: Accelerator) -> Iterator[None]:
    """The main process first, then one process of each other node, then all: each finds the caches of those before.

    So data is prepared once where the nodes share a disk, and once a node where they don't.
    """
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        yield


def from_main(value: Any) -> Any:
    """The main process's value, on every process. It is small: it is pickled on its way."""
    return broadcast_object_list([value])[0]


def tensors_from_main(tensors: dict[str, Tensor] | None, accelerator: Accelerator) -> dict[str, Tensor]:
    """The main process's tensors, on every process; the other processes give None."""
    if accelerator.num_processes == 1:
        return tensors
    layout = from_main({name: (tensor.shape, tensor.dtype) for name, tensor in (tensors or {}).items()})
    result = {}
    for name, (shape, dtype) in layout.items():
        value = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name]
        result[name] = broadcast(value.to(accelerator.device))
    return result


def content_from_main(content: Content | None, accelerator: Accelerator) -> Content | None:
    """The checkpoint the main process has read, on every process; None where it has none."""
    state = from_main(None if content is None else content.state)
    if state is None:
        return None
    weights = tensors_from_main(content and content.weights, accelerator)
    return Content(weights, tensors_from_main(content and content.moments, accelerator), state)


def weights_from_main(model: nn.Module) -> None:
    """Gives the model of every process the main one's weights and saved buffers, in place."""
    for tensor in model.state_dict().values():
        broadcast(tensor)


def sum_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Sums the gradients over all processes, in place, by one all-reduce, to the same bits on each.

    In place of hooks in the backward pass, so that each process can replay its passes as a recording of its own.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(joined)
    parts = joined.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])
