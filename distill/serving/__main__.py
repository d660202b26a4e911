"""The server in an image: `python -m distill.serving FOLDER [--port 8080 ...]`, an artefact's folder and settings.
`tinybert serve` is the same for a run, and has the teacher too."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from pydantic import ValidationError

from distill.interruption import Interrupted
from distill.serving.artefact import student_model
from distill.serving.options import ServingOptions
from distill.serving.server import serve
from distill.settings import RunError, UserError


def main() -> int:
    """Exit status: 2 the input is wrong, 130 or 143 after a signal, 1 anything else."""
    parser = argparse.ArgumentParser(prog="python -m distill.serving", description=__doc__)
    parser.add_argument("folder", type=Path)
    for setting in fields(ServingOptions):
        parser.add_argument(f"--{setting.name.replace('_', '-')}", default=None)
    given = vars(parser.parse_args())
    folder: Path = given.pop("folder")
    try:
        options = ServingOptions(**{name: value for name, value in given.items() if value is not None})
        serve([student_model(folder, options.threads)], options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        print(f"error: --{str(first['loc'][0]).replace('_', '-')}: {first['msg']}", file=sys.stderr)
        return 2
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
