"""Token streams and the batches cut from them."""

import torch
from torch import Tensor


def token_stream(tokenizer, documents, end_of_text: int) -> Tensor:
    """All `documents` as one int64 stream `[tokens]`, each followed by the `end_of_text` token."""
    tokens = []
    for document in documents:
        tokens += tokenizer.encode(document.text, add_special_tokens=False).ids
        tokens.append(end_of_text)
    return torch.tensor(tokens)


class TrainingBatches:
    """Batches `[batch_size, context + 1]` of windows of a token stream, as a function of the step.

    Every epoch cuts the stream at a new random offset into windows that do not overlap and visits
    them in a new random order. Both depend on `(seed, epoch)` alone: a run resumed at step k sees
    exactly the batches of a run that was never interrupted, and no sampler state is saved.
    """

    def __init__(self, stream: Tensor, *, context: int, batch_size: int, seed: int = 0):
        self.stream, self.context = stream, context
        self.batch_size, self.seed = batch_size, seed
        self.windows = (len(stream) - context - 1) // context  # of an epoch, at any offset
        if self.windows < batch_size:
            raise ValueError(
                f"a stream of {len(stream)} tokens has {max(self.windows, 0)} windows of {context}: "
                f"too few for a batch of {batch_size}. Use more text, or smaller batches."
            )
        self.steps_per_epoch = self.windows // batch_size

    def __call__(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        offset = torch.randint(self.context, (), generator=generator)
        order = torch.randperm(self.windows, generator=generator)
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        starts = offset + chosen * self.context
        return self.stream[starts[:, None] + torch.arange(self.context + 1)]
