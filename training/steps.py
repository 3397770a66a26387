"""What both scripts do around a step of training: its time, its log, its checkpoint, its end."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.shuffle import Shuffler
from training import distributed, report
from training.guard import NonFiniteGuard
from training.run import Run
from training.schedule import due
from training.signals import Stopped, StopSignal


class Steps:
    """The steps of a run from `start_step` on. While entered, a signal stops the run once a step is done and saved.
    run: its arguments of `train` say what is due when. losses: their names, the total first. ValueError where a batch
    of the shuffler is too small for the processes and micro-steps."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        shuffler: Shuffler,
        losses: Sequence[str],
        start_step: int,
    ) -> None:
        self._run, self._model, self._optimizer = run, model, optimizer
        self._names, self._batch_size, self._iterations = losses, shuffler.batch_size, run.settings["iterations"]
        processes = run.accelerator.num_processes
        self._n_shares = processes * run.settings["gradient_accumulate_every"]
        if self._n_shares > shuffler.batch_size:
            raise ValueError(
                f"A batch of {shuffler.batch_size} samples is too small for {self._n_shares} shares (processes x "
                "train.gradient_accumulate_every): raise train.batch_size."
            )
        self._guard = NonFiniteGuard(run.accelerator, shuffler, run.checkpoints)
        self._speed, self._stop = report.Speed(), StopSignal(processes)
        self._bar = report.progress(self._iterations, start_step, run.is_main)

    def __enter__(self) -> "Steps":
        self._stop.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bar.close()
        self._stop.__exit__(kind, *error)

    def start(self, learning_rate: float) -> None:
        """To be called as a step begins."""
        self._speed.start()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def shares(self, batch: Tensor) -> list[Tensor]:
        """What this process takes of a batch [B], for each micro-step; shares may differ by one row."""
        return list(self._own(batch.tensor_split(self._n_shares)))

    def even_shares(self, sizes: Tensor, *batch: Tensor) -> list[tuple[int, Tensor, *tuple[Tensor, ...]]]:
        """What this process takes of samples of unequal sizes [B] and of their tensors [B], for each micro-step: the
        sum of the sizes in the largest share that a process has then, its own sizes, its rows of each tensor."""
        if self._n_shares == 1:
            return [(int(sizes.sum()), sizes, *batch)]
        shares, sums = deal_out(sizes, self._n_shares)
        largest = sums.view(-1, self._run.accelerator.num_processes).amax(1).tolist()
        every = (sizes, *batch)
        return [(most, *(t[rows] for t in every)) for most, rows in zip(largest, self._own(shares), strict=True)]

    def _own(self, shares: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of this process, of all processes' in the first micro-step, the second ..."""
        return shares[self._run.accelerator.process_index :: self._run.accelerator.num_processes]

    def made(self, step: int, losses: Tensor, norm: Tensor, recording: float = 0.0) -> None:
        """To be called once the weights are updated; logs if due. FloatingPointError where a loss was not finite. step:
        counted from 1. losses: this process's part of them. norm: of the gradient. recording: the seconds that all
        steps spent on recordings, which count for no speed."""
        self._guard.watch(step, losses[0], norm)
        self._bar.update()
        if due(step, self._run.settings["log_every"], self._iterations):
            accelerator = self._run.accelerator
            values = dict(zip(self._names, accelerator.reduce(losses, "sum").tolist(), strict=True))
            values |= {"gradient_norm": float(norm), "learning_rate": self._optimizer.param_groups[0]["lr"]}
            speed = values["examples_per_second"] = self._speed.steps_per_second(recording) * self._batch_size
            if accelerator.scaler is not None:
                values["loss_scale"] = accelerator.scaler.get_scale()
            self._run.log(step, "train", values)
            self._bar.set_postfix(loss=f"{values['loss']:.3f}", examples=f"{speed:,.0f}/s", refresh=False)
            self._guard.check(self._model)
        self._speed.stop()

    def end(self, step: int, last: int, best: dict[str, float] | None = None, improved: bool = False) -> None:
        """To be called as a step ends; saves if due, improved, or stopped by a signal, which raises Stopped. last: the
        last step, unless a better checkpoint comes. best: metrics of the best one, this one if improved."""
        signum = self._stop.after_step()
        if signum or improved or due(step, self._run.settings["save_model_every"], last):
            self._guard.check(self._model)
            self._run.save(step, self._model, self._optimizer, best or {}, improved)
        if signum:
            self._bar.close()
            self._run.close(status=128 + signum)
            distributed.end(self._run.accelerator)
            raise Stopped(signum, step)


def deal_out(sizes: Tensor, n: int) -> tuple[list[Tensor], Tensor]:
    """Numbers of B samples in n shares of about equal sums of sizes, which may differ by one sample, and the sums [n].

    The samples are dealt out from the largest on, up and down the shares in turn: sums differ by the largest size at
    most. Of several processes, one that had more to do would make the others wait. sizes: [B], not negative."""
    order = sizes.argsort(stable=True, descending=True)
    shares = [torch.cat([order[k :: 2 * n], order[2 * n - 1 - k :: 2 * n]]) for k in range(n)]
    return shares, torch.stack([sizes[share].sum() for share in shares])
