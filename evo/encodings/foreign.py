"""Kinds of quantised checkpoints that are not read, and what to do with them.

Their numbers lie on grids that were fitted to data; merging would have to fit them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from evo.encodings import EncodingError

READ = ("fp8", "mxfp4")
"""Values of quantization_config.quant_method that encodings here read."""

_LOAD = "AutoModelForCausalLM.from_pretrained(PATH, dtype='bfloat16'"
_SAVE = "save_pretrained(NEW_PATH)"
_CONVERT = "compressed_tensors.entrypoints.convert.convert_checkpoint"
CONVERSIONS = {
    "bitsandbytes": f"{_LOAD}).dequantize().{_SAVE}",
    "higgs": f"{_LOAD}).dequantize().{_SAVE}",
    "compressed-tensors": f"{_LOAD}, quantization_config=CompressedTensorsConfig(dequantize=True)).{_SAVE}",
    "gguf": f"{_LOAD}, gguf_file='NAME.gguf').{_SAVE}",
    "gptq": "gptqmodel.utils.model_dequant.dequantize_model(PATH, NEW_PATH)",
    "awq": (
        f"{_CONVERT}(PATH, PACKED_PATH, AutoAWQConverter.from_pretrained(PATH)), then "
        f"{_CONVERT}(PACKED_PATH, NEW_PATH, CompressedTensorsDequantizer(PACKED_PATH))"
    ),
}
"""Kind -> Python that turns it into floats, where there is such. (GPTQModel 7.7 takes AWQ, too, but leaves its columns
in AWQ's order.)
"""

_TELLTALES = {
    r"\.(qweight|qzeros)$": "GPTQ or AWQ",
    r"\.weight_(packed|scale|zero_point)$": "compressed-tensors",
    r"\.(absmax|quant_map|SCB|weight_format)$|\.quant_state\.": "bitsandbytes",
    r"\.W_q$": "HQQ",
    r"\.weight_scales$": "EETQ",
    r"\.weight\._(data|scale)$": "quanto",
}
_ANY_TELLTALE = re.compile("|".join(_TELLTALES))


def refuse(names: Iterable[str], quantization: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is quantised in a way that is not read.

    Args:
        names: tensors of the files.
        quantization: config.json's quantization_config, or {}.

    Raises:
        EncodingError: with the way to convert it.
    """
    method = quantization.get("quant_method")
    if method is not None and method not in READ:
        method = str(method)
        raise EncodingError(f"quantised with {method!r} (config.json: quantization_config). {advice(method)}")
    if name := next(filter(_ANY_TELLTALE.search, names), None):
        kind = next(kind for pattern, kind in _TELLTALES.items() if re.search(pattern, name))
        raise EncodingError(f"tensor {name} is one of {kind}'s. {advice(kind)}")


def advice(kind: str) -> str:
    """How to get at floats."""
    start = "Such weights cannot be merged: take the bfloat16 checkpoint that it was made from"
    code = CONVERSIONS.get(kind.lower().replace("_", "-"))
    return f"{start}, or convert it first: {code}" if code else f"{start}."
