"""What a student is told by its teacher, as plain functions of logits `[..., vocabulary]`.

All return nats per token, the mean over all positions. P is the teacher's distribution and Q the
student's, both softened by the same temperature: softmax(logits / T). No function sends a gradient to
the teacher. Built step by step in `distillation/distillation_demo`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(P || Q), where the teacher is likely: the student has to cover all that the teacher does.

    `student` and `teacher` are logits `[..., vocabulary]` of one shape. `F.kl_div(log_q, p,
    reduction="batchmean")` of tensors flattened to `[tokens, vocabulary]` is the same. Raises
    `ValueError` for other shapes and for a temperature that is not positive.
    """
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return _kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(Q || P), where the student is likely: it may leave out what the teacher does, and pays for what the
    teacher would not do (MiniLLM, arXiv 2306.08543). Shapes and errors as in `forward_kl`.
    """
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    return _kl(log_q, log_p)


def generalized_jsd(
    student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q (GKD, arXiv 2306.13649).

    The formula itself is 0 at both ends, whatever P and Q are. Divided by beta it tends to KL(P || Q)
    as beta goes to 0, and divided by 1 - beta to KL(Q || P) as beta goes to 1. So 0 means `forward_kl`
    here and 1 `reverse_kl`, as in TRL. Raises `ValueError` for a beta outside [0, 1], and as
    `forward_kl` does.
    """
    check_share("beta", beta)
    if beta == 0:
        return forward_kl(student, teacher, temperature)
    if beta == 1:
        return reverse_kl(student, teacher, temperature)
    log_q, log_p = _log_probabilities(student, teacher, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def soft_target_loss(
    student: Tensor, teacher: Tensor, temperature: float, beta: float = 0.0
) -> Tensor:
    """T^2 times the divergence at temperature T: Hinton et al., arXiv 1503.02531, section 2, for beta 0.

    The gradient of the divergence falls as 1 / T^2, so the factor keeps its size while T is varied.
    """
    return temperature**2 * generalized_jsd(student, teacher, beta, temperature)


def hard_loss(student: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with `labels` `[...]`, of which a share `smoothing` is spread evenly over the vocabulary.

    Smoothing is the control for soft targets: they are soft, too, and say nothing. Raises `ValueError`
    for labels of another shape than the logits' positions, and a smoothing outside [0, 1].
    """
    check_share("smoothing", smoothing)
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} have to be one for each of the positions "
            f"{tuple(student.shape[:-1])} of the logits: shift both alike."
        )
    return F.cross_entropy(student.flatten(0, -2), labels.flatten(), label_smoothing=smoothing)


def mixed_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, mix: float,
    beta: float = 0.0, smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """`mix` times `soft_target_loss` plus 1 - `mix` times `hard_loss` (at temperature 1).

    Raises `ValueError` for a mix outside [0, 1], and as its parts do.
    """
    check_share("mix", mix)
    soft = soft_target_loss(student, teacher, temperature, beta)
    return soft if mix == 1 else mix * soft + (1 - mix) * hard_loss(student, labels, smoothing)


def check_share(name: str, value: float) -> None:
    """Refuse a share outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is a share: choose it from 0 to 1")


def check_temperature(temperature: float) -> None:
    """Refuse what logits cannot be divided by, or would be turned around by."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature={temperature} has to be above 0 and finite: 1 leaves the probabilities as they "
            "are, larger ones soften them"
        )


def _log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log Q and log P `[tokens, vocabulary]`, P without a gradient."""
    check_temperature(temperature)
    if student.shape != teacher.shape or student.ndim < 2:
        what = "vocabularies" if student.shape[-1] != teacher.shape[-1] else "positions"
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} have other "
            f"{what}: both need [..., vocabulary] for the same tokens of the same tokenizer"
        )
    pair = (student, teacher.detach().to(student.dtype))
    return tuple(F.log_softmax(z.flatten(0, -2) / temperature, dim=-1) for z in pair)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(A || B), the sum over the vocabulary and the mean over tokens."""
    return (log_a.exp() * (log_a - log_b)).sum(-1).mean()
