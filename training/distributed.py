"""Several processes: how they start, and what the main process sends to the others."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Timer
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    get_int_from_env,
    parse_flag_from_env,
)
from torch import Tensor, nn

from training.checkpoint import CheckpointData

logger = logging.getLogger(__name__)
PROCESS_TIMEOUT = timedelta(hours=2)  # how long processes wait for one that prepares the data, or writes to a slow disk
ADVICE = "For a run of one process unset RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, which something has set."
FLAG = "1|0|y|n|t|f|yes|no|true|false|on|off"
SILENCE = 10.0  # seconds in which nothing is said
SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]  # of the launchers, and of MPI's
RANKS = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]
LOCAL_SIZES = ["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"]


def start(amp: bool = False, mixed_precision_type: str = "no", cpu: bool = False) -> Accelerator:
    """Joins the processes of the launch, whatever started them: each on a CUDA GPU of its own, or all on the CPU.
    mixed_precision_type: "fp16", "bf16", if amp. cpu: even where there is a GPU. Raises ValueError or ConnectionError
    where not all processes can take part, or the CPU is asked for fp16."""
    _check_environment()
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()  # never Apple's mps
    if amp and mixed_precision_type == "fp16" and cpu:
        raise ValueError('train.mixed_precision_type = "fp16" needs a GPU: set it to "bf16", or train.amp = False.')
    expected, local = (get_int_from_env(names, 1) for names in (SIZES, LOCAL_SIZES))
    if not cpu and local > torch.cuda.device_count():
        raise ValueError(f"{local} processes were started on a machine with {torch.cuda.device_count()} GPUs.")
    with _named_wait(expected):
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=mixed_precision_type if amp else "no",
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
    if accelerator.num_processes != expected:
        raise ValueError(
            f"{expected} processes were started, and this one is alone: start them by torchrun or accelerate launch, "
            "which set LOCAL_RANK."
        )
    return accelerator


def _check_environment() -> None:
    """ValueError that names a variable of the launcher with a value that can't be."""
    for name in {*SIZES, *RANKS, *LOCAL_SIZES, "LOCAL_RANK", "MASTER_PORT", "ACCELERATE_USE_CPU"} & os.environ.keys():
        if not re.fullmatch(FLAG if name == "ACCELERATE_USE_CPU" else r"-?\d+", value := os.environ[name], re.I):
            rule = "true or false" if name == "ACCELERATE_USE_CPU" else "a whole number"
            raise ValueError(f"The environment has {name} = {value!r}, which must be {rule}: set it so, or unset it.")
    rank, size = get_int_from_env(RANKS, 0), get_int_from_env(SIZES, 1)
    if rank >= size > 1:
        raise ValueError(f"The environment is of process {rank} of {size}, which are counted from 0. {ADVICE}")


@contextmanager
def _named_wait(expected: int) -> Iterator[None]:
    """Says what this process waits for, if the others don't come soon. expected: how many there are in all."""
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    rank = get_int_from_env(RANKS, 0)
    message = f"process {rank} waits at {address} for all {expected} to come. {ADVICE}"
    waiting = Timer(SILENCE, logger.warning, [message])
    waiting.daemon = True
    if expected > 1:
        waiting.start()
    try:
        yield
    except (torch.distributed.DistError, ValueError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        if expected == 1:
            rule = "unset what asks for it, LOCAL_RANK or a variable ACCELERATE_..."
            raise ValueError(f"Accelerate can't start as the environment says ({reason}): {rule}") from error
        raise ConnectionError(f"Process {rank} of {expected} can't join at {address} ({reason}). {ADVICE}") from error
    finally:
        waiting.cancel()


def end(accelerator: Accelerator) -> None:
    """Leaves the processes of the launch once all have come here: its launcher ends all when one has ended. The barrier
    also lets gloo's threads finish with the interpreter, which destroying the group would wait for."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def from_main(value: Any) -> Any:
    """The main process's value, on every process. It is small: it is pickled on its way."""
    return broadcast_object_list([value])[0]


def tensors_from_main(tensors: dict[str, Tensor] | None, accelerator: Accelerator) -> dict[str, Tensor]:
    """The main process's tensors, on every process; the other processes give None."""
    if accelerator.num_processes == 1:
        return tensors or {}
    layout = from_main({name: (tensor.shape, tensor.dtype) for name, tensor in (tensors or {}).items()})
    result = {}
    for name, (shape, dtype) in layout.items():
        value = torch.empty(shape, dtype=dtype) if tensors is None else tensors[name]
        result[name] = broadcast(value.to(accelerator.device))
    return result


def checkpoint_from_main(content: CheckpointData | None, accelerator: Accelerator) -> CheckpointData | None:
    """The checkpoint the main process has read, on every process; None where it has none."""
    state = from_main(None if content is None else content.state)
    if state is None:
        return None
    weights = tensors_from_main(content and content.weights, accelerator)
    return CheckpointData(weights, tensors_from_main(content and content.moments, accelerator), state)


def weights_from_main(model: nn.Module) -> None:
    """Gives the model of every process the main one's weights and saved buffers, in place."""
    for tensor in model.state_dict().values():
        broadcast(tensor)
