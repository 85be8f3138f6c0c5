"""Profiles: how big a run this machine can take, decided in one place.

| profile | for | models | numbers |
| --- | --- | --- | --- |
| `quick` | CI, a first look | course-lm | float32 on the CPU |
| `cpu` | a laptop | course-lm, SmolLM2-135M | float32 on the CPU |
| `colab` | Colab's T4; without a GPU as `cpu` | GPT-2 | float16 (a T4 has no bfloat16 in hardware) |
| `gpu` | a local card | GPT-2 | bfloat16 where the hardware has it, else float16 |
"""

import os
import sys
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from course_utils.cache import DownloadError
from course_utils.data.corpora import documents
from course_utils.evaluation import Protocol
from course_utils.models import LoadedModel, ModelUnavailable, load_model
from course_utils.results import set_context

PROFILES = ("quick", "cpu", "colab", "gpu")
MODELS = {
    "quick": ("course-lm",),
    "cpu": ("course-lm", "smollm2-135m-q4_1"),
    "colab": ("gpt2",),
    "gpu": ("gpt2",),
}
WINDOW = 512  # tokens of an evaluation's window; a model of fewer positions takes all of them
SECOND_CORPUS = "wikipedia"  # another domain: course-lm has seen nothing like it
T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """A resolved profile: what to run, on what, and why."""

    name: str
    models: tuple[str, ...]  # models to run, small to large
    chosen: bool  # True if the reader named the model: then no other takes its place
    device: torch.device
    dtype: torch.dtype
    seed: int
    reason: str

    def pick(self, *, quick: T, cpu: T, gpu: T | None = None) -> T:
        """The size for this profile; where it has a card that is `gpu` (default: as `cpu`)."""
        if self.name == "quick":
            return quick
        return cpu if gpu is None or self.device.type == "cpu" else gpu

    def protocol(self, model: nn.Module, corpus: str = "factbook") -> Protocol:
        """What `model` is evaluated on, in all notebooks: see `evaluation.protocol`."""
        window = min(WINDOW, model.config.max_position_embeddings)
        return Protocol(corpus, self.pick(quick=2048, cpu=8192), window)

    def protocols(self, model: nn.Module) -> list[Protocol]:
        """The protocol on the Factbook, and on the second text where more than `quick` is asked for.

        The second text is fetched on first use. Where it cannot be had it is left out, and one line says
        so.
        """
        found = [self.protocol(model)]
        if self.name == "quick":
            return found
        try:
            documents(SECOND_CORPUS, "evaluation")
        except DownloadError as error:
            print(f"Evaluating on the Factbook only: {error}")
            return found
        return [*found, self.protocol(model, SECOND_CORPUS)]

    def load_models(self) -> dict[str, LoadedModel]:
        """The profile's models by name.

        A model that cannot be had here is left out, and course-lm, which is part of the package,
        stands in if nothing is left; one line says so. A model that the reader named raises
        `ModelUnavailable` instead.
        """
        loaded, missing = {}, []
        for name in self.models:
            try:
                loaded[name] = load_model(name, dtype=self.dtype, device=self.device)
            except ModelUnavailable as error:
                if self.chosen:
                    raise
                missing.append(str(error))
        if not loaded:
            loaded["course-lm"] = load_model("course-lm", dtype=self.dtype, device=self.device)
        if missing:
            print(f"Using {', '.join(loaded)} only: {' '.join(missing)}")
        return loaded

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Profile {self.name} ({self.reason}): {', '.join(self.models)} in {dtype} on {self.device}"


def resolve(profile: str = "auto", model: str = "auto", seed: int = 0) -> Profile:
    """Turn a notebook's parameters into a `Profile`.

    "auto" takes the profile from `$COURSE_PROFILE`; without that, `colab` on Colab, `gpu` where there
    is a CUDA device, else `cpu`. `model` "auto" takes the profile's own models.
    """
    name, reason = profile, "asked for"
    if profile == "auto":
        name, reason = _pick_profile()
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r} ({reason}): choose auto, {', '.join(PROFILES)}")
    cuda = torch.cuda.is_available()
    if name == "gpu" and not cuda:
        raise ValueError(
            "profile 'gpu' needs a CUDA device, and torch sees none: choose cpu or quick"
        )
    device = torch.device("cuda" if cuda and name in ("colab", "gpu") else "cpu")
    models = MODELS["cpu" if name == "colab" and not cuda else name]
    chosen = model != "auto"
    resolved = Profile(
        name, (model,) if chosen else models, chosen, device, _dtype(name, device), seed, reason
    )
    set_context(profile=name, device=_device_name(device))
    return resolved


def on_colab() -> bool:
    """Whether this runs in Google Colab."""
    return "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules


def _pick_profile() -> tuple[str, str]:
    if os.environ.get("COURSE_PROFILE"):
        return os.environ["COURSE_PROFILE"], "from COURSE_PROFILE"
    if on_colab():
        return "colab", "running on Colab"
    if torch.cuda.is_available():
        return "gpu", "a CUDA device is there"
    return "cpu", "no CUDA device is there"


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    # A T4 emulates bfloat16, slowly, and says that it is supported unless asked this way.
    native = name == "gpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
