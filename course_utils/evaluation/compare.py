"""Models against a reference, on the same tokens, in one pass.

Two models find the same tokens hard. Their losses are therefore subtracted token by token, and the
error is that of the differences, which is many times smaller than that of either loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.evaluation.estimate import Estimate, format_difference, over_units, with_error
from course_utils.evaluation.perplexity import Perplexity, check_window
from course_utils.evaluation.protocol import Text


@dataclass(frozen=True)
class Comparison:
    """A model against a reference; errors are over documents, or over windows where it says so."""

    loss: Estimate  # nats per token that the model loses, paired
    divergence: Estimate  # KL(reference || model) in nats per token
    agreement: Estimate  # share of the tokens where both find the same token likeliest
    perplexity: Perplexity
    reference: Perplexity
    nats: Tensor = field(repr=False)  # the model's loss on each predicted token, float64
    unit: Tensor = field(repr=False)  # number of the document or window of each predicted token

    def __str__(self) -> str:
        divergence = with_error(self.divergence.value, self.divergence.error)
        agreement = with_error(100 * self.agreement.value, 100 * self.agreement.error)
        return (
            f"{format_difference(self.loss)}; KL divergence {divergence} nats; same top token "
            f"{agreement} %; perplexity {self.reference.perplexity:.2f} -> "
            f"{self.perplexity.perplexity:.2f} (errors over {self.loss.count} {self.loss.units})"
        )


def compare(model: nn.Module, reference: nn.Module, text: Text) -> Comparison:
    """`model` against `reference` on `text`: see `compare_all`."""
    return compare_all({"model": model}, reference, text)["model"]


@torch.no_grad()
def compare_all(
    models: Mapping[str, nn.Module], reference: nn.Module, text: Text
) -> dict[str, Comparison]:
    """Each of `models` against `reference` on `text`; the reference runs once.

    Window by window: the logits of one window are all that is held of the reference. The first token of
    a window has nothing before it and is not predicted, as in `perplexity`, whose values these are.
    Raises `ValueError` for a model in training mode, vocabularies of different sizes, a text shorter than
    its window, and logits that are NaN or infinite, with the window that they are in.
    """
    named = {"the reference": reference} | {f"model {name!r}": m for name, m in models.items()}
    for name, model in named.items():
        if model.training:
            raise ValueError(
                f"{name} is in training mode, where dropout is on: call .eval() first."
            )
        check_window(model, text.window, text.window)
    tokens, window = text.tokens, text.window
    if tokens.ndim != 1 or len(tokens) < window:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} are no stream [n] of at least one window of {window}: take "
            "more tokens, or a shorter window."
        )
    unit, units = text.documents, "documents"
    if unit is None:
        unit, units = torch.arange(len(tokens)) // window, "windows"
    if unit.shape != tokens.shape:
        raise ValueError(
            f"documents {tuple(unit.shape)} must number the document of each of the {len(tokens)} tokens."
        )
    # A last token that is a window of its own is not predicted: nothing stands before it.
    starts = [start for start in range(0, len(tokens), window) if start + 1 < len(tokens)]
    rows = {name: [] for name in models}  # of each window: [4, predicted]
    for start in starts:
        piece = tokens[start : start + window]
        expected = _log_probabilities(reference, "the reference", piece, start)
        for name, model in models.items():
            found = _log_probabilities(model, f"model {name!r}", piece, start)
            if found.shape != expected.shape:
                raise ValueError(
                    f"model {name!r} has {found.shape[1]} tokens in its vocabulary, and the reference "
                    f"{expected.shape[1]}: only models that share a tokenizer can be compared."
                )
            rows[name].append(_of_tokens(expected, found.to(expected.device), piece[1:]))
    predicted = torch.arange(len(tokens)) % window != 0
    return {
        name: _comparison(torch.cat(of_model, 1), unit[predicted], units, text)
        for name, of_model in rows.items()
    }


def difference(a: Comparison, b: Comparison) -> Estimate:
    """Nats per token that the model of `a` loses more than that of `b`, paired.

    Both must have been compared on the same text; raises `ValueError` otherwise.
    """
    if not torch.equal(a.unit, b.unit) or a.loss.units != b.loss.units:
        raise ValueError("the two comparisons are of different texts: compare on the same one.")
    return over_units(a.nats - b.nats, a.unit, a.loss.units)


def _log_probabilities(model: nn.Module, name: str, piece: Tensor, start: int) -> Tensor:
    """Log-probabilities `[predicted, vocabulary]` of what follows each token of a window but the last."""
    device = next(model.parameters()).device
    logits = model(input_ids=piece[None, :-1].to(device)).logits[0].float()
    if not logits.isfinite().all():
        raise ValueError(
            f"{name} gives NaN or infinite logits in the window of tokens {start} to "
            f"{start + len(piece) - 1}: look for layers whose weights or outputs are not finite, or "
            "load the model in a wider dtype."
        )
    return F.log_softmax(logits, dim=-1)


def _of_tokens(expected: Tensor, found: Tensor, targets: Tensor) -> Tensor:
    """`[4, predicted]`: loss of the reference and of the model, KL divergence, same top token."""
    targets = targets.to(expected.device)[:, None]
    losses = [-log_p.gather(1, targets)[:, 0] for log_p in (expected, found)]
    divergence = (expected.exp() * (expected - found)).sum(1)
    agreement = (expected.argmax(1) == found.argmax(1)).float()
    return torch.stack([*losses, divergence, agreement]).cpu().double()


def _comparison(rows: Tensor, unit: Tensor, units: str, text: Text) -> Comparison:
    reference, nats, divergence, agreement = rows
    protocol = len(nats), len(text.tokens), text.window, text.window
    return Comparison(
        loss=over_units(nats - reference, unit, units),
        divergence=over_units(divergence, unit, units),
        agreement=over_units(agreement, unit, units),
        perplexity=Perplexity(nats.sum().item(), *protocol),
        reference=Perplexity(reference.sum().item(), *protocol),
        nats=nats,
        unit=unit,
    )
