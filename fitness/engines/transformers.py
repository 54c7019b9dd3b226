"""The default engine: one resident `transformers` model, written in place, decoded greedily in batches.

`model.generate` keeps computing rows that have already stopped until the last one does. Answers differ in
length many times over (that is what a search here is about), so this engine decodes with a short loop of
its own that drops finished rows from the batch and its key-value cache.

Shapes: B rows still generating, L columns of the cache, V vocabulary.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from fitness.types import Completion, Finish

COMPACT_SHARE = 0.125
"""Finished rows are dropped once they are this share of the batch; each drop copies the rest of the cache."""


class TransformersEngine:
    """See fitness.types.Engine.

    Args:
        checkpoint: folder whose config, tokenizer, chat template and generation config are used (the
            interface parent); its weights are what the model holds until the first update, NaN if they are
            quantised.
        dtype: of the resident weights and of all arithmetic: "float32", "bfloat16", "float16".
        device: "auto" takes a GPU where there is one.
        batch_size: prompts decoded together. Greedy text depends on it, so it is fixed for a run.
        options: passed on to from_pretrained (attn_implementation, experts_implementation, ...).

    Raises:
        ValueError: if the device is not there, or nothing names a stop token.
    """

    capabilities = frozenset({"generate"})

    def __init__(
        self,
        checkpoint: str,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        device: str = "auto",
        batch_size: Annotated[int, Ge(1)] = 32,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device!r} was asked for, but torch sees no GPU here: use 'auto' or 'cpu'")
        self._batch_size = batch_size
        logging.disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = load_model(checkpoint, getattr(torch, dtype), **(options or {})).to(self.device)
        self._model.eval()
        self._slots = find_slots(self._model)
        self._writer: Any = None
        self._stop_ids = torch.tensor(_stop_ids(self._model.generation_config, self._tokenizer), device=self.device)
        self._end_of_thought: int | None = self._tokenizer.get_vocab().get("</think>")
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

    def generate(self, prompts: Sequence[str], *, max_tokens: int, seed: int = 0) -> list[Completion]:
        """See Engine. Greedy, so the seed changes nothing.

        Raises:
            FloatingPointError: if the model's logits are not finite (a merge that has collapsed).
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        self._check_context(encoded, max_tokens)
        completions: list[Completion] = []
        for start in range(0, len(encoded), self._batch_size):
            batch = encoded[start : start + self._batch_size]
            completions += [self._completion(ids, max_tokens) for ids in self._decode(batch, max_tokens)]
        return completions

    def _encode(self, prompt: str) -> list[int]:
        """Token ids of a user message, through the chat template where the tokenizer has one."""
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(prompt)["input_ids"])
        message = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them

    def _check_context(self, encoded: Sequence[Sequence[int]], max_tokens: int) -> None:
        longest = max((len(ids) for ids in encoded), default=0)
        if self._context is not None and longest + max_tokens > self._context:
            raise ValueError(
                f"the longest prompt has {longest} tokens; with max_tokens {max_tokens} that exceeds the "
                f"model's context of {self._context}: lower max_tokens to {self._context - longest} or less, "
                "or leave such problems out"
            )

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy continuation of each prompt, the stop token included."""
        ids, mask = self._pad_left(prompts, max_tokens)
        n_columns = ids.shape[1]
        positions = (mask[:, :n_columns].cumsum(1) - 1).clamp_(min=0)
        cache = DynamicCache(config=self._model.config)
        rows = torch.arange(len(prompts), device=self.device)  # (B,) which prompt each row belongs to
        written = torch.zeros(len(prompts), max_tokens, dtype=torch.long, device=self.device)
        n_written = torch.full((len(prompts),), max_tokens, device=self.device)
        active = torch.ones(len(prompts), dtype=torch.bool, device=self.device)  # (B,)
        for step in range(max_tokens):
            logits = self._model(
                input_ids=ids,
                attention_mask=mask[:, : n_columns + step],
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]  # (B, V)
            best, tokens = logits.max(dim=-1)
            if not torch.isfinite(best).all():
                raise FloatingPointError("the model's logits are not finite")
            written[rows, step] = tokens
            stopped = active & torch.isin(tokens, self._stop_ids)
            n_written[rows[stopped]] = step + 1
            active = active & ~stopped
            n_active = int(active.sum())
            if n_active == 0:
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            if len(active) - n_active >= COMPACT_SHARE * len(active):
                keep = active.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                ids, positions, mask, rows, active = (t[keep] for t in (ids, positions, mask, rows, active))
        return [written[i, : n_written[i]].tolist() for i in range(len(prompts))]

    def _pad_left(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Ids (B, L) and a mask (B, L + max_tokens) that is already set for the tokens to come."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.ones(len(prompts), width + max_tokens, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, : width - len(prompt)] = 0
        return ids.to(self.device), mask.to(self.device)

    def _completion(self, ids: list[int], max_tokens: int) -> Completion:
        stopped = bool(ids) and ids[-1] in self._stop_ids.tolist()
        text = self._tokenizer.decode(ids[:-1] if stopped else ids, clean_up_tokenization_spaces=False)
        return Completion(
            text=text,
            n_tokens=len(ids),
            n_think_tokens=self._count_thinking(ids, text),
            finish=Finish.STOP if stopped else Finish.LENGTH,
        )

    def _count_thinking(self, ids: list[int], text: str) -> int:
        if self._end_of_thought is not None:
            return len(ids) - ids[::-1].index(self._end_of_thought) if self._end_of_thought in ids else 0
        thought, tag, _ = text.rpartition("</think>")
        return len(self._tokenizer(thought + tag, add_special_tokens=False)["input_ids"]) if tag else 0


def load_model(checkpoint: str, dtype: torch.dtype, **options: Any) -> Any:
    """A model with its weights in `dtype`; of a quantised checkpoint, only the architecture, filled with NaN.

    transformers would want a GPU, kernels or further libraries for some kinds of quantised weights. An update
    overwrites every one of them anyway, and what it forgot would show at once.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if getattr(config, "quantization_config", None) is None:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **options)
    del config.quantization_config
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    empty = {name: torch.full(t.shape, torch.nan, dtype=dtype) for name, t in shapes.state_dict().items()}
    model = type(shapes).from_pretrained(None, config=config, state_dict=empty, dtype=dtype, **options)
    del model._weight_conversions  # it loaded under its own names, which says nothing of the checkpoint's
    if (Path(checkpoint) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model


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
    return {**resident, **slots}  # a checkpoint may also be stored packed, under the model's own names


def _stop_ids(generation: GenerationConfig, tokenizer: Any) -> list[int]:
    ids = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    if ids is None:
        raise ValueError("neither the generation config nor the tokenizer names a stop token (eos_token_id)")
    return list(ids) if isinstance(ids, list | tuple) else [ids]
