"""Bytes, measured three ways: tensors of the model, files on disk, memory of a process."""

import subprocess
import sys
from pathlib import Path

from torch import nn


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; a tensor that is shared (tied embeddings) counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def file_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in `folder`."""
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors in {folder}: save a model there first")
    return sum(file.stat().st_size for file in files)


_PROBE = """
import sys, psutil, torch
import course_utils.compression  # registers the course's format with transformers
from course_utils.models import load_model
load_model("course-lm")  # so that what any model needs (code, thread pools) is there before
process = psutil.Process()
before = process.memory_info().rss
model, _ = load_model(sys.argv[1])
with torch.no_grad():
    for parameter in [*model.parameters(), *model.buffers()]:
        parameter.sum()  # read every page: files are mapped into memory lazily
print(process.memory_info().rss - before)
"""


def process_bytes(folder: Path) -> int:
    """Bytes by which a fresh Python process grows when it loads the model saved in `folder`."""
    run = subprocess.run(
        [sys.executable, "-c", _PROBE, str(folder)], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(
            f"loading {folder} in a fresh process failed: {run.stderr.strip()[-500:]}"
        )
    return int(run.stdout.strip().splitlines()[-1])
