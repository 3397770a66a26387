"""Where kernels run."""

import pytest
import torch

from ops import dispatch


@pytest.mark.parametrize("triton", [False, True])
def test_kernels_run_on_a_gpu_where_triton_is_installed(monkeypatch, triton):
    monkeypatch.setattr(dispatch, "TRITON", triton)
    assert dispatch.has_kernel(torch.device("cuda")) == triton
    assert not dispatch.has_kernel(torch.device("cpu"))
    assert not dispatch.has_kernel(torch.device("cuda"), torch.float64)
