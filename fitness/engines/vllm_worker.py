"""What runs inside vLLM's worker processes, where the weights live: merged tensors go through vLLM's own loader.

Weights there are fused, cut among the ranks of a tensor-parallel group and packed for kernels. vLLM's layerwise
reload knows how: it collects a layer's tensors as the checkpoint has them, loads and packs them anew as at the start,
and copies the result to where the kernels expect it. Each rank merges whole tensors, and the loader keeps its shard.
Knows no recipes, and no architecture.
"""

from __future__ import annotations

import pickle
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

Answer = tuple[Any, Exception | None]
"""Of a rank: what was asked for, or why there is none."""


class MergeWorker:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`) and calls by name on every rank."""

    device: Any
    model_runner: Any
    vllm_config: Any

    def host_writer(self, writer: str, arguments: Mapping[str, Any]) -> Answer:
        """Create the writer: `writer` names a callable (slots, device=, **arguments); there are no slots here."""

        def host() -> None:
            self._merge_writer = pkgutil.resolve_name(writer)(None, device=self.device, **arguments)

        return _answer(host)

    def write_recipe(self, recipe: Mapping[str, Any]) -> Answer:
        """Let the writer feed a recipe's tensors to the loader."""

        def write() -> Any:
            with set_current_vllm_config(self.vllm_config):
                return self._merge_writer.feed(recipe, self._load_weights)

        return _answer(write)

    def watch_logits(self) -> None:
        """Make NaN of rows whose largest logit is infinite: NaN is what vLLM looks for."""
        model = self.model_runner.get_model()
        compute = model.compute_logits

        def watched(*arguments: Any, **options: Any) -> Tensor | None:
            logits: Tensor | None = compute(*arguments, **options)  # (B, V); None on ranks that pick no tokens
            return None if logits is None else logits.add_(0 * logits.amax(dim=-1, keepdim=True))

        model.compute_logits = watched

    def clear_cache(self) -> None:
        """Overwrite all cached keys and values: in a masked place a NaN still makes NaN (0 times NaN) of an answer."""
        for cache in self.model_runner.kv_caches:
            for tensor in cache if isinstance(cache, list | tuple) else [cache]:
                tensor.zero_()

    def _load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Raises RuntimeError if weights are left that the tensors did not reach, whatever the model says."""
        model = self.model_runner.get_model()
        names = {name for name, _ in model.named_parameters()}
        kernels = _forget_kernels(model)
        initialize_layerwise_reload(model)
        names &= {name for name, _ in model.named_parameters()}  # those that a checkpoint has, too
        try:
            loaded = model.load_weights(weights)
            lost = names & _without_values(model)
        except BaseException:
            _forget_loaded(model)
            raise
        finally:  # puts back what was not loaded
            finalize_layerwise_reload(model, self.model_runner.model_config)
            _pack_tied_heads(model)
            for method, kernel in kernels.items():
                method.moe_kernel = method.moe_kernel or kernel
        if self.vllm_config.quant_config is not None:  # whose layers have weights that few checkpoints hold
            lost &= loaded or set()
        elif loaded is not None:
            lost |= names - loaded
        if lost:
            raise RuntimeError(
                f"vLLM has not loaded {len(lost)} weight(s) of the merge ({', '.join(sorted(lost)[:5])}): it may be "
                "unable to load them more than once in this architecture; the engine 'transformers' can"
            )


def _answer(call: Callable[[], Any]) -> Answer:
    """What a call returns, or its error: of a call that raises, vLLM leaves further ranks' answers to the next."""
    try:
        return call(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # it cannot go to another process
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _without_values(model: nn.Module) -> set[str]:
    """Weights that nothing was collected for: some models (gpt-oss) write past the reload, to tensors without data."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, layer in model.named_modules()
        for name, weight in layer._parameters.items()
        if weight is not None and weight.is_meta
        if name not in {collected for collected, _ in get_layerwise_info(layer).loaded_weights}
    }


def _forget_loaded(model: nn.Module) -> None:
    """Drop what has been collected of layers that are not complete, so that they keep the weights they have."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0


def _forget_kernels(model: nn.Module) -> dict[Any, Any]:
    """Make CPU experts be packed again: vLLM 0.32 does that only where it builds their kernel, at the first load.

    Returns:
        What was forgotten, for layers that are not loaded after all.
    """
    if not current_platform.is_cpu():
        return {}
    methods: set[Any] = {getattr(layer, "quant_method", None) for layer in model.modules()}
    kernels = {method: kernel for method in methods if (kernel := getattr(method, "moe_kernel", None)) is not None}
    for method in kernels:
        method.moe_kernel = None
    return kernels


def _pack_tied_heads(model: nn.Module) -> None:
    """A head that shares the embedding's weights is loaded with it, but on a CPU it has a packed copy of its own."""
    if not current_platform.is_cpu():
        return
    holders: dict[int, nn.Module] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and holders.setdefault(id(weight), layer) is not layer:
            layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
