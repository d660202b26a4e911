"""The commands' names, and the status with which they end. `tinybert run` and scripts/distill.py are the same.
What a command does is in pipelines/commands/."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from pipelines.commands import distil, student
from pipelines.terminal import printable

REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What a disk answers that takes no more."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Distil a BERT-family teacher into a TinyBERT student that plain transformers loads.",
)

for command in (
    distil.run,
    distil.augment,
    distil.doctor,
    distil.evaluate,
    student.export,
    student.card,
    student.benchmark,
    student.report,
    student.serve,
    student.package,
):
    app.command()(command)


def main() -> None:
    """The `tinybert` command."""
    _exit_with(app)


def run_main() -> None:
    """scripts/distill.py: `tinybert run` without its name."""
    from pipelines.launch import start_missing_processes

    start_missing_processes(sys.argv[0], sys.argv[1:])
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command()(distil.run)
    _exit_with(single)


def _exit_with(command: Callable[[], Any]) -> None:
    """0 done, 2 the user's input is wrong, 130 or 143 after a signal, 1 anything else."""
    from distill.interruption import Interrupted
    from distill.settings import RunError, UserError

    first = os.environ.get("LOCAL_RANK", "0") == "0"

    def tell(message: object, here: bool | None = None) -> None:
        if first if here is None else here:
            # A bar that was cut off, this process's or another's, stands on the line.
            print(("\n" if here else "") + printable(str(message)), file=sys.stderr)

    try:
        command()
    except UserError as error:
        tell(f"error: {error}")
        sys.exit(2)
    except Interrupted as stop:
        tell(stop)
        sys.exit(stop.status)
    except RunError as error:
        tell(f"error: {error}", error.told_here)
        sys.exit(1)
    except Exception as error:
        if (refused := _refused_write(error)) is not None:
            from distill.checkpoint import storage_error

            # Whoever was writing may be another process than the first.
            print(f"error: {storage_error(refused.filename or 'a file', refused)}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.exit(1)


def _refused_write(error: BaseException | None) -> OSError | None:
    """The disk's own error behind one that a library raised for it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in REFUSED_WRITES:
            return error
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
