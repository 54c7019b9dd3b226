"""Text on its way into a model and out of it: chat template, tokenizer, stop tokens and strings, thinking tags.

What every engine does alike, whatever decodes. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

from fitness.types import Completion, Finish


class Text:
    """The interface of a checkpoint to people.

    Args:
        checkpoint: folder with the tokenizer and its chat template.
        generation: of the checkpoint; it names the stop tokens.
        stop: strings that end a completion.
        system: a system message before every prompt.
        chat: further arguments of the chat template.

    Raises:
        ValueError: if nothing names a stop token.
    """

    def __init__(
        self,
        checkpoint: str,
        generation: GenerationConfig,
        *,
        stop: tuple[str, ...] = (),
        system: str | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.stop = stop
        self.stop_ids = _stop_ids(generation, self.tokenizer)
        self._messages = [{"role": "system", "content": system}] if system else []
        self._chat = dict(chat or {})
        self._end_of_thought: int | None = self.tokenizer.get_vocab().get("</think>")

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a user message, through the chat template where the tokenizer has one."""
        return encode(self.tokenizer, [*self._messages, {"role": "user", "content": prompt}], self._chat)

    def completion(self, ids: list[int], max_tokens: int) -> Completion:
        """What a model has written, as data; `ids` with the stop token, where it wrote one."""
        by_token = bool(ids) and ids[-1] in self.stop_ids
        text = self.tokenizer.decode(ids[:-1] if by_token else ids, clean_up_tokenization_spaces=False)
        cuts = [at for string in self.stop if (at := text.find(string)) >= 0]
        stopped = by_token or bool(cuts)
        text = text[: min(cuts, default=len(text))]
        return Completion(
            text=text,
            n_tokens=len(ids) if stopped else max_tokens,
            n_think_tokens=self._count_thinking(ids, text),
            finish=Finish.STOP if stopped else Finish.LENGTH,
            token_ids=tuple(ids),
        )

    def _count_thinking(self, ids: list[int], text: str) -> int:
        if self._end_of_thought is not None:
            return len(ids) - ids[::-1].index(self._end_of_thought) if self._end_of_thought in ids else 0
        thought, tag, _ = text.rpartition("</think>")
        return len(self.tokenizer(thought + tag, add_special_tokens=False)["input_ids"]) if tag else 0


def encode(tokenizer: Any, messages: Sequence[Mapping[str, str]], chat: Mapping[str, Any]) -> list[int]:
    """Token ids of a conversation, through the chat template where the tokenizer has one."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **chat)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template wrote them


def check_template(text: str) -> None:
    """Refuse what no tokenizer could use as its chat template.

    Raises:
        ValueError: if it is not written in Jinja, as `transformers` reads it.
    """
    if "{{" not in text and "{%" not in text:
        raise ValueError(f"{text!r} is no text of a template (in Jinja)")
    try:
        render_jinja_template([], chat_template=text)  # compiles it; of no conversation nothing is run
    except TemplateSyntaxError as error:
        raise ValueError(f"Jinja cannot read this template: {error} (line {error.lineno} of it)") from None


def rooms(
    text: Text, prompts: Sequence[str], max_tokens: int, context: int | None
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Prompt -> its tokens, and prompt -> how many it may be continued by.

    Args:
        text: encodes.
        prompts: each may occur several times.
        max_tokens: the most for any.
        context: tokens that a prompt and its completion may have together; None: any number.

    """
    encoded = {prompt: text.encode(prompt) for prompt in dict.fromkeys(prompts)}
    if context is None:
        return encoded, dict.fromkeys(encoded, max_tokens)
    return encoded, {prompt: max(0, min(max_tokens, context - len(ids))) for prompt, ids in encoded.items()}


def most_room(text: Text, prompts: Sequence[str], context: int | None) -> int | None:
    """See Engine.room; arguments as there and in `rooms`."""
    if context is None or not prompts:
        return None
    return max(0, context - min(len(text.encode(prompt)) for prompt in dict.fromkeys(prompts)))


def generation_config(checkpoint: str) -> GenerationConfig:
    """A checkpoint's generation config; what its model's config says, where it has none."""
    if (Path(checkpoint) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(checkpoint)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(checkpoint))


def _stop_ids(generation: GenerationConfig, tokenizer: Any) -> list[int]:
    ids = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    if ids is None:
        raise ValueError("neither the generation config nor the tokenizer names a stop token (eos_token_id)")
    return list(ids) if isinstance(ids, list | tuple) else [ids]
