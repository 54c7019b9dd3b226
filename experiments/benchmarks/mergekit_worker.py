"""Runs inside mergekit's own environment: answers merges on stdin, one a line, {"config", "out", "touch"}.

The answer is CPU seconds of the operations alone, and wall seconds of the whole, from files to files on disk. With
"touch", inputs are read before an operation's clock starts, which the whole then pays for.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.base import MergeMethod
from mergekit.options import MergeOptions

torch.set_num_threads(1)
OPTIONS = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0, num_threads=1)
spent = 0.0
execute = MergeMethod._execute_resolved


def timed(self: MergeMethod, groups: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation."""
    global spent
    for group in groups if job["touch"] else ():
        for tensor in group.tensors:
            tensor.clone()
    start = time.process_time()
    result = execute(self, groups, *args, **kwargs)
    spent += time.process_time() - start
    return result


MergeMethod._execute_resolved = timed
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever mergekit prints is no answer
for line in sys.stdin:
    job, spent = json.loads(line), 0.0
    start = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(job["config"]), job["out"], OPTIONS)
    for file in Path(job["out"]).iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    print(json.dumps({"operation": spent, "whole": time.perf_counter() - start}), file=answers, flush=True)
