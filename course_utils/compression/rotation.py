"""SliceGPT's computational invariance: a model whose hidden states are rotated computes the same logits.

RMSNorm divides by the length of x, and a rotation Q keeps lengths: norm(x Q) = norm(x) Q. So all that
writes hidden states is multiplied by Q, and all that reads them by its transpose (arXiv 2401.15024).
Left out of the original: an own Q for each block, the directions found by PCA, and the cutting. With a
randomized Hadamard matrix for Q it is the part of QuaRot (arXiv 2404.00456) that costs nothing when the model
runs: it makes weights more alike. Left out of that: rotations that a running model has to compute.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from course_utils.kernels import hadamard
from course_utils.models.structure import norm_groups
from course_utils.models.walk import LinearLayer, blocks, replace_module

_WRITERS = {
    "GPT2Block": ("attn.c_proj", "mlp.c_proj"),
    "LlamaDecoderLayer": ("self_attn.o_proj", "mlp.down_proj"),
}
_OUTSIDE = {  # embeddings, and the last norm
    "GPT2Block": (("transformer.wte", "transformer.wpe"), "transformer.ln_f"),
    "LlamaDecoderLayer": (("model.embed_tokens",), "model.norm"),
}


def random_rotation(width: int, seed: int) -> Tensor:
    """An orthogonal matrix `[width, width]`: the Q of a QR decomposition of random numbers, float64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q


def randomized_hadamard(width: int, seed: int) -> Tensor:
    """The orthogonal `diag(signs) H^T / sqrt(width)` `[width, width]`, float64, H of `kernels.hadamard`.

    Every entry has the magnitude 1 / sqrt(width), so each new feature mixes all old ones in equal parts. The
    signs are drawn with `seed`. Raises `ValueError` for a width that has no such H.
    """
    draw = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, (width,), generator=draw) - 1
    return hadamard(torch.diag(signs.double()))


@torch.no_grad()
def rotated(model: PreTrainedModel, Q: Tensor) -> PreTrainedModel:
    """A copy of a GPT-2 or Llama model whose hidden states are x Q; its logits are the same.

    Each norm's gain and bias move into the layers that read it. LayerNorm also subtracts the mean: that
    moves into what writes the hidden states, and an RMSNorm is left. The head is no longer tied to the
    embeddings, so the copy lives in memory only. `Q` is `[width, width]`. Raises `ValueError` where it
    is not orthogonal, and for other models.
    """
    width = model.config.hidden_size
    _check_orthogonal(Q, width)
    changed = copy.deepcopy(model)
    all_blocks = [block for _, block in blocks(changed)]
    family = type(all_blocks[0]).__name__
    if family not in _WRITERS:
        raise ValueError(f"blocks of class {family}: known are {' and '.join(_WRITERS)}")
    embeddings, last = _OUTSIDE[family]
    head = _untied_head(changed)
    groups = [
        (block, group.norm, [block.get_submodule(name) for name in group.layers])
        for block in all_blocks
        for group in norm_groups(block)
    ]
    groups.append((changed, changed.get_submodule(last), [head]))
    centred = any(isinstance(norm, nn.LayerNorm) for _, norm, _ in groups)
    for parent, norm, readers in groups:
        for reader in readers:
            _take_over(norm, reader, Q)
        _bare(parent, norm, width)
    for name in embeddings:
        table = changed.get_submodule(name).weight
        table.copy_(_written(table, Q, centred))
    for block in all_blocks:
        for name in _WRITERS[family]:
            layer = LinearLayer(name, block.get_submodule(name))
            layer.weight.copy_(_written(layer.weight.T, Q, centred).T)
            if layer.bias is not None:
                layer.bias.copy_(_written(layer.bias[None], Q, centred)[0])
    return changed


def _written(rows: Tensor, Q: Tensor, centred: bool) -> Tensor:
    """Rows `[n, width]` that go into the hidden states, times Q; without their means for LayerNorm."""
    rows = rows.double()
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    return rows @ Q.double()


def _take_over(norm: nn.Module, reader: nn.Module, Q: Tensor) -> None:
    """Multiply a reader `[out, width]` by the norm's gain and Q, and add what the norm's bias gave."""
    layer = LinearLayer("", reader)
    weight = layer.weight.double()
    if (bias := getattr(norm, "bias", None)) is not None:
        layer.bias.add_(weight @ bias.double())
    layer.weight.copy_(weight * norm.weight.double() @ Q.double())


def _bare(parent: nn.Module, norm: nn.Module, width: int) -> None:
    """Put an RMSNorm without gain in the norm's place."""
    if not isinstance(norm, nn.LayerNorm):
        norm.weight.fill_(1.0)
        return
    name = next(name for name, module in parent.named_modules() if module is norm)
    replace_module(parent, name, nn.RMSNorm(width, norm.eps, elementwise_affine=False))


def _untied_head(model: PreTrainedModel) -> nn.Linear:
    """A head of its own, with a bias for what the last norm's may add."""
    old = model.get_output_embeddings()
    size = old.weight.shape
    head = nn.Linear(size[1], size[0], device=old.weight.device, dtype=old.weight.dtype)
    head.weight.copy_(old.weight)
    head.bias.zero_()
    if old.bias is not None:
        head.bias.copy_(old.bias)
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    return head


def _check_orthogonal(Q: Tensor, width: int) -> None:
    if Q.shape != (width, width):
        raise ValueError(f"Q is {tuple(Q.shape)}, and hidden states have {width} features")
    off = (Q.double().T @ Q.double() - torch.eye(width, dtype=torch.float64)).abs().max().item()
    if off > 1e-4:
        raise ValueError(
            f"Q'Q is up to {off:.2g} away from the identity: only a rotation keeps lengths; take the Q of "
            "torch.linalg.qr"
        )
