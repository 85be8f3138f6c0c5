"""Gradients through quantized layers: those of the decoded weight, with nothing kept but packed weights."""

import pytest
import torch
from tiny_models import some_tokens, tiny_gpt2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from course_utils.compression import QuantizedLinear, get_method, method_names, quantize_model
from course_utils.compression.driver import quantize_layer
from course_utils.models import LinearLayer

FEATURES, OUT, TOKENS = 64, 48, 160
SETTINGS = {  # beside the defaults: all that treats inputs otherwise, and widths that fit this layer
    "affine": [{}, {"group_size": "row", "inputs": "per_token"}, {"group_size": "row", "inputs": "static"}],
    "awq": [{"group_size": 32}],
    "gptq": [{"group_size": 32}],
    "llm_int8": [{}, {"threshold": 0.0}, {"outlier_weights": "original"}],
    "magnitude": [{}, {"sparsity": "2:4"}],
    "smoothquant": [{}, {"inputs": "static"}],
    "sparse_gptq": [{"group_size": 32}],
    "sparsegpt": [{}, {"sparsity": "2:4"}],
    "wanda": [{}, {"sparsity": "2:4"}],
}  # fmt: skip
# of the decoded and the float weight: two bits and fewer are coarse, and so is half of the weights
COSINE = {
    "bitnet": 0.85, "e8p": 0.9, "magnitude": 0.9, "sparse_gptq": 0.8, "sparsegpt": 0.8, "trellis": 0.9,
    "ultra_low": 0.75, "vector": 0.9, "wanda": 0.9,
}  # fmt: skip
# learned_rounding learns whole blocks; what it stores is affine's
METHODS = [
    (name, given)
    for name in method_names()
    if name != "learned_rounding"
    for given in SETTINGS.get(name, [{}])
]
EACH = pytest.mark.parametrize(("name", "given"), METHODS, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_layer(name: str, given: dict, bias: bool = True) -> tuple[nn.Linear, QuantizedLinear]:
    """A float layer, and the same in the method `name`, calibrated on normal inputs."""
    layer = nn.Linear(FEATURES, OUT, bias=bias)
    layer.weight.data.copy_(normal(OUT, FEATURES, seed=1) / 8)
    method, statistics = get_method(name, **given), None
    if method.wants_statistics:
        statistics = method.new_statistics(FEATURES, torch.device("cpu"))
        statistics.update(normal(TOKENS, FEATURES, seed=2))
    return layer, quantize_layer(LinearLayer("layer", layer), method, statistics)[0]


def gradient(module: nn.Module, x: Tensor) -> Tensor:
    """Of a random projection of the outputs, by the inputs."""
    x = x.clone().requires_grad_()
    (module(x) * normal(OUT, seed=3)).sum().backward()
    return x.grad


@EACH
def test_backward_through_any_method_is_that_of_the_decoded_weight(name, given):
    """It was that of the rounding of the inputs: nothing, but for their scales."""
    layer, quantized = a_layer(name, given)
    x = normal(3, 5, FEATURES, seed=4)
    found, exact = gradient(quantized, x), gradient(layer, x)
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), 0) > COSINE.get(name, 0.98)
    decoded = normal(OUT, seed=3) @ quantized.quantized_weight.dequantize()
    torch.testing.assert_close(found, decoded.expand(3, 5, -1))


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_inputs(name, given, dtype):
    layer, quantized = a_layer(name, given)
    x = normal(7, FEATURES, seed=4)
    found, exact = gradient(quantized, x.to(dtype)), gradient(layer, x).flatten()
    assert found.dtype == dtype
    assert torch.cosine_similarity(found.float().flatten(), exact, 0) > COSINE.get(name, 0.98)


@EACH
def test_nothing_of_the_size_of_a_float_weight_is_kept_for_backward(name, given):
    """Every decoded weight was: 12.6 MB for the 1.7 MB of course-lm."""
    _, quantized = a_layer(name, given)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = normal(2, FEATURES, seed=4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = quantized(x).square().sum()
    loss.backward()
    stored = {tensor.data_ptr() for tensor in quantized.buffers()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in stored]
    assert sum(tensor.numel() for tensor in others) <= 2 * x.numel()  # far below OUT * FEATURES


def test_a_bias_learns_whether_or_not_the_inputs_do():
    _, quantized = a_layer("llm_int8", {})
    quantized.bias.requires_grad_()
    x = normal(7, FEATURES, seed=4)
    quantized(x).sum().backward()
    torch.testing.assert_close(quantized.bias.grad, torch.full((OUT,), 7.0))
    _, without = a_layer("llm_int8", {}, bias=False)
    assert gradient(without, x).isfinite().all()
    with torch.no_grad():
        assert not quantized(x.requires_grad_()).requires_grad


def test_the_gradient_is_exact_in_float64_also_where_a_layer_is_used_twice():
    _, quantized = a_layer("affine", {"n_bits": 3})
    x = normal(3, FEATURES, seed=4).double().requires_grad_()
    there_and_back = nn.Linear(OUT, FEATURES).double()
    twice = lambda x: quantized(there_and_back(quantized(x)).tanh())  # noqa: E731
    assert torch.autograd.gradcheck(quantized, x) and torch.autograd.gradcheck(twice, x)
    assert torch.autograd.gradgradcheck(twice, x[:1, :])


def test_gradient_checkpointing_changes_nothing():
    _, quantized = a_layer("gptq", {"group_size": 32})
    x = normal(3, FEATURES, seed=4)
    recomputed = lambda x: checkpoint(quantized, x, use_reentrant=False)  # noqa: E731
    assert torch.equal(gradient(recomputed, x), gradient(quantized, x))


@pytest.mark.parametrize("name", ["affine", "llm_int8"])
def test_a_packed_model_trains_what_lies_before_its_layers(name):
    """As QLoRA does: the embedding's gradient is close to that of the float model."""
    found = []
    for quantize in (False, True):
        model = tiny_gpt2(width=64)
        if quantize:
            quantize_model(model, get_method(name, **({"n_bits": 8} if name == "affine" else {})))
        tokens = some_tokens()
        model(tokens, labels=tokens).loss.backward()
        found.append(model.transformer.wpe.weight.grad.flatten())
    assert torch.cosine_similarity(*found, 0) > 0.99
