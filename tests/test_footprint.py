"""What a model, its cache and drawing take, against real models and a real process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from evo.checkpoint import Checkpoint
from evo.planning.footprint import cache_row_bytes, columns, export_bytes, kernel_bytes, model_bytes, step_row_bytes
from fitness.engines.columns import Columns, cache_name, is_columnar, one_token
from fitness.engines.sampling import Settings as Sampling
from tests.conftest import make_checkpoint
from tests.test_architecture import ROOT
from tests.test_architectures import ARCHITECTURES, COMMON, SEEING


@pytest.mark.parametrize("config", ["llama", "llama_tied", "qwen3_moe", "deepseek_v3"])
def test_bytes_are_those_of_the_real_model_cache_and_files(tmp_path, config):
    folder = make_checkpoint(tmp_path / "model", config, 0)
    checkpoint = Checkpoint.open(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    resident = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    # DeepSeek's biases stay float32 whatever is asked for, and its routers since transformers 5.24
    float32 = sum(t.nbytes // 2 for t in model.state_dict().values() if t.dtype is torch.float32)
    assert model_bytes(checkpoint, "bfloat16") == pytest.approx(resident - float32, rel=0.001)
    assert float32 < 0.02 * resident  # on so small a model; plans are to be within a tenth
    weights = sum(checkpoint.tensor(name).nbytes for name in checkpoint.headers)
    files = {f for f in folder.iterdir() if "safetensors" not in f.name}
    assert export_bytes(checkpoint) == weights + sum(f.stat().st_size for f in files)
    prompt, answer, rows = 5, 64, 3
    cache = Columns(rows, one_token(model))
    cache.join(rows, prompt)
    model(input_ids=torch.ones(rows, prompt, dtype=torch.long), **{cache_name(model): cache}, use_cache=True)
    for n in range(prompt, prompt + answer - 1):
        cache.step(n)
        at = torch.full((rows, 1), n)
        mask = torch.ones(rows, n + 1)
        model(input_ids=at % 2, position_ids=at, attention_mask=mask, **{cache_name(model): cache}, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert rows * cache_row_bytes(AutoConfig.from_pretrained(folder).to_dict(), prompt, answer, 2) == held


KINDS = {
    "gpt2": {}, "falcon": {"multi_query": True}, "bloom": {}, "dbrx": {},
    "lfm2_moe": {}, "nemotron_h": {}, "qwen3_next": {},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 4, "num_kv_shared_layers": 2},
    "qwen2_5_vl": {},
}  # fmt: skip
"""Model type -> what to change: shared heads and layers, other names, states, a tower."""


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_other_architectures_are_those_of_the_real_model_and_cache(kind, tmp_path):
    """Within 3 %: of a window transformers keeps one token less."""
    options = SEEING.get(kind) or {**COMMON, **ARCHITECTURES[kind], **KINDS[kind]}
    options = {key: value for key, value in options.items() if key not in (*options.get("without", ()), "without")}
    factory = AutoModelForImageTextToText if kind in SEEING else AutoModelForCausalLM
    factory.from_config(AutoConfig.for_model(kind, **options)).to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint, model = Checkpoint.open(tmp_path), factory.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model_bytes(checkpoint, "bfloat16") == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.03)
    prompt, answer, cache = 20, 40, DynamicCache(config=model.config)
    ids = torch.ones(1, prompt + answer, dtype=torch.long)
    with torch.inference_mode():
        model(input_ids=ids, **{cache_name(model): cache}, use_cache=True)
    held = [t for layer in cache.layers for v in vars(layer).values() for t in (v.values() if type(v) is dict else [v])]
    real = sum(t.nbytes for t in held if isinstance(t, torch.Tensor))
    if is_columnar(model.config):  # kept with room to spare
        real = real // (prompt + answer) * columns(prompt, answer)
    assert cache_row_bytes(checkpoint.config(), prompt, answer, 2) == pytest.approx(real, rel=0.03)
    assert step_row_bytes(checkpoint.config(), prompt, answer, 2, 4) > 0


def test_a_published_config_leaves_out_what_is_its_architectures_default():
    """google/gemma-3-4b-it says neither heads nor vocabulary; its keys and values have 4 heads of 256."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "text_config": {**text, "sliding_window": 1024}, "vision_config": {}}
    assert cache_row_bytes(config, 100, 32, 2) == columns(100, 32) * 34 * 2 * 4 * 256 * 2
    assert step_row_bytes(config, 100, 32, 2, 4) > 4 * 262_208  # the vocabulary


DRAWING = [
    Sampling(True), Sampling(True, repetition_penalty=1.1), Sampling(False, temperature=0.6),
    Sampling(False, temperature=0.6, top_p=0.95, top_k=20),
]  # fmt: skip
MEASURE_DRAWING = """
import sys
import numpy as np, torch
from fitness.engines.sampling import Sampler, Settings

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

logits, steps = torch.randn(16, 200_000).bfloat16(), np.zeros(16, np.int64)
for settings in eval(sys.argv[1]):
    draw = Sampler(settings)
    draw(logits[:1, :64], torch.zeros(1, 8, dtype=torch.long), steps[:1].astype(np.uint64), steps[:1])
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = memory("VmRSS")
    draw(logits, torch.zeros(16, 8, dtype=torch.long), steps.astype(np.uint64), steps)
    print((memory("VmHWM") - before + logits.nbytes) / logits.numel())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak")
def test_what_drawing_takes_is_what_it_really_takes():
    """Within 3 bytes a logit, of 2 to 32; large blocks are given back at once, so that peaks are of what is in use."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", MEASURE_DRAWING, repr(DRAWING)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=True)
    told = [settings.logit_bytes for settings in DRAWING]
    assert told == pytest.approx(list(map(float, run.stdout.split())), abs=3)


def test_columns_by_hand():
    assert columns(10, 20) == 42  # fits at once
    assert columns(10, 60) == 42 + 32  # 42, then 32 more, which is more than half of 42
    assert columns(100, 100) == 132 + 66 + 99  # 132, 198 are less than 200


MEASURE_KERNELS = """
import sys
import torch
from transformers import AutoModelForCausalLM

def memory():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.inference_mode():
    model(input_ids=torch.ones(200, 1, dtype=torch.long), use_cache=False)
    before = memory()
    for n in range(1, 49):
        model(input_ids=torch.ones(n, 1, dtype=torch.long), use_cache=False)
print(memory() - before)
"""


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not Path("/proc/self/status").exists(),
    reason="torch has oneDNN multiply bfloat16 where there is AVX-512",
)
def test_compiled_products_of_a_real_model(tmp_path):
    """Of a batch of 32 whose rows end one by one, and of prompts: 48 numbers of tokens in all, one after the other."""
    folder = make_checkpoint(tmp_path / "model", "llama", 0)
    command = [sys.executable, "-c", MEASURE_KERNELS, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert kernel_bytes(Checkpoint.open(folder), 5, 32) == pytest.approx(int(run.stdout), rel=0.15)


def test_compiled_products_by_hand(tmp_path):
    """Attention, gates, down, and the head's shape; of experts the shapes of their three matrices: two."""
    dense, moe = (Checkpoint.open(make_checkpoint(tmp_path / name, name, 0)) for name in ("llama", "qwen3_moe"))
    assert kernel_bytes(dense, 5, 32) == 4 * 48 * 570_000
    assert kernel_bytes(moe, 5, 2) < kernel_bytes(moe, 50, 2) <= kernel_bytes(moe, 5000, 2) == 1024 * 570_000
