"""Training of the ternary language models and of their float twins: `course train-bitnet`.

One script, one list of runs (`PLAN`), most important first. Twins share architecture, initial weights,
batches, tokens, schedule, and the effort of tuning: each size sweeps the same learning rates for both
kinds, in runs of `SWEEP_TOKENS`, and each kind takes the one with the lowest held-out loss.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_model, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BitNetForCausalLM

import course_utils.compression  # noqa: F401 (tells transformers how packed weights are read)
from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.data.corpora import documents
from course_utils.files import replacing
from course_utils.finetuning.bitnet import BitLinear, bitnet_model, prepare_bitnet
from course_utils.finetuning.conversion import convert
from course_utils.models.registry import COURSE_LM
from course_utils.quantizers.bitnet import BitNet
from course_utils.training.course_lm import (
    BATCH,
    CONTEXT,
    CORPORA,
    END_OF_TEXT,
    VOCABULARY,
    held_out_loss,
)  # fmt: skip
from course_utils.training.logs import of_this_run, read_logs
from course_utils.training.loop import TrainConfig, train

SHIPPED = Path(__file__).parent.parent / "assets" / "bitnet"  # what `ship` wrote for the notebook
WIDTHS = {"tiny": 64, "small": 128, "medium": 192}
# What the linear layers compute with; None: float weights.
KINDS = {
    "float": None,
    "ternary": BitNet(),
    "ternary_weights": BitNet(inputs="float"),
    "ternary_rows": BitNet(rounding="row_absmean"),
    "binary": BitNet(rounding="binary"),
}
TWINS = ("ternary", "float")
SWEEP_TOKENS = 500_000
SWEEPS = {
    "tiny": (1.5e-3, 3e-3, 6e-3),
    "small": (0.75e-3, 1.5e-3, 3e-3, 6e-3),
    "medium": (0.75e-3, 1.5e-3, 3e-3),
}


CARD = """---
license: apache-2.0
language: en
library_name: transformers
---
# {name}

A small language model of the course's notebook `chronology/bitnet_demo`: one of two twins, of which one is
trained with ternary linear layers (BitNet b1.58, arXiv 2402.17764) and the other with float ones. It is a
test object, and writes text that resembles its training text for a few words.

```python
import course_utils.compression  # without it transformers makes up random weights for packed ones
from transformers import BitNetForCausalLM

model = BitNetForCausalLM.from_pretrained("the path of this folder")
```

|  |  |
| --- | --- |
{table}

The log of this run, with its curve, is `{name}.json` beside this folder, with those of other seeds.
Its held-out loss mixes both texts, and chose the weights that were kept. Perplexity and bits per byte on
the Factbook are in the notebook.
"""


class TwoStages(TrainConfig):
    """The schedule that the authors advise, with the ratios of b1.58's FAQ (1.5e-3, 8e-4, 5e-4, 0).

    The first half of the steps falls by a cosine from the peak to 8/15 of it, with weight decay; the second
    starts at a third of the peak, falls by a cosine to 0, without weight decay.
    """

    def lr_at(self, step: int) -> float:
        half = self.steps / 2
        high, low = (1, 8 / 15) if step < half else (1 / 3, 0)
        cosine = (1 + math.cos(math.pi * (step % half) / half)) / 2
        return self.lr * min((step + 1) / self.warmup, low + (high - low) * cosine)

    def weight_decay_at(self, step: int) -> float:
        return self.weight_decay if step < self.steps / 2 else 0.0


@dataclass(frozen=True)
class Run:
    """One training. `lr` None: the best of the sweep of this size, for float or for ternary weights."""

    size: str
    kind: str
    tokens: int
    seed: int = 0
    lr: float | None = None
    advice: str = "none"  # "two_stages", "quantization_warmup"

    @property
    def name(self) -> str:
        parts = [self.size, self.kind, f"{self.tokens / 1e6:g}M"]
        if self.lr is not None:
            parts.append(f"lr{self.lr:g}")
        if self.advice != "none":
            parts.append(self.advice)
        return "-".join([*parts, f"seed{self.seed}"])

    def config(self, lr: float) -> TrainConfig:
        """Warm-up over 5 % of the steps, decay over the last 20 %; a row about every 100 steps."""
        steps = round(self.tokens / (BATCH * CONTEXT))
        schedule = TwoStages if self.advice == "two_stages" else TrainConfig
        return schedule(steps, lr, warmup=steps // 20, decay=steps // 5, eval_every=100)


def sweep(size: str) -> list[Run]:
    """The short runs that choose the learning rates of this size, for both twins."""
    return [Run(size, kind, SWEEP_TOKENS, lr=lr) for lr in SWEEPS[size] for kind in TWINS]


def pair(size: str, tokens: int, seed: int = 0) -> list[Run]:
    return [Run(size, kind, tokens, seed) for kind in TWINS]


WITH_WEIGHTS = pair("small", 4_000_000)  # what the notebook opens; of all others it reads the logs
SHORT = 1_000_000
PLAN = [
    *sweep("small"),
    *pair("small", 4_000_000),
    *pair("small", 4_000_000, seed=1),
    *pair("small", 4_000_000, seed=2),
    *sweep("tiny"),
    *pair("tiny", 4_000_000),
    *pair("small", SHORT),
    *(Run("small", k, SHORT, advice="two_stages") for k in TWINS),
    Run("small", "ternary", SHORT, advice="quantization_warmup"),
    *(Run("small", k, SHORT) for k in ("ternary_weights", "ternary_rows", "binary")),
    *sweep("medium"),
    *pair("medium", 4_000_000),
    *pair("tiny", 4_000_000, seed=1),
    *pair("tiny", 4_000_000, seed=2),
    *pair("medium", 8_000_000),
    *pair("medium", 4_000_000, seed=1),
    *pair("medium", 4_000_000, seed=2),
]


def train_plan(out: Path, plan: list[Run] = PLAN) -> None:
    """Train the runs of `plan`, one after another; those that `out` holds are skipped."""
    if all((out / run.name / "log.json").exists() for run in plan):
        return
    text = {s: [d for c in CORPORA for d in documents(c, s)] for s in ("train", "evaluation")}
    tokenizer = Tokenizer.from_file(str(COURSE_LM / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    streams = {split: token_stream(tokenizer, found, end) for split, found in text.items()}
    for run in plan:
        if not (out / run.name / "log.json").exists():
            train_run(run, streams["train"], streams["evaluation"], out)


def train_run(run: Run, stream: Tensor, held_out: Tensor, out: Path) -> dict:
    """Train `run` on a token stream; weights (float32) and `log.json` go to `out / run.name`.

    An interrupted run goes on from its checkpoint, bit for bit. Raises `ValueError` if what is there was
    begun with other settings or other data, or if the learning rate's sweep is not finished.
    """
    folder = out / run.name
    lr = best_rate(run, out) if run.lr is None else run.lr
    config = run.config(lr)
    begun = {
        "run": asdict(run),
        "schedule": type(config).__name__,
        "settings": asdict(config),
        "batch_sequences": BATCH,
        "context": CONTEXT,
        "training_tokens_in_corpus": len(stream),
        "data_sha256": {
            split: hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
            for split, tokens in (("train", stream), ("held_out", held_out))
        },
    }
    _check_begun(folder / "run.json", begun)
    model = new_model(run)
    print(f"{run.name}: lr {lr:g}, {config.steps} steps", flush=True)
    curve = train(
        model,
        TrainingBatches(stream, context=CONTEXT, batch_size=BATCH, seed=run.seed),
        config,
        evaluate=lambda m: held_out_loss(m, held_out),
        before_step=quantization_warmup(model, config.steps // 5)
        if run.advice == "quantization_warmup"
        else None,
        checkpoint=folder / "checkpoint.safetensors",
        progress=sys.stderr.isatty(),
    )
    embedding = model.get_input_embeddings().weight.numel()
    log = {
        **begun,
        "parameters": model.num_parameters(),
        "parameters_without_embedding": model.num_parameters() - embedding,
        "held_out": min(row["held_out"] for row in curve),  # nats per token, of the weights kept
        **of_this_run(curve),
    }
    weights = {name: value.detach() for name, value in model.named_parameters()}
    with replacing(folder / "model.safetensors") as partial:
        save_file(weights, partial)
    with replacing(folder / "log.json") as partial:
        partial.write_text(json.dumps(log, indent=1) + "\n", "utf-8")
    (folder / "checkpoint.safetensors").unlink()
    print(f"{run.name}: held-out loss {log['held_out']:.4f}, {log['seconds']:.0f} s", flush=True)
    return log


def ship(out: Path, folder: Path, plan: list[Run] = PLAN) -> None:
    """Write what the notebook reads to `folder`: logs of finished runs, weights of `WITH_WEIGHTS`.

    Ternary weights are packed, all else is float16. Runs that are not finished are left out.
    """
    for run in plan:
        finished = out / run.name / "log.json"
        if not finished.exists():
            continue
        with replacing(folder / f"{run.name}.json") as partial:
            shutil.copyfile(finished, partial)
        if run in WITH_WEIGHTS:
            model = nn.Module.half(
                trained_model(run, out)
            )  # the model's own refuses what is packed
            model.save_pretrained(folder / run.name)
            card = folder / run.name / "README.md"
            card.write_text(model_card(json.loads(finished.read_text("utf-8"))), "utf-8")


def model_card(log: dict) -> str:
    """The README of the shipped weights of a run, from its log."""
    run, settings = log["run"], log["settings"]
    ternary, name = KINDS[run["kind"]] is not None, Run(**run).name
    seen = settings["steps"] * log["batch_sequences"] * log["context"]
    rates = ", ".join(f"{lr:g}" for lr in SWEEPS[run["size"]])
    rows = {
        "linear layers": "ternary, inputs int8 per token" if ternary else "float",
        "architecture": "transformers' `BitNetForCausalLM`: 4 layers, 4 heads, width "
        f"{WIDTHS[run['size']]}, tied embedding in float",
        "parameters": f"{log['parameters']:,}; without the embedding "
        f"{log['parameters_without_embedding']:,}",
        "weights": "linear layers in 2 bits with one float32 scale each, all else float16"
        if ternary
        else "float16 (trained in float32)",
        "tokenizer": f"that of course-lm, {VOCABULARY:,} entries; context {log['context']}",
        "made by": f"`course train-bitnet`, from fresh weights of seed {run['seed']}",
        "text": f"{' and '.join(CORPORA)}, training split, "
        f"{log['training_tokens_in_corpus']:,} tokens",
        "seen": f"{settings['steps']:,} steps of {log['batch_sequences']} sequences, {seen:,} tokens",
        "optimizer": f"AdamW, betas {settings['betas'][0]} and {settings['betas'][1]}, weight decay "
        f"{settings['weight_decay']}",
        "learning rate": f"{settings['lr']}, the best of {rates} in runs of {SWEEP_TOKENS:,} tokens",
        "schedule": f"{settings['warmup']} steps of warm-up, linear decay to 0 over the last "
        f"{settings['decay']}",
        "held-out loss": f"{log['held_out']:.4f} nats per token, 128 windows of documents not trained "
        "on",
        "time": f"{log['seconds']:,.0f} s on {log['threads']} threads of a busy CPU, "
        f"{log['cpu_seconds']:,.0f} CPU seconds",
        "speed": f"{seen / log['seconds']:,.0f} tokens a second, {seen / log['cpu_seconds']:,.0f} a CPU "
        "second",
        "torch, transformers, python": f"{log['torch']}, {log['transformers']}, {log['python']}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return CARD.format(name=name, table=table)


def shipped_logs(folder: Path = SHIPPED) -> dict[str, dict]:
    """The logs in `folder`, by the names of their runs: settings, held-out loss, curve, seconds."""
    return read_logs(folder)


def shipped_model(name: str, folder: Path = SHIPPED) -> BitNetForCausalLM:
    """The shipped model of the run `name`, in float32 beside its packed weights, in evaluation mode.

    Raises `ValueError` for a run whose weights are not shipped, with those that are.
    """
    if not (folder / name / "config.json").exists():
        known = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise ValueError(f"no weights of {name!r} are shipped; there are {', '.join(known)}")
    return BitNetForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()


def trained_model(run: Run, out: Path) -> BitNetForCausalLM:
    """The model that `run` left in `out`: float, or with packed ternary weights."""
    model = new_model(run)
    load_model(model, out / run.name / "model.safetensors", strict=False)
    if KINDS[run.kind] is not None:
        convert(model)
    return model.eval()


def new_model(run: Run) -> BitNetForCausalLM:
    """The model that `run` trains, with fresh weights."""
    model = bitnet_model(WIDTHS[run.size], vocabulary=VOCABULARY, context=CONTEXT, seed=run.seed)
    method = KINDS[run.kind]
    if method is not None:
        prepare_bitnet(model, method)
    return model


def best_rate(run: Run, out: Path) -> float:
    """The learning rate with the lowest held-out loss in the sweep of the run's size and twin."""
    kind = "float" if run.kind == "float" else "ternary"
    losses = {}
    for trial in (replace(run, kind=kind, tokens=SWEEP_TOKENS, seed=0, lr=lr, advice="none")
                  for lr in SWEEPS[run.size]):  # fmt: skip
        log = out / trial.name / "log.json"
        if not log.exists():
            raise ValueError(
                f"{run.name} needs a learning rate: run {trial.name} of its sweep first"
            )
        losses[trial.lr] = json.loads(log.read_text("utf-8"))["held_out"]
    return min(losses, key=losses.get)


def quantization_warmup(model: nn.Module, steps: int) -> Callable[[int], None]:
    """What sets the strength of the quantization to min(step / `steps`, 1) before each step."""
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]

    def before_step(step: int) -> None:
        for layer in layers:
            layer.strength = min(step / steps, 1.0)

    return before_step


def _check_begun(path: Path, begun: dict) -> None:
    """Write down what a run was begun with; refuse to go on with anything else."""
    begun = json.loads(json.dumps(begun))  # tuples as lists, as they are read
    if not path.exists():
        with replacing(path) as partial:
            partial.write_text(json.dumps(begun, indent=1) + "\n", "utf-8")
    elif (found := json.loads(path.read_text("utf-8"))) != begun:
        differing = [k for k in begun if begun[k] != found.get(k)]
        raise ValueError(
            f"{path} was begun with another {', '.join(differing)}: move {path.parent} away to start anew."
        )
