"""Rows arrive in order, from memory and from a file."""

import numpy as np
import pytest
import torch

from common.prefetch import stream

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("batch_size", [1, 7, 10, 64])
def test_the_chunks_are_the_rows_in_order(tmp_path, batch_size):
    x = torch.randn(50, 3)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    for source in (x, mapped, x.to(DEVICE)):
        chunks = list(stream(source, batch_size, DEVICE))
        assert all(chunk.device.type == DEVICE.type and len(chunk) <= batch_size for chunk in chunks)
        assert torch.equal(torch.cat(chunks).cpu(), x)


def test_of_nothing_there_are_no_chunks():
    assert list(stream(torch.empty(0, 3), 4, DEVICE)) == []


def test_reading_may_end_early():
    assert torch.equal(next(stream(torch.arange(9), 2, DEVICE)).cpu(), torch.tensor([0, 1]))
