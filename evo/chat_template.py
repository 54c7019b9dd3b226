"""Chat templates of checkpoints: what they are, and giving one another than its interface parent's."""

from __future__ import annotations

import json
from pathlib import Path

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
    """The chat template that `transformers` finds in a checkpoint's folder, of several the default one; None: none."""
    if (file := folder / _FILE).is_file():
        return file.read_text()
    if not (said := folder / _TOKENIZER).is_file():
        return None
    found = json.loads(said.read_text()).get(_KEY)
    if isinstance(found, list):
        found = {named["name"]: named["template"] for named in found}.get("default")
    return found or None


def put_template(text: str, folder: Path) -> None:
    """Make a template the only one of a checkpoint.

    Args:
        text: the template.
        folder: of the checkpoint, with its tokenizer's files; templates are kept in any of three.
    """
    (folder / _OF_PROCESSORS).unlink(missing_ok=True)
    if (said := folder / _TOKENIZER).is_file() and _KEY in (settings := json.loads(said.read_text())):
        said.write_text(json.dumps({k: v for k, v in settings.items() if k != _KEY}, indent=2, ensure_ascii=False))
    (folder / _FILE).write_text(text)
