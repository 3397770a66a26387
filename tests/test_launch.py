"""Under a real launcher: what happens to the others when one process fails, or when the launcher is told to stop.
And in an interpreter that can't import Triton."""

import os
import subprocess
import sys

from tests.pipeline import REPOSITORY, bindings, write_raw
from training.checkpoint import Checkpoints

SCRIPT = """
import os, signal
import train_decoder
from tests.children import in_step
from training import cli

def fail():
    raise ValueError("the disk of this machine is gone")

def stop_the_launcher():
    os.kill(os.getppid(), signal.SIGTERM)

if os.environ["RANK"] == "1":
    in_step(5, {action})
cli.run(train_decoder.train, "")
"""

WITHOUT_TRITON = """
import sys
from pathlib import Path
sys.modules["triton"] = None  # every import of it raises ImportError
from tests.pipeline import run
for stage in ("rqvae", "decoder"):
    run(Path(sys.argv[1]), stage, "train.iterations = 3")
"""


def torchrun(trained, root, action: str) -> subprocess.CompletedProcess:
    """Two processes of stage 2, the second of which does something in its fifth step."""
    root.mkdir()
    (root / "script.py").write_text(SCRIPT.format(action=action))
    config = bindings(trained, "decoder", f'train.save_dir_root = "{root}/run"')
    (root / "decoder.gin").write_text("\n".join(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(root / "script.py"), str(root / "decoder.gin")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_process_that_fails_ends_all_with_its_error_shown(trained, tmp_path):
    done = torchrun(trained, tmp_path / "fail", "fail")
    assert done.returncode == 1
    assert "error: the disk of this machine is gone" in done.stderr


def test_a_launcher_that_is_told_to_stop_leaves_a_checkpoint(trained, tmp_path):
    done = torchrun(trained, tmp_path / "stop", "stop_the_launcher")
    assert done.returncode != 0
    assert "stopped by SIGTERM after step" in done.stderr
    newest = Checkpoints(tmp_path / "stop" / "run" / "checkpoints").newest()
    assert 5 <= int(newest.name.split("_")[1]) < 300


def test_both_stages_run_without_triton(tmp_path):
    write_raw(tmp_path)
    command = [sys.executable, "-c", WITHOUT_TRITON, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "decoder" / "metrics.json").is_file()
