from enum import Enum

import gin
import pytest
from pydantic import PositiveInt

from data.parameters import Rate, checked


class Kind(Enum):
    ONE = "one"


@gin.configurable
@checked("make")
def make(kind: Kind, size: PositiveInt = 3, sizes: tuple[PositiveInt, ...] = (), rate: Rate = 0.5) -> tuple:
    return kind, size, sizes, rate


@pytest.fixture(autouse=True)
def _without_bindings():
    yield
    gin.clear_config()


def test_text_and_whole_numbers_become_what_is_asked_for():
    gin.parse_config(["make.kind = 'one'", "make.size = '20'", "make.sizes = [1, 2]", "make.rate = 1"])
    assert make() == (Kind.ONE, 20, (1, 2), 1.0)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("make.kind = 'two'", "make.kind = 'two': Input should be 'one'."),
        ("make.size = 0", "make.size = 0: Input should be greater than 0."),
        ("make.size = 2.5", "make.size = 2.5: Input should be a valid integer, got a number with a fractional part."),
        ("make.sizes = (4, -1)", r"make.sizes\[1\] = -1: Input should be greater than 0."),
        ("make.sizes = 4", "make.sizes = 4: Input should be a valid tuple."),
        ("make.rate = -0.1", "make.rate = -0.1: Input should be greater than or equal to 0."),
        ("make.rate = 1e999", "make.rate = inf: Input should be a finite number."),
    ],
)
def test_others_are_named_with_their_value_and_the_rule(binding, message):
    gin.parse_config(["make.kind = 'one'", binding])
    with pytest.raises(ValueError, match=message):
        make()


def test_gin_knows_the_parameters():
    with pytest.raises(ValueError, match="doesn't have a parameter named 'length'"):
        gin.parse_config("make.length = 5")
