"""Training a student on a teacher's probabilities, by the course's own training loop.

`distil(student, teacher, batches, settings, config)` is all there is to it; it also recovers a pruned
or a quantized model, with the float model as its teacher.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from course_utils.distillation.cached import CachedTeacher, top_k_loss
from course_utils.distillation.features import FeatureLoss, feature_loss, run_with_features
from course_utils.distillation.losses import (
    check_share,
    check_temperature,
    hard_loss,
    mixed_loss,
    soft_target_loss,
)
from course_utils.training.loop import TrainConfig, train


@dataclass(frozen=True)
class DistilSettings:
    """What the student is told; refuses a temperature of 0 or below and shares outside [0, 1].

    `mix` is the teacher's share of the loss, the rest is cross-entropy with the text; 0 is training
    without a teacher. `beta` chooses the divergence: 0 KL(teacher || student), 1 KL(student ||
    teacher), between them GKD's generalized JSD. `smoothing` smooths the labels of the text.
    `on_policy` is the probability that a batch is written by the student (GKD's lambda): it goes on
    from the first `prompt` tokens of each sequence of the batch, and the teacher judges what it wrote;
    `seed` draws that.
    """

    temperature: float = 1.0
    mix: float = 1.0
    beta: float = 0.0
    smoothing: float = 0.0
    on_policy: float = 0.0
    prompt: int = 32
    seed: int = 0

    def __post_init__(self):
        check_temperature(self.temperature)
        for name in ("mix", "beta", "smoothing", "on_policy"):
            check_share(name, getattr(self, name))
        if self.on_policy and self.mix != 1:
            raise ValueError(
                f"on_policy={self.on_policy} with mix={self.mix}: text of the student's own holds no labels, "
                "use mix=1"
            )
        if self.prompt < 1:
            raise ValueError(f"prompt={self.prompt}: the student needs a token to go on from")


def distil(
    student: nn.Module,
    teacher: nn.Module | CachedTeacher | None,
    batches: Callable[[int], Tensor],
    settings: DistilSettings,
    config: TrainConfig,
    *,
    features: Sequence[FeatureLoss] = (),
    evaluate: Callable[[nn.Module], float] | None = None,
    checkpoint: Path | None = None,
    data: str = "",
    progress: bool = False,
) -> list[dict]:
    """Train `student` in place on batches `[batch, context + 1]`; returns the curve, as `loop.train` does.

    The teacher runs without gradients, and is left as it was; None is a teacher for `mix` 0 alone. A
    `CachedTeacher` answers from disk, with the likeliest tokens only. `features` are added to the loss of
    the probabilities: what the student is told of the teacher's hidden states and attention. `evaluate`,
    `checkpoint` and `data` are those of `loop.train`.

    Raises `ValueError` for a teacher in training mode, a teacher that is the student or shares weights
    with it, vocabularies of different sizes, sequences longer than either has positions for, and a
    cached teacher of another temperature, of another divergence than `beta` 0 or of text that the
    student writes. Features are refused of layers that there are not, without a teacher that can be run,
    with `mix` 0 and with text of the student's own.
    """
    _check_teacher(student, teacher, settings)
    _check_features(student, teacher, settings, features)
    _check_length(student, teacher, batches(0))
    place = {"step": 0}

    def before_step(step: int) -> None:
        place["step"] = step

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if features:
            return loss_with_features(model, teacher, batch, settings, features)
        return _loss(model, teacher, batch, place["step"], settings)

    return train(
        student, batches, config, loss=loss, evaluate=evaluate, before_step=before_step,
        checkpoint=checkpoint, data=f"{data} {asdict(settings)}{_named(features)}", progress=progress,
    )  # fmt: skip


def loss_with_features(
    student: nn.Module, teacher: nn.Module, batch: Tensor, settings: DistilSettings,
    features: Sequence[FeatureLoss],
) -> Tensor:  # fmt: skip
    """`mixed_loss` and `features` on a batch `[batch, context + 1]`, of one pass of each model."""
    inputs = batch[:, :-1]
    student_logits, ours = run_with_features(student, inputs)
    with torch.no_grad():
        teacher_logits, theirs = run_with_features(teacher, inputs)
    told = feature_loss(features, student, ours, theirs, inputs)
    return told + mixed_loss(
        student_logits, teacher_logits, batch[:, 1:], temperature=settings.temperature,
        mix=settings.mix, beta=settings.beta, smoothing=settings.smoothing,
    )  # fmt: skip


def check_tokenizers(student, teacher) -> None:
    """Refuse two tokenizers that number a token differently, with an example of it."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    token = min(t for t in ours | theirs if ours.get(t) != theirs.get(t))
    raise ValueError(
        f"student and teacher have different tokenizers, of {len(ours)} and {len(theirs)} tokens: "
        f"{token!r} is {ours.get(token)} for the student and {theirs.get(token)} for the teacher. "
        "Column i of their logits means different tokens; give the student the teacher's tokenizer."
    )


@torch.no_grad()
def write_on(
    model: nn.Module, prompts: Tensor, new_tokens: int, generator: torch.Generator
) -> Tensor:
    """`prompts` `[batch, n]` and `new_tokens` tokens more of each, drawn at temperature 1.

    `generator` is one of the CPU, and the same draws give the same text.
    """
    training = model.training
    model.eval()
    written, inputs, cache = [prompts], prompts, None
    for _ in range(new_tokens):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()  # [batch, vocabulary]
        inputs = torch.multinomial(probabilities, 1, generator=generator).to(prompts.device)
        cache = output.past_key_values
        written.append(inputs)
    model.train(training)
    return torch.cat(written, 1)


def _loss(
    model: nn.Module, teacher: nn.Module | CachedTeacher | None, batch: Tensor, step: int,
    settings: DistilSettings,
) -> Tensor:  # fmt: skip
    draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    own = settings.on_policy > 0 and torch.rand((), generator=draw).item() < settings.on_policy
    if own:
        prompts = batch[:, : settings.prompt]
        batch = write_on(model, prompts, batch.shape[1] - settings.prompt, draw)
    inputs, labels = batch[:, :-1], batch[:, 1:]
    student_logits = model(input_ids=inputs).logits.float()  # [batch, context, vocabulary]
    if settings.mix == 0:
        return hard_loss(student_logits, labels, settings.smoothing)
    if isinstance(teacher, CachedTeacher):
        told = teacher.at(step, batch)
        soft = settings.temperature**2 * top_k_loss(student_logits, told, settings.temperature)
        hard = hard_loss(student_logits, labels, settings.smoothing) if settings.mix < 1 else 0.0
        return settings.mix * soft + (1 - settings.mix) * hard
    with torch.no_grad():
        teacher_logits = teacher(input_ids=inputs).logits.float()
    if (
        own
    ):  # the prompt is not the student's text: the first token it wrote is predicted at prompt - 1
        written = slice(settings.prompt - 1, None)
        return soft_target_loss(
            student_logits[:, written],
            teacher_logits[:, written],
            settings.temperature,
            settings.beta,
        )
    return mixed_loss(
        student_logits, teacher_logits, labels, temperature=settings.temperature, mix=settings.mix,
        beta=settings.beta, smoothing=settings.smoothing,
    )  # fmt: skip


def _check_teacher(student, teacher, settings: DistilSettings) -> None:
    if teacher is None:
        if settings.mix > 0:
            raise ValueError(f"mix={settings.mix} needs a teacher: give one, or train with mix=0")
        return
    if isinstance(teacher, CachedTeacher):
        if settings.beta != 0 or settings.on_policy:
            raise ValueError(
                f"beta={settings.beta}, on_policy={settings.on_policy}: a cached teacher knows only "
                "what it was asked before, and its likeliest tokens; give the model, or use beta=0 and "
                "on_policy=0"
            )
        if settings.temperature != teacher.temperature:
            raise ValueError(
                f"temperature={settings.temperature}, but {teacher.path} was written at "
                f"{teacher.temperature}: the tail's share is known at that one only"
            )
        return
    if teacher.training:
        raise ValueError("the teacher is in training mode, where dropout is on: call .eval() first")
    theirs = {p.data_ptr() for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if p.data_ptr() in theirs]
    if shared:
        raise ValueError(
            f"the student shares {len(shared)} tensors with its teacher, as {shared[0]}: a teacher "
            "that learns with its student agrees with it always. Make the student of a copy"
        )
    sizes = [model.config.vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student's vocabulary has {sizes[0]} tokens and the teacher's {sizes[1]}: only models that "
            "share a tokenizer can be compared token by token"
        )


def _check_features(student, teacher, settings: DistilSettings, features) -> None:
    if not features:
        return
    if not isinstance(teacher, nn.Module) or settings.mix == 0 or settings.on_policy:
        raise ValueError(
            f"features with a {type(teacher).__name__} as teacher, mix={settings.mix} and on_policy="
            f"{settings.on_policy}: give a model, a mix above 0, and text that is not the student's"
        )
    for loss in features:
        loss.check(student, teacher)


def _named(features: Sequence[FeatureLoss]) -> str:
    """What a checkpoint is told of feature losses; nothing where there are none."""
    return "".join(
        f" {loss.kind} {loss.layers} {loss.weight:.6g} {'another' if loss.source else 'the'} teacher"
        for loss in features
    )


def _check_length(student, teacher, batch: Tensor) -> None:
    length = batch.shape[1] - 1
    for who, model in (("student", student), ("teacher", teacher)):
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", length)
        if length > limit:
            raise ValueError(
                f"sequences of {length} tokens, and the {who} has {limit} positions: cut shorter ones"
            )
