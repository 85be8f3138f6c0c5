"""Exact folding: a scale for every input feature of some layers, moved into what comes before them.

Divide feature j by s_j where it is made, and multiply column j of all the weights that read it by s_j:
each product x_j W_j stays what it was. That takes a source that is linear in its own weight: a norm (its
weight, and LayerNorm's bias), or a linear layer (its rows, and its bias) with nothing but sums and
products of other features in between. Attention's values pass to its output projection so, and Llama's
up projection to its down projection: both are multiplied by something else and added up. GELU(x / s) is
not GELU(x) / s, so nothing folds through the MLP of GPT-2.

What feeds what is data, `FOLDS`, by class of block. Built step by step in `chronology/awq_demo`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_utils.models.walk import LinearLayer, linear_layers


@dataclass(frozen=True)
class Fold:
    """One place where a scale can move. All names are dotted paths within the block.

    `source`: a norm or a linear layer, which makes the features. `layers`: all the linear layers that read
    them. `inspected`: the smallest module that holds the layers, and by whose output a scale is judged.
    `parts`: the layers read the last of so many equal parts of what the source puts out, as attention
    reads the values behind queries and keys. `heads`: the attention module between source and
    layers, where several query heads may read one head of values (grouped-query attention).
    """

    source: str
    layers: tuple[str, ...]
    inspected: str
    parts: int = 1
    heads: str | None = None


# Blocks by class, since names alone do not tell what is computed: Gemma's norms have the names of Llama's,
# but multiply by 1 + weight. Another architecture is another entry.
FOLDS: dict[str, tuple[Fold, ...]] = {
    "LlamaDecoderLayer": (
        Fold(
            "input_layernorm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn",
        ),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", heads="self_attn"),
        Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        Fold("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    ),
    "GPT2Block": (
        Fold("ln_1", ("attn.c_attn",), "attn"),
        Fold("attn.c_attn", ("attn.c_proj",), "attn.c_proj", parts=3),
        Fold("ln_2", ("mlp.c_fc",), "mlp"),
    ),
}


def folds_of(block: nn.Module) -> tuple[Fold, ...]:
    """The folds of a decoder block, by its class; ValueError where none are written down."""
    kind = type(block).__name__
    if kind not in FOLDS:
        raise ValueError(
            f"where scales fold in a block of class {kind} is not known. It is written down for "
            f"{' and '.join(FOLDS)} in course_utils.compression.folding: add "
            f'FOLDS["{kind}"] = (Fold("name of a norm", ("layers", "that read it"), "module inspected"), ...)'
        )
    return FOLDS[kind]


def check_folds(block: nn.Module) -> None:
    """Refuse a block without a mapping, with layers that are not float, or with shapes that do not fold."""
    layers = {layer.name for layer in linear_layers(block)}
    for fold in folds_of(block):
        for name in fold.layers:
            if name not in layers:
                kind = type(block.get_submodule(name)).__name__
                raise ValueError(
                    f"layer {name} has no float weight to fold a scale into: it is a {kind}. Fold scales "
                    "into a block before its layers are quantized."
                )
        source = block.get_submodule(fold.source)
        if fold.source not in layers and any(p.ndim != 1 for p in source.parameters()):
            raise ValueError(
                f"{fold.source} is a {type(source).__name__}, neither a float linear layer nor a norm with "
                "one weight a feature: no scale can be divided out of it."
            )
        source_features(block, fold)


def source_features(block: nn.Module, fold: Fold) -> Tensor:
    """Which of the source's features each column of the fold's layers reads: int64 `[in]`.

    0, 1, 2, ... but for grouped-query attention, where the query heads of a group read the same head of
    values. Raises ValueError for shapes that do not fit.
    """
    source, columns = block.get_submodule(fold.source), _columns(block, fold)
    linear = isinstance(getattr(source, "weight", None), Tensor) and source.weight.ndim == 2
    made = len(LinearLayer(fold.source, source).weight if linear else source.weight)
    features = made // fold.parts
    if made % fold.parts or columns % features or (columns != features and fold.heads is None):
        part = f" in {fold.parts} equal parts" if fold.parts > 1 else ""
        raise ValueError(
            f"{fold.source} makes {made} features{part}, and {fold.layers[0]} reads {columns}: these do not "
            "fold. Correct the block's entry in course_utils.compression.folding.FOLDS."
        )
    index = torch.arange(features)
    if columns != features:
        width = block.get_submodule(fold.heads).head_dim
        index = index.view(-1, width).repeat_interleave(columns // features, 0).flatten()
    return index.to(source.weight.device)


def pool(values: Tensor, index: Tensor) -> Tensor:
    """The mean of `values` `[in]` over the columns that read one feature, `[features]`.

    `index` as `source_features` has it. Where each column reads a feature of its own these are `values`.
    """
    total = values.new_zeros(int(index.max()) + 1).index_add_(0, index, values)
    return total / (len(index) // len(total))


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Divide the source's features by `scale` `[features]`, and multiply the columns that read them.

    Raises ValueError for a scale of another shape, or one that is not positive and finite.
    """
    index = source_features(block, fold)
    features = int(index.max()) + 1
    if scale.shape != (features,) or not (scale.isfinite() & (scale > 0)).all():
        raise ValueError(
            f"a scale of {fold.source} is one positive, finite number for each of its {features} features, "
            f"got {tuple(scale.shape)} from {scale.min().item():.3g} to {scale.max().item():.3g}"
        )
    source = block.get_submodule(fold.source)
    for parameter in _by_feature(fold.source, source):
        last = parameter[-features:]  # all of them, or the last part
        last.div_(scale.view(-1, *[1] * (last.ndim - 1)))
    for name in fold.layers:
        LinearLayer(name, block.get_submodule(name)).weight.mul_(scale[index])


def _columns(block: nn.Module, fold: Fold) -> int:
    """Columns of the fold's layers, which have to be as many in each."""
    widths = {LinearLayer(name, block.get_submodule(name)).weight.shape[1] for name in fold.layers}
    if len(widths) != 1:
        raise ValueError(
            f"{', '.join(fold.layers)} are said to read the same features of {fold.source}, and have "
            f"{', '.join(map(str, sorted(widths)))} columns. Correct the block's entry in "
            "course_utils.compression.folding.FOLDS."
        )
    return widths.pop()


def _by_feature(name: str, source: nn.Module) -> list[Tensor]:
    """The source's parameters, each with the features it makes along its first dimension."""
    if source.weight.ndim == 1:
        return [parameter.detach() for parameter in source.parameters()]
    layer = LinearLayer(name, source)
    return [layer.weight, *([] if layer.bias is None else [layer.bias])]
