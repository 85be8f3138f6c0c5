"""Training of the teacher and the students of `reasoning_distillation`: `course train-reasoning`.

One script, one list of runs (`PLAN`). The teacher learns worked solutions from a program, and is stopped
before it is perfect. It then writes a trace for every problem of `TRACED`. Each kind of student learns
another version of these traces, all at the same number of tokens. Each training takes about half a minute
of one core.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from course_utils.distillation.arithmetic import (
    HELD_OUT_LENGTHS,
    LONGEST,
    ROOM,
    TRAINED,
    answer_is_right,
    answer_only,
    character_tokenizer,
    dotted,
    on_form,
    random_problems,
    shuffled,
    worked,
)
from course_utils.distillation.traces import (
    LineBatches,
    completion_loss,
    line_rows,
    rejection_sample,
    write_traces,
)
from course_utils.files import replacing
from course_utils.training.logs import of_this_run, read_logs
from course_utils.training.loop import TrainConfig, train

SHIPPED = (
    Path(__file__).parent.parent / "assets" / "reasoning"
)  # what `ship` wrote for the notebook
WIDTHS = {"teacher": 96, "student": 48}
TOKENS = 714  # of a batch: 34 rows of 21 tokens with steps, 42 of 17 without
STEPS = {"teacher": 350, "student": 1000}
TRACED = 5000  # problems of each trained length that the teacher solves
KINDS = ("answers", "verified", "unfiltered", "rejected", "shuffled", "dots")
HEADLINE = ("answers", "verified")
SEEDS = (0, 1, 2)
PLAN = [*((kind, 0) for kind in KINDS), *((kind, seed) for seed in SEEDS[1:] for kind in HEADLINE)]

CARD = """---
license: apache-2.0
library_name: transformers
---
# Teacher and students of the notebook `distillation/reasoning_distillation`

Tiny GPT-2 models over 16 symbols that work chains of additions and subtractions. They are test objects.
`NAME.safetensors` holds weights (float16, trained in float32), `NAME.json` the log of the run with its
settings, curve, seconds and versions. `teacher` learned from solutions that a program worked; the others
learned from what the teacher wrote. Read them with `course_utils.distillation.reasoning_lm.shipped_model`.

Made by `course train-reasoning`. No text of others is in the data: problems are drawn at random.

| run | parameters | tokens seen | seconds of CPU | right, lengths as trained |
| --- | --- | --- | --- | --- |
{rows}
"""


@dataclass(frozen=True)
class Run:
    """One training: "teacher", or a kind of student, from a seed that draws weights and order."""

    kind: str
    seed: int = 0

    @property
    def name(self) -> str:
        return "teacher" if self.kind == "teacher" else f"{self.kind}-seed{self.seed}"

    @property
    def role(self) -> str:
        return "teacher" if self.kind == "teacher" else "student"

    def config(self) -> TrainConfig:
        """Warm-up over 5% of the steps, decay over the last 30%; ten rows of the curve."""
        steps = STEPS[self.role]
        return TrainConfig(
            steps, 2e-3, warmup=steps // 20, decay=3 * steps // 10, eval_every=steps // 10
        )


def new_model(width: int, seed: int) -> GPT2LMHeadModel:
    """GPT-2's architecture with two blocks and fresh weights; dropout is off.

    Initial weights are drawn with a deviation of 0.1, since GPT-2's own 0.02 is meant for a width of 768:
    at a width of 48 attention then begins blind to positions, and learns nothing for a long time.
    """
    config = GPT2Config(
        vocab_size=16, n_positions=ROOM + LONGEST + 4, n_embd=width, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def solve(model, problems: Sequence[str], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """The line that `model` writes for each problem, without the beginning of text."""
    tokenizer = character_tokenizer()
    prompts = [tokenizer.bos_token + on_form(problem) for problem in problems]
    texts = write_traces(
        model, tokenizer, prompts, max_new_tokens=LONGEST + 2, temperature=temperature, seed=seed
    )
    return [text.removeprefix(tokenizer.bos_token) for text in texts]


def problems_of(count: int, lengths: Sequence[int], *, split: str, seed: int) -> list[str]:
    """`count` problems of each length, mixed by `seed`."""
    found = [p for n in lengths for p in random_problems(count, n, split=split, seed=seed)]
    random.Random(seed).shuffle(found)
    return found


def teacher_traces(teacher: GPT2LMHeadModel, count: int = TRACED, seed: int = 1) -> list[str]:
    """What the teacher writes at temperature 1 for `count` training problems of each length."""
    problems = problems_of(count, TRAINED, split="train", seed=seed)
    return solve(teacher, problems, temperature=1.0, seed=seed)


def lines_of(kind: str, traces: Sequence[str]) -> list[str]:
    """What a student of this kind learns from the teacher's traces.

    "answers", "shuffled" and "dots" are made of the verified traces. Raises `ValueError` for another kind,
    and if no trace is right.
    """
    found = rejection_sample(traces, answer_is_right)
    draw = random.Random(0)
    make: dict[str, Callable[[], list[str]]] = {
        "answers": lambda: [answer_only(line) for line in found.accepted],
        "verified": lambda: found.accepted,
        "unfiltered": lambda: list(traces),
        "rejected": lambda: [line for line in found.rejected if line.endswith("\n")],
        "shuffled": lambda: [shuffled(line, draw) for line in found.accepted],
        "dots": lambda: [dotted(line) for line in found.accepted],
    }
    if kind not in make:
        raise ValueError(f"unknown kind {kind!r}: choose of {', '.join(make)}")
    return make[kind]()


def train_lines(
    model: GPT2LMHeadModel,
    lines: Sequence[str],
    config: TrainConfig,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> list[dict]:
    """Train `model` on lines with `TOKENS` tokens a step, by `training.loop.train`; returns the curve.

    `held_out` is the share of wrong answers on problems of the training split that were drawn apart, 50 of
    each trained length; it chooses the weights that are kept.
    """
    tokenizer = character_tokenizer()
    rows = line_rows(lines, tokenizer)
    batches = LineBatches(rows, batch_size=TOKENS // rows.shape[1], seed=seed)
    device = next(model.parameters()).device
    problems = problems_of(50, TRAINED, split="train", seed=2)

    def batch(step: int) -> Tensor:
        return batches(step).to(device)

    def wrong(model) -> float:
        return 1 - sum(map(answer_is_right, solve(model, problems))) / len(problems)

    loss = completion_loss(tokenizer.convert_tokens_to_ids(":"), tokenizer.eos_token_id)
    return train(
        model, batch, config, loss=loss, evaluate=wrong, checkpoint=checkpoint, progress=progress,
        data=f"{len(lines)} lines, begun with {lines[0]!r}",
    )  # fmt: skip


def accuracy(model: GPT2LMHeadModel, count: int) -> dict[int, list[bool]]:
    """Which of `count` evaluation problems of each length, 1 to 6, `model` solves (likeliest tokens)."""
    found = {}
    for length in (*TRAINED, *HELD_OUT_LENGTHS):
        problems = random_problems(count, length, split="evaluation", seed=0)
        found[length] = [answer_is_right(line) for line in solve(model, problems)]
    return found


def train_plan(out: Path, plan: Sequence[tuple[str, int]]) -> None:
    """Train the teacher, let it write, and train the students of `plan`; what `out` holds is skipped."""
    teacher = train_run(Run("teacher"), None, out)
    missing = [run for run in starmap(Run, plan) if not (out / run.name / "log.json").exists()]
    if not missing:
        return
    traces = teacher_traces(teacher)
    for run in missing:
        train_run(run, lines_of(run.kind, traces), out)


def train_run(run: Run, lines: list[str] | None, out: Path) -> GPT2LMHeadModel:
    """Train `run`, or read it if it is finished; weights (float32) and log go to `out / run.name`.

    An interrupted run goes on from its checkpoint, bit for bit.
    """
    folder = out / run.name
    model = new_model(WIDTHS[run.role], run.seed)
    if (folder / "log.json").exists():
        _load(model, folder / "model.safetensors")
        return model.eval()
    if lines is None:
        lines = [worked(p) for p in problems_of(TRACED, TRAINED, split="train", seed=0)]
    folder.mkdir(parents=True, exist_ok=True)
    config, checkpoint = run.config(), folder / "checkpoint.safetensors"
    curve = train_lines(
        model, lines, config, seed=run.seed, checkpoint=checkpoint, progress=sys.stderr.isatty()
    )
    right = accuracy(model, 400)
    log = {
        "run": asdict(run),
        "parameters": model.num_parameters(),
        "width": WIDTHS[run.role],
        "settings": asdict(config),
        "lines": len(lines),
        "tokens_seen": config.steps * TOKENS,
        "right": {str(length): sum(of) / len(of) for length, of in right.items()},
        **of_this_run(curve),
    }
    with replacing(folder / "model.safetensors") as partial:
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, partial)
    with replacing(folder / "log.json") as partial:
        partial.write_text(json.dumps(log, indent=1) + "\n", "utf-8")
    checkpoint.unlink()
    print(f"{run.name}: {log['right']}, {log['cpu_seconds']} s of CPU", flush=True)
    return model


def ship(out: Path, folder: Path) -> None:
    """Write what the notebook reads to `folder`: all logs, and float16 weights of the runs of seed 0.

    Runs that are not finished are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for run in (Run("teacher"), *starmap(Run, PLAN)):
        if not (out / run.name / "log.json").exists():
            continue
        with replacing(folder / f"{run.name}.json") as partial:
            shutil.copyfile(out / run.name / "log.json", partial)
        if run.seed == 0:
            weights = load_file(out / run.name / "model.safetensors")
            with replacing(folder / f"{run.name}.safetensors") as partial:
                save_file({name: value.half() for name, value in weights.items()}, partial)
    rows = [
        f"| {name} | {log['parameters']:,} | {log['tokens_seen']:,} | {log['cpu_seconds']} "
        f"| {sum(log['right'][str(n)] for n in TRAINED) / len(TRAINED):.1%} |"
        for name, log in shipped_logs(folder).items()
    ]
    (folder / "README.md").write_text(CARD.format(rows="\n".join(rows)), "utf-8")


def shipped_logs(folder: Path = SHIPPED) -> dict[str, dict]:
    """The logs in `folder`, by the names of their runs."""
    return read_logs(folder)


def shipped_model(name: str, folder: Path = SHIPPED) -> GPT2LMHeadModel:
    """The shipped model of the run `name`, in float32 and evaluation mode.

    Raises `ValueError` for a run whose weights are not shipped, with those that are.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists():
        known = sorted(found.stem for found in folder.glob("*.safetensors"))
        raise ValueError(f"no weights of {name!r} are shipped; there are {', '.join(known)}")
    model = new_model(WIDTHS["teacher" if name == "teacher" else "student"], 0)
    _load(model, path)
    return model.eval()


def _load(model: GPT2LMHeadModel, path: Path) -> None:
    with torch.no_grad():
        for name, value in load_file(path).items():
            model.get_parameter(name).copy_(value)
