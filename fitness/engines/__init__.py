"""Engines: resident models that generate text. One a file; the protocol is fitness.types.Engine."""

import importlib.util

ENGINES = {
    "transformers": "fitness.engines.transformers:TransformersEngine",
    "vllm": "fitness.engines.vllm:VllmEngine",
}
"""Name -> class(checkpoint, **options), keyword-only options being the config's keys."""

EXTRAS = {"vllm": "vllm"}
"""Engine -> the package that it needs; the extra of mergefront has the same name."""


def what_is_missing(kind: str) -> str | None:
    """What to tell a user whose engine needs a package that is not installed; None if it can be made."""
    package = EXTRAS.get(kind)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"engine {kind!r} needs the package {package}: pip install 'mergefront[{package}]'"
