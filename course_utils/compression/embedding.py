"""The embedding and the LM head in int8, on request: on a small model they are most of the bytes.

The papers leave both in float, and so does `quantize_model` unless it is asked. A row of codes with its
scale stands for one token's vector. A head that is tied to the embedding computes from the embedding's
codes, which are stored once.
"""

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from course_utils.compression.base import (
    LayerReport,
    QuantizedWeight,
    check_weight,
    dequantized_linear,
    keeping_dtype,
    with_decoded_gradient,
)
from course_utils.grids.vectorwise import vectorwise_quantize
from course_utils.models.walk import replace_module


@dataclass(frozen=True)
class Int8Rows(QuantizedWeight):
    """int8 codes with the largest magnitude of each row (`grids.vectorwise`)."""

    codes: Tensor  # int8 [out, in]
    absmax: Tensor  # float32 [out]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    def dequantize(self, columns: Tensor | slice = slice(None)) -> Tensor:
        """The weight in float32, or some `columns` of it: code * absmax / 127."""
        # bitsandbytes' product and bits, but for the power of two: 127 * absmax may overflow.
        return self.codes[:, columns].float() * 2**-7 * self.absmax[:, None] * (2**7 / 127)


class QuantizedEmbedding(nn.Module):
    """An embedding that holds `Int8Rows` `[tokens, width]`, and decodes those it is asked for.

    `dtype` is that of its outputs, and follows the model's; what is stored keeps its own.
    """

    def __init__(self, rows: Int8Rows, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim = rows.shape
        self.dtype = dtype
        self.register_buffer("codes", rows.codes)
        self.register_buffer("absmax", rows.absmax)

    @property
    def rows(self) -> Int8Rows:
        """All rows, over the module's own buffers."""
        return Int8Rows(self.codes, self.absmax)

    def _apply(self, fn, recurse: bool = True):
        like = torch.empty(0, dtype=self.dtype, device=self.codes.device)
        self.dtype = fn(like).dtype
        return super()._apply(keeping_dtype(fn), recurse)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` to their vectors `[..., width]`."""
        ids = input.flatten()
        found = replace(self.rows, codes=self.codes[ids], absmax=self.absmax[ids])
        return found.dequantize().to(self.dtype).unflatten(0, input.shape)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.rows.bits_per_weight:.3f} bits per weight"


class QuantizedHead(nn.Module):
    """An LM head that multiplies by the rows of a `QuantizedEmbedding`: the model's, or one of its own."""

    def __init__(self, embedding: QuantizedEmbedding, bias: Tensor | None, *, tied: bool):
        super().__init__()
        self.tied = tied
        # What is the model's already is no submodule here: it would be stored twice.
        self._of_model = (embedding,) if tied else ()
        self.own = None if tied else embedding
        self.out_features, self.in_features = embedding.rows.shape
        self.register_buffer("bias", bias)

    @property
    def embedding(self) -> QuantizedEmbedding:
        return self._of_model[0] if self.tied else self.own

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(keeping_dtype(fn), recurse)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., width]` to the logits `[..., tokens]`, by the decoded rows."""
        x = input.flatten(0, -2)
        y = with_decoded_gradient(dequantized_linear, x, self.embedding.rows, self.bias)
        return y.unflatten(0, input.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {'tied' if self.tied else 'not tied'}"


class _Parts(NamedTuple):
    """A model's float embedding and, if it has one, its LM head, with their names in it."""

    name: str
    embedding: nn.Embedding
    head_name: str | None
    head: nn.Linear | None

    @property
    def tied(self) -> bool:
        return self.head is not None and self.head.weight is self.embedding.weight


def check_embeddings(model: nn.Module) -> _Parts:
    """The embedding and head of `model`; refuses those that `quantize_embeddings` does not know."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for what, module, known in (("embedding", embedding, nn.Embedding), ("head", head, nn.Linear)):
        if type(module) is not known and not (module is None and what == "head"):
            raise ValueError(
                f"the {what} of {type(model).__name__} is a {type(module).__name__}, and only a plain "
                f"{known.__name__} is quantized: leave embeddings= out"
            )
    if embedding.max_norm is not None:
        raise ValueError(
            f"the embedding's max_norm {embedding.max_norm} changes its rows: leave embeddings= out"
        )
    names = {
        module: [name for name, m in model.named_modules(remove_duplicate=False) if m is module]
        for module in (embedding, head)
    }
    own = {f"{name}.weight" for found in names.values() for name in found}
    weights = [module.weight for module in (embedding, head) if module is not None]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(parameter is weight for weight in weights) and name not in own:
            raise ValueError(
                f"{name} is a weight of the embedding or head too: leave embeddings= out"
            )
    if len(twice := names[embedding]) > 1:
        raise ValueError(f"{' and '.join(twice)} are one embedding: leave embeddings= out")
    for weight in weights:
        check_weight(weight)
    return _Parts(
        names[embedding][0], embedding, names[head][0] if head is not None else None, head
    )


@torch.no_grad()
def quantize_embeddings(model: nn.Module) -> list[LayerReport]:
    """Replace the embedding of `model`, in place, and its LM head; a report for each that stores rows.

    Where the two were tied, the head computes from the embedding's codes, and the configuration says no more
    that they are tied: transformers would look for the float weight.
    """
    parts = check_embeddings(model)
    embedding, report = _quantized(parts.name, parts.embedding.weight)
    reports = [report]
    if parts.head is not None:
        rows = embedding
        if not parts.tied:
            rows, report = _quantized(parts.head_name, parts.head.weight)
            reports.append(report)
        bias = None if parts.head.bias is None else parts.head.bias.detach()
        replace_module(model, parts.head_name, QuantizedHead(rows, bias, tied=parts.tied))
    replace_module(model, parts.name, embedding)
    if parts.tied:
        model.config.tie_word_embeddings = False
    return reports


def _quantized(name: str, weight: Tensor) -> tuple[QuantizedEmbedding, LayerReport]:
    """The rows of `weight` `[tokens, width]` in int8."""
    start = time.perf_counter()
    codes, absmax, _ = vectorwise_quantize(weight)
    rows = Int8Rows(codes, absmax)
    seconds = time.perf_counter() - start
    error, size = (
        torch.linalg.vector_norm(part, dtype=torch.float64).item()
        for part in (weight.float() - rows.dequantize(), weight)
    )
    relative = (error / size) ** 2 if size else 0.0
    report = LayerReport(
        name, rows.shape, rows.bits_per_weight, rows.nbytes, relative, None, seconds
    )
    return QuantizedEmbedding(rows, weight.dtype), report


def quantized_embeddings(model: nn.Module) -> dict[str, QuantizedEmbedding | QuantizedHead]:
    """The quantized embedding and LM head of `model` by their names; none of them is there, or all are."""
    kinds = QuantizedEmbedding | QuantizedHead
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: m for name, m in found.items() if name.rpartition(".")[0] not in found}


def describe_embeddings(model: nn.Module) -> dict:
    """What is written down of them beside their tensors, by name; all of it JSON."""
    return {
        name: {
            "rows": list(
                (module.embedding if isinstance(module, QuantizedHead) else module).rows.shape
            ),
            "tied": module.tied if isinstance(module, QuantizedHead) else None,
            "dtypes": {
                key: str(t.dtype).removeprefix("torch.") for key, t in module.named_buffers()
            },
        }
        for name, module in quantized_embeddings(model).items()
    }


def place_empty_embeddings(model: nn.Module, entries: dict) -> None:
    """Put into the float `model` what `describe_embeddings` wrote `entries` of, on the meta device."""
    embedding = None
    # The embedding first: a tied head computes from it.
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["tied"] is not None):
        tokens, width = entry["rows"]
        original = model.get_submodule(name)
        if tuple(original.weight.shape) != (tokens, width):
            raise ValueError(
                f"config.json disagrees with itself: {name} of this model is {tuple(original.weight.shape)}, "
                f"its codes are {(tokens, width)}. Save the quantized model again."
            )
        with torch.device("meta"):
            codes = torch.empty(tokens, width, dtype=torch.int8)
            rows = Int8Rows(codes, torch.empty(tokens, dtype=torch.float32))
            dtype = entry["dtypes"].get("bias")
            bias = torch.empty(tokens, dtype=getattr(torch, dtype)) if dtype else None
        module = QuantizedEmbedding(rows, original.weight.dtype)
        if entry["tied"] is None:
            embedding = module
        else:
            module = QuantizedHead(embedding if entry["tied"] else module, bias, tied=entry["tied"])
        for part in module.modules():
            part._is_hf_initialized = True
        replace_module(model, name, module)
