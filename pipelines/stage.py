"""What a stage is: a name, what it depends on, a plan, its work. The order and the skipping are pipeline.py's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distill.config import Config
from pipelines.run import Run


@dataclass(frozen=True)
class Work:
    """A part of a plan. tokens: word pieces through the student; seconds: an estimate from measured speeds."""

    name: str
    what: str
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0


class Stage:
    """One step of the pipeline. Its folder is run.folder / name; result.json in it is written last, by pipeline.py."""

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    """Stages whose output this one reads."""

    def is_on(self, config: Config) -> bool:
        return True

    def reads(self, config: Config) -> tuple[str, ...]:
        """`after`, where it does not follow from settings."""
        return self.after

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        """Plain values; a finished stage is skipped while they and the stages before it are unchanged."""
        raise NotImplementedError

    def check(self, run: Run) -> None:
        """Raise UserError for whatever the stage would stumble over later."""

    def plan(self, run: Run) -> list[Work]:
        raise NotImplementedError

    def run(self, run: Run) -> dict[str, Any]:
        """Do the work; the returned mapping goes into result.json: metrics, and tokens where it trains."""
        raise NotImplementedError
