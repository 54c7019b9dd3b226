"""Engines: resident models that generate text. One a file; the protocol is fitness.types.Engine."""

ENGINES = {"transformers": "fitness.engines.transformers:TransformersEngine"}
"""Name -> class(checkpoint, **options), keyword-only options being the config's keys."""
