"""The page at /, one file without anything from elsewhere, and the headers that keep it so."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from distill.serving.answers import Served
from distill.serving.options import ServingOptions


class Page:
    """Args: models: (name in routes, title, what it answers) of each."""

    def __init__(self, models: Sequence[tuple[str, str, Served]], options: ServingOptions) -> None:
        known = {
            "models": [
                {"name": name, "title": title, "task": served.task, "labels": served.labels, "pairs": served.pairs}
                for name, title, served in models
            ],
            "maxCharacters": options.max_characters,
        }
        # Data, not script; a label may hold anything, and </script> would end the element.
        data = json.dumps(known).replace("<", "\\u003c")
        text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        self.html = text.replace('"{{models}}"', data)
        script, style = (self._hash(tag) for tag in ("script", "style"))
        self.headers = {
            "content-security-policy": f"default-src 'none'; connect-src 'self'; script-src '{script}'; "
            f"style-src '{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

    def _hash(self, tag: str) -> str:
        """Of the one element whose content a browser may use."""
        found = re.search(rf"<{tag}>(.*?)</{tag}>", self.html, re.DOTALL)
        assert found is not None, tag
        return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
