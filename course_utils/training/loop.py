"""The course's training loop: one plain loop for language models of every kind.

Run as it is under `torchrun --nproc_per_node N`: each process then takes its share of every batch,
and the loss curve is that of one process, to rounding.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.std import tqdm

from course_utils.digest import digest
from course_utils.files import replacing


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; everything that decides its result, beside model, data and loss.

    The learning rate warms up linearly, stays constant, and decays linearly to zero over the last
    `decay` steps (the warmup-stable-decay schedule of MiniCPM, Hu et al. 2024, arXiv 2404.06395).
    Until the decay begins the run does not depend on `steps`, so it can be shortened or
    prolonged from any checkpoint (`train` refuses other changes).

    `patience`: stop after that many evaluations without a new best; the best weights are kept.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    decay: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    eval_every: int = 200
    patience: int | None = None

    def lr_at(self, step: int) -> float:
        """Learning rate of the update number `step`, counted from 0."""
        rate = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay:
            rate = min(rate, (self.steps - step) / self.decay)
        return self.lr * rate

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of the matrices in that update; here the same in all."""
        return self.weight_decay


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token, of predicting `batch[:, 1:]` from `batch[:, :-1]`."""
    logits = model(input_ids=batch[:, :-1]).logits  # [batch, context, vocabulary]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train(
    model: nn.Module,
    batches: Callable[[int], Tensor],
    config: TrainConfig,
    *,
    loss: Callable[[nn.Module, Tensor], Tensor] = next_token_loss,
    evaluate: Callable[[nn.Module], float] | None = None,
    before_step: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
    data: str = "",
    progress: bool = True,
) -> list[dict]:
    """Train `model` in place with AdamW; returns the curve, one row per `eval_every` steps.

    `batches(step)` gives the whole batch of that step, `[batch, context + 1]`. A row holds `step`,
    `loss` (mean training loss since the last row), `lr`, `seconds` on the clock, `cpu_seconds` of all
    threads, and `held_out` where `evaluate(model)` is given; the weights with the lowest `held_out` are the
    ones left in `model`. `before_step(step)` is called before each update, to change what the model does.
    With `checkpoint`, a file, the state is saved there at every row, and a run that finds the
    file goes on from it, bit for bit as if it had never stopped (if model and loss draw no random
    numbers: dropout's are not part of the checkpoint). What is not trained, frozen parameters and
    buffers, is neither copied nor saved, and is left as it is. A checkpoint of another run is refused:
    one with another setting, other untrained tensors, another first batch, or another `data`, a text
    that says what all batches are made of. `steps` alone may change, as long as every learning rate up
    to the checkpoint stays what it was.

    Raises `ValueError` for `patience` without `evaluate`, a batch that the processes cannot share
    equally, or another model's or run's checkpoint; `FloatingPointError` when the loss is no longer
    finite.
    """
    if config.patience is not None and evaluate is None:
        raise ValueError(f"patience={config.patience} watches the held-out loss: give evaluate too")
    rank, world = _process_group(model)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config), lr=config.lr, betas=config.betas
    )
    decayed, _ = optimizer.param_groups
    curve: list[dict] = []
    best = _weights(model)
    start = 0
    if checkpoint is not None:
        made = {
            "config": asdict(config),
            "untrained": {name: digest({name: tensor}) for name, tensor in _untrained(model)},
            "first batch": digest({"batch": batches(0)}),
            "data": data,
        }
        if checkpoint.exists():
            start, curve, best = _load_checkpoint(checkpoint, model, optimizer, config, made)
    since, cpu_since, losses = time.monotonic(), time.process_time(), []

    bar = tqdm(range(start, config.steps), initial=start, total=config.steps,
               disable=rank > 0 or not progress, mininterval=1.0)  # fmt: skip
    for step in bar:
        if _exhausted(curve, config.patience):
            break
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        decayed["weight_decay"] = config.weight_decay_at(step)
        if before_step is not None:
            before_step(step)
        model.train()
        value = loss(parallel, _share(batches(step), rank, world))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        losses.append(_mean_over_processes(value.detach(), world))

        if (step + 1) % config.eval_every and step + 1 != config.steps:
            continue
        row = {
            "step": step + 1,
            "loss": torch.stack(losses).mean().item(),
            "lr": config.lr_at(step),
        }
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"the training loss is {row['loss']} before step {step + 1}: lower lr={config.lr:g} "
                f"or clip={config.clip:g}, or warm up longer. The last checkpoint was left as it is."
            )
        if evaluate is not None:
            model.eval()
            row["held_out"] = evaluate(model)
            if row["held_out"] < min((r["held_out"] for r in curve), default=float("inf")):
                best = _weights(model)
        row["seconds"] = round(time.monotonic() - since, 1)
        row["cpu_seconds"] = round(time.process_time() - cpu_since, 1)
        curve.append(row)
        since, cpu_since, losses = time.monotonic(), time.process_time(), []
        bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "held_out") if k in row})
        if checkpoint is not None and rank == 0:
            _save_checkpoint(checkpoint, model, optimizer, step + 1, curve, best, made)
    if evaluate is not None:
        model.load_state_dict(best, strict=False)
    model.eval()
    return curve


def _process_group(model: nn.Module) -> tuple[int, int]:
    """(rank, world size): those of torchrun where it started this process, else (0, 1)."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        on_gpu = next(model.parameters()).is_cuda
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _share(batch: Tensor, rank: int, world: int) -> Tensor:
    """Every `world`-th sequence. Gradients are averaged over processes, so shares must be equal."""
    if len(batch) % world:
        raise ValueError(
            f"a batch of {len(batch)} sequences cannot be shared equally by {world} processes: "
            "choose a batch size that the number of processes divides."
        )
    return batch[rank::world]


def _mean_over_processes(value: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(value)
    return value / world


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Matrices are decayed; gains, biases and other vectors are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _exhausted(curve: list[dict], patience: int | None) -> bool:
    if patience is None or len(curve) <= patience:
        return False
    held_out = [row["held_out"] for row in curve]
    return min(held_out[-patience:]) >= min(held_out[:-patience])


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _untrained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    yield from model.named_buffers()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _trained(model)}


def _save_checkpoint(path, model, optimizer, step, curve, best, made) -> None:
    """One safetensors file, never half of it."""
    tensors = {f"best.{name}": value for name, value in best.items()}
    for name, parameter in _trained(model):
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    described = {"step": str(step), "curve": json.dumps(curve), "made": json.dumps(made)}
    with replacing(path) as partial:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=described)


def _load_checkpoint(
    path, model, optimizer, config, made
) -> tuple[int, list[dict], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        state: dict[str, dict[str, Tensor]] = {}
        for full_name in file.keys():  # noqa: SIM118 (no dictionary)
            key, name = full_name.split(".", 1)
            state.setdefault(key, {})[name] = file.get_tensor(full_name)
    start, best = int(metadata["step"]), state.pop("best")
    shapes = {name: list(value.shape) for name, value in state["model"].items()}
    expected = {name: list(parameter.shape) for name, parameter in _trained(model)}
    if shapes != expected:
        differing = sorted(n for n in shapes | expected if shapes.get(n) != expected.get(n))
        raise ValueError(
            f"{path} is the checkpoint of another model ({differing[0]} is "
            f"{shapes.get(differing[0], 'not trained')} there, "
            f"{expected.get(differing[0], 'not trained')} here): move it away to start anew."
        )
    differences = _differences(json.loads(metadata.get("made", "{}")), made, config, start)
    if differences:
        raise ValueError(
            f"{path} is the checkpoint of another run: {'; '.join(differences)}. Go on with what it was "
            "made with, or move it away to start anew."
        )
    with torch.no_grad():
        for name, parameter in _trained(model):
            parameter.copy_(state["model"][name])
            kept = {key: of[name] for key, of in state.items() if key != "model" and name in of}
            if kept:  # AdamW keeps its step counter on the CPU, its moments beside the parameter
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in kept.items()
                }
    return start, json.loads(metadata["curve"]), best


def _differences(there: dict, here: dict, config: TrainConfig, start: int) -> list[str]:
    """What keeps a checkpoint after `start` updates from being one of this run, a text each."""
    if not there:
        return ["it does not say what it was made with"]
    then, now = there["config"], json.loads(json.dumps(here["config"]))  # tuples are lists there
    found = [
        f"{name} is {then.get(name)} there, {now.get(name)} here"
        for name in then | now
        if name != "steps" and then.get(name) != now.get(name)
    ]
    if not found and then["steps"] != now["steps"]:
        planned = replace(config, steps=then["steps"])
        if any(planned.lr_at(step) != config.lr_at(step) for step in range(start)):
            found.append(
                f"steps is {then['steps']} there, {now['steps']} here, and after {start} updates the "
                f"decay of the last {config.decay} has begun, or would have"
            )
    frozen = there["untrained"], here["untrained"]
    if apart := sorted(n for n in frozen[0] | frozen[1] if frozen[0].get(n) != frozen[1].get(n)):
        found.append(f"{len(apart)} tensors that are not trained are others, as {apart[0]}")
    if there["data"] != here["data"]:
        found.append(f"data is {there['data']!r} there, {here['data']!r} here")
    if there["first batch"] != here["first batch"]:
        found.append("the first batch is another")
    return found
