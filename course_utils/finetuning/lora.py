"""LoRA and QLoRA: a frozen base, and beside each linear layer two small matrices that are trained.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1; with a
base of packed NF4 codes it is QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3. The base may be a
float layer or a `QuantizedLinear` of any method: its weight is decoded in the forward pass, again in the
backward pass, and never kept between them (`compression.base.with_decoded_gradient`).

Left out of peft's LoRA: dropout, several adapters at once, adapters on embeddings, the variants (DoRA,
rsLoRA). Built step by step in `chronology/nf4_qlora`.
"""

import copy
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from course_utils.compression.base import QuantizedLinear
from course_utils.compression.checks import check_replaceable
from course_utils.compression.driver import naming
from course_utils.compression.embedding import describe_embeddings
from course_utils.compression.saving import mark_quantized
from course_utils.digest import digest
from course_utils.files import replacing
from course_utils.models.walk import LinearLayer, linear_layers, replace_module

FORMAT = "course_utils LoRA 1"


class LoRALinear(nn.Module):
    """`base(x) + alpha / rank * x A^T B^T`: the frozen layer `base`, and an update of rank `rank` beside it.

    `A` `[rank, in]` starts at uniform random values within 1 / sqrt(in), as in peft, and `B` `[out, rank]`
    at zero: at first the layer computes what its base does. Both are float32 whatever the base is, and
    follow `.to(device)`.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        out, columns = _shape(base)
        _check_rank(rank, alpha, out, columns)
        self.base, self.rank, self.alpha = base, rank, alpha
        device = next(iter([*base.parameters(), *base.buffers()])).device
        bound = 1 / math.sqrt(columns)
        start = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(start.to(device))
        self.B = nn.Parameter(torch.zeros(out, rank, device=device))

    @property
    def scaling(self) -> float:
        """alpha / rank: what the product of B and A is multiplied by."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`, in the dtype of the base's output."""
        y = self.base(x)
        low = F.linear(x.to(self.A.dtype), self.A)  # [..., rank]
        return y + (self.scaling * F.linear(low, self.B)).to(y.dtype)

    @torch.no_grad()
    def update(self) -> Tensor:
        """The update of the weight, alpha / rank * B A, `[out, in]` float32."""
        return self.scaling * self.B.float() @ self.A.float()

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The weight `[out, in]` that the base computes with, decoded, in float32 (a copy)."""
        if isinstance(self.base, QuantizedLinear):
            return self.base.quantized_weight.dequantize()
        return LinearLayer("", self.base).weight.float().clone()

    def extra_repr(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}"


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model` by name, in its own order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_adapters(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    layers: Iterable[str] | None = None,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freeze `model`, in place, and put a `LoRALinear` around its linear layers; returns what is trained.

    All linear layers but the LM head, as QLoRA does, or those named in `layers`; float and quantized ones
    alike. Raises `ValueError` for a model that has adapters already or no linear layer, for names that are
    no such layer, for a rank that is no positive number below both sides of a layer, for an alpha that is
    not positive, and for layers that cannot be replaced (`compression.checks`); the model is whole then.
    """
    if adapters(model):
        raise ValueError("the model has adapters already: merge or remove_adapters them first.")
    found = _linear_modules(model)
    if not found:
        raise ValueError("the model has no linear layer, float or quantized, to adapt.")
    chosen = list(found) if layers is None else list(layers)
    if unknown := [name for name in chosen if name not in found]:
        raise ValueError(
            f"the model has no linear layer {unknown[0]!r}: choose from {', '.join(list(found)[:4])}, ..."
        )
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in chosen:
        with naming(f"layer {name}"):
            if not isinstance(found[name], QuantizedLinear):
                check_replaceable(LinearLayer(name, found[name]))
            made[name] = LoRALinear(found[name], rank, alpha, generator=generator)
    model.requires_grad_(False)
    for name, layer in made.items():
        replace_module(model, name, layer)
    return trainable_parameters(model)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [p for p in model.parameters() if p.requires_grad]


def remove_adapters(model: nn.Module) -> None:
    """Put the bases back in their places, in `model`, without the updates; they stay frozen."""
    for name, layer in _adapted(model).items():
        replace_module(model, name, layer.base)


# Saving and loading


def base_digest(model: nn.Module) -> str:
    """Hex SHA-256 of all that `model` holds beside its adapters: what says which base they belong to."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    inside = tuple(f"{name}." for name in adapters(model))
    own = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in inside if name.startswith(p)), None)
        if prefix is None:
            own[name] = tensor
        elif (rest := name.removeprefix(prefix)) not in ("A", "B"):
            own[prefix + rest.removeprefix("base.")] = tensor
    return digest(own)


def save_adapters(model: nn.Module, path: Path | str) -> None:
    """Write A and B of every adapted layer to the safetensors file `path`, with rank, alpha, base.

    Raises `ValueError` if the model has no adapters.
    """
    layers = _adapted(model)
    tensors = {}
    for name, layer in layers.items():
        tensors |= {f"{name}.A": layer.A.detach(), f"{name}.B": layer.B.detach()}
    settings = {name: [layer.rank, layer.alpha] for name, layer in layers.items()}
    metadata = {"format": FORMAT, "layers": json.dumps(settings), "base": base_digest(model)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=metadata)


@torch.no_grad()
def load_adapters(model: nn.Module, path: Path | str, *, other_base: bool = False) -> None:
    """Put the adapters of the file `path` onto `model`, in place; it may have such adapters already.

    Raises `ValueError` for a file that is no adapter or is not whole, for one that was trained on another
    base (the same model in other bits is another base; `other_base=True` loads it all the same), for one
    of layers or shapes that the model does not have, and where the model's adapters have another rank or
    alpha; the model is as it was then.
    """
    tensors, settings, base = _read(Path(path))
    if not other_base and (here := base_digest(model)) != base:
        raise ValueError(
            f"{path} was trained on another base: its hash is {base[:12]}, this model's {here[:12]}. Load "
            "the base that it was trained on, quantized in the same way, or say other_base=True."
        )
    present = adapters(model)
    bases = {n: m.base for n, m in present.items()} or _linear_modules(model)
    for name, (rank, alpha) in settings.items():
        if name not in bases:
            raise ValueError(
                f"{path} adapts a layer {name!r}, which this model has not: it is another model's"
            )
        out, columns = _shape(bases[name])
        for part, wanted in (("A", (rank, columns)), ("B", (out, rank))):
            found = tuple(tensors[f"{name}.{part}"].shape)
            if found != wanted:
                raise ValueError(
                    f"{path}: {name}.{part} is {found}, and rank {rank} on this layer takes {wanted}: "
                    "it is another model's adapter, or was altered"
                )
        if present and (of := present[name]) and (of.rank, of.alpha) != (rank, alpha):
            raise ValueError(
                f"{path}: layer {name} has rank {rank} and alpha {alpha:g} there, and rank {of.rank} and "
                f"alpha {of.alpha:g} in this model: add adapters of that rank, or remove_adapters first"
            )
    if present and (missing := sorted(set(present) - set(settings))):
        raise ValueError(f"{path} lacks layer {missing[0]}, which this model adapts")
    if not present:
        model.requires_grad_(False)
        for name, (rank, alpha) in settings.items():
            replace_module(model, name, LoRALinear(bases[name], rank, alpha))
    for name, layer in adapters(model).items():
        layer.A.copy_(tensors[f"{name}.A"])
        layer.B.copy_(tensors[f"{name}.B"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, list], str]:
    """Tensors, rank and alpha by layer, and the base's hash of an adapter's file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        settings = json.loads(metadata["layers"])
        wanted = {f"{name}.{part}" for name in settings for part in "AB"}
        if wanted != set(tensors):
            raise ValueError(f"it holds {len(tensors)} tensors of {len(wanted)}, or others")
        if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{bad[0]} holds NaN or infinite values")
        return tensors, settings, metadata["base"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as an adapter ({error}): give a file that save_adapters wrote"
        ) from error


# Merging


@dataclass(frozen=True)
class MergeReport:
    """What merging did to one layer; sizes are sums of squares."""

    name: str
    weight: float  # of the base's weight
    update: float  # of the adapter's update
    kept: float  # <change, update> / <update, update>: 1 where the update arrived whole
    error: float  # of the new weight less (weight + update)


@torch.no_grad()
def merge_adapters(model: nn.Module, *, requantize: bool = False) -> list[MergeReport]:
    """Add every update to its base's weight, in place, and take the adapters away; reports each layer.

    A float base keeps its module. Of a quantized one a float layer of the kind that the model's class has
    there is made, with the decoded weight plus the update, exact to rounding. With `requantize` its own
    method quantizes that sum again: the model stays as small as it was, and what is less than half a step
    of an update is mostly lost (`kept`). Raises `ValueError` if there are no adapters, or if `requantize` is
    asked of a method that looks at inputs or of a float base; the model is whole then.
    """
    layers = _adapted(model)
    if requantize:
        for name, layer in layers.items():
            if not isinstance(layer.base, QuantizedLinear):
                raise ValueError(f"layer {name} has a float base, which has no codes to go back to")
            if layer.base.method.needs_calibration:
                raise ValueError(
                    f"layer {name}: {layer.base.method} looks at inputs. Merge into float, and call "
                    "quantize_model with calibration."
                )
    reports, originals = [], _originals(model)
    for name, layer in layers.items():
        weight, update = layer.base_weight(), layer.update()
        wanted = weight + update
        transposed = isinstance(originals.get(name), Conv1D)
        merged = _merged(layer.base, wanted, requantize, transposed)
        replace_module(model, name, merged)
        quantized = isinstance(merged, QuantizedLinear)
        new = merged.quantized_weight.dequantize() if quantized else LinearLayer("", merged).weight
        size = update.square().sum()
        kept = ((new - weight) * update).sum() / size if size > 0 else torch.ones(())
        error = (new - wanted).square().sum().item()
        reports.append(
            MergeReport(name, weight.square().sum().item(), size.item(), kept.item(), error)
        )
    _mark(model)
    return reports


def _merged(base: nn.Module, weight: Tensor, requantize: bool, transposed: bool) -> nn.Module:
    """The module that takes the place of `base`, with `weight` `[out, in]`; a Conv1D if `transposed`."""
    if not isinstance(base, QuantizedLinear):
        LinearLayer("", base).weight.copy_(weight)  # a view of the parameter
        return base
    if requantize:
        return QuantizedLinear(base.method, base.method.quantize(weight), base.bias)
    out, columns = weight.shape
    with torch.device("meta"):
        merged = Conv1D(out, columns) if transposed else nn.Linear(columns, out)
    stored = weight.T.contiguous() if transposed else weight
    merged.weight = nn.Parameter(stored, requires_grad=False)
    bias = None if base.bias is None else nn.Parameter(base.bias.clone(), requires_grad=False)
    merged.bias = bias
    return merged


def _originals(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the class of `model` has by name, without memory: GPT-2's file is read by them.

    Empty for a model without a configuration.
    """
    if not hasattr(model, "config"):
        return {}
    with torch.device("meta"):
        return dict(type(model)(copy.deepcopy(model.config)).named_modules())


def _mark(model: nn.Module) -> None:
    """Let the configuration say how the model is quantized now, or that it is not any more."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    packed = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if packed or describe_embeddings(model):
        mark_quantized(model)
        return
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    vars(model).pop("save_pretrained", None)


def _adapted(model: nn.Module) -> dict[str, LoRALinear]:
    found = adapters(model)
    if not found:
        raise ValueError("the model has no adapters: call add_adapters or load_adapters first.")
    return found


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Float and quantized linear layers of `model` by name, in its own order; no LM head."""
    plain = {layer.name for layer in linear_layers(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if name in plain or isinstance(module, QuantizedLinear)
    }


def _shape(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a float or quantized linear layer."""
    if isinstance(base, QuantizedLinear):
        return base.out_features, base.in_features
    return tuple(LinearLayer("", base).weight.shape)


def _check_rank(rank: int, alpha: float, out: int, columns: int) -> None:
    if type(rank) is not int or not 1 <= rank <= min(out, columns):
        raise ValueError(
            f"rank {rank!r}: choose 1 to {min(out, columns)}, the smaller side of a weight {out} x {columns}"
        )
    if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
        raise ValueError(f"alpha {alpha!r}: choose a positive number; rank and 2 * rank are usual")
