"""Runs inside mergekit's own environment: python mergekit_runner.py JOBS.json

JOBS.json lists [config, folder]; each config is merged into its folder, or error.txt in it says why not. One process,
since starting one takes longer than merging a tiny checkpoint.
"""

import json
import sys
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

JOBS = Path(sys.argv[1])
OPTIONS = MergeOptions(
    copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0, num_threads=1,
    lora_merge_cache=str(JOBS.parent / "with_adapters"),
)  # fmt: skip

for config, folder in json.loads(JOBS.read_text()):
    try:
        run_merge(MergeConfiguration.model_validate(config), folder, OPTIONS)
    except RuntimeError as error:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "error.txt").write_text(str(error))
