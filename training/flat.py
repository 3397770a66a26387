"""Parameters in one stretch of memory, so that an optimizer has one tensor to launch kernels for instead of many."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatParameters:
    """Parameters that become views of one, `whole`, which an optimizer takes in their place.

    A model trains on its own parameters; `gather`, after each backward pass, hands their gradients to the whole.
    They can still be read, saved and loaded in place, but not moved or cast. A part without a gradient counts as one
    with gradient 0: unlike torch's, an optimizer's weight decay and momentum move it.
    whole: [sum of the sizes], on the device and in the dtype of the parameters, which must agree in both.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parts = list(parameters)
        self.whole = nn.Parameter(torch.cat([part.detach().flatten() for part in self._parts]))
        for part, view in zip(self._parts, self._views(self.whole.detach()), strict=True):
            part.data = view

    def gather(self) -> None:
        """Adds the parts' gradients to that of the whole, and clears them.

        RuntimeError where the parts have been moved or cast since, as by `model.double()`.
        """
        if self._parts[0].data_ptr() != self.whole.data_ptr():
            raise RuntimeError("The model was moved or cast after FlatParameters was made; make it after that.")
        gradients = [part.grad if part.grad is not None else torch.zeros_like(part) for part in self._parts]
        gradient = torch.empty_like(self.whole)
        torch._foreach_copy_(self._views(gradient), gradients)  # torch.cat took 145 us of a step of 3.4 ms
        self.whole.grad = gradient if self.whole.grad is None else self.whole.grad.add_(gradient)
        for part in self._parts:
            part.grad = None

    def _views(self, whole: Tensor) -> list[Tensor]:
        """The parts' places in a tensor [sum of the sizes]."""
        stretches = whole.split([part.numel() for part in self._parts])
        return [stretch.view_as(part) for stretch, part in zip(stretches, self._parts, strict=True)]


class FlatAdamW:
    """torch's AdamW in one kernel: clips the gradient and makes the optimizer's step, without asking the host.

    Made once the parameters have gradients; those without one are left alone, as torch leaves them. The others' values
    and the optimizer's state of them become views of `state` and `steps`, so that both can still be read, saved and
    changed in place where they were: through the model and `optimizer.state`.

    optimizer: `torch.optim.AdamW` with one group of float32 parameters on one device. Its rate is not read.
    """

    def __init__(self, optimizer: torch.optim.AdamW, max_norm: float) -> None:
        (group,) = optimizer.param_groups
        if group["amsgrad"] or group["maximize"]:
            raise ValueError("FlatAdamW is AdamW with amsgrad=False and maximize=False; the optimizer has one of them.")
        self._parameters = [p for p in group["params"] if p.grad is not None]
        self._settings = (max_norm, *group["betas"], group["eps"], group["weight_decay"])
        sizes = [p.numel() for p in self._parameters]
        device = self._parameters[0].device
        self._ends = torch.tensor(sizes, device=device).cumsum(0)
        self.state = torch.zeros(3, sum(sizes), device=device)  # values, first moments, second moments
        self.steps = torch.zeros(len(sizes), device=device)
        flat = [row.split(sizes) for row in self.state]
        for p, step, value, first, second in zip(self._parameters, self.steps, *flat, strict=True):
            views = {"step": step, "exp_avg": first.view_as(p), "exp_avg_sq": second.view_as(p)}
            for name, tensor in optimizer.state[p].items():  # empty before the first step
                views[name].copy_(tensor)
            optimizer.state[p] = views
            p.data = value.view_as(p).copy_(p.data)

    def step(self, rate: Tensor) -> Tensor:
        """Updates the parameters by their gradients. rate: [], on their device. Returns the norm before clipping."""
        from ops.triton.adamw import clipped_adamw

        grads = torch.cat([p.grad.flatten() for p in self._parameters])
        return clipped_adamw(self.state, self.steps, self._ends, grads, rate, *self._settings)
