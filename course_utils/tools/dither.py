"""Which columns of SmolLM2 the dithering leaves out, and what dithering does to the model.

`course dither` writes the list into `assets/smollm2-dithered`, and measures. Running it again on
another machine may swap columns whose inputs are nearly equally large, and with them the model: the
committed list is what makes it the same everywhere.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import Protocol, compare_all
from course_utils.models import linear_layers, load_model
from course_utils.models.smollm2 import EXEMPT, dither
from course_utils.quantizers.affine import Affine

SEQUENCES, LENGTH = 16, 512  # of the calibration
SHARE = 0.05  # of a layer's columns
PROTOCOLS = (
    Protocol("factbook", 4096, 512),
    Protocol("factbook", 8192, 512),
    Protocol("wikipedia", 4096, 512),
    Protocol("sotu", 4096, 512),
)


def write_exempt_columns() -> None:
    """Choose the exempt columns on calibration tokens, and write them as the package's asset."""
    model, tokenizer = load_model("smollm2-135m-q4_1")
    tokens = calibration_tokens(tokenizer, SEQUENCES, LENGTH)
    columns = {
        name: largest(mean_square, SHARE)
        for name, mean_square in input_power(model, tokens).items()
    }
    EXEMPT.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(found)}" for name, found in columns.items()
    )
    EXEMPT.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8", newline="\n")


@torch.no_grad()
def input_power(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """By layer, the mean square `[in]` of each input over `tokens` `[sequences, length]`."""
    power = {layer.name: torch.zeros((), dtype=torch.float64) for layer in linear_layers(model)}

    def hook_for(name: str):
        def hook(_, args: tuple):
            power[name] = power[name] + args[0].double().square().flatten(0, -2).sum(0)

        return hook

    handles = [
        layer.module.register_forward_pre_hook(hook_for(layer.name))
        for layer in linear_layers(model)
    ]
    for sequence in tokens:
        model(input_ids=sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / tokens.numel() for name, total in power.items()}


def largest(values: Tensor, share: float) -> list[int]:
    """Places of the `share` of `values` `[n]` that are the largest, in ascending order."""
    return values.topk(round(share * len(values))).indices.sort().values.tolist()


def costs() -> Iterator[str]:
    """What the noise costs the model, line by line: on every column, and on all but the exempt ones."""
    plain, tokenizer = load_model("smollm2-135m-q4_1")
    everywhere, _ = load_model("smollm2-135m-q4_1")
    dither(everywhere, {})
    dithered, _ = load_model("smollm2-135m-dithered")
    for protocol in PROTOCOLS:
        yield f"{protocol}, against the plain model:"
        text = protocol.text(tokenizer)
        models = {"noise everywhere": everywhere, "but for the exempt columns": dithered}
        for name, comparison in compare_all(models, plain, text).items():
            yield f"  {name}: {comparison}"


def grid_errors() -> Iterator[str]:
    """Relative squared errors of rounding to 4 bits, beside those of Gaussian weights, line by line.

    Weights on a grid of groups of 32 err too little; the dithered ones must err as a Gaussian's do.
    """
    plain, _ = load_model("smollm2-135m-q4_1")
    dithered, _ = load_model("smollm2-135m-dithered")
    generator = torch.Generator().manual_seed(0)
    gaussian = [torch.randn(1536, 1536, generator=generator)]
    weights = {
        "plain": [layer.weight for layer in linear_layers(plain)],
        "dithered": [layer.weight for layer in linear_layers(dithered)],
        "Gaussian": gaussian,
    }
    for grid, rounded in GRIDS.items():
        errors = (f"{name} {relative_error(of, rounded):.4f}" for name, of in weights.items())
        yield f"{grid}: {', '.join(errors)}"


def relative_error(weights: list[Tensor], rounded: Callable[[Tensor], Tensor]) -> float:
    """Squared error of rounding all `weights`, over their squares."""
    error = sum((rounded(weight) - weight).square().sum().item() for weight in weights)
    return error / sum(weight.square().sum().item() for weight in weights)


def float_minimum(weight: Tensor, group_size: int) -> Tensor:
    """`weight` `[out, in]` on the 4-bit grid from minimum to maximum of each group, both in float."""
    groups = weight.unflatten(1, (-1, group_size))  # [out, groups, group]
    minimum, maximum = groups.aminmax(dim=2, keepdim=True)
    step = (maximum - minimum) / 15
    return (minimum + step * ((groups - minimum) / step).round()).flatten(1)


def affine(weight: Tensor, symmetric: bool) -> Tensor:
    """`weight` `[out, in]` after round-to-nearest in groups of 64."""
    return Affine(group_size=64, symmetric=symmetric).quantize(weight).dequantize()


GRIDS = {
    "groups of 32, float minimum": partial(float_minimum, group_size=32),
    "groups of 64, float minimum": partial(float_minimum, group_size=64),
    "groups of 64, integer zero point": partial(affine, symmetric=False),
    "groups of 64, symmetric": partial(affine, symmetric=True),
}
