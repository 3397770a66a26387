"""Parameters in one stretch of memory, so that an optimizer has one tensor to launch kernels for instead of many."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatParameters:
    """Parameters that become views of one, `flat`, which an optimizer takes in their place.

    A model trains on its own parameters; `collect_grads`, after each backward pass, hands their gradients to `flat`.
    They can still be read, saved and loaded in place, but not moved or cast. A part without a gradient counts as one
    with gradient 0: unlike torch's, an optimizer's weight decay and momentum move it.
    parameters: those without `requires_grad` are left out; if none are left, `flat` is empty and gets no gradient.
    flat: [sum of the sizes], on the device and in the dtype of the parameters, which must agree in both.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parts = [parameter for parameter in parameters if parameter.requires_grad]
        values = [part.detach().flatten() for part in self._parts]
        self.flat = nn.Parameter(torch.cat(values) if values else torch.empty(0))
        for part, view in zip(self._parts, self._views(self.flat.detach()), strict=True):
            part.data = view

    def collect_grads(self) -> None:
        """Adds the parts' gradients to that of `flat`, and clears them.

        RuntimeError where the parts have been moved or cast since, as by `model.double()`.
        """
        if not self._parts:
            return
        if self._parts[0].data_ptr() != self.flat.data_ptr():
            raise RuntimeError("The model was moved or cast after FlatParameters was made; make it after that.")
        gradients = [part.grad if part.grad is not None else torch.zeros_like(part) for part in self._parts]
        gradient = torch.empty_like(self.flat)
        torch._foreach_copy_(self._views(gradient), gradients)  # torch.cat took 145 us of a step of 3.4 ms
        self.flat.grad = gradient if self.flat.grad is None else self.flat.grad.add_(gradient)
        for part in self._parts:
            part.grad = None

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The parts' places in a tensor [sum of the sizes]."""
        stretches = flat.split([part.numel() for part in self._parts])
        return [stretch.view_as(part) for stretch, part in zip(stretches, self._parts, strict=True)]
