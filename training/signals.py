"""SIGTERM and SIGINT: every process stops after the same step."""

import os
import signal
import time
from types import FrameType

import torch
from torch import distributed

REPEATED = 2.0  # seconds in which a second signal counts as the first: terminal and launcher both send one


class Stopped(Exception):
    """A run that was asked to stop and has saved where it is."""

    def __init__(self, signum: int, step: int) -> None:
        self.status = 128 + signum  # what a shell reports of a process that a signal has ended
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} after step {step}, and saved; the same command goes on from there")


class StopSignal:
    """While entered, SIGTERM and SIGINT don't end the process but are asked for after each step. The processes agree
    through the host: one integer is reduced (gloo) while a step runs and read after it, so neither the device nor
    another process is waited for. A second signal ends the process at once."""

    def __init__(self, num_processes: int) -> None:
        self._signum, self._time = 0, 0.0
        self._group = distributed.new_group(backend="gloo") if num_processes > 1 else None
        self._asked: tuple[distributed.Work, torch.Tensor] | None = None  # the reduction under way, and its result

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._asked is not None and kind in (None, Stopped):
            self._asked[0].wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self._signum:
            self._signum, self._time = signum, time.monotonic()
        elif time.monotonic() - self._time > REPEATED:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def after_step(self) -> int:
        """The signal to stop for, the same on every process; 0 for none. To be called after every step. Alone, a
        process sees its signal after the step it came in; several see it one step later."""
        if self._group is None:
            return self._signum
        agreed = 0
        if self._asked is not None:
            work, result = self._asked
            work.wait()
            agreed = int(result)
        result = torch.tensor([self._signum])
        work = distributed.all_reduce(result, distributed.ReduceOp.MAX, self._group, async_op=True)
        self._asked = work, result
        return agreed
