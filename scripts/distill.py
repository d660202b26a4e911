"""The entry point for `accelerate launch`: removes its own folder from the path, then hands over to pipelines.cli."""

import sys
from pathlib import Path

# Python puts scripts/ first on the path, where `import distill` would find this very file.
here = str(Path(__file__).resolve().parent)
sys.path[:] = [str(Path(here).parent)] + [entry for entry in sys.path if str(Path(entry or ".").resolve()) != here]

from pipelines.cli import run_main  # noqa: E402

if __name__ == "__main__":
    run_main()
