"""Claims about any config at all, drawn from the classes of the settings themselves: YAML and dotted overrides say what
nested values say, and a misspelt key is told the one that was meant."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import annotated_types
import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from distill.config import Config, _Dumper, dump_config, dump_values, load_config, parse_config
from distill.settings import UserError

# Not the next-line character, which PyYAML's own writer loses; that ours keeps it is claimed in test_config.py.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=12)
KEYS = st.text("abcxyz", min_size=1, max_size=6)
PRESETS = st.just("default")  # under another, what a config leaves out is no default


def of_type(kind: Any, limits: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Values of a type, as a YAML would hold them, mostly within the limits."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return of_type(parts[0], (*limits, *parts[1:]))
    if dataclasses.is_dataclass(kind):
        return of_group(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([of_type(part, limits) for part in parts])
    if origin is Literal:
        return st.sampled_from(parts)
    if origin is list:
        return st.lists(of_type(parts[0]), max_size=3)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return st.lists(of_type(parts[0]), max_size=3)
        return st.tuples(*map(of_type, parts)).map(list)
    if origin is dict:
        return st.dictionaries(KEYS, of_type(parts[1]), max_size=3)
    least, most = _bounds(limits)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(math.ceil(least), math.floor(most))
    if kind is float:
        return st.floats(least, most)
    return st.none() if kind is type(None) else TEXTS


def _bounds(limits: tuple[Any, ...]) -> tuple[float, float]:
    least, most = 0.0, 1e9
    for limit in limits:
        for one in getattr(limit, "metadata", [limit]):
            least = max(least, one.ge) if isinstance(one, annotated_types.Ge) else least
            least = max(least, one.gt + 1e-9) if isinstance(one, annotated_types.Gt) else least
            most = min(most, one.le) if isinstance(one, annotated_types.Le) else most
            most = min(most, one.lt - 1e-6) if isinstance(one, annotated_types.Lt) else most
    return least, most


def of_group(group: Any) -> st.SearchStrategy[dict[str, Any]]:
    fields = group.__pydantic_fields__
    options = {name: of_type(field.annotation, tuple(field.metadata)) for name, field in fields.items()}
    if group is Config:
        options["preset"] = PRESETS
    return st.lists(st.sampled_from(sorted(options)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: options[name] for name in names})
    )


@st.composite
def configs(draw: st.DrawFn) -> tuple[dict[str, Any], Config]:
    """Values and the config that they make."""
    values = draw(of_group(Config))
    try:
        return values, parse_config(values)
    except UserError:
        assume(False)  # a name of another form, a rule between two settings
        raise


def written(text: str, *overrides: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(text, encoding="utf-8")
        return load_config(file, overrides)


def leaves(values: Mapping[str, Any], group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of the settings that are given, a section that gives none as {}."""
    for name, value in values.items():
        inner = _group_of(group.__pydantic_fields__[name].annotation)
        if inner is not None and isinstance(value, dict) and value:
            yield from leaves(value, inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _group_of(kind: Any) -> Any:
    return next((part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)), None)


EASY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@settings(EASY, max_examples=60)
@given(configs())
def test_any_config_survives_the_way_through_yaml(drawn: tuple[dict[str, Any], Config]) -> None:
    values, config = drawn
    assert written(dump_config(config)) == config
    assert written(dump_values(values)) == config


A_NUMBER_TO_LOOK_AT = {"output": "0E0"}
"""Which PyYAML writes without quotes, and a config reads as a number, as it does 5e-5."""


@settings(EASY, max_examples=60)
@given(configs())
@example((A_NUMBER_TO_LOOK_AT, parse_config(A_NUMBER_TO_LOOK_AT)))
def test_dotted_overrides_say_what_nested_values_say(drawn: tuple[dict[str, Any], Config]) -> None:
    values, config = drawn
    overrides = [
        f"{key}={in_one_line(value).removesuffix('...' + chr(10)).strip()}" for key, value in leaves(values, Config)
    ]
    assert written("{}", *overrides) == config


def in_one_line(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6)
    return text


def every_key(group: Any = Config, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Every setting's path, and the names beside it."""
    names = list(group.__pydantic_fields__)
    for name, field in group.__pydantic_fields__.items():
        yield (*prefix, name), names
        inner = _group_of(field.annotation)
        if inner is not None:
            yield from every_key(inner, (*prefix, name))


def misspelt(draw: st.DrawFn, name: str) -> str:
    at = draw(st.integers(0, len(name) - 2))
    return draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],  # a letter left out
                name[:at] + name[at] + name[at:],  # one twice
                name[:at] + name[at + 1] + name[at] + name[at + 2 :],  # two exchanged
                name[:at] + "q" + name[at + 1 :],  # another key beside it
            ]
        )
    )


def edits(one: str, other: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        above, row = row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@settings(EASY, max_examples=150)
@given(st.data())
def test_a_misspelt_key_is_told_the_one_that_was_meant(data: st.DataObject) -> None:
    path, beside = data.draw(st.sampled_from([(path, names) for path, names in every_key() if len(path[-1]) > 3]))
    wrong = misspelt(data.draw, path[-1])
    assume(wrong not in beside)
    nearest = min(edits(wrong, name) for name in beside)
    assume([name for name in beside if edits(wrong, name) <= nearest] == [path[-1]])
    values: Any = 1
    for name in (wrong, *reversed(path[:-1])):
        values = {name: values}
    with pytest.raises(UserError) as error:
        parse_config(values)
    where = ".".join([*path[:-1], wrong])
    assert str(error.value) == f"{where}: there is no such setting; did you mean {'.'.join(path)}?"
