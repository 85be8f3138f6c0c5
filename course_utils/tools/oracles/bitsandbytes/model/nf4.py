"""A whole model by bitsandbytes' NF4, on its CPU path: `python nf4.py FOLDER SETTINGS OUT`.

Called by `course bench quantize` as `course_utils/tools/bench/quantize_once.py` is, in the course's own
Python, whose extra `oracles` it is. OUT gets the decoded weight `[out, in]` of every linear layer, and in
`measured.json` what was measured.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import psutil
import torch
from peak_memory import forget_peak, peak_bytes
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


def main(folder: Path, settings: dict, out: Path) -> None:
    torch.compiler.set_stance("force_eager")  # compiling takes a minute, and is not what is timed
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for tensor in model.state_dict().values():
        tensor.sum()  # read every page: files are mapped into memory lazily
    weights = {
        name: (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and "lm_head" not in name
    }
    asked = {
        "blocksize": settings["block_size"],
        "compress_statistics": settings["double_quantization"],
    }
    bnb.quantize_4bit(torch.zeros(64, 64), quant_type="nf4", **asked)  # loads its library
    loaded = psutil.Process().memory_info().rss
    forget_peak()

    start = time.perf_counter()
    stored = {
        name: bnb.quantize_4bit(weight.contiguous(), quant_type="nf4", **asked)
        for name, weight in weights.items()
    }
    seconds = time.perf_counter() - start
    measured = {
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "bits_per_weight": 8
        * sum(map(_bytes, stored.values()))
        / sum(w.numel() for w in weights.values()),
        "versions": {n: version(n) for n in ("bitsandbytes", "torch", "transformers", "numpy")},
    }
    decoded = {name: bnb.dequantize_4bit(*both).contiguous() for name, both in stored.items()}
    save_file(decoded, out / "weights.safetensors")
    (out / "measured.json").write_text(json.dumps(measured), "utf-8")


def _bytes(both: tuple) -> int:
    """Bytes of the codes, the absmax, and what is nested."""
    packed, state = both
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return sum(t.numel() * t.element_size() for t in (packed, state.absmax, *nested))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
