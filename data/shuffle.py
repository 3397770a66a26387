"""Which samples make a batch, and random numbers, as pure functions of a seed and the step."""

import hashlib

import torch
from torch import Tensor


class Shuffler:
    """Which samples make the global batch of a step, as a pure function of (seed, step).

    n: samples. An epoch is a permutation of them cut into batches of `batch_size` (n, if that is less); what
    fills no batch is left out, and comes in another epoch. groups: [n] int64, samples that share their uniform number
    of an epoch, as the windows of a user do; None: no two do.
    """

    def __init__(self, n: int, batch_size: int, seed: int, groups: Tensor | None = None) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"Cannot draw batches of {batch_size} from {n} training samples.")
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self._groups = torch.arange(n) if groups is None else groups
        self._epoch, self._order, self._uniform = -1, torch.empty(0), torch.empty(0)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Sample numbers [B] int64 and a uniform number in [0, 1) for each [B] float64, on the CPU."""
        epoch, place = divmod(step, self.n // self.batch_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
            groups = int(self._groups.max()) + 1
            self._uniform = torch.rand(groups, dtype=torch.float64, generator=generator)
        index = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        return index, self._uniform[self._groups[index]]


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on all parts; streams with different parts are independent."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def seed_noise(seed: int, device: torch.device) -> None:
    """Seeds the random numbers drawn on the device by default: dropout, Gumbel noise. On a GPU those alone:
    `torch.manual_seed` seeds all kinds of devices, which takes the host as long as a short step."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)
