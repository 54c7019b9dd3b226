"""Chat templates of checkpoints: what they are, and giving one another than its interface parent's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evo.checkpoint import read_json

_TOKENIZER = "tokenizer_config.json"
_KEY = "chat_template"
_FILE, _OF_PROCESSORS = "chat_template.jinja", "chat_template.json"


def check_template(text: str) -> None:
    """Refuse what no tokenizer could use.

    Raises:
        ValueError: saying why.
    """
    from fitness.engines.text import check_template as check  # only here: transformers takes seconds to load

    check(text)


def template_of(folder: Path) -> str | None:
    """The chat template that `transformers` finds in a checkpoint's folder, of several the default one; None: none.

    Raises:
        CheckpointError: if the tokenizer's config cannot be read.
    """
    if (file := folder / _FILE).is_file():
        return file.read_text(encoding="utf-8")
    found = _settings(folder).get(_KEY)
    if isinstance(found, list):
        named = (one for one in found if isinstance(one, dict) and one.get("name") == "default")
        found = next(named, {}).get("template")
    return found if found and isinstance(found, str) else None


def put_template(text: str, folder: Path) -> None:
    """Make a template the only one of a checkpoint.

    Args:
        text: the template.
        folder: of the checkpoint, with its tokenizer's files; templates are kept in any of three.
    """
    (folder / _OF_PROCESSORS).unlink(missing_ok=True)
    if _KEY in (settings := _settings(folder)):
        del settings[_KEY]
        (folder / _TOKENIZER).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / _FILE).write_text(text, encoding="utf-8")


def _settings(folder: Path) -> dict[str, Any]:
    """What the tokenizer's config says; empty where there is none."""
    file = folder / _TOKENIZER
    settings = read_json(file) if file.is_file() else {}
    return settings if isinstance(settings, dict) else {}
