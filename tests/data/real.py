"""Where the real data sets lie, which can't be redistributed: in $REAL_DATA, or shared/data beside the checkout."""

import os
from pathlib import Path

import pytest

REAL = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))


def needs_real(name: str):
    """Skips a test where the machine lacks a data set."""
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"the real files are not in {REAL / name}")
