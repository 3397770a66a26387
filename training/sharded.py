"""AdamW whose moments and work the processes of a launch share."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.flat import FlatParameters


class ShardedAdamW(torch.optim.AdamW):
    """AdamW of flat parameters; each of several processes keeps the moments of one stretch of each, and updates it.

    That is the second stage of ZeRO (Rajbhandari et al. 2020): gradients are summed stretch by stretch, and the new
    weights gathered, which together moves as much as summing all gradients everywhere. The weights, and the gradients
    of a pass, are whole on every process. `state_dict` is whole too, the same on any number of processes; it and
    `load_state_dict` are to be called on all of them.

    flats: one for each group, with its weight decay.
    """

    def __init__(
        self,
        flats: Sequence[FlatParameters],
        lr: float,
        weight_decays: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.flats = list(flats)
        groups = [
            {"params": flat.own, "weight_decay": weight_decay}
            for flat, weight_decay in zip(self.flats, weight_decays, strict=True)
        ]
        super().__init__(groups, lr, betas=betas, fused=True)

    def update(self, max_norm: float, scaler: torch.amp.GradScaler | None) -> Tensor:
        """Sums the gradients over all processes, clips them, makes the step, and clears them.

        Returns the norm before clipping, []. In fp16 a step whose gradient is not finite is left out.
        """
        own = [flat.own for flat in self.flats]
        for flat in self.flats:
            flat.sum_grads()
        if scaler is not None:
            if self.flats[0].n_shares > 1:  # what is not finite in one stretch is so for all
                poison = self._norm(own) * 0
                for stretch in own:
                    if stretch.grad is not None:
                        stretch.grad.add_(poison)
            scaler.unscale_(self)
        norm = self._norm(own)
        nn.utils.clip_grads_with_norm_(own, max_norm, norm)
        if scaler is None:  # accelerate's own optimizer looks for packages in each step, which takes longer than a step
            self.step()
        else:
            scaler.step(self)
            scaler.update()
        self.zero_grad()
        for flat in self.flats:
            flat.gather()
        return norm

    def _norm(self, own: list[nn.Parameter]) -> Tensor:
        """Of the whole gradient, []."""
        norm = nn.utils.get_total_norm([stretch.grad for stretch in own if stretch.grad is not None])
        if self.flats[0].n_shares == 1:
            return norm
        squares = norm.square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def forget(self, flat: FlatParameters) -> None:
        """Starts anew for one of the flat parameters."""
        for moment in self.state.get(flat.own, {}).values():
            moment.zero_()

    def state_dict(self) -> dict:
        state = super().state_dict()
        for number, flat in enumerate(self.flats):
            moments = state["state"].get(number, {})
            state["state"][number] = {
                name: flat.whole(value) if value.ndim else value for name, value in moments.items()
            }
        return state

    def load_state_dict(self, state: dict) -> None:
        moments = {
            number: {name: self.flats[number].share(value) if value.ndim else value for name, value in own.items()}
            for number, own in state["state"].items()
        }
        super().load_state_dict({**state, "state": moments})
