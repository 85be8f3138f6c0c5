"""Which linear layers read the output of which norm: where a scale can be moved without a trace.

A norm multiplies every feature by a weight of its own. Divide that by s, and multiply the feature's
column in all the layers that read it by s: the product is the same.
"""

from dataclasses import dataclass

from torch import nn

# Blocks by class, since names alone do not tell what a norm computes: Gemma's has those of Llama's, but
# multiplies by 1 + weight.
_FED_BY = {
    "GPT2Block": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    "LlamaDecoderLayer": {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
}


@dataclass(frozen=True)
class NormGroup:
    """A norm, and the names, within the block, of all the linear layers that read its output."""

    norm: nn.Module
    layers: tuple[str, ...]


def norm_groups(block: nn.Module) -> list[NormGroup]:
    """The norms of a GPT-2 or Llama decoder block with the linear layers they feed.

    Attention's output projection and the second layer of the MLP read no norm, and are in no group.
    Raises `ValueError` for blocks of other models.
    """
    kind = type(block).__name__
    if kind not in _FED_BY:
        raise ValueError(
            f"a block of class {kind} is not known: which of its layers read which norm is written down "
            f"for {' and '.join(_FED_BY)}."
        )
    return [NormGroup(block.get_submodule(norm), names) for norm, names in _FED_BY[kind].items()]
