import builtins
import errno
import itertools
import os
import shutil
import subprocess

import pytest
import torch
from torch import nn

from training.checkpoint import MODEL, OPTIMIZER, STATE, SUMS, Checkpoints, load, load_optimizer

FILES = (MODEL, OPTIMIZER, STATE, SUMS)


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    groups = [{"params": [model[0].weight, model[1].weight]}, {"params": [model[0].bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(steps):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained_state(steps: int) -> tuple[nn.Module, dict]:
    """A model, and its optimizer's state."""
    model, optimizer = trained(steps)
    return model, optimizer.state_dict()


def saved(folder, steps, best=(), keep: int = 3) -> Checkpoints:
    """Checkpoints after the given numbers of steps, each of its own weights."""
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, *trained_state(step), {"best": {"ndcg": step}}, step in best)
    return checkpoints


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_goes_on_from(checkpoints: Checkpoints, step: int) -> None:
    """The newest whole checkpoint is that of `step` and holds its weights and optimizer state."""
    path = checkpoints.newest()
    assert path.name == f"step_{step:08d}"
    content = load(path)
    (model, optimizer), (restored, fresh) = trained(step), trained(0)
    restored.load_state_dict(content.weights)
    load_optimizer(fresh, content)
    assert content.state["step"] == step
    train_step(model, optimizer)
    train_step(restored, fresh)
    for one, two in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(one, two)


def test_model_and_optimizer_continue_as_if_never_saved(tmp_path):
    assert_goes_on_from(saved(tmp_path, [3]), 3)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    content = load(saved(tmp_path, [3]).newest())
    model, _ = trained(0)
    with pytest.raises(ValueError, match="another version wrote it. Choose another train.save_dir_root"):
        load_optimizer(torch.optim.AdamW(model.parameters()), content)


def test_the_newest_stay_and_the_best_one_of_each_ones_time(tmp_path):
    checkpoints = saved(tmp_path, [1, 2, 3, 4, 5], best=(1, 4))
    assert names(tmp_path) == {"LAST", "BEST", *(f"step_0000000{step}" for step in (1, 3, 4, 5))}
    assert checkpoints.marked("LAST").name == "step_00000005"
    assert checkpoints.marked("BEST").name == checkpoints.best().name == "step_00000004"
    checkpoints.save(6, *trained_state(6), {})
    assert names(tmp_path) == {"LAST", "BEST", *(f"step_0000000{step}" for step in (4, 5, 6))}


def test_nothing_is_there_where_nothing_was_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.newest() is None and checkpoints.marked("LAST") is None
    with pytest.raises(FileNotFoundError, match="no best checkpoint"):
        checkpoints.best()


def test_the_checksums_are_those_of_sha256sum(tmp_path):
    folder = saved(tmp_path, [1]).newest()
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("OK") == 3


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-1],
    "extended": lambda content: content + b" ",
    "first bit flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "middle bit flipped": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 16]) + content[len(content) // 2 + 1 :]
    ),
    "last bit flipped": lambda content: content[:-1] + bytes([content[-1] ^ 128]),
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_taken(tmp_path, capsys, name, damage):
    checkpoints = saved(tmp_path, [1, 2], best=[1])
    file = tmp_path / "step_00000002" / name
    if DAMAGES[damage] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert_goes_on_from(checkpoints, 1)
    message = capsys.readouterr().err
    assert "step_00000002 is damaged" in message and "going on from step_00000001" in message
    checkpoints.save(2, *trained_state(2), {})
    assert_goes_on_from(checkpoints, 2)
    assert capsys.readouterr().err == ""


def test_damaged_checkpoints_alone_are_an_error_and_stay(tmp_path):
    checkpoints = saved(tmp_path, [1, 2])
    for step in (1, 2):
        (tmp_path / f"step_0000000{step}" / MODEL).write_bytes(b"")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="(?s)No checkpoint is whole.*step_00000002.*step_00000001"):
        checkpoints.newest()
    assert names(tmp_path) == before


def test_a_checkpoint_after_a_damaged_one_replaces_it(tmp_path):
    checkpoints = saved(tmp_path, [1, 5])
    (tmp_path / "step_00000005" / MODEL).write_bytes(b"")
    checkpoints.resume(checkpoints.newest())
    checkpoints.save(3, *trained_state(3), {})
    assert names(tmp_path) == {"LAST", "step_00000001", "step_00000003"}


def test_going_on_from_an_older_checkpoint_takes_its_best_one(tmp_path):
    checkpoints = saved(tmp_path, [1, 2, 3], best=(1, 3))
    (tmp_path / "step_00000003" / STATE).write_bytes(b"")
    assert checkpoints.resume(checkpoints.newest()).state["best"] == {"ndcg": 2}
    assert checkpoints.best().name == "step_00000001"
    assert checkpoints.marked("LAST").name == "step_00000002"


def test_a_damaged_best_checkpoint_is_forgotten_with_a_warning(tmp_path, capsys):
    checkpoints = saved(tmp_path, [1, 2], best=[1])
    (tmp_path / "step_00000001" / MODEL).write_bytes(b"")
    with pytest.raises(ValueError, match="step_00000001 is damaged"):
        checkpoints.best()
    state = checkpoints.resume(checkpoints.newest()).state
    assert (state["step"], state["best_step"], state["best"]) == (2, None, {})
    assert checkpoints.marked("BEST") is None
    assert "step_00000001 is damaged" in capsys.readouterr().err


class Faults:
    """Lets the n-th call that changes the disk fail, after half of its bytes if it writes: by an error as of a full
    disk, or by the end of the process."""

    CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")

    def __init__(self, patch: pytest.MonkeyPatch, n: int, kill: bool) -> None:
        self.left, self.kill = n, kill
        for name in self.CALLS:
            patch.setattr(os, name, self.counted(getattr(os, name)))
        patch.setattr(builtins, "open", self.opening(builtins.open))

    def fails_now(self) -> bool:
        self.left -= 1
        return self.left == 0

    def fail(self) -> None:
        if self.kill:
            os._exit(9)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def counted(self, call):
        def wrapper(*args, **kwargs):
            if self.fails_now():
                self.fail()
            return call(*args, **kwargs)

        return wrapper

    def opening(self, call):
        def wrapper(path, mode="r", *args, **kwargs):
            file = call(path, mode, *args, **kwargs)
            if "w" not in mode:
                return file
            if self.fails_now():  # the file is there, and empty
                self.fail()
            write = file.raw.write if hasattr(file, "raw") else file.write

            def half(content):
                if self.fails_now():
                    write(content[: len(content) // 2])
                    self.fail()
                return write(content)

            return _Writer(file, half)

        return wrapper


class _Writer:
    """A file of which `write` is replaced."""

    def __init__(self, file, write) -> None:
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("kill", [False, True], ids=["full disk", "killed"])
def test_a_failure_at_any_write_leaves_a_checkpoint_to_go_on_from(tmp_path, kill):
    saved(tmp_path / "before", [1, 2], best=[1])
    model, optimizer = trained(3)
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "before", folder)
        checkpoints = Checkpoints(folder, keep=2)

        def save(checkpoints=checkpoints, n=n) -> bool:
            """Whether the n-th call, if there was one, failed."""
            with pytest.MonkeyPatch.context() as patch:
                faults = Faults(patch, n, kill)
                try:
                    checkpoints.save(3, model, optimizer.state_dict(), {"best": {"ndcg": 3}}, best=True)
                except OSError:
                    return True
            return faults.left <= 0  # mkdir may fail where the folder is there already

        failed = in_child(save) if kill else save()
        newest = checkpoints.newest()
        content = checkpoints.resume(newest)
        assert_goes_on_from(checkpoints, content.state["step"])
        assert checkpoints.best().name == {2: "step_00000001", 3: "step_00000003"}[content.state["step"]]
        checkpoints.save(4, *trained_state(4), {})
        assert_goes_on_from(checkpoints, 4)
        assert not [name for name in names(folder) if name.startswith(".step") or name.startswith(".removed")]
        if not failed:
            break
    assert n > 30  # so many calls change the disk


def in_child(save) -> bool:
    """Whether the child was ended by the fault."""
    child = os.fork()
    if child == 0:
        save()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("size", [0, 1, 100, 200, 290, 500, 800])
def test_a_file_that_the_system_cuts_off_is_an_error(tmp_path, small_disk, size):
    """The real thing: the kernel takes no more than `size` bytes a file."""
    checkpoints = saved(tmp_path, [1])
    contents = [len((tmp_path / "step_00000001" / name).read_bytes()) for name in FILES]
    assert max(contents) > 800
    with small_disk(size), pytest.raises(OSError, match="File too large"):
        checkpoints.save(2, *trained_state(2), {})
    assert_goes_on_from(checkpoints, 1)
