"""What a training step holds in memory, counted tensor by tensor.

Four parts: the model's tensors, the gradients, the optimizer's states, and what the forward pass keeps
for the backward pass (the activations). The last is seen by `torch.autograd.graph.saved_tensors_hooks`.
Each storage counts once, with its whole bytes; tensors of the model that autograd keeps too are no
activations. What is allocated and freed within an operation (a decoded weight) is not seen.
For `chronology/nf4_qlora`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_utils.evaluation import tensor_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that live at some time of a training step, by part."""

    weights: int  # parameters and buffers, trained or not
    gradients: int
    optimizer: int  # states: two moments for each trained parameter with AdamW, and step counters
    activations: int  # kept between forward and backward pass

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


class SavedBytes:
    """Counts, in its `with` block, the bytes that autograd keeps beside the tensors of `model`."""

    def __init__(self, model: nn.Module):
        self._own = {
            t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]
        }
        self._seen: dict[int, Tensor] = {}  # kept alive, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._own and place not in self._seen:
            self._seen[place] = tensor.detach()
        return tensor

    @property
    def total(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._seen.values())

    @property
    def sizes(self) -> list[int]:
        """Bytes of each storage that is kept."""
        return [t.untyped_storage().nbytes() for t in self._seen.values()]

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)


def training_memory(
    model: nn.Module, batch: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]
) -> TrainingMemory:
    """Run one step of AdamW on `batch`, at a learning rate of 0, and count what it holds.

    No weight is changed, and gradients are taken away again. Raises `ValueError` if nothing is trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: nothing is trained")
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    with SavedBytes(model) as saved:
        value = loss(model, batch)
    activations = saved.total
    value.backward()
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer.step()
    states = [t for of in optimizer.state.values() for t in of.values() if isinstance(t, Tensor)]
    optimizer.zero_grad(set_to_none=True)
    return TrainingMemory(
        tensor_bytes(model), gradients, sum(t.nbytes for t in states), activations
    )
