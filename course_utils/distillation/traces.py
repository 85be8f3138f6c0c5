"""Distillation through text: a teacher writes solutions, a verifier sorts them, a student learns the lines.

Nothing here knows the task. The teacher is any causal language model; the student sees the teacher's
tokens, not its probabilities, so that this is ordinary fine-tuning on chosen text. That is how the small
models beside DeepSeek-R1 were made (arXiv 2501.12948), and STaR's loop without the repetition (2203.14465).
For `distillation/reasoning_distillation`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def write_traces(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 512,
) -> list[str]:
    """What `model` writes after each of `prompts`, with the prompt before it: a text for each.

    Each next token is the likeliest (`temperature` 0), or drawn from softmax(logits / temperature) by a
    generator of `seed` on the model's device. A text ends with the tokenizer's end of text, which is
    decoded as part of it, or without one after `max_new_tokens`. Prompts of one length in tokens are
    written side by side, so that nothing is padded. Works for any causal language model of transformers.

    Raises `ValueError` for a model in training mode, no prompts, an empty one, a negative temperature, and
    prompts that leave no room in the model's context.
    """
    if model.training:
        raise ValueError("the teacher is in training mode: call .eval() first.")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative: take 0 for the likeliest token.")
    if not prompts:
        raise ValueError("no prompts: give at least one problem to solve.")
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for place, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        by_length.setdefault(len(ids), []).append((place, ids))
    room = getattr(model.config, "max_position_embeddings", None)
    if 0 in by_length:
        raise ValueError("a prompt holds no token: write a problem.")
    if room is not None and max(by_length) + max_new_tokens > room:
        raise ValueError(
            f"a prompt of {max(by_length)} tokens and {max_new_tokens} new ones need more than the "
            f"model's {room} positions: lower max_new_tokens, or leave out long problems."
        )
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(seed)
    texts = [""] * len(prompts)
    for of_length in by_length.values():
        for start in range(0, len(of_length), batch_size):
            places, ids = zip(*of_length[start : start + batch_size], strict=True)
            prompt = torch.tensor(ids, device=device)  # [prompts, tokens]
            written = _continue(model, prompt, max_new_tokens, temperature, draw, tokenizer)
            for place, row in zip(places, torch.cat([prompt, written], 1).tolist(), strict=True):
                texts[place] = _until_end(row, prompt.shape[1], tokenizer)
    return texts


def _continue(model, inputs, max_new_tokens, temperature, draw, tokenizer) -> Tensor:
    """Tokens `[prompts, new]`; what follows a row's end of text means nothing."""
    cache, written, end = None, [], tokenizer.eos_token_id
    ended = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
    while len(written) < max_new_tokens and not ended.all():
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        logits, cache = (
            output.logits[:, -1].float(),
            output.past_key_values,
        )  # [prompts, vocabulary]
        if temperature == 0:
            inputs = logits.argmax(-1, keepdim=True)
        else:
            inputs = torch.softmax(logits / temperature, -1).multinomial(1, generator=draw)
        written.append(inputs)
        ended |= inputs[:, 0] == end
    return torch.cat(written, 1)


def _until_end(row: list[int], prompt: int, tokenizer) -> str:
    new = row[prompt:]
    if tokenizer.eos_token_id in new:
        row = row[: prompt + new.index(tokenizer.eos_token_id) + 1]
    return tokenizer.decode(row, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class Sorted:
    """Traces that passed the verifier, and those that did not, each in the order they were written."""

    accepted: list[str]
    rejected: list[str]

    @property
    def rate(self) -> float:
        """Share that passed."""
        return len(self.accepted) / (len(self.accepted) + len(self.rejected))


def rejection_sample(traces: Sequence[str], verify: Callable[[str], bool]) -> Sorted:
    """Sort `traces` by `verify(trace)`.

    Raises `ValueError` if none passes: a student has nothing to learn from then.
    """
    found = Sorted([t for t in traces if verify(t)], [t for t in traces if not verify(t)])
    if not found.accepted:
        shown = f" The first one is {traces[0]!r}." if traces else ""
        raise ValueError(
            f"the verifier accepted none of {len(traces)} traces: take a better teacher, easier "
            f"problems, more samples of each or a lower temperature, or look for a verifier that reads "
            f"another form of answer.{shown}"
        )
    return found


def same_tokenizer(teacher, student) -> None:
    """Raise `ValueError` unless both tokenizers give every token the same number.

    Token ids, and probabilities over them, mean something else under another vocabulary. Text does not.
    """
    of_teacher, of_student = teacher.get_vocab(), student.get_vocab()
    if of_teacher == of_student:
        return
    token = min(
        (t for t in of_teacher | of_student if of_teacher.get(t) != of_student.get(t)),
        key=lambda t: of_teacher.get(t, len(of_teacher)),
    )
    numbers = [
        f"number {of[token]}" if token in of else "missing" for of in (of_teacher, of_student)
    ]
    raise ValueError(
        f"teacher and student have different tokenizers ({len(of_teacher)} and {len(of_student)} "
        f"tokens; {token!r} is {numbers[0]} in the teacher's, {numbers[1]} in the student's): the "
        "teacher's token ids would be other text to the student. Give both one tokenizer, or decode the "
        "traces and encode the text anew."
    )


def line_rows(lines: Sequence[str], tokenizer, *, teacher_tokenizer=None) -> Tensor:
    """`lines` as int64 tokens `[lines, width]`: begun with the beginning of text, filled with its end.

    The width is that of the longest. Raises `ValueError` for no lines, and where `teacher_tokenizer` is
    given and is another one.
    """
    if teacher_tokenizer is not None:
        same_tokenizer(teacher_tokenizer, tokenizer)
    if not lines:
        raise ValueError("no lines to learn from: give at least one accepted trace.")
    ids = [
        tokenizer(tokenizer.bos_token + line, add_special_tokens=False).input_ids for line in lines
    ]
    width, end = max(map(len, ids)), tokenizer.eos_token_id
    return torch.tensor([row + [end] * (width - len(row)) for row in ids])


class LineBatches:
    """Batches `[batch_size, width]` of rows `[lines, width]`, as a function of the step.

    Each epoch visits all rows in a new order, which depends on `(seed, epoch)` alone. Raises `ValueError`
    for fewer rows than a batch holds.
    """

    def __init__(self, rows: Tensor, *, batch_size: int, seed: int = 0):
        if len(rows) < batch_size:
            raise ValueError(
                f"{len(rows)} lines are too few for a batch of {batch_size}: take more, or smaller batches."
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = len(rows) // batch_size

    def __call__(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        return self.rows[order[index * self.batch_size : (index + 1) * self.batch_size]]


def completion_loss(start: int, end: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """A loss for `training.loop.train`: cross-entropy of what the teacher wrote, not of the problem.

    `start` is the token that closes a problem, `end` the one that ends a text: see `completion_mask`.
    Nats per counted token. Raises `ValueError` for a batch in which nothing is counted.
    """

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        counted = completion_mask(batch, start, end)[:, 1:]  # [batch, context]
        if not counted.any():
            raise ValueError(f"no row has a token after the token {start} that closes a problem.")
        logits = model(input_ids=batch[:, :-1]).logits  # [batch, context, vocabulary]
        return F.cross_entropy(logits[counted].float(), batch[:, 1:][counted])

    return loss


def completion_mask(batch: Tensor, start: int, end: int) -> Tensor:
    """Which tokens of `batch` `[batch, width]` are counted, bool of that shape.

    Those after the first `start` of a row, up to and with the next `end`; what fills the row is not.
    """

    def before(here: Tensor) -> Tensor:
        return here.int().cumsum(1) - here.int() > 0  # whether there was one before this token

    written = before(batch == start)
    return written & ~before(written & (batch == end))
