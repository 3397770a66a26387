"""Parameters of functions that gin binds, checked where they enter."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated

from pydantic import Field, ValidationError, validate_call

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


def checked(name: str) -> Callable[[Callable], Callable]:
    """Decorates a function, known to users by `name`, so that its arguments fit their annotations.

    Numbers and members of enums may be given as text. A ValueError names the parameter, its value and the rule.
    """

    def decorate(function: Callable) -> Callable:
        valid = validate_call(function, config={"arbitrary_types_allowed": True})

        @wraps(function)
        def call(*args, **kwargs):
            try:
                return valid(*args, **kwargs)
            except ValidationError as error:
                first = error.errors()[0]
                place, *parts = first["loc"]
                where = f"{name}.{place}" + "".join(f"[{part}]" for part in parts)
                raise ValueError(f"{where} = {first['input']!r}: {first['msg']}.") from error

        call.__signature__ = inspect.signature(function)  # which gin reads
        return call

    return decorate
