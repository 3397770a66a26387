import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.packed_strings import pack_lists, pack_strings, unpack_lists, unpack_strings, without_collector


@given(st.lists(st.text()))
def test_strings_survive_packing(strings):
    packed, offsets = pack_strings(strings)
    assert packed.dtype == torch.uint8 and offsets.dtype == torch.int64
    assert bytes(packed.tolist()).decode() == "".join(strings)
    assert unpack_strings(packed, offsets) == strings


@given(st.lists(st.lists(st.text(), max_size=3)))
def test_lists_of_strings_survive_packing(lists):
    assert unpack_lists(*pack_lists(lists)) == lists


@pytest.mark.parametrize(
    ("packed", "offsets"),
    [([65], []), ([65], [1]), ([65], [0, 2]), ([65, 66], [0, 2, 1, 2]), ([255], [0, 1])],
)
def test_wrong_offsets_or_bytes_are_refused(packed, offsets):
    with pytest.raises(ValueError):
        unpack_strings(torch.tensor(packed, dtype=torch.uint8), torch.tensor(offsets, dtype=torch.int64))


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError):
        pack_strings(["\ud800"])


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_waits_and_goes_on_as_before(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), without_collector():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
