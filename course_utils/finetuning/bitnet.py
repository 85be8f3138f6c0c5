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

from course_utils.grids.fake_quantization import straight_through
from course_utils.models.walk import linear_layers, replace_module
from course_utils.quantizers.bitnet import ROUNDINGS, quantize_tokens


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


class BitLinear(nn.Module):
    """A linear layer `[out, in]` without bias that computes with ternary weights and int8 inputs.

    Both are fake-quantized: float values on their grids, with the gradient of the identity (nothing is
    masked where codes are clipped). `strength` below 1 takes part of the way only, x + strength * (Q(x) - x):
    the warm-up of the quantization that Hugging Face fine-tunes with.
    """

    def __init__(self, weight: Tensor, rounding: str = "absmean", *, int8_inputs: bool = True):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.rounding, self.int8_inputs = rounding, int8_inputs
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` to `[..., out]`."""
        codes, scale = ROUNDINGS[self.rounding](self.weight.detach())
        weight = self._on_grid(codes.mul_(scale), self.weight)
        if self.int8_inputs:
            codes, inverse = quantize_tokens(x.detach())
            x = self._on_grid(codes.div_(inverse), x)
        return F.linear(x, weight)

    def _on_grid(self, value: Tensor, original: Tensor) -> Tensor:
        if self.strength < 1:
            value = original.detach().lerp(value, self.strength)
        return straight_through(value, original)


def prepare_bitnet(
    model: nn.Module, rounding: str = "absmean", *, int8_inputs: bool = True
) -> None:
    """Replace every linear layer of `model`, in place, by a `BitLinear` that starts at its weight."""
    for layer in linear_layers(model):
        module = BitLinear(layer.weight, rounding, int8_inputs=int8_inputs)
        replace_module(model, layer.name, module)
