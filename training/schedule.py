"""When things happen, and how large a step is."""

import math


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps, and after the last, happens after step number `step`
    (counted from 1). `every` = 0: only after the last."""
    return step == last or (every > 0 and step % every == 0)


def warmup_cosine(step: int, warmup: int, total: int, floor: float = 0.02) -> float:
    """Factor of the learning rate in step number `step` (counted from 0): linear to 1 over `warmup` steps, then
    half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def last_step(iterations: int, best: dict[str, float], patience: int) -> int:
    """Number of the last step, counted from 1: `patience` steps after the best one, at most `iterations`. best: "step"
    is that of the best validation so far; {} for none. patience 0: never before `iterations`."""
    return min(iterations, int(best["step"]) + patience) if patience and best else iterations
