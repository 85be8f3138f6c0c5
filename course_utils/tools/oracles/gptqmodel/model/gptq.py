"""A whole model by GPTQModel's GPTQ: `python gptq.py FOLDER SETTINGS OUT`, in an environment that has it.

Called by `course bench quantize` as `course_utils/tools/bench/quantize_once.py` is. OUT gets the dequantized
weight `[out, in]` of every linear layer, and in `measured.json` what was measured, or why it cannot do
what is asked.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it does not start on two cores

import psutil
import torch
from gptqmodel import GPTQModel, QuantizeConfig, extension
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from peak_memory import forget_peak, peak_bytes
from safetensors.torch import load_file, save_file


def refusal(settings: dict) -> str | None:
    """What of the settings it does not have."""
    if settings["current_groups"]:
        return "it has no current_groups"
    if settings["block_size"] != 128:
        return "its blocks are of 128 columns"
    if settings["scale_dtype"] != "float32":
        return "it finds its codes with float32 scales: compare it with scale_dtype=float32"


def config(settings: dict) -> QuantizeConfig:
    """Its settings for those of the course."""
    return QuantizeConfig(
        bits=settings["n_bits"],
        group_size=-1 if settings["group_size"] == "row" else settings["group_size"],
        sym=settings["symmetric"],
        desc_act=settings["act_order"],
        static_groups=settings["static_groups"],
        damp_percent=settings["damping"],
        format="gptq_v2",  # "gptq" stores zero points less one, which dequantize_weight knows nothing of
        act_group_aware=False,
        # Its default feeds the later layers of a block from the earlier ones as quantized. The course
        # feeds all from the float block, as the authors' code does unless told otherwise.
        true_sequential=False,
        offload_to_disk=False,  # the course keeps the model in memory
    )


def main(folder: Path, settings: dict, out: Path) -> None:
    if reason := refusal(settings):
        (out / "measured.json").write_text(json.dumps({"refused": reason}), "utf-8")
        return
    extension.load(name="pack_block_cpu")  # compiled the first time, half a minute: not measured
    tokens = load_file(folder / "calibration.safetensors")["tokens"]
    model = GPTQModel.load(str(folder), config(settings), device="cpu", dtype=torch.float32)
    for tensor in model.model.state_dict().values():
        tensor.sum()  # read every page: files are mapped into memory lazily
    loaded = psutil.Process().memory_info().rss
    forget_peak()

    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    start = time.perf_counter()
    model.quantize(calibration, batch_size=1)
    seconds = time.perf_counter() - start
    peak = peak_bytes()

    layers = {n: m for n, m in model.model.named_modules() if isinstance(m, BaseQuantLinear)}
    weights = {n: layer.dequantize_weight().T.float().contiguous() for n, layer in layers.items()}
    stored = [b for layer in layers.values() for n, b in layer.named_buffers() if n != "bias"]
    bits = 8 * sum(b.nbytes for b in stored) / sum(w.numel() for w in weights.values())
    measured = {
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "bits_per_weight": bits,
        "versions": {n: version(n) for n in ("gptqmodel", "torch", "transformers", "numpy")},
    }
    save_file(weights, out / "weights.safetensors")
    (out / "measured.json").write_text(json.dumps(measured), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
