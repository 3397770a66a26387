"""The precision around is kept."""

import pytest
import torch

from ops.precision import matmul_precision


@pytest.mark.parametrize("around", ["highest", "high"])
def test_the_precision_holds_within_and_ends_with_it(around):
    before = torch.get_float32_matmul_precision()
    with matmul_precision(around):
        with pytest.raises(RuntimeError, match="stop"), matmul_precision("highest" if around == "high" else "high"):
            assert torch.get_float32_matmul_precision() != around
            raise RuntimeError("stop")
        assert torch.get_float32_matmul_precision() == around
    assert torch.get_float32_matmul_precision() == before
