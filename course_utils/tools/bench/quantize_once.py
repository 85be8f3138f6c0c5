"""Quantize a model once, in this process, and say what it took: a run of `course bench quantize`.

`python -m course_utils.tools.bench.quantize_once FOLDER SETTINGS OUT`. FOLDER holds a float model with its
tokenizer, as `save_pretrained` writes them, and the calibration in `calibration.safetensors`. SETTINGS
are the method's name and fields, as JSON. The folder OUT gets the quantized model, and in
`measured.json` what was measured. The scripts of libraries, `tools/oracles/LIBRARY/model/METHOD.py`, are
called alike.
"""

import json
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from course_utils.compression import get_method, quantize_model
from course_utils.models import load_model
from course_utils.tools.bench.memory.peak_memory import forget_peak, peak_bytes


def main(folder: Path, settings: dict, out: Path) -> None:
    method = get_method(**settings)
    model, tokenizer = load_model(str(folder))
    calibration = load_file(folder / "calibration.safetensors")["tokens"]
    for tensor in model.state_dict().values():
        tensor.sum()  # read every page: files are mapped into memory lazily
    loaded = psutil.Process().memory_info().rss
    forget_peak()

    start = time.perf_counter()
    report = quantize_model(
        model, method, calibration=calibration if method.needs_calibration else None
    )
    seconds = time.perf_counter() - start
    measured = {
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "bits_per_weight": report.bits_per_weight,
        "versions": {"torch": torch.__version__},
    }
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "measured.json").write_text(json.dumps(measured), "utf-8")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
    except ValueError as error:  # the last line of what it printed is the reason, then
        sys.exit(str(error))
