"""What lets a run be continued. What it then does is tested with the runs themselves."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.training.test_checkpoint import train_step
from training.run import Run

SETTINGS = {
    "keep_checkpoints": 3,
    "resume": True,
    "wandb_logging": False,
    "rate": 0.1,
    "sizes": (1, 2),
    "features": ["a"],
}
INPUTS = {"corpus": "12ab"}


class Model(nn.Sequential):
    def __init__(self, bias: bool = True, **config) -> None:
        super().__init__(nn.Linear(3, 2, bias))
        self.config = {"width": 2, **config}


def make(root, settings=None, inputs=None, **config) -> tuple[Run, dict, Model, torch.optim.Optimizer]:
    """A run, restored: run, state, model, optimizer."""
    device = torch.device("cpu")
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0, scaler=None, device=device)
    run, model = Run(str(root), SETTINGS | (settings or {}), INPUTS | (inputs or {}), accelerator), Model(**config)
    optimizer = torch.optim.AdamW(model.parameters())
    return run, run.restore(model, optimizer), model, optimizer


@pytest.fixture
def root(tmp_path):
    """A run that has logged steps 1 to 3, saved after step 2, and was killed."""
    run, state, model, optimizer = make(tmp_path)
    assert state == {"step": 0, "best": {}}
    train_step(model, optimizer)
    for step in (1, 2, 3):
        run.log(step, "train", {"loss": 1.5})
    run.save(2, model, optimizer, {}, improved=False)
    run.close()
    return tmp_path


def test_values_decide_and_what_is_known_by_content_may_have_moved(root):
    assert make(root, {"features": ["b"], "keep_checkpoints": 1, "sizes": [1, 2]})[1]["step"] == 2
    with pytest.raises(ValueError, match=r"(?s)another config:\n  train.rate: 0.1 -> 0.2\nChoose"):
        make(root, {"rate": 0.2})
    with pytest.raises(
        ValueError, match=r"  Model.depth: not there -> 4\n  Model.width: 2 -> 3\n  corpus: 12ab -> 34cd\n"
    ):
        make(root, inputs={"corpus": "34cd"}, width=3, depth=4)
    with pytest.raises(ValueError, match="already holds a run"):
        make(root, {"resume": False})
    assert len((root / "metrics.jsonl").read_text().splitlines()) == 2  # of the run that went on


def test_weights_of_an_earlier_version_are_refused_and_nothing_is_lost(root):
    log = (root / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"run of an earlier version, whose weights differ in 0.bias\. Choose"):
        make(root, bias=False)
    assert (root / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "spl', b"\0\0\0\n", b'"step"\n', b"\xff\n", b"{}\n\n"])
def test_a_log_is_cut_to_the_step_gone_on_from_whatever_its_end(root, tail):
    file = root / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + tail)
    assert make(root)[1]["step"] == 2
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
