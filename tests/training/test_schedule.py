import math

import pytest

from training.schedule import due, warmup_cosine


def test_due_every_so_often_and_at_the_end():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 0, 10)] == [10]


def test_warmup_is_linear_and_the_rest_half_a_cosine():
    factors = [warmup_cosine(step, 10, 110, floor=0.1) for step in range(111)]
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors[110] == pytest.approx(0.1)
    assert sorted(factors[10:], reverse=True) == factors[10:]
