"""A teacher's likeliest tokens on disk: asked once, used by every student.

Whole logits take 2 x vocabulary bytes a token in float16; the `k` likeliest take 6 k + 4. What is left
out is kept as one number, the probability of all other tokens together.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from course_utils.distillation.losses import check_temperature
from course_utils.files import replacing


class TopK(NamedTuple):
    """The teacher's `k` likeliest tokens at each position, softened by the temperature of the cache."""

    tokens: Tensor  # int64 [..., k]
    log_p: Tensor  # float32 [..., k]


class CachedTeacher:
    """What `cache_teacher` wrote to `path`, for `trainer.distil`."""

    def __init__(self, path: Path):
        self.path = Path(path)
        with safe_open(self.path, "pt") as file:
            self.temperature = float(file.metadata()["temperature"])
            self.batches, self._tokens, self._log_p = (
                file.get_tensor(name) for name in ("batches", "tokens", "log_p")
            )

    @property
    def nbytes(self) -> int:
        """Size of the file, in bytes."""
        return self.path.stat().st_size

    def at(self, step: int, batch: Tensor) -> TopK:
        """What the teacher said to the batch of that step; refuses steps and text that it was not asked."""
        if step >= len(self.batches):
            raise ValueError(
                f"{self.path} holds {len(self.batches)} steps, and step {step} was asked for: cache more"
            )
        if not torch.equal(self.batches[step].long(), batch.cpu()):
            raise ValueError(
                f"the batch of step {step} is not the one that {self.path} was written for: use the same "
                "stream, context, batch size and seed"
            )
        found = self._tokens[step].long(), self._log_p[step].float()
        return TopK(*(tensor.to(batch.device) for tensor in found))


@torch.no_grad()
def cache_teacher(
    teacher: nn.Module, batches: Callable[[int], Tensor], steps: int, path: Path, *,
    k: int = 32, temperature: float = 1.0,
) -> CachedTeacher:  # fmt: skip
    """Ask the teacher about the batches of `steps` steps, and write its `k` likeliest tokens to `path`.

    Tokens are int32, log-probabilities float16. Raises `ValueError` for a teacher in training mode, a
    temperature that is not positive, and a `k` that the vocabulary does not have.
    """
    check_temperature(temperature)
    if teacher.training:
        raise ValueError("the teacher is in training mode, where dropout is on: call .eval() first")
    if not 1 <= k < teacher.config.vocab_size:
        raise ValueError(
            f"k={k}: choose 1 to {teacher.config.vocab_size - 1} of {teacher.config.vocab_size} tokens"
        )
    kept: dict[str, list[Tensor]] = {"batches": [], "tokens": [], "log_p": []}
    for step in range(steps):
        batch = batches(step)
        logits = teacher(input_ids=batch[:, :-1]).logits.float() / temperature
        values, tokens = F.log_softmax(logits, -1).topk(k)  # [batch, context, k]
        for name, tensor in (
            ("batches", batch.int()),
            ("tokens", tokens.int()),
            ("log_p", values.half()),
        ):
            kept[name].append(tensor.cpu())
    with replacing(Path(path)) as partial:
        tensors = {name: torch.stack(of_steps) for name, of_steps in kept.items()}
        save_file(tensors, partial, metadata={"temperature": repr(temperature)})
    return CachedTeacher(path)


def top_k_loss(student: Tensor, told: TopK, temperature: float = 1.0) -> Tensor:
    """KL(P || Q) over `k` + 1 outcomes: the teacher's likeliest tokens, and all others together.

    `student` are logits `[..., vocabulary]`. Never more than the whole divergence, and equal to it
    where the two agree on the proportions of the others. Mean over positions, in nats.
    """
    check_temperature(temperature)
    log_q = F.log_softmax(student / temperature, -1).gather(-1, told.tokens)  # [..., k]
    inside = (told.log_p.exp() * (told.log_p - log_q)).sum(-1)
    tail_p, tail_q = (1 - log.exp().sum(-1) for log in (told.log_p, log_q))
    tiny = torch.finfo(student.dtype).eps  # float16 may sum to a little more than 1
    tail_p, tail_q = tail_p.clamp(min=tiny), tail_q.clamp(min=tiny)
    return (inside + tail_p * (tail_p / tail_q).log()).mean()
