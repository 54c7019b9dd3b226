"""Tiny real checkpoints, made in milliseconds from transformers' own config classes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import hypothesis
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from evo import Search
from evo.config import Config
from evo.merge_file import merge
from tests.adapters import make_adapter
from tests.encoding import files_of
from tests.synthetic import config_of

# The same examples in every run; `pytest --hypothesis-profile default` draws new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

DATA = Path(os.environ.get("MERGEFRONT_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
"""Real problems (gsm8k_test.jsonl and others), which are not part of the project; tests of them skip without."""
CHIMERA = Path(__file__).parent.parent / "experiments" / "chimera_mini"
PARENTS = Path(__file__).parent / "parents"
"""What searches merge, where experts do not matter: chimera-mini's skills in a model that is four times as fast."""
LONG = (
    "test_resume", "test_engine_contract", "test_sittings", "test_proxy_parking", "test_cli", "test_search",
    "test_tracker", "test_decoding", "test_proxy_search", "test_hub_download",
)  # fmt: skip
"""Modules that take minutes: begun first, so that no worker is left with one at the end."""
VOCABULARY = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "</think>", *"0123456789+-*=;?"]

_COMMON = {
    "vocab_size": len(VOCABULARY),
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long modules before the others, which stay in their order."""
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONG)))


def _configs(width: int, **of_deepseek: Any) -> dict[str, Callable[[], PretrainedConfig]]:
    """Every architecture under test, at a hidden size."""
    common = {**_COMMON, "hidden_size": width, "intermediate_size": 3 * width // 2}
    experts = {"moe_intermediate_size": width // 2, "num_experts_per_tok": 2}
    return {
        "llama": lambda: LlamaConfig(**common),
        "llama_tied": lambda: LlamaConfig(**common, tie_word_embeddings=True),
        "qwen3_moe": lambda: Qwen3MoeConfig(**common, **experts, num_experts=4, head_dim=width // 2),
        "deepseek_v3": lambda: DeepseekV3Config(
            **common,
            **experts,
            n_routed_experts=8,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            v_head_dim=width // 2,
            **of_deepseek,
        ),
    }


CONFIGS = _configs(32, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8)
CONFIGS_OF_ENGINES = _configs(
    64,
    kv_lora_rank=512,
    qk_nope_head_dim=32,
    qk_rope_head_dim=64,
    topk_method="noaux_tc",  # vLLM has biases of experts only where the config says so, as DeepSeek's does
)
"""The same architectures with sizes that vLLM's kernels have, too."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^>]+>|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "<s>{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    return fast


def make_checkpoint(
    folder: Path, config: str | PretrainedConfig, seed: int, *, dtype: torch.dtype = torch.bfloat16, shard: str = "8KB"
) -> Path:
    """A random sharded checkpoint in the published layout, with a tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[config]() if isinstance(config, str) else config)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # norms start at exactly one
        parameter.data = parameter.data.to(torch.float32 if "e_score" in name else dtype)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "e_score" in name:
                buffer.normal_(std=0.01)
    model.config.dtype = dtype
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=list(CONFIGS))
def parents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random checkpoints of one architecture: ancestor, a, b."""
    folder = tmp_path_factory.mktemp(request.param)
    return {name: make_checkpoint(folder / name, request.param, seed) for seed, name in enumerate(["base", "a", "b"])}


@pytest.fixture(scope="session")
def moe_parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random DeepSeek-V3 checkpoints."""
    folder = tmp_path_factory.mktemp("moe")
    return {name: make_checkpoint(folder / name, "deepseek_v3", seed) for seed, name in enumerate(["base", "a", "b"])}


@pytest.fixture
def copy(moe_parents: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be spoilt."""
    return Path(shutil.copytree(moe_parents["a"], tmp_path / "copy"))


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP does what it does at a terminal, though the tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def own_parents(tmp_path: Path) -> Path:
    """Copies of the parents that searches merge, to be changed."""
    for name in ("reasoner", "concise", "base"):
        shutil.copytree(PARENTS / name, tmp_path / "parents" / name)
    return tmp_path / "parents"


@pytest.fixture
def chimera() -> Config:
    """A config of a run over the built-in parents."""
    engine = {"dtype": "float32", "device": "cpu", "batch_size": 32, "max_tokens": 110}
    return config_of({name: CHIMERA / name for name in ("reasoner", "concise", "base")}, engine=engine)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search on the parents that ran to its end without interruption; not to be changed."""
    from tests.searching import write_config  # which imports this module

    folder = tmp_path_factory.mktemp("finished")
    search = Search.from_yaml(write_config(folder), folder / "run")
    search.run()
    return search


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 checkpoints called base, a and b, in a folder that recipes are written to."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "a", "b"]):
        make_checkpoint(folder / name, "llama", seed, dtype=torch.float32, shard="1GB")
    return folder


@pytest.fixture
def merged(models: Path, tmp_path: Path) -> Callable[[str], dict[str, torch.Tensor]]:
    """Merges what the text of a recipe beside the models says, and gives the tensors."""

    def run(text: str) -> dict[str, torch.Tensor]:
        (models / "recipe.yaml").write_text(text)
        merge(models / "recipe.yaml", tmp_path / "out", force=True)
        return files_of(tmp_path / "out")

    return run


@pytest.fixture(scope="module")
def llama_adapter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Parents of which a is an adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    base = make_checkpoint(folder / "base", "llama", 0)
    return {"base": base, "a": make_adapter(folder / "a", base, 1), "b": make_checkpoint(folder / "b", "llama", 2)}
