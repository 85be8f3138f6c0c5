"""BitNet b1.58: linear layers that train float weights through ternary codes, from the first step on.

`bitnet_model` makes a small language model with the architecture of BitNet b1.58 2B4T (Ma et al. 2025,
arXiv 2504.12285) as `transformers` has it, and `prepare_bitnet` puts a `BitLinear` in the place of every
linear layer. The same model without it is the float twin: same shapes, same norms, same initial weights.

Normalisation before each quantized layer is SubLN's: the usual two RMSNorms of a block stand before
q, k, v and before gate and up, and two more before o and before down. (The first code of b1.58 had one
inside each BitLinear instead.) There are no biases; embedding and LM head are one float matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitNetConfig, BitNetForCausalLM

from course_utils.finetuning.conversion import TrainedLinear
from course_utils.grids.fake_quantization import straight_through
from course_utils.models.walk import linear_layers, replace_module
from course_utils.quantizers.bitnet import BitNet, TernaryWeight, quantize_tokens


def bitnet_model(width: int, *, vocabulary: int, context: int, seed: int) -> BitNetForCausalLM:
    """A float model of 4 blocks with 4 heads: 52 `width`^2 weights in its linear layers."""
    config = BitNetConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=context,
        tie_word_embeddings=True, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BitNetForCausalLM(config)


class BitLinear(TrainedLinear):
    """A linear layer without bias that trains a float weight and computes with ternary codes and int8 inputs.

    Both are fake-quantized: float values on the grids of `method`, with the gradient of the identity (none is
    masked where codes are clipped). `strength` below 1 goes only part of the way, x + strength (Q(x) - x):
    the warm-up of the quantization that Hugging Face fine-tunes with.
    """

    bias = None

    def __init__(self, method: BitNet, weight: Tensor):
        super().__init__()
        self.method = method
        self.weight = nn.Parameter(weight.detach().clone())
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`."""
        codes, scale = self.method.round(self.weight.detach())
        weight = self._on_grid(codes.mul_(scale), self.weight)
        if self.method.inputs == "int8":
            codes, inverse = quantize_tokens(x.detach())
            x = self._on_grid(codes.div_(inverse), x)
        return F.linear(x, weight)

    @torch.no_grad()
    def quantized_weight(self) -> TernaryWeight:
        """The packed codes that the layer computes with, at full strength."""
        return self.method.quantize(self.weight)

    def _on_grid(self, value: Tensor, original: Tensor) -> Tensor:
        if self.strength < 1:
            value = original.detach().lerp(value, self.strength)
        return straight_through(value, original)

    def extra_repr(self) -> str:
        out, columns = self.weight.shape
        return f"{columns}, {out}, {self.method}"


def prepare_bitnet(model: nn.Module, method: BitNet) -> None:
    """Replace every linear layer of `model`, in place, by a `BitLinear` that starts at its weight.

    Embeddings and LM head stay as they are, and are trained with the rest. Raises `TypeError` for weights
    that are not float32, `ValueError` for layers with a bias (BitNet has none) and for a model without
    float linear layers; the model is whole then.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError("the model has no float linear layer left: is it prepared already?")
    for layer in layers:
        if layer.bias is not None:
            raise ValueError(f"layer {layer.name} has a bias, and BitNet's layers have none")
        if layer.weight.dtype != torch.float32:
            raise TypeError(
                f"layer {layer.name} is {layer.weight.dtype}, too coarse for small updates: train in "
                "float32, model.float()"
            )
    for layer in layers:
        replace_module(model, layer.name, BitLinear(method, layer.weight))
