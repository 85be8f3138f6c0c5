"""The longer trainings that `distillation/distillation_demo` shows: `course train-distillation`.

Students of half of course-lm's depth learn on the Factbook's training split, with and without their
teacher. All see the same number of tokens; those of one seed see the same batches. Each way of starting
has a sweep of learning rates for training with the teacher and one for training without, of equal
effort.
"""

import functools
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.data.corpora import documents
from course_utils.data.tokens import evaluation_documents
from course_utils.distillation.students import half_depth
from course_utils.distillation.trainer import DistilSettings, distil, write_on
from course_utils.evaluation import (
    Comparison,
    Estimate,
    Protocol,
    compare,
    continuations,
    prompt_of,
)
from course_utils.evaluation.estimate import over_units
from course_utils.files import replacing
from course_utils.models import LoadedModel, load_model
from course_utils.training.course_lm import held_out_loss
from course_utils.training.logs import of_this_run, read_logs
from course_utils.training.loop import TrainConfig

SHIPPED = Path(__file__).parent.parent / "assets" / "distillation"
BATCH, CONTEXT = 4, 256
PROTOCOL = Protocol("factbook", 8192, CONTEXT)
TOKENS = 25_000  # tokens of a run
RATES = {"inherited": (0.25e-3, 0.5e-3, 1e-3), "fresh": (0.5e-3, 1e-3)}
PROMPTS, PROMPT, WRITTEN = 64, 32, 96  # texts that a student writes: number, tokens given, written

# What the student is told.
ARMS = {
    "hard": DistilSettings(mix=0),
    "smooth": DistilSettings(mix=0, smoothing=0.1),
    "soft": DistilSettings(),
    "soft-T2": DistilSettings(temperature=2),
    "soft-T4": DistilSettings(temperature=4),
    "mix50": DistilSettings(mix=0.5),
    "reverse": DistilSettings(beta=1),
    "own-reverse": DistilSettings(on_policy=1, beta=1),
}


@dataclass(frozen=True)
class Run:
    """One training. `start`: "inherited" or "fresh" weights; `lr` None: the best of its sweep."""

    arm: str
    start: str
    tokens: int
    seed: int = 0
    lr: float | None = None

    @property
    def name(self) -> str:
        rate = [] if self.lr is None else [f"lr{self.lr:g}"]
        return "-".join(
            [self.start, self.arm, f"{self.tokens // 1000}k", *rate, f"seed{self.seed}"]
        )

    def config(self, lr: float) -> TrainConfig:
        """Warm-up over 10 % of the steps, decay over the last half; a row every sixth of the run."""
        steps = self.tokens // (BATCH * CONTEXT)
        return TrainConfig(
            steps, lr, warmup=steps // 10, decay=steps // 2, eval_every=max(1, steps // 6)
        )


def sweep(start: str) -> list[Run]:
    """The short runs that choose the learning rates of a start, with another seed."""
    return [
        Run(arm, start, TOKENS, seed=9, lr=lr) for lr in RATES[start] for arm in ("hard", "soft")
    ]


def _seeds(arms: Iterable[str], count: int = 1, start: str = "inherited") -> list[Run]:
    return [Run(arm, start, TOKENS, seed) for seed in range(count) for arm in arms]


WAYS = _seeds(("soft", "reverse", "own-reverse"))  # compared in what they write
GROUPS = {
    "inherited": sweep("inherited") + _seeds(("hard", "soft"), 3) + _seeds(("smooth",)),
    "fresh": sweep("fresh") + _seeds(("hard", "soft"), start="fresh"),
    "settings": _seeds(("soft-T2", "mix50", "soft-T4")),
    "directions": WAYS,
}


def train_groups(out: Path, groups: Iterable[str] = tuple(GROUPS)) -> None:
    """Train what is not finished yet of `groups`, in their order; see `train_run`.

    Raises `ValueError` for a group that there is not.
    """
    groups = list(groups)
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"no group {unknown[0]!r}: choose of {', '.join(GROUPS)}")
    teacher = load_model("course-lm")
    for group in groups:
        for run in GROUPS[group]:
            if not _log(run, out).exists():
                train_run(run, teacher, out)


def train_run(run: Run, teacher: LoadedModel, out: Path) -> dict:
    """Train `run`, and write its log to `out`; an interrupted run goes on from its checkpoint.

    The weights kept are those of the least loss on the calibration split, which nothing is trained on,
    and which the evaluation does not see.
    """
    stream, held_out = _stream("train"), _stream("calibration")
    config = run.config(best_rate(run, out) if run.lr is None else run.lr)
    student = half_depth(teacher.model, inherit=run.start == "inherited", seed=run.seed)
    before = held_out_loss(student, held_out, 16)
    checkpoint = out / f"{run.name}.safetensors"
    settings = replace(ARMS[run.arm], seed=run.seed)
    curve = distil(
        student,
        None if settings.mix == 0 else teacher.model,
        TrainingBatches(stream, context=CONTEXT, batch_size=BATCH, seed=run.seed),
        settings,
        config,
        evaluate=lambda model: held_out_loss(model, held_out, 16),
        checkpoint=checkpoint,
        data=f"factbook, {len(stream)} tokens",
        progress=sys.stderr.isatty(),
    )
    found = compare(student, teacher.model, PROTOCOL.text(teacher.tokenizer))
    prompt = prompt_of("course-lm")
    log = {
        "run": asdict(run),
        "told": asdict(settings),
        "settings": asdict(config),
        "batch_sequences": BATCH,
        "context": CONTEXT,
        "parameters": student.num_parameters(),
        "teacher_parameters": teacher.model.num_parameters(),
        "training_tokens_in_corpus": len(stream),
        "held_out_before": before,
        **_evaluated(found),
        **({"own_text": own_text(student, teacher)} if run in WAYS else {}),
        "writes": continuations({"": student}, teacher.tokenizer, prompt, new_tokens=32).texts[""],
        **of_this_run(curve),
    }
    with replacing(_log(run, out)) as partial:
        partial.write_text(json.dumps(log, indent=1) + "\n", "utf-8")
    checkpoint.unlink()
    print(f"{run.name}: {found}; lr {config.lr:g}, {log['seconds']:.0f} s", flush=True)
    return log


@torch.no_grad()
def own_text(student: nn.Module, teacher: LoadedModel) -> dict[str, list[float]]:
    """What the teacher thinks of what the student writes: means for each of `PROMPTS` prompts.

    Prompts are cut from evaluation documents; all students go on from the same with the same draws.
    `teacher_nats` is the teacher's loss on the tokens written, `reverse_kl` KL(student || teacher) at
    their places, and `entropy` the student's own; the teacher's loss estimates the sum of the last two.
    """
    shares = evaluation_documents(teacher.tokenizer, PROTOCOL.tokens)
    pieces = torch.cat(
        [share.unfold(0, PROMPT, PROMPT) for share in shares if len(share) >= PROMPT]
    )
    prompts = pieces[torch.linspace(0, len(pieces) - 1, PROMPTS).long()]
    text = write_on(student, prompts, WRITTEN, torch.Generator().manual_seed(0))
    kept = {"teacher_nats": [], "reverse_kl": [], "entropy": []}
    for piece in text.split(16):
        log_q, log_p = (
            F.log_softmax(model(input_ids=piece[:, :-1]).logits[:, PROMPT - 1 :].float(), -1)
            for model in (student, teacher.model)
        )  # [prompts, written, vocabulary]
        wrote = piece[:, PROMPT:, None]
        kept["teacher_nats"] += (-log_p.gather(-1, wrote)[..., 0]).mean(1).tolist()
        kept["reverse_kl"] += (log_q.exp() * (log_q - log_p)).sum(-1).mean(1).tolist()
        kept["entropy"] += (-log_q.exp() * log_q).sum(-1).mean(1).tolist()
    return {name: [round(value, 4) for value in values] for name, values in kept.items()}


def best_rate(run: Run, out: Path) -> float:
    """The learning rate with the least loss in the sweep of the run's start, with a teacher or without.

    Raises `ValueError` while a run of that sweep is missing.
    """
    arm = "hard" if ARMS[run.arm].mix == 0 else "soft"
    losses = {}
    for trial in sweep(run.start):
        if trial.arm == arm:
            if not _log(trial, out).exists():
                raise ValueError(
                    f"{run.name} needs a learning rate: run {trial.name} of its sweep first"
                )
            curve = json.loads(_log(trial, out).read_text("utf-8"))["curve"]
            losses[trial.lr] = min(row["held_out"] for row in curve)
    return min(losses, key=losses.get)


def shipped_logs(folder: Path = SHIPPED) -> dict[str, dict]:
    """The logs in `folder`, by the names of their runs."""
    return read_logs(folder)


def paired(log: dict, other: dict) -> Estimate:
    """Nats per token that the run of `log` loses more than that of `other`, over the same documents."""
    counts = torch.tensor(log["document_tokens"])
    nats = [torch.tensor(of["document_nats"], dtype=torch.float64) for of in (log, other)]
    mean = (
        nats[0] - nats[1]
    ) / counts  # the same for each token of a document: sums stay what they were
    unit = torch.arange(len(counts)).repeat_interleave(counts)
    return over_units(mean.repeat_interleave(counts), unit, "documents")


@functools.cache
def _stream(split: str) -> Tensor:
    """The Factbook's documents of a split in course-lm's tokens, one after another."""
    tokenizer = load_model("course-lm").tokenizer
    end = tokenizer.eos_token_id
    return token_stream(tokenizer.backend_tokenizer, documents("factbook", split), end)


def _evaluated(found: Comparison) -> dict:
    """What a log keeps of the comparison with the teacher on `PROTOCOL`."""
    counts = found.unit.bincount()
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, found.unit, found.nats)
    return {
        "evaluation": PROTOCOL.fields,
        "document_nats": [round(v, 4) for v in sums.tolist()],
        "document_tokens": counts.tolist(),
        "less_teacher": [found.loss.value, found.loss.error],
        "divergence": [found.divergence.value, found.divergence.error],
        "agreement": [found.agreement.value, found.agreement.error],
    }


def _log(run: Run, out: Path) -> Path:
    return out / f"{run.name}.json"
