import math

import pytest

from training.schedule import due, last_step, warmup_cosine


def test_due_every_so_often_and_at_the_end():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 0, 10)] == [10]


def test_the_last_step_is_some_after_the_best_one_at_most_the_last_of_all():
    assert [last_step(100, best, 30) for best in ({}, {"step": 20}, {"step": 90})] == [100, 50, 100]
    assert last_step(100, {"step": 20}, 0) == 100


def test_warmup_is_linear_and_the_rest_half_a_cosine():
    factors = [warmup_cosine(step, 10, 110, floor=0.1) for step in range(111)]
    assert factors[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors[110] == pytest.approx(0.1)
    assert sorted(factors[10:], reverse=True) == factors[10:]
