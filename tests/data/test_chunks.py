import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.chunks import encode_chunks

REPOSITORY = Path(__file__).parents[2]
TEXTS = [f"text {n}" for n in range(10)]
EXPECTED = np.array([[len(text), int(text[5:])] for text in TEXTS], dtype=np.float32)


class Encoder:
    """Counts the texts it gets, and is interrupted at the call of number `breaks_at`."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.seen, self.calls, self.breaks_at = [], 0, breaks_at

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.calls += 1
        if self.calls == self.breaks_at:
            raise KeyboardInterrupt
        self.seen += texts
        return np.array([[len(text), int(text[5:])] for text in texts], dtype=np.float64)


@pytest.mark.parametrize("size", [1, 3, 5, 10, 99])
def test_the_matrix_does_not_depend_on_the_chunks(tmp_path, size):
    encoder = Encoder()
    encode_chunks(encoder, TEXTS, size, tmp_path / "deep/x.npy")
    values = np.load(tmp_path / "deep/x.npy", mmap_mode="r")
    assert values.dtype == np.float32 and encoder.seen == TEXTS and encoder.calls == -(-10 // size)
    np.testing.assert_array_equal(values, EXPECTED)
    assert os.listdir(tmp_path / "deep") == ["x.npy"]


def test_an_interrupted_run_goes_on_with_the_missing_chunks(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encode_chunks(Encoder(breaks_at=3), TEXTS, 3, tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()
    encoder = Encoder()
    encode_chunks(encoder, TEXTS, 3, tmp_path / "x.npy")
    assert encoder.seen == TEXTS[6:]
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), EXPECTED)


def test_a_chunk_that_was_half_written_is_encoded_again(tmp_path, small_disk):
    with small_disk(130), pytest.raises(OSError, match="File too large: '.*000000.npy'"):
        encode_chunks(Encoder(), TEXTS, 4, tmp_path / "x.npy")
    encoder = Encoder()
    encode_chunks(encoder, TEXTS, 4, tmp_path / "x.npy")
    assert encoder.seen == TEXTS


def test_fresh_encodes_everything_and_chunks_of_another_size_are_not_mixed_in(tmp_path):
    for fresh, size in ((True, 3), (False, 4)):
        with pytest.raises(KeyboardInterrupt):
            encode_chunks(Encoder(breaks_at=3), TEXTS, 3, tmp_path / "x.npy")
        encoder = Encoder()
        encode_chunks(encoder, TEXTS, size, tmp_path / "x.npy", fresh)
        assert encoder.seen == TEXTS
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), EXPECTED)


def test_wrong_outputs_are_refused(tmp_path):
    for output, message in (
        (np.zeros((2, 2)), r"the encoder returned \(2, 2\) for 5 items"),
        (np.zeros(5), r"returned \(5,\)"),
        (np.array([[0], [0], [np.nan], [0], [0]]), r"the encoder: item 2 \('text 2'\) is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_chunks(lambda _, output=output: output, TEXTS, 5, tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"have \[1, 2\] columns"):
        encode_chunks(lambda texts: np.zeros((5, 1 + ("text 0" in texts))), TEXTS, 5, tmp_path / "x.npy")


TWO = """
import sys
from pathlib import Path
from accelerate import PartialState
import numpy as np
from data.chunks import encode_chunks
from tests.data.test_chunks import TEXTS, Encoder
state, folder = PartialState(cpu=True), Path(sys.argv[1])
place = folder / str(state.process_index) if len(sys.argv) > 2 else folder
encoder = Encoder()
for _ in range(2):
    encode_chunks(encoder, TEXTS, 3, place / "x.npy", fresh=True)
(folder / f"seen{state.process_index}").write_text(",".join(encoder.seen))
np.save(folder / f"from{state.process_index}.npy", np.load(folder / "x.npy"))
state.destroy_process_group()
"""


def two(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command += [str(folder / "two.py"), str(folder), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_two_processes_encode_their_shares_and_see_one_matrix(tmp_path):
    done = two(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [(tmp_path / f"seen{rank}").read_text().split(",") for rank in (0, 1)]
    assert seen == [(TEXTS[:3] + TEXTS[6:9]) * 2, (TEXTS[3:6] + TEXTS[9:]) * 2]
    for rank in (0, 1):
        np.testing.assert_array_equal(np.load(tmp_path / f"from{rank}.npy"), EXPECTED)


def test_processes_on_disks_of_their_own_are_told_so(tmp_path):
    done = two(tmp_path, "own disks")
    assert done.returncode != 0 and "the processes must share a disk" in done.stderr
    assert not (tmp_path / "0" / "x.npy").exists()
