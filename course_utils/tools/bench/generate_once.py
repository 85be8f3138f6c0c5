"""Generate with a saved model, in this process, and say what it took: a run of `course bench generate`.

`python -m course_utils.tools.bench.generate_once FOLDER TOKENS OUT`. FOLDER holds a model, float or packed,
as `save_pretrained` writes it. The file OUT gets milliseconds a token and what the process holds, as JSON.
"""

import json
import sys
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import course_utils.compression  # noqa: F401 - packed models are loaded by what it registers
from course_utils.evaluation.timing import time_per_token

PROMPT = "The economy of the country depends on"


def main(folder: Path, new_tokens: int, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids[0]
    for tensor in model.state_dict().values():
        tensor.sum()  # read every page: files are mapped into memory lazily
    timing = time_per_token(model, prompt, new_tokens=new_tokens)
    measured = {
        "milliseconds": timing.milliseconds,
        "resident_bytes": psutil.Process().memory_info().rss,
    }
    out.write_text(json.dumps(measured), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
