"""The decorator that makes a class a strict, frozen group of settings, and the errors that end in a message alone.
What the groups are is left to the classes that use them; reading YAML is left to config.py."""

from __future__ import annotations

from dataclasses import field
from typing import TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Group = TypeVar("Group")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field, Field))
def settings(cls: type[Group]) -> type[Group]:
    """Make a frozen, keyword-only pydantic dataclass; unknown keys are refused, docstrings describe the fields."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True)
    return cast(type[Group], dataclass(cls, frozen=True, kw_only=True, config=config))


class UserError(Exception):
    """The user's input is wrong: the message names the key, file or row, the rule, and what to do. Exit status 2."""


class RunError(Exception):
    """A run that began well cannot go on: the disk is full, a loss is not finite. The message names the place and what
    to do. Exit status 1.

    Args:
        told_here: whether this process is to tell it; None for the first of each machine, as of all other errors.
    """

    def __init__(self, message: str, told_here: bool | None = None) -> None:
        super().__init__(message)
        self.told_here = told_here
