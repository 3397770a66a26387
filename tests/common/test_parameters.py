"""Every parameter that gin binds, with values of every wrong type and at the borders, as a user would bind them."""

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Literal

import gin
import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

import train_decoder  # noqa: F401  (for what it registers)
import train_rqvae  # noqa: F401
from common.parameters import CONFIGURABLES, NamedEnum, PositiveInt, Rate, configurable
from training import cli

NAMES = [name for name, _ in gin.config._REGISTRY.items() if not name.startswith("gin.")]  # before this file's own


def unwrapped(annotation: Any) -> tuple[Any, bool, list]:
    """The type itself, whether None may stand for it, and what limits it."""
    if typing.get_origin(annotation) is Annotated:
        kind, nullable, limits = unwrapped(annotation.__origin__)
        found = [m for one in annotation.__metadata__ for m in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return kind, nullable, limits + found
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        [inner] = [one for one in typing.get_args(annotation) if one is not type(None)]
        kind, _, limits = unwrapped(inner)
        return kind, True, limits
    return annotation, False, []


def wrong(annotation: Any) -> Iterator[tuple[Any, Any, str]]:
    """Values that don't fit, what of each is shown, and a part of the rule that must be."""
    kind, nullable, limits = unwrapped(annotation)
    others = [["a"], {"a": 1}] + [None] * (not nullable)
    if kind in (int, float):
        rule = "valid integer" if kind is int else "valid number"
        yield from ((value, value, rule) for value in ("many", "", *others))
        yield True, True, "a number, not True or False"
        if kind is int:
            yield from ((value, value, rule) for value in (2.5, "2.5"))
        yield float("inf"), float("inf"), "finite number"
        step = 1 if kind is int else 1e-9
        for limit in limits:
            past = {Ge: ("ge", -step), Gt: ("gt", 0), Le: ("le", step), Lt: ("lt", 0)}.get(type(limit))
            if past:
                bound = getattr(limit, past[0])
                yield bound + past[1], bound + past[1], f"than or equal to {bound}" if past[1] else f"than {bound}"
    elif kind is bool:
        yield from ((value, value, "valid boolean") for value in ("perhaps", 2, 0.5, *others))
    elif kind is str:
        yield from ((value, value, "valid string") for value in (5, 2.5, True, *others))
        for limit in limits:
            if isinstance(limit, MinLen):
                yield "", "", "at least 1 character"
            if isinstance(limit, AfterValidator):
                yield from ((value, value, "a path with no") for value in ("", " ", "out/{dataset}", "{", "a\0"))
    elif typing.get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        allowed = typing.get_args(kind) or [member.value for member in kind]
        yield from ((value, value, repr(allowed[-1])) for value in ("nonsense", "", 5, 0.5, True, *others))
    elif typing.get_origin(kind) is tuple:
        element, *more = typing.get_args(kind)
        whole = [5, "text", *others[1:]]
        yield from ((value, value, "valid tuple") for value in whole if value != {"a": 1})
        if any(isinstance(limit, MinLen) for limit in limits):
            yield [], [], "at least 1 item"
        length = 1 if more == [Ellipsis] else 1 + len(more)
        for value, shown, rule in wrong(element):
            yield [value] * length, shown, rule
        if length > 1:
            yield [1.0], [1.0], "required"
            yield [1.0] * 3, [1.0] * 3, "at most 2 items"
    elif typing.get_origin(kind) is not None:  # a mapping of names to lists of them
        yield from ((value, value, "valid dictionary") for value in (5, "text", ["a"]))
        yield from (({"a": [value]}, value, "valid string") for value in (5, None))
    else:
        rule = "brackets, such as @TfidfSvd()" if kind.__name__ == "FeatureSource" else f"instance of {kind.__name__}"
        yield from ((value, value, rule) for value in (5, "text", 0.5, ["a"]))


def right(annotation: Any) -> Iterator[Any]:
    """Values at the borders, and numbers and members given as text."""
    kind, nullable, limits = unwrapped(annotation)
    if nullable:
        yield None
    if kind in (int, float):
        bounds = {type(limit): limit for limit in limits if isinstance(limit, (Ge, Gt, Lt))}
        low = bounds[Ge].ge if Ge in bounds else bounds[Gt].gt + (1 if kind is int else 1e-9)
        yield from (low, str(low))
        if Lt in bounds:
            yield bounds[Lt].lt - (1 if kind is int else 1e-9)
    elif kind is bool:
        yield from (True, "false")
    elif isinstance(kind, type) and issubclass(kind, Enum):
        yield from (text for member in kind for text in (member.value, member.name, member.name.lower()))
    elif typing.get_origin(kind) is Literal:
        yield from typing.get_args(kind)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command line as a script does, but for the training itself; what it ends with, None if it trains."""
    config, trained = tmp_path / "empty.gin", []
    config.write_text("")
    monkeypatch.chdir(tmp_path)

    def run(*bindings: str) -> str | None:
        gin.clear_config()
        monkeypatch.setattr(sys, "argv", ["train", str(config), *(part for one in bindings for part in ("--gin", one))])
        trained.clear()
        try:
            cli.run(lambda: trained.append(True), "")
        except SystemExit as ended:
            assert ended.code == 1 and not trained
        out, error = capsys.readouterr()
        assert out == "" and bool(error) != bool(trained) and (not error or error.endswith("\n"))
        return error[:-1] or None

    yield run
    gin.clear_config()
    assert list(tmp_path.iterdir()) == [config]  # nothing was written


def written(value: Any) -> str:
    return repr(value).replace("inf", "1e999")


def test_gin_binds_no_parameter_that_is_not_checked():
    assert sorted(CONFIGURABLES) == sorted(NAMES) and len(NAMES) > 10


def test_every_wrong_value_is_one_line_with_the_parameter_the_value_and_the_rule(run):
    count = 0
    for selector in NAMES:
        for place, annotation in annotations(selector).items():
            drawn = list(wrong(annotation))
            assert len(drawn) > 2, f"{selector}.{place} is of a kind that this test does not know"
            for value, shown, rule in drawn:
                said = run(f"{selector}.{place} = {written(value)}")
                name = f"{selector.rpartition('.')[2]}.{place}"
                assert said is not None, f"{name} took {value!r}"
                assert said.startswith(f"error: {name}") and f" = {shown!r}: " in said and "\n" not in said, said
                assert rule in said.partition(f" = {shown!r}: ")[2], said
                count += 1
    assert count > 1000


def test_values_at_the_borders_and_members_by_name_are_taken(run):
    for selector in NAMES:
        for place, annotation in annotations(selector).items():
            for value in right(annotation):
                assert run(f"{selector}.{place} = {written(value)}") is None


def annotations(selector: str) -> dict[str, Any]:
    """Of the parameters of a configurable, read from its signature. Each has one, and each number a lower border."""
    target = gin.get_configurable(selector)
    function = target.__init__ if isinstance(target, type) else target
    hints = {k: v for k, v in typing.get_type_hints(function, include_extras=True).items() if k != "return"}
    assert hints.keys() == inspect.signature(function).parameters.keys() - {"self"}, selector
    for name, hint in hints.items():
        for part in (hint, *typing.get_args(unwrapped(hint)[0])):
            kind, _, limits = unwrapped(part)
            assert kind not in (int, float) or any(isinstance(one, (Ge, Gt)) for one in limits), f"{selector}.{name}"
    return hints


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            "train_rqvae.train.iteration = 5",
            "a parameter named 'iteration'. In bindings string line 1: train_rqvae.tra",
        ),
        ("train_rqvae.train.iteration = 5", "The nearest names are iterations"),
        ("Rqvae.n_layers = 5", "No configurable matching 'Rqvae'."),
        ("Rqvae.n_layers = 5", "RqVae."),
        ("train_rqvae.train.features = [@Tfidf()]", "The nearest names are TfidfSvd"),
        ("train_rqvae.train.dataset = %RecDataset.SAMPEL", "%RecDataset.SAMPEL is not defined. The nearest names are "),
        (
            "train_rqvae.train.dataset = SAMPLE",
            "--gin 'train_rqvae.train.dataset = SAMPLE': Failed to parse token 'SAMPLE'",
        ),
        ("train_rqvae.train.iterations = ", "Unable to parse value; a value is"),
        ("train_rqvae.train.iterations = [1,", "EOF in multi-line statement"),
        ("train_rqvae.train.iterations 5", "Couldn't parse statement"),
        ("iterations = 5", "--gin 'iterations = 5' must be of the form 'train.iterations = 5'"),
        (
            "train_rqvae.train.features = @TfidfSvd()",
            "min_df=2): Input should be a valid tuple; put one alone in brackets",
        ),
        (
            "train_rqvae.train.features = [@TfidfSvd]",
            "train.features[0] = <class 'data.encoders.TfidfSvd'>: Input should be",
        ),
        ("train_rqvae.train.features = [@Vectors()]", "Vectors: missing a required argument: 'path'"),
        (
            "CustomData.text_columns = ('title')",
            "= 'title': Input should be a valid tuple; put one alone in brackets, ['ti",
        ),
    ],
)
def test_names_and_forms_that_do_not_exist_are_named_with_what_comes_near(binding, message, run):
    said = run(binding)
    assert said.startswith("error: ") and message in said and "\n" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\ufeffN = 1\n", r"{}, line 1: Unexpected token in '\ufeffN = 1'; a value is"),
        ("N = 1\nRqVae.n_layers =\n", "{}, line 2: Unable to parse value in 'RqVae.n_layers ='; a value is"),
        ("N = 1\n\nRqVae.n_layers = N\n", "{}, line 3: Failed to parse token 'N' in 'RqVae.n_layers = N'; a value is"),
        ("include 'none.gin'\n", "Unable to open file: none.gin."),
        ("include '{}'\n", "{} includes itself."),
        ("import nowhere\n", "No module named 'nowhere'"),
        ("RqVae.n_layers = %N\n", "%N is not defined."),
    ],
)
def test_a_file_that_gin_cannot_read_is_named_with_the_line(run, tmp_path, caplog, content, message):
    path = tmp_path / "empty.gin"
    path.write_text(content.replace("{}", str(path)), encoding="utf-8")
    said = run()
    assert said.startswith(f"error: {message.replace('{}', str(path))}") and "\n" not in said and not caplog.records


class Kind(NamedEnum):
    ONE = "one"


def test_functions_and_classes_get_what_their_annotations_ask_for():
    @configurable
    def make(kind: Kind, size: PositiveInt = 3, sizes: tuple[PositiveInt, ...] = (), *, rate: Rate = 0.5) -> tuple:
        return kind, size, sizes, rate

    @configurable("thing")
    class Thing:
        def __init__(self, size: PositiveInt, other=None) -> None:
            self.size, self.other = size, other

    gin.parse_config(
        ["make.kind = 'ONE'", "make.sizes = [1, '2']", "make.rate = 1", "a/make.rate = -1", "thing.size = '7'"]
    )
    try:
        assert make() == (Kind.ONE, 3, (1, 2), 1.0) and make("one", "20")[1] == 20
        assert Thing().size == 7 and Thing(2, "x").other == "x" and isinstance(Thing(1), Thing)
        for call, message in (
            (lambda: make(size=0), "make.size = 0: Input should be greater than 0."),
            (lambda: make(Kind.ONE, 1, [3, -1]), r"make.sizes\[1\] = -1: Input should be greater than 0."),
            (lambda: Thing(0), "thing.size = 0: Input"),
            (lambda: make(length=5), "make: got an unexpected keyword argument 'length'"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with gin.config_scope("a"), pytest.raises(ValueError, match="make.rate = -1: Input"):
            make()
    finally:
        gin.clear_config()
        for name in ("make", "thing"):
            del CONFIGURABLES[f"{__name__}.{name}"]
