"""What a student is told of its teacher's inside: hidden states, attention scores, relations of values.

Losses are plain functions of tensors, means over all that is compared, and send no gradient to the
teacher. Layers are counted as TinyBERT counts them: block m is the m-th, from 1; hidden state m is what
leaves it, before the model's last norm; hidden state 0 are the embeddings. Built step by step in
`distillation/feature_distillation`. Left out of the papers: the loss of embeddings, data augmentation
and stages (TinyBERT), a teacher assistant (MiniLM), convolutional regressors (FitNets).
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.distillation.losses import soft_target_loss
from course_utils.models.walk import blocks, hidden_states

KINDS = ("hidden", "cosine", "attention", "relations")


@dataclass(frozen=True)
class Features:
    """What one pass computed on its way, `hidden[m]` `[batch, tokens, width]` for m from 0.

    `queries`, `keys` and `values` hold `[batch, heads, tokens, width of a head]` of blocks 1, 2, ...
    """

    hidden: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def scores(self, block: int) -> Tensor:
        """Attention scores before the softmax, `[batch, heads, query, key]`, of a block from 1."""
        return _scaled(self.queries[block - 1], self.keys[block - 1])

    def value_relations(self, block: int) -> Tensor:
        """Scaled products of all pairs of values, `[batch, heads, token, token]`, of a block from 1."""
        return _scaled(self.values[block - 1], self.values[block - 1])


def run_with_features(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, Features]:
    """Logits `[batch, tokens, vocabulary]` and the features of one pass of a GPT-2.

    Raises `ValueError` for blocks of another model: where those keep queries, keys and values is not
    written down here.
    """
    found = [block for _, block in blocks(model)]
    if (kind := type(found[0]).__name__) != "GPT2Block":
        raise ValueError(f"a block of class {kind}: features are read of GPT-2's blocks only")
    hidden, joint = [], []

    def entered(_, args, kwargs):
        hidden.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        first = found[0].register_forward_pre_hook(entered, with_kwargs=True)
        hooks.callback(first.remove)
        for block in found:
            left = block.register_forward_hook(
                lambda _, args, output: hidden.append(hidden_states(output))
            )
            made = block.attn.c_attn.register_forward_hook(
                lambda _, args, output: joint.append(output)
            )
            hooks.callback(left.remove)
            hooks.callback(made.remove)
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
    heads = found[0].attn.num_heads
    parts = [_of_heads(output, heads) for output in joint]
    return logits, Features(tuple(hidden), *zip(*parts, strict=True))


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """TinyBERT's loss of hidden states `[..., width]`: the mean of squared differences.

    FitNets' hint is half of their sum over the width, so it is `width / 2` times this. Raises `ValueError`
    for shapes that differ: a student of another width needs `add_projection`.
    """
    _check_hidden(student, teacher)
    return (student - teacher.detach()).square().mean()


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """DistilBERT's loss of hidden states `[..., width]`: 1 - cosine, which sees directions alone.

    `nn.CosineEmbeddingLoss` with target 1 is the same. Errors as in `hidden_mse`.
    """
    _check_hidden(student, teacher)
    return (1 - F.cosine_similarity(student, teacher.detach(), dim=-1)).mean()


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """TinyBERT's loss of attention scores `[..., heads, query, key]` *before* the softmax.

    The mean over the pairs that a causal model looks at: no key after its query. Raises `ValueError` for
    other shapes, as those of other numbers of heads.
    """
    seen = _seen_pairs(student, teacher)
    return (student - teacher.detach())[..., seen].square().mean()


def relation_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """MiniLM's loss of scaled products `[..., heads, token, token]`: KL(teacher || student) of each row.

    Rows are softened to probabilities over the tokens up to their own; the mean over all rows, in nats.
    MiniLM applies it to the products of queries and keys, and to those of values with values
    (arXiv 2002.10957). Errors as in `attention_mse`.
    """
    seen = _seen_pairs(student, teacher)
    pair = (x.masked_fill(~seen, -math.inf).log_softmax(-1) for x in (student, teacher.detach()))
    log_q, log_p = (x.masked_fill(~seen, 0.0) for x in pair)  # no infinity less infinity
    return ((log_p.exp() * (log_p - log_q)) * seen).sum(-1).mean()


@dataclass(frozen=True)
class FeatureLoss:
    """`weight` times a loss of one kind over pairs of `layers` (student's, teacher's).

    Kinds: "hidden" (`hidden_mse`), "cosine" (`cosine_loss`), "attention" (`attention_mse`) and
    "relations" (`relation_kl` of attention scores plus that of values). Losses of several pairs are
    added. `source` is another model than the teacher of the probabilities to take the features of, as a
    control. Raises `ValueError` for another kind, no pairs and a weight that is not positive.
    """

    kind: str
    layers: tuple[tuple[int, int], ...]
    weight: float = 1.0
    source: nn.Module | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"no feature loss {self.kind!r}: choose of {', '.join(KINDS)}")
        if not self.layers:
            raise ValueError("layers are empty: name pairs of a student's and a teacher's layer")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight={self.weight} has to be above 0 and finite")

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Refuse layers that student or teacher does not have, and a source in training mode."""
        teacher = self.source or teacher
        if teacher.training:
            raise ValueError("the source of features is in training mode: call .eval() first")
        first = 0 if self.kind in ("hidden", "cosine") else 1
        for place, (who, model) in enumerate((("student", student), ("teacher", teacher))):
            last = len(blocks(model))
            for pair in self.layers:
                if not first <= pair[place] <= last:
                    raise ValueError(
                        f"layers {pair}: the {who} has no layer {pair[place]} for {self.kind!r}, only "
                        f"{first} to {last}"
                    )

    def __call__(self, student: Features, teacher: Features, project=None) -> Tensor:
        """The loss; `project` maps the student's hidden states to the teacher's width."""
        project = project or (lambda hidden: hidden)
        total = 0.0
        for m, n in self.layers:
            if self.kind in ("hidden", "cosine"):
                compare = hidden_mse if self.kind == "hidden" else cosine_loss
                total = total + compare(project(student.hidden[m]), teacher.hidden[n])
            elif self.kind == "attention":
                total = total + attention_mse(student.scores(m), teacher.scores(n))
            else:
                total = total + relation_kl(student.scores(m), teacher.scores(n))
                ours, theirs = student.value_relations(m), teacher.value_relations(n)
                total = total + relation_kl(ours, theirs)
        return self.weight * total


def layer_map(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """TinyBERT's uniform map of numbers of blocks: m to m times teacher / student, for m from 1.

    The last layers meet. Raises `ValueError` where the teacher's number is no multiple.
    """
    if student < 1 or teacher % student:
        raise ValueError(
            f"{teacher} teacher layers are no multiple of {student} student layers: name pairs yourself"
        )
    return tuple((m, m * (teacher // student)) for m in range(1, student + 1))


def add_projection(student: nn.Module, teacher: nn.Module, seed: int = 0) -> nn.Module:
    """Give `student` one linear map to the teacher's width, which `distil` trains with it; returns it.

    TinyBERT's code shares one map for all layers too. `drop_projection` takes it away afterwards.
    """
    widths = student.config.hidden_size, teacher.config.hidden_size
    projection = nn.Linear(*widths, bias=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        projection.weight.normal_(std=widths[0] ** -0.5, generator=draw)
    student.projection = projection.to(next(student.parameters()).device)
    return student.projection


def drop_projection(student: nn.Module) -> None:
    """Take the projection away: what is left is the student that is used."""
    del student.projection


def feature_loss(
    losses: Sequence[FeatureLoss],
    student: nn.Module,
    ours: Features,
    teacher: Features,
    input_ids: Tensor,
) -> Tensor:
    """The sum of `losses`, of a student's features `ours` and the teacher's on `input_ids`."""
    total = 0.0
    for loss in losses:
        theirs = teacher
        if loss.source is not None:
            with torch.no_grad():
                _, theirs = run_with_features(loss.source, input_ids)
        total = total + loss(ours, theirs, getattr(student, "projection", None))
    return total


def gradient_norm(value: Tensor, model: nn.Module) -> float:
    """Norm of the gradient of `value` over all parameters of `model` that it reaches."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(g.square().sum().item() for g in found if g is not None))


def balanced(
    loss: FeatureLoss, student: nn.Module, teacher: nn.Module, input_ids: Tensor
) -> FeatureLoss:
    """`loss` with a weight that makes its gradient as long as that of the soft targets on these tokens.

    Long is `gradient_norm` over the student's parameters, its projection's too; soft targets are at
    temperature 1.
    """
    logits, ours = run_with_features(student, input_ids)
    with torch.no_grad():
        told, theirs = run_with_features(teacher, input_ids)
    loss = replace(loss, weight=1.0)
    soft = gradient_norm(soft_target_loss(logits, told, 1.0), student)
    own = gradient_norm(feature_loss([loss], student, ours, theirs, input_ids), student)
    return replace(loss, weight=soft / own)


def _scaled(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.mT / math.sqrt(a.shape[-1])


def _of_heads(joint: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values `[batch, heads, tokens, d]` of `[batch, tokens, 3 width]`."""
    return tuple(
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in joint.float().chunk(3, -1)
    )


def _check_hidden(student: Tensor, teacher: Tensor) -> None:
    if student.shape[-1:] != teacher.shape[-1:]:
        raise ValueError(
            f"hidden states of width {student.shape[-1]} and {teacher.shape[-1]}: give the student a map to "
            "the teacher's width, add_projection(student, teacher)"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"hidden states {tuple(student.shape)} and {tuple(teacher.shape)} are not of the same tokens"
        )


def _seen_pairs(student: Tensor, teacher: Tensor) -> Tensor:
    """Which pairs `[query, key]` a causal model compares; refuses other shapes."""
    square = student.ndim >= 3 and student.shape[-1] == student.shape[-2]
    if student.shape != teacher.shape or not square:
        raise ValueError(
            f"products {tuple(student.shape)} and {tuple(teacher.shape)} have to be [..., heads, tokens, "
            "tokens] both, of the same tokens and as many heads"
        )
    tokens = student.shape[-1]
    return torch.ones(tokens, tokens, dtype=torch.bool, device=student.device).tril()
