"""What is looked at before a model is touched, so that nothing fails halfway through.

A layer can be replaced if it computes what `nn.Linear` does, from a weight of its own, and if no other code
reads that weight. Calibration block by block stands for the model if blocks, one after the other, make of
the first one's inputs what they make within the whole model.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from course_utils.models.walk import BlockInputs, LinearLayer, blocks, hidden_states, layer_input

ALL_ZERO = (
    "all calibration inputs are zero: nothing tells which weights matter, or how far inputs reach. Look for "
    "what blocks the layer's inputs, or leave the layer out"
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_replaceable(layer: LinearLayer) -> None:
    """Refuse a layer whose weight is computed or elsewhere, and one that carries what would be lost."""
    module = layer.module
    if is_computed(module):
        raise ValueError(
            "its weight is computed anew whenever it is read (weight_norm, a parametrization), and a "
            "replaced weight would not be: make it a parameter, e.g. by remove_parametrizations"
        )
    if "forward" in vars(module):
        raise ValueError(
            "its forward was replaced on the object, as accelerate does for weights that are offloaded: "
            "load the model without a device_map, or without offloading"
        )
    if module.weight.is_meta:
        raise ValueError(
            "its weight is on the meta device, without values: load the model into memory first"
        )
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise ValueError(
            "it has hooks, which would vanish with it: remove them (handle.remove()), and register them "
            "on the quantized layer"
        )


def is_computed(module: nn.Module) -> bool:
    """Whether a tensor of the module is computed from others: by a parametrization, or by a hook."""
    by_hook = isinstance(vars(module).get("weight"), Tensor)  # torch.nn.utils.weight_norm
    return parametrize.is_parametrized(module) or by_hook


def check_unshared(name: str, block: nn.Module, model: nn.Module) -> None:
    """Refuse to rewrite the block `name` if its tensors are computed, or are those of other modules too."""
    prefix = f"{name}."
    for inside, module in block.named_modules():
        if is_computed(module):
            raise ValueError(
                f"block {name} cannot be rewritten: the weight of {inside} is computed anew whenever it is "
                "read (weight_norm, a parametrization). Make it a parameter first."
            )
    spans = sorted(
        (parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes, full)
        for full, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.numel()
    )
    reached, owner = 0, ""
    for start, end, full in spans:
        if start < reached and (full.startswith(prefix) or owner.startswith(prefix)):
            raise ValueError(
                f"block {name} cannot be rewritten: {owner} and {full} are one parameter, and what changes "
                "one of them changes the other. Give each a copy of its own."
            )
        if end > reached:
            reached, owner = end, full


def checked_calibration(model: nn.Module, calibration: Tensor) -> Tensor:
    """The token ids `[sequences, length]` in int64, if the model can read them; warns of repeated ones."""
    wanted = "calibration is [sequences, length] token ids, got "
    if not isinstance(calibration, Tensor):
        raise TypeError(
            f"{wanted}a {type(calibration).__name__}: give one tensor, such as torch.tensor(ids) or "
            "tokenizer(...)['input_ids'] of texts that are equally long"
        )
    integers = not (
        calibration.is_floating_point()
        or calibration.is_complex()
        or calibration.dtype == torch.bool
    )
    if calibration.ndim != 2 or calibration.numel() == 0 or not integers:
        raise ValueError(f"{wanted}{calibration.dtype} {tuple(calibration.shape)}")
    calibration = calibration.long()
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is not None and calibration.shape[1] > positions:
        raise ValueError(
            f"calibration sequences of {calibration.shape[1]} tokens, but the model has {positions} "
            "positions: cut shorter ones."
        )
    if hasattr(model, "get_input_embeddings"):
        embedding = token_embedding(model)
        if embedding is None:
            raise ValueError(
                f"{type(model).__name__} reads no token ids, and calibration is made of them: take a method "
                "that needs none, without calibration."
            )
        known = embedding.num_embeddings
        bad = calibration[(calibration < 0) | (calibration >= known)]
        if len(bad):
            raise ValueError(
                f"token id {bad[0].item()} in the calibration, but the model has ids 0 to {known - 1}: "
                "take its own tokenizer."
            )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "some of the model's weights are on the meta device (offloaded, or never loaded), so it cannot "
            "run on the calibration: load all of it into memory."
        )
    if model.training:
        raise ValueError(
            "the model is in training mode, whose dropout would be calibrated on: call model.eval()."
        )
    different, ids = len(calibration.unique(dim=0)), len(calibration.unique())
    if different < 0.9 * len(calibration) or (ids == 1 and calibration.numel() > 1):
        warnings.warn(
            f"only {different} of the {len(calibration)} calibration sequences are different, with "
            f"{ids} different token ids: repeated ones tell nothing new. Give more text.",
            stacklevel=4,
        )
    return calibration


def token_embedding(model: nn.Module) -> nn.Module | None:
    """The embedding of the token ids that `model` reads, if it has one and says so."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model of transformers, or two embeddings
        return None
    return embedding if hasattr(embedding, "num_embeddings") else None


@torch.no_grad()
def check_reads(model: nn.Module, layers: list[LinearLayer]) -> None:
    """Refuse layers whose weight other code reads than their own forward, as two tokens show.

    Only models that read token ids and nothing else can be tried without inputs. In others, a quantized
    layer says what is wrong when its weight is read.
    """
    embedding = token_embedding(model)
    if embedding is None:
        return
    padding = getattr(model.config, "pad_token_id", None)
    token = 1 if padding == 0 and embedding.num_embeddings > 1 else 0
    inputs = {"input_ids": torch.full((1, 2), token, device=next(model.parameters()).device)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    training = [module for module in model.modules() if module.training]
    model.eval()
    with _reads(layers) as reads:
        try:
            model(**inputs)
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError):
            pass  # it wants other inputs; what was read until then counts
        finally:
            for module in training:
                module.training = True
    _refuse(reads)


@torch.no_grad()
def check_calibrated(
    model: nn.Module, tokens: Tensor, layers: list[LinearLayer], wanting: list[LinearLayer]
) -> None:
    """Refuse what a walk through the blocks would get wrong, as the whole float model shows.

    The first sequence of `tokens` `[sequences, length]` goes through the whole model, and beside it from
    block to block: both have to agree. Weights that other code reads are found on the way. More sequences
    follow until all layers in `wanting`, whose methods look at their inputs, had some that are not zero.
    """
    waiting = {layer: "it never ran on the calibration" for layer in wanting}

    def look(layer: LinearLayer) -> Callable:
        def hook(_, args: tuple, kwargs: dict):
            x = layer_input(args, kwargs)
            if x.any():
                waiting.pop(layer, None)
            elif layer in waiting and x.numel():
                waiting[layer] = ALL_ZERO

        return hook

    handles = [
        layer.module.register_forward_pre_hook(look(layer), with_kwargs=True) for layer in wanting
    ]
    try:
        with _reads(layers) as reads:
            _compare_walk(model, tokens[:1])
            for sequence in tokens[1:]:
                if not waiting:
                    break
                run(model, sequence)
    finally:
        for handle in handles:
            handle.remove()
    _refuse(reads)
    for layer, reason in waiting.items():
        raise ValueError(
            f"layer {layer.name}: {reason}. Its method needs inputs: give more calibration, or a mapping "
            "that does not name it."
        )


def run(model: nn.Module, sequence: Tensor) -> None:
    """Run `model` without its head on one sequence of token ids `[length]`."""
    device = next(model.parameters()).device
    whole = getattr(model, "base_model", model)
    whole(input_ids=sequence[None].to(device), use_cache=False)


def _compare_walk(model: nn.Module, tokens: Tensor) -> None:
    """Refuse blocks that run otherwise within the model than one after the other with the first's inputs."""
    named = blocks(model)
    names = [name for name, _ in named]
    inputs = BlockInputs.of_first_block(model, tokens)
    ran = []

    def compare(name: str) -> Callable:
        def hook(block: nn.Module, _, output):
            ran.append(name)
            if ran != names[: len(ran)]:
                return
            # Called beside its hooks, of which this is one
            walked = block.forward(inputs.hidden, *inputs.args, **inputs.kwargs)
            inputs.hidden = hidden_states(walked)
            if _differ(inputs.hidden, hidden_states(output)):
                raise ValueError(
                    f"block {name} makes something else within {type(model).__name__} than when it runs "
                    "after the blocks before it: the model gives its blocks different inputs besides the "
                    "hidden states. It cannot be calibrated block by block; take a method that needs no "
                    "calibration."
                )

        return hook

    handles = [block.register_forward_hook(compare(name)) for name, block in named]
    try:
        run(model, tokens[0])
    finally:
        for handle in handles:
            handle.remove()
    if ran != names:
        raise ValueError(
            f"the {len(names)} blocks of {type(model).__name__} ran {len(ran)} times in one forward pass: "
            "only models that run each block once, in order, can be calibrated block by block. Take a method "
            "that needs no calibration."
        )


def _differ(walked: Tensor, whole: Tensor) -> bool:
    """Whether a token's hidden states `[1, length, width]` are further apart than rounding explains."""
    if walked.shape != whole.shape:
        return True
    distance = (walked.float() - whole.float()).norm(dim=-1)
    tolerance = max(1e-4, 4 * torch.finfo(whole.dtype).eps)
    return bool((distance > tolerance * whole.float().norm(dim=-1)).any())


@contextmanager
def _reads(layers: list[LinearLayer]) -> Iterator[dict[str, str]]:
    """While this is open, who reads a layer's weight but its own forward is noted, by the layer's name."""
    reads: dict[str, str] = {}
    kinds = {layer.module: type(layer.module) for layer in layers}
    for layer in layers:
        layer.module.__class__ = _noting(layer.name, kinds[layer.module], reads)
    try:
        yield reads
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


def _noting(layer: str, kind: type[nn.Module], reads: dict[str, str]) -> type[nn.Module]:
    own = kind.forward.__code__

    class Noting(kind):
        def __getattribute__(self, name: str):
            if name == "weight" and (code := sys._getframe(1).f_code) is not own:
                reads[layer] = f"{code.co_qualname} ({Path(code.co_filename).name})"
            return super().__getattribute__(name)

    return Noting


def _refuse(reads: Mapping[str, str]) -> None:
    if reads:
        found = ", ".join(f"{layer} by {reader}" for layer, reader in reads.items())
        raise ValueError(
            "a quantized layer holds no float weight, and the model's own code reads that of "
            f"{found}. Name the layers to quantize in a mapping, without these."
        )
