"""The default engine: one resident `transformers` model, written in place, decoded in a batch that is refilled.

Text is in text.py, the loop over tokens in decoding.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import pkgutil
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from fitness.engines.columns import check_cache, is_columnar, row_memory
from fitness.engines.decoding import Decoder, Request
from fitness.engines.memory import ROW_LOGIT_BYTES, free_bytes, missing_gpu, rows_that_fit
from fitness.engines.sampling import Sampler, Settings
from fitness.engines.text import Text, encode, most_room, rooms
from fitness.types import Completion, Decoding, Likelihood

_POSITIONS = 256
"""Of an answer whose likelihoods are computed together: 156 MB in float32 with a vocabulary of 152,000 tokens."""


class TransformersEngine:
    """See fitness.types.Engine.

    Args:
        checkpoint: folder whose config, tokenizer, chat template and generation config are used (the
            interface parent); its weights are what the model holds until the first update, NaN if they are
            quantised.
        dtype: of the resident weights and of all arithmetic: "float32", "bfloat16", "float16".
        device: "auto" takes a GPU where there is one.
        batch_size: prompts decoded together. Text depends on it, so it is fixed for a run; "auto" finds it
            from free memory at the first call of `generate`.
        decoding: how text is drawn; default: as the checkpoint's generation config says.
        system: a system message before every prompt.
        chat: further arguments of the chat template, such as `enable_thinking`.
        compile: have torch.compile make the step that adds a token to every row, for any number of rows and tokens.
            The first call of `generate` then takes minutes; updates need none. In 16 bits the text may be another.
        options: passed on to from_pretrained (attn_implementation, experts_implementation, ...).

    Raises:
        ValueError: if the device is not there, transformers does not take the options, nothing names a stop token,
            the generation config asks for what is not followed here, the model's cache is none that is known here,
            or there is no way to compile.
    """

    capabilities = frozenset({"generate", "logprobs"})

    def __init__(
        self,
        checkpoint: str,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        device: str = "auto",
        batch_size: Annotated[int, Ge(1)] | Literal["auto"] = 32,
        decoding: Decoding | None = None,
        system: str | None = None,
        chat: Mapping[str, Any] | None = None,
        compile: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if missing := missing_gpu(self.device):
            raise ValueError(f"device {device!r} was asked for, but torch sees {missing} here: use 'auto' or 'cpu'")
        if self.device.type == "cuda":
            # cuDNN's attention plans anew for every shape, of which decoding has one a step (up to 0.4 s each), and is
            # reported to corrupt text of batches (pytorch issue 193893); torch prefers it from the H100 on.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.batch_size = None if batch_size == "auto" else batch_size
        self._decoding = decoding or Decoding()
        logging.disable_progress_bar()
        self._model = _loaded(checkpoint, getattr(torch, dtype), options or {}).to(self.device)
        self._model.eval()
        check_cache(self._model)
        self.caveat = _caveat_of(self._model.config.get_text_config())
        self._slots = find_slots(self._model)
        self._writer: Any = None
        generation = self._model.generation_config
        self._text = Text(checkpoint, generation, stop=self._decoding.stop, system=system, chat=chat)
        self._decoder = Decoder(
            self._model,
            Sampler(Settings.of(generation, self._decoding)),
            torch.tensor(self._text.stop_ids, device=self.device),
            self._find_stop_strings if self._decoding.stop else None,
            refill=is_columnar(self._model.config),
            step=self._compiled() if compile else None,
        )
        self._context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def slots(self) -> Mapping[str, Tensor]:
        """See Engine."""
        return self._slots

    def host(self, writer: str, **arguments: Any) -> None:
        """See Engine."""
        self._writer = pkgutil.resolve_name(writer)(self._slots, **arguments)

    def update(self, recipe: Mapping[str, Any]) -> Any:
        """See Engine. Nothing outlives a call of generate here, so there is no cache to drop."""
        if self._writer is None:
            raise RuntimeError("engine.host(...) must be called before engine.update(...)")
        return self._writer.write(recipe)

    def room(self, prompts: Sequence[str]) -> int | None:
        """See Engine."""
        return most_room(self._text, prompts, self._context)

    def generate(
        self, prompts: Sequence[str], *, max_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """See Engine.

        Raises:
            FloatingPointError: if the model's logits are not finite (a merge that has collapsed).
        """
        encoded, room = rooms(self._text, prompts, max_tokens, self._context)
        if self.batch_size is None:
            longest = max((len(ids) for ids in encoded.values()), default=0)
            self.batch_size = self._find_batch_size(longest + max_tokens)
        requests = [
            Request(encoded[prompt], room[prompt], seed)
            for prompt, seed in zip(prompts, seeds or [0] * len(prompts), strict=True)
        ]
        written = self._decode(requests, self.batch_size)
        return [self._text.completion(ids, max_tokens) for ids in written]

    def _decode(self, requests: Sequence[Request], n_rows: int) -> list[list[int]]:
        """Decode, and where a GPU's memory runs out once more: what it has free may have been in pieces."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._decoder.decode(requests, n_rows)
        torch.cuda.empty_cache()  # out here nothing holds to what the failed attempt has made
        return self._decoder.decode(requests, n_rows)

    @torch.inference_mode()
    def log_likelihood(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Likelihood]:
        """See Engine. One after another: logits of several long answers would take gigabytes."""
        asked = [self._text.encode(prompt) for prompt in prompts]
        read, stop_id = self._text.tokenizer, self._text.stop_ids[0]
        given = [[*read(c, add_special_tokens=False)["input_ids"], stop_id] for c in completions]
        found = []
        for before, after in zip(asked, given, strict=True):
            ids = torch.tensor([before + after], device=self.device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1]  # (L, V)
            said, pieces = ids[0, len(before) :], [slice(i, i + _POSITIONS) for i in range(0, len(after), _POSITIONS)]
            nats = sum(float(cross_entropy(logits[at].float(), said[at], reduction="sum")) for at in pieces)
            found.append(Likelihood(-nats, len(after), -math.log(logits.shape[-1])))
        return found

    def _compiled(self) -> Any:
        """The model's forward pass; weights stay its inputs, so that what is written into them counts."""
        if not is_columnar(self._model.config):
            raise ValueError(
                "engine.compile: this architecture's cache is not one of plain keys and values: leave it out"
            )
        if self.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise ValueError("engine.compile: torch.compile needs a C++ compiler here, g++ or clang++, or $CXX")
        return torch.compile(self._model.forward, dynamic=True)

    @torch.inference_mode()
    def _find_batch_size(self, n_tokens: int) -> int:
        """How many rows of so many tokens find room beside the model."""
        n_logits = self._model.config.get_text_config().vocab_size
        row_bytes = row_memory(self._model).n_bytes(n_tokens) + ROW_LOGIT_BYTES * n_logits
        return rows_that_fit(row_bytes, free_bytes(self.device), self.device)

    def _find_stop_strings(self, tail: Tensor) -> Tensor:
        texts = (self._text.tokenizer.decode([i for i in row if i >= 0]) for row in tail.tolist())
        found = [any(string in text for string in self._decoding.stop) for text in texts]
        return torch.tensor(found, device=tail.device)


def longest_prompt(
    checkpoint: str, prompts: Sequence[str], *, system: str | None = None, chat: Mapping[str, Any] | None = None
) -> int:
    """Tokens of the longest prompt. Loads the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    before = [{"role": "system", "content": system}] if system else []
    asked = ([*before, {"role": "user", "content": prompt}] for prompt in prompts)
    return max((len(encode(tokenizer, messages, chat or {})) for messages in asked), default=0)


def _loaded(checkpoint: str, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    """A model, loaded with options of a config. What transformers does not know, it hands to the model's own class.

    Raises:
        ValueError: for options that transformers does not take.
    """
    try:
        return load_model(checkpoint, dtype, **options)
    except (TypeError, AttributeError, KeyError) as error:
        if not options:
            raise
        raise ValueError(
            f"engine.options: transformers cannot load a model with {dict(options)} ({type(error).__name__}: {error}): "
            "expected arguments of from_pretrained, such as attn_implementation: sdpa"
        ) from error


def load_model(checkpoint: str, dtype: torch.dtype, **options: Any) -> Any:
    """A model with its weights in `dtype`; of a quantised checkpoint, only the architecture, filled with NaN.

    transformers would want a GPU, kernels or further libraries for some kinds of quantised weights. An update
    overwrites every one of them anyway, and what it forgot would show at once.

    Raises:
        ValueError: if transformers has no model that writes text for this config.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    kind = kind_of_model(config)
    if getattr(config, "quantization_config", None) is None:
        return kind.from_pretrained(checkpoint, dtype=dtype, **options)
    del config.quantization_config
    with torch.device("meta"):
        shapes = kind.from_config(config)
    empty = {name: torch.full(t.shape, torch.nan, dtype=dtype) for name, t in shapes.state_dict().items()}
    model = type(shapes).from_pretrained(None, config=config, state_dict=empty, dtype=dtype, **options)
    del model._weight_conversions  # it loaded under its own names, which says nothing of the checkpoint's
    if (Path(checkpoint) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model


def _caveat_of(config: Any) -> str | None:
    """What to know of all text that a model writes here. Of config.json, the part about text."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    limit = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return (
        f"positions are scaled in another way beyond {limit} tokens (longrope), and text that gets there is not what "
        "model.generate writes: it computes all keys anew, which is not done here, and text depends on the longest row "
        "of a batch. Answers that stay below, prompt included, are not affected"
    )


def kind_of_model(config: Any) -> Any:
    """What loads it: models that see or hear answer text, too."""
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in kind._model_mapping:
            return kind
    raise ValueError(
        f"transformers has no model that writes text for model_type {config.model_type!r}: expected a language model, "
        "or one with a vision or sound tower"
    )


class _View(Tensor):
    """A tensor whose `contiguous` is itself, so that splitting it yields views and never copies."""

    def contiguous(self, *args: Any, **kwargs: Any) -> Tensor:
        return self


def find_slots(model: Any) -> dict[str, Tensor]:
    """Views of a model's resident weights under the names that they have in a checkpoint.

    transformers 5 renames and packs weights while loading (all experts of a block in one tensor). Its own
    table of conversions, run backwards on tensors that refuse to be copied, finds where each piece went.

    Raises:
        NotImplementedError: where a conversion does more than rename, stack and concatenate.
    """
    resident = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    storages = {tensor.untyped_storage().data_ptr() for tensor in resident.values()}
    views = {name: tensor.as_subclass(_View) for name, tensor in resident.items()}
    slots = {name: slot.as_subclass(Tensor) for name, slot in revert_weight_conversion(model, views).items()}
    copies = [name for name, slot in slots.items() if slot.untyped_storage().data_ptr() not in storages]
    if copies:
        raise NotImplementedError(
            f"transformers rearranges {len(copies)} weight(s) of this architecture while loading, so they "
            f"cannot be written in place: {', '.join(copies[:5])}"
        )
    named = {**resident, **slots}  # a checkpoint may also be stored packed, as the model is
    prefix = f"{model.base_model_prefix}."  # which transformers adds and takes away as it needs
    without = {name.removeprefix(prefix): slot for name, slot in named.items()}
    return {**without, **{f"{prefix}{name}": slot for name, slot in named.items()}, **named}
