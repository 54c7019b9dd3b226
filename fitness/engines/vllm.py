"""vLLM as an engine: started once, and every candidate is merged inside its workers, into the live weights.

Text is in text.py, what runs in the workers in vllm_worker.py. The engine core lives in this process, which makes its
schedule deterministic; workers of further ranks are processes of their own. vLLM is imported when an engine is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from fitness.engines.sampling import Settings
from fitness.engines.text import Text, generation_config, most_room, rooms
from fitness.types import Completion, Decoding, Finish

_OWN = {
    "model": "parents",
    "dtype": "engine.dtype",
    "max_num_seqs": "engine.batch_size",
    "generation_config": "engine.decoding",
    "override_generation_config": "engine.decoding",
    "worker_extension_cls": None,
    "enable_lora": None,
}
"""Arguments of vLLM that are decided here -> the key of the config to set instead, where there is one."""

_ROUNDED = "vLLM would round the weights while it loads them"
_ELSEWHERE = "vLLM would not take the model and its tokenizer as the checkpoint has them"
_OTHER_DRAWS = "vLLM would draw text in a way that no export knows of"
_OLD_KEYS = "vLLM would find keys and values of the candidate before where it keeps them"
_ANOTHER = {
    **dict.fromkeys(("quantization", "quantization_config"), _ROUNDED),
    **dict.fromkeys(("hf_overrides", "hf_config_path", "model_weights", "load_format"), _ELSEWHERE),
    **dict.fromkeys(("model_class_overrides", "tokenizer", "skip_tokenizer_init"), _ELSEWHERE),
    **dict.fromkeys(("logits_processors", "watermark_config"), _OTHER_DRAWS),
    **dict.fromkeys(("kv_transfer_config", "kv_offloading_size"), _OLD_KEYS),
    "enable_eplb": "vLLM would move experts about, and load a candidate's to where they were at first",
}
"""Arguments with which another model would be scored than is exported -> why."""


UTILIZATION = 0.92
"""The share of a device's memory, a CPU's too, that vLLM 0.32 takes for itself where nothing else is said."""


def share_of_memory(options: Mapping[str, Any]) -> float:
    """Of a device's whole memory, what vLLM takes for weights, activations and cache together."""
    return float(_number(options, "gpu_memory_utilization") or UTILIZATION)


def cache_bytes(options: Mapping[str, Any], device: str) -> int | None:
    """Of the cache of keys and values, where it is given, and the share counts for nothing; None: the share's rest."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "") if device == "cpu" else ""
    found = int(space) << 30 if space else _number(options, "kv_cache_memory_bytes")
    return None if found is None else int(found)


def ranks(options: Mapping[str, Any]) -> int:
    """Among which the weights are cut."""
    counts = (_number(options, f"{kind}_parallel_size") for kind in ("tensor", "pipeline"))
    return math.prod(int(count or 1) for count in counts)


def _number(options: Mapping[str, Any], name: str) -> float | None:
    found = options.get(name)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float)):
        raise ValueError(f"engine.options.{name}: expected a number, got {found!r}")
    return found


TEMPERATURES = (0.01, 2.0)
"""The lowest and the highest that vLLM 0.32 draws with."""

NOT_INVARIANT = (
    "answers are not bit-reproducible: vLLM's kernels were not in batch-invariant mode, so that rounding, and with it "
    "the text, depends on which prompts are decoded together"
)


class VllmEngine:
    """See fitness.types.Engine.

    Sampled answers have a seed of their own, so a candidate meets the same random numbers as every other, in any
    batch. They are vLLM's numbers, not those of the engine "transformers": the two draw different samples, of the same
    probabilities, but where both top_p and min_p are set: vLLM cuts by min_p first, transformers last.

    Args:
        checkpoint: folder whose config, tokenizer, chat template and generation config are used (the
            interface parent); its weights are what the model holds until the first update.
        dtype: of the resident weights, unless they are quantised, and of all arithmetic.
        batch_size: most prompts decoded together (vLLM's max_num_seqs); "auto" is vLLM's own choice.
        decoding: how text is drawn; default: as the checkpoint's generation config says.
        system: a system message before every prompt.
        chat: further arguments of the chat template, such as `enable_thinking`.
        batch_invariant: whether to use kernels whose results do not depend on what is decoded together, where
            vLLM has them (NVIDIA and Intel GPUs); they are slower.
        options: arguments of vLLM (max_model_len, tensor_parallel_size, gpu_memory_utilization, ...), but for those
            that change what the weights are or how text is drawn (quantization, hf_overrides, ...).

    Raises:
        ValueError: for options that vLLM does not know or that are refused, for a temperature that vLLM does not
            follow, or if nothing names a stop token.
    """

    capabilities = frozenset({"generate"})
    refused: ClassVar[Mapping[str, str]] = {
        **{
            name: "this argument of vLLM is decided by mergefront" + (f": set {key}" if key else "")
            for name, key in _OWN.items()
        },
        **{
            name: f"what is scored would not be what is exported, since {why}: leave it out"
            for name, why in _ANOTHER.items()
        },
    }

    def __init__(
        self,
        checkpoint: str,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        batch_size: Annotated[int, Ge(1)] | Literal["auto"] = "auto",
        decoding: Decoding | None = None,
        system: str | None = None,
        chat: Mapping[str, Any] | None = None,
        batch_invariant: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        invariant = _prepare_environment(batch_invariant)
        from vllm import LLM
        from vllm.platforms import current_platform

        options = dict(options or {})
        _check(options)
        decoding, generation = decoding or Decoding(), generation_config(checkpoint)
        self._settings = _followed(Settings.of(generation, decoding))
        self._text = Text(checkpoint, generation, stop=decoding.stop, system=system, chat=chat)
        if current_platform.is_cpu():
            if (_number(options, "pipeline_parallel_size") or 1) > 1:  # it loads, and fails at the first prompt
                raise ValueError("engine.options.pipeline_parallel_size: not on a CPU: use tensor_parallel_size")
            options.setdefault("enforce_eager", True)  # compiling takes half a minute, and gains little
            if "attention_config" not in options:  # AMX's kernel for MLA drops weights, so that no others can follow
                options.setdefault("attention_backend", "CPU_MLA")
        if batch_size != "auto":
            options["max_num_seqs"] = batch_size
        self._llm = LLM(
            checkpoint,
            dtype=dtype,
            generation_config="vllm",
            worker_extension_cls="fitness.engines.vllm_worker.MergeWorker",
            **{"seed": 0, **options},
        )
        self.batch_size: int | None = self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._llm.collective_rpc("watch_logits")
        self.caveat = _caveat(invariant, options.get("kv_cache_dtype", "auto"), dtype)

    def slots(self) -> Mapping[str, Tensor]:
        """See Engine.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("vLLM's weights are fused and packed in its workers: there are no slots to give out")

    def host(self, writer: str, **arguments: Any) -> None:
        """See Engine."""
        with self._workers():
            self._call("host_writer", writer, arguments)

    def update(self, recipe: Mapping[str, Any]) -> Any:
        """See Engine. The report is that of the first rank.

        Raises:
            RuntimeError: if a worker process has died.
        """
        with self._workers():
            self._abort()
            try:
                return self._call("write_recipe", recipe)
            finally:
                if not self._llm.reset_prefix_cache():
                    raise RuntimeError("vLLM still holds cached keys and values of the weights before")

    def _call(self, method: str, *arguments: Any) -> Any:
        """What the first rank answers, once all have; raises the first error that one answers with."""
        answers = self._llm.collective_rpc(method, args=arguments)
        for _, error in answers:
            if error is not None:
                raise error
        return answers[0][0]

    def room(self, prompts: Sequence[str]) -> int | None:
        """See Engine."""
        return most_room(self._text, prompts, self._llm.model_config.max_model_len)

    def generate(
        self, prompts: Sequence[str], *, max_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """See Engine.

        Raises:
            FloatingPointError: if the model's logits are not finite (a merge that has collapsed).
            RuntimeError: if a worker process has died.
        """
        encoded, room = rooms(self._text, prompts, max_tokens, self._llm.model_config.max_model_len)
        seeds = seeds or [0] * len(prompts)
        asked = [i for i, prompt in enumerate(prompts) if room[prompt] > 0]
        found = [self._text.completion([], max_tokens)] * len(prompts)
        if asked:
            requests = [{"prompt_token_ids": encoded[prompts[i]]} for i in asked]
            parameters = [self._parameters(room[prompts[i]], seeds[i]) for i in asked]
            with self._workers():
                written = self._decode(requests, parameters)
            for i, output in zip(asked, written, strict=True):
                found[i] = self._completion(output, max_tokens)
        return found

    def _completion(self, output: Any, max_tokens: int) -> Completion:
        """What vLLM wrote. Tokenizers may drop the space before a text, where vLLM finds a stop string that has one."""
        found = self._text.completion(list(output.token_ids), max_tokens)
        if output.finish_reason == "stop" and found.finish is not Finish.STOP:
            return dataclasses.replace(found, text=output.text, n_tokens=len(output.token_ids), finish=Finish.STOP)
        return found

    def _decode(self, requests: list[dict[str, list[int]]], parameters: list[Any]) -> list[Any]:
        try:
            outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        except RuntimeError as error:
            if _tells_of_nan(error):
                self._abort()
                self._llm.collective_rpc("clear_cache")
                raise FloatingPointError("the model's logits are not finite") from error
            raise
        finally:
            self._abort()
        return [output.outputs[0] for output in outputs]

    @contextmanager
    def _workers(self) -> Iterator[None]:
        """Tell of a worker process that has died, whatever vLLM trips over then: it ends the others within 10 s."""
        try:
            yield
        except Exception as error:
            if getattr(self._llm.llm_engine.engine_core.engine_core.model_executor, "is_failed", False):
                raise RuntimeError(
                    "a worker process of vLLM has died, and the others were ended: it crashed, or was killed, by hand "
                    "or for want of memory"
                ) from error
            raise

    def _parameters(self, max_tokens: int, seed: int) -> Any:
        from vllm import SamplingParams

        cuts = {name: value for name, value in dataclasses.asdict(self._settings).items() if value is not None}
        if cuts.pop("greedy"):
            cuts["temperature"] = 0.0
        return SamplingParams(
            max_tokens=max_tokens,
            seed=None if self._settings.greedy else seed >> 1,  # vLLM's have a sign
            stop=list(self._text.stop),
            stop_token_ids=self._text.stop_ids,
            ignore_eos=True,  # the stop tokens are those above
            detokenize=bool(self._text.stop),
            skip_special_tokens=False,  # a stop string may be, or hold, the text of one
            **cuts,
        )

    def _abort(self) -> None:
        """Drop requests that an interrupt or an error has left behind, and the memory that they hold."""
        engine = self._llm.llm_engine
        core = engine.engine_core.engine_core
        if engine.has_unfinished_requests():
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
        while core.scheduler.has_requests() or core.batch_queue:
            try:
                engine.step()
            except RuntimeError as error:  # where batches are scheduled ahead, the next has the same weights
                if not _tells_of_nan(error):
                    raise


def _caveat(invariant: bool, cached: str, dtype: str) -> str | None:
    rounded = f"keys and values were cached as {cached}, so that scores are of models that are served with that"
    return "; ".join([NOT_INVARIANT] * (not invariant) + [rounded] * (cached not in ("auto", dtype))) or None


def _followed(settings: Settings) -> Settings:
    """The settings, if vLLM draws as they say: a lower temperature it raises, a higher one it refuses."""
    low, high = TEMPERATURES
    if settings.temperature is not None and not low <= settings.temperature <= high:
        raise ValueError(
            f"decoding.temperature: vLLM follows {low:g} to {high:g}, got {settings.temperature:g}: set one of those, "
            "or decoding.greedy to true for the likeliest token"
        )
    return settings


def _tells_of_nan(error: RuntimeError) -> bool:
    return "NaNs detected in logits" in str(error)


def _prepare_environment(batch_invariant: bool) -> bool:
    """Set what vLLM reads when it is first used; whether its kernels will be batch-invariant."""
    from vllm.platforms import current_platform

    invariant = bool(batch_invariant and (current_platform.is_cuda() or current_platform.is_xpu()))
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(invariant))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_RAISE_ON_LOGIT_NANS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    return invariant


def _check(options: Mapping[str, Any]) -> None:
    from vllm import EngineArgs

    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in options:
        if name in VllmEngine.refused:
            raise ValueError(f"engine.options.{name}: {VllmEngine.refused[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"engine.options.{name}: vLLM has no such argument{hint}")
