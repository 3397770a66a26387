"""Parameters of functions and classes that gin binds, checked where they enter."""

import copy
import difflib
import inspect
import logging
import re
from collections.abc import Callable
from enum import Enum
from functools import partial, wraps
from tokenize import TokenError
from typing import Annotated, Any

import gin
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

CONFIGURABLES: dict[str, dict[str, TypeAdapter]] = {}  # "module.name" -> parameter -> what checks it
SHOWN = 100  # characters of a value in a message


class NamedEnum(Enum):
    """Members may be given by value or by name, in capitals or not."""

    @classmethod
    def _missing_(cls, value: object) -> Enum | None:
        return next((member for member in cls if str(value).lower() in (member.value, member.name.lower())), None)


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not True or False")
    return value


def _path(places: str, value: str) -> str:
    """places: what may stand in braces, with them."""
    if not value.strip() or "\0" in value or re.search("[{}]", value.replace(places, "") if places else value):
        raise ValueError(f"Input should be a path with {'no other brace than ' + places if places else 'no braces'}")
    return value


_Number = Annotated[int, BeforeValidator(_number)]
_Whole = Annotated[_Number, Field(lt=2**31)]
_Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveInt = Annotated[_Whole, Field(gt=0)]
NonNegativeInt = Annotated[_Whole, Field(ge=0)]
PositiveFloat = Annotated[_Real, Field(gt=0)]
Rate = Annotated[_Real, Field(ge=0)]
Share = Annotated[_Real, Field(ge=0, le=1)]
ShareBelowOne = Annotated[_Real, Field(ge=0, lt=1)]
PositiveShare = Annotated[_Real, Field(gt=0, lt=1)]
Seed = Annotated[_Number, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(min_length=1)]
PathName = Annotated[str, AfterValidator(partial(_path, ""))]
CorpusPath = Annotated[str, AfterValidator(partial(_path, "{corpus}"))]


def configurable(target: Callable | str, name: str = "") -> Callable:
    """As `gin.configurable`, and arguments must fit their annotations; numbers and enums may be given as text.

    A ValueError names the parameter, its value and the rule. Of a class the arguments are those of __init__.
    """
    if isinstance(target, str):
        return partial(configurable, name=target)
    name, function = name or target.__name__, target.__init__ if inspect.isclass(target) else target
    signature = inspect.signature(function)
    adapters = {
        place: TypeAdapter(parameter.annotation)
        for place, parameter in signature.parameters.items()
        if parameter.annotation is not parameter.empty
    }

    @wraps(function)
    def checked(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error
        for place in adapters.keys() & bound.arguments.keys():
            bound.arguments[place] = _fit(adapters[place], f"{name}.{place}", bound.arguments[place])
        return function(*bound.args, **bound.kwargs)

    vars(checked)["__signature__"] = signature  # which gin reads
    CONFIGURABLES[f"{target.__module__}.{name}"] = adapters
    if inspect.isclass(target):
        target.__init__ = checked  # type: ignore[method-assign]  # as a decorator of the method would
    return gin.configurable(name)(target if inspect.isclass(target) else checked)


def _fit(adapter: TypeAdapter, where: str, value: Any) -> Any:
    """The value as its annotation has it."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        shown = " ".join(repr(first["input"]).split())
        shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
        rule = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type" and value is not None:
            rule += f"; put one alone in brackets, [{shown}]"
        raise ValueError(f"{where}{''.join(f'[{part}]' for part in first['loc'])} = {shown}: {rule}.") from error


def bind(config: str, bindings: list[str]) -> None:
    """Reads a gin file, then bindings that override it, and checks their values.

    A ValueError of one line says what can't be read, does not exist (and which names come near) or does not fit.
    """
    source = config
    logging.disable(logging.ERROR)  # gin logs what is raised, too
    try:
        gin.parse_config_file(config)
        for binding in bindings:
            source = f"--gin {binding!r}"
            if "." not in binding.partition("=")[0]:
                raise ValueError(f"{source} must be of the form 'train.iterations = 5'")
            gin.parse_config(binding)
        gin.finalize()
    except (SyntaxError, TokenError) as error:
        problem = str(error.args[0]).strip().rpartition("\n")[2].strip(" .")
        if isinstance(error, SyntaxError) and error.filename:
            source, problem = f"{error.filename}, line {error.lineno}", f"{problem} in {(error.text or '').strip()!r}"
        raise ValueError(f"{source}: {problem}; a value is a number, a text in quotes, or a list of them.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source} includes itself.") from error
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(_with_names(str(error))) from error
    finally:
        logging.disable(logging.NOTSET)
    for selector, adapters in CONFIGURABLES.items():
        for place, adapter in adapters.items():
            try:
                value = gin.query_parameter(f"{selector}.{place}")
            except ValueError:  # not bound
                continue
            _fit(adapter, f"{selector.rpartition('.')[2]}.{place}", copy.deepcopy(value))  # which makes @references


def _with_names(message: str) -> str:
    """What gin says about a name that does not exist, in one line, with the nearest names."""
    line, *where = [part.strip(" ^") for part in message.split("\n") if part.strip(" ^")]
    line += f" {': '.join(where)}." if where else ""
    names = {selector.rpartition(".")[2]: list(adapters) for selector, adapters in CONFIGURABLES.items()}
    members = [f"{kind.__module__}.{kind.__name__}.{one.name}" for kind in NamedEnum.__subclasses__() for one in kind]
    if found := re.match(r"No bindings specified for '(.+)/gin\.macro'", line):
        line, wrong, names = f"%{found[1]} is not defined.", found[1], [*members]
    elif found := re.match(r"Configurable '(?:.*\.)?(\w+)' doesn't have a parameter named '(\w+)'", line):
        wrong, names = found[2], names.get(found[1], [])
    elif found := re.match(r"No configurable matching (?:reference )?'@?(?:[^']*[./])?(\w+)", line):
        wrong = found[1]
    else:
        return line
    near = difflib.get_close_matches(wrong, names, cutoff=0.5)
    return f"{line} The nearest names are {', '.join(near)}." if near else line
