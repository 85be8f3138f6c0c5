"""Students: a teacher with fewer blocks, which may begin with some of the teacher's own."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from course_utils.models.walk import blocks


def student_of(
    teacher: PreTrainedModel, layers: Sequence[int], *, inherit: bool = True, seed: int = 0
) -> PreTrainedModel:
    """A model of the teacher's class with `len(layers)` blocks, float32, in evaluation mode.

    With `inherit` it begins with the teacher's blocks of these numbers, its embeddings and its last
    norm, as DistilBERT does with every other layer (arXiv 1910.01108); otherwise with fresh weights of
    `seed`. Nothing is shared with the teacher. Raises `ValueError` for no layers, a layer twice or one
    that the teacher lacks.
    """
    names = [name for name, _ in blocks(teacher)]
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(len(names))):
        raise ValueError(
            f"layers {list(layers)} of a teacher with {len(names)} blocks: name different ones from 0 to "
            f"{len(names) - 1}"
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = type(teacher)(config).float()
    if inherit:
        kept = {f"{names[layer]}.": f"{names[place]}." for place, layer in enumerate(layers)}
        state = {}
        for name, tensor in teacher.state_dict().items():
            block = next((b for b in map("{}.".format, names) if name.startswith(b)), None)
            if block is None:
                state[name] = tensor
            elif block in kept:
                state[kept[block] + name.removeprefix(block)] = tensor
        student.load_state_dict(state)
    return student.eval()


def half_depth(teacher: PreTrainedModel, *, inherit: bool = True, seed: int = 0) -> PreTrainedModel:
    """A student of every other block of the teacher, the first among them: see `student_of`."""
    return student_of(teacher, range(0, len(blocks(teacher)), 2), inherit=inherit, seed=seed)


def half_width(teacher: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """A student of half the width with as many blocks and heads, and fresh weights of `seed`.

    Its matrices fit none of the teacher's, so it inherits nothing. Raises `ValueError` for a width whose
    half the heads do not divide.
    """
    config = copy.deepcopy(teacher.config)
    width, heads = config.hidden_size, config.num_attention_heads
    if width % (2 * heads):
        raise ValueError(f"{heads} heads do not divide half of the width {width}")
    config.n_embd = width // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(teacher)(config).float().eval()
