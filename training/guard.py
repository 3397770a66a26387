"""A loss that is not finite ends the run, before it reaches a checkpoint."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.shuffle import Shuffler
from training.checkpoint import Checkpoints
from training.distributed import from_main

NEVER = 2**62
SHOWN = 10  # sample numbers in the message


class NonFiniteGuard:
    """Notices a non-finite loss in any step, but waits for the device only when asked to `check`. A gradient that is
    not finite counts as well, except in fp16: there the scaler skips such a step and lowers its scale."""

    def __init__(self, accelerator: Accelerator, shuffler: Shuffler, checkpoints: Checkpoints) -> None:
        self._accelerator, self._shuffler, self._checkpoints = accelerator, shuffler, checkpoints
        self._first_bad = torch.full((1,), NEVER, device=accelerator.device)

    def watch(self, step: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """To be called in every step, counted from 1."""
        zero = loss * 0  # NaN if it is not finite; `isfinite` would be four kernels
        if self._accelerator.scaler is None:
            zero = zero + gradient_norm * 0
        self._first_bad = torch.where(zero == 0, self._first_bad, self._first_bad.clamp_max(step))

    def check(self, model: nn.Module) -> None:
        """Raises FloatingPointError, on every process, if a step was not finite, or the weights are not now."""
        weights = [t for t in model.state_dict().values() if t.is_floating_point() and t.numel()]
        largest = nn.utils.get_total_norm(weights, math.inf)  # a few kernels for all
        first_bad = torch.where(largest.isfinite(), self._first_bad, self._first_bad.clamp_max(NEVER - 1))
        step = int(self._accelerator.gather(first_bad).min())
        if step == NEVER:
            return
        last = from_main(self._checkpoints.marked("LAST"))
        advice = f"The last checkpoint is {last or 'none'}. Lower train.learning_rate, or train without train.amp."
        if step == NEVER - 1:
            raise FloatingPointError(f"The weights are not finite, though every loss was. {advice}")
        index, _ = self._shuffler.draw(step - 1)
        recipe = f"Shuffler({self._shuffler.n}, {self._shuffler.batch_size}, {self._shuffler.seed}).draw({step - 1})"
        samples = " ".join(map(str, index[:SHOWN].tolist())) + (" ..." if len(index) > SHOWN else "")
        raise FloatingPointError(
            f"The loss or its gradient is not finite in step {step}. Its batch has the {len(index)} training samples "
            f"{samples} (data.shuffle: {recipe}). {advice}"
        )
