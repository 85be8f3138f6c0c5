"""Pruning of course-lm with training: `course prune-lm`, for `pruning/pruning_demo`.

One script, one list of runs (`PLAN`). All runs start from course-lm, see the same batches (for one seed)
in the same number of updates, and prune `SPARSITY` of every linear layer:

- `one_shot`: the smallest weights go before the first update;
- `gradual`: they go by the cubic schedule in the first three fifths of the updates;
- `random`: any weights go, before the first update. The control of what is chosen;
- `dense`: none goes. The control of what the training alone does.

Embeddings and head are frozen, so that the shipped weights need not hold them.
"""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.data.corpora import documents
from course_utils.files import replacing
from course_utils.models.registry import load_model
from course_utils.models.walk import linear_layers
from course_utils.pruning.gradual import GradualPruning
from course_utils.pruning.magnitude import magnitude_masks
from course_utils.pruning.masked import hold_masks, masks_of, release_masks
from course_utils.pruning.masks import layer_mask
from course_utils.pruning.sparse import BitmaskWeight
from course_utils.training.course_lm import CORPORA, held_out_loss
from course_utils.training.loop import TrainConfig, train

SHIPPED = Path(__file__).parent.parent / "assets" / "pruning"  # what `ship` wrote for the notebook
SPARSITY, CONTEXT, BATCH, STEPS, WINDOWS = 0.9, 256, 4, 160, 64
ARMS = ("one_shot", "gradual", "random", "dense")
SWEEP_STEPS, SWEEP_SEED, RATES = 50, 7, (1e-3, 2e-3, 4e-3)
RATE = 2e-3  # the best of RATES in the sweep, for one shot and for gradual pruning


@dataclass(frozen=True)
class Run:
    """One training of course-lm while it is pruned, or not."""

    arm: str
    seed: int  # of the order of the batches, and of a random mask
    steps: int = STEPS
    lr: float = RATE

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.steps}-lr{self.lr:g}-seed{self.seed}"

    @property
    def config(self) -> TrainConfig:
        """A tenth of the updates warm up, the last two fifths decay; no weight decay."""
        return TrainConfig(
            self.steps,
            self.lr,
            warmup=self.steps // 10,
            decay=2 * self.steps // 5,
            weight_decay=0.0,
            eval_every=max(1, self.steps // 40),
        )

    @property
    def schedule(self) -> GradualPruning:
        """The cubic schedule of the arm `gradual`: over the first three fifths of the updates."""
        every = max(1, self.steps // 80)
        return GradualPruning(SPARSITY, 0, 3 * self.steps // (5 * every), every)


SWEEP = [Run(arm, SWEEP_SEED, SWEEP_STEPS, lr) for lr in RATES for arm in ("one_shot", "gradual")]
MAIN = [
    *(Run(arm, 0) for arm in ARMS),
    *(Run(arm, seed) for seed in (1, 2) for arm in ("one_shot", "gradual")),
]
PLAN = [*SWEEP, *MAIN]


def freeze_embeddings(model: nn.Module) -> None:
    """Train linear layers and norms alone: embeddings, and the head that is tied to one, stay."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)


def start_pruning(model: nn.Module, run: Run) -> Callable[[int], None] | None:
    """Hold the masks with which `run` starts; returns what is called before each of its updates."""
    if run.arm == "one_shot":
        hold_masks(model, magnitude_masks(model, SPARSITY))
    elif run.arm == "random":
        hold_masks(model, random_masks(model, SPARSITY, run.seed))
    elif run.arm == "gradual":
        return run.schedule.masking(model)
    elif run.arm != "dense":
        raise ValueError(f"arm {run.arm!r}: choose one of {', '.join(ARMS)}")
    return None


def random_masks(model: nn.Module, sparsity: float, seed: int) -> dict[str, Tensor]:
    """Masks of all linear layers that remove any weights: the control of `magnitude_masks`."""
    draw = torch.Generator().manual_seed(seed)
    return {
        layer.name: layer_mask(torch.rand(layer.weight.shape, generator=draw), sparsity)
        for layer in linear_layers(model)
    }


def train_run(run: Run, stream: Tensor, held_out: Tensor, progress: bool = False):
    """(the trained model, its log) of `run` on the token stream `stream`.

    The log says settings, training loss every few updates, and the loss on `held_out` before and after,
    in nats per token over `WINDOWS` windows.
    """
    model, _ = load_model("course-lm")
    freeze_embeddings(model)
    before_step = start_pruning(model, run)
    before = held_out_loss(model, held_out, WINDOWS)
    batches = TrainingBatches(stream, context=CONTEXT, batch_size=BATCH, seed=run.seed)
    curve = train(model, batches, run.config, before_step=before_step, progress=progress)
    release_masks(model)
    kept = [mask.float().mean().item() for mask in masks_of(model).values()]
    log = {
        "run": asdict(run),
        "settings": asdict(run.config),
        "sparsity": 1 - sum(kept) / len(kept),  # a mean over layers
        "batch_sequences": BATCH,
        "context": CONTEXT,
        "held_out_before": before,  # with the masks that are held before the first update
        "held_out": held_out_loss(model, held_out, WINDOWS),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "curve": curve,
    }
    return model, log


def train_plan(out: Path, plan: list[Run] = PLAN) -> None:
    """Train the runs of `plan`, one after another, into `out`; those that it holds are skipped."""
    missing = [run for run in plan if not (out / f"{run.name}.json").exists()]
    if not missing:
        return
    _, tokenizer = load_model("course-lm")
    streams = {
        split: token_stream(
            tokenizer.backend_tokenizer,
            [d for corpus in CORPORA for d in documents(corpus, split)],
            tokenizer.eos_token_id,
        )
        for split in ("train", "evaluation")
    }
    out.mkdir(parents=True, exist_ok=True)
    for run in missing:
        model, log = train_run(run, streams["train"], streams["evaluation"])
        if run.arm == "gradual":
            save_pruned(model, out / f"{run.name}.safetensors")
        with replacing(out / f"{run.name}.json") as partial:
            partial.write_text(json.dumps(log, indent=1) + "\n", "utf-8")
        print(f"{run.name}: {log['held_out_before']:.4f} -> {log['held_out']:.4f}", flush=True)


def ship(out: Path, folder: Path, plan: list[Run] = PLAN) -> None:
    """Copy what the notebook reads to `folder`: all logs, and the first gradual run's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{run.name}.json" for run in plan]
    files.append(f"{next(run for run in plan if run in MAIN and run.arm == 'gradual').name}.safetensors")
    for name in files:
        with replacing(folder / name) as partial:
            partial.write_bytes((out / name).read_bytes())


def save_pruned(model: nn.Module, path: Path) -> None:
    """Write all that was trained: matrices as bitmask and float16 values, all else as float16."""
    tensors = {}
    for layer in linear_layers(model):
        stored = BitmaskWeight.from_mask(layer.weight, layer.weight != 0, "float16")
        tensors |= {f"{layer.name}.{part}": value for part, value in stored.tensors().items()}
    matrices = {f"{layer.name}.weight" for layer in linear_layers(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in matrices:
            tensors[name] = parameter.detach().half()
    with replacing(path) as partial:
        save_file(tensors, partial)


@torch.no_grad()
def load_pruned(path: Path) -> nn.Module:
    """course-lm with the weights that `save_pruned` wrote, in float32 and evaluation mode."""
    model, _ = load_model("course-lm")
    tensors = load_file(path)
    for layer in linear_layers(model):
        mask, values = (tensors.pop(f"{layer.name}.{part}") for part in ("mask", "values"))
        layer.weight.copy_(BitmaskWeight(mask, values, layer.weight.shape[1]).dequantize())
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameters[name].copy_(value)
    return model


def shipped_logs(folder: Path = SHIPPED) -> dict[str, dict]:
    """The logs in `folder`, by the names of their runs."""
    return {p.stem: json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("*.json"))}


def shipped_model(folder: Path = SHIPPED) -> nn.Module:
    """course-lm, gradually pruned by `SPARSITY` and trained, as it is shipped."""
    (path,) = folder.glob("*.safetensors")
    return load_pruned(path)
