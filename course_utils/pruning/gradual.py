"""Gradual pruning: the share of removed weights grows while the model is trained.

Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression",
arXiv 1710.01878. Many weights go early, when there are many to spare, and few go late. Between two steps
of the schedule the mask is held, and the weights that stay are trained. What is left out of the paper:
layers that keep all their weights, and a schedule for each layer. Built in `pruning/pruning_demo`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from course_utils.pruning.magnitude import magnitude_masks
from course_utils.pruning.masked import hold_masks
from course_utils.pruning.masks import check_sparsity


@dataclass(frozen=True)
class GradualPruning:
    """The cubic schedule: equation 1 of the paper, in its own letters.

    `final`: the share of weights that is removed in the end, s_f. `begin`: the update t_0 at which it
    starts, at `initial`, s_i. `times`: how often the mask grows after that, n. `every`: updates from one
    time to the next, Delta t. Raises `ValueError` for shares outside [0, 1), a final share below the
    initial one, and counts that are too small.
    """

    final: float
    begin: int
    times: int
    every: int
    initial: float = 0.0

    def __post_init__(self):
        check_sparsity(self.initial)
        check_sparsity(self.final)
        if self.final < self.initial:
            raise ValueError(
                f"final {self.final} is below initial {self.initial}: removed weights do not come back, so "
                "ask for at least as many"
            )
        for name, least in (("begin", 0), ("times", 1), ("every", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} {value!r}: choose a whole number from {least} on")

    @property
    def end(self) -> int:
        """The update before which the mask grows for the last time, t_0 + n Delta t."""
        return self.begin + self.times * self.every

    def sparsity_at(self, step: int) -> float:
        """The share that is removed in update number `step`, counted from 0.

        s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n Delta t))^3, for the last t of the schedule that is
        not after `step`. Before `begin` it is `initial`.
        """
        done = min(max(step - self.begin, 0) // self.every, self.times)
        if done == self.times:
            return self.final
        return self.final + (self.initial - self.final) * (1 - done / self.times) ** 3

    def masking(self, model: nn.Module) -> Callable[[int], None]:
        """What `train` calls before each update: new masks for `model` where the schedule has a time.

        Of each layer the smallest weights go (`magnitude_masks`); removed ones are zero, and so go again.
        It starts from update 0: a training that skips the first times leaves them out.
        """

        def before_step(step: int) -> None:
            since = step - self.begin
            if 0 <= since <= self.times * self.every and since % self.every == 0:
                hold_masks(model, magnitude_masks(model, self.sparsity_at(step)))

        return before_step
