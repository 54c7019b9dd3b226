"""results.json, which every benchmark adds its figures to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PATH = Path(__file__).parent / "results.json"


def recorded() -> dict[str, Any]:
    """What is there."""
    return json.loads(_PATH.read_text()) if _PATH.exists() else {}


def record(figures: dict[str, Any]) -> None:
    """Put figures in the place of those of the same names."""
    _PATH.write_text(json.dumps({**recorded(), **figures}, indent=1) + "\n")
