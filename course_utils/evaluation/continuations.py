"""What models write: one prompt, continued by each of them with the likeliest token every time."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

PROMPTS = {"course-lm": "Economic overview: A small island economy that depends on"}
OTHERS = "The Pacific Ocean is the largest ocean on Earth. It"


def prompt_of(name: str) -> str:
    """The course's prompt for the model `name`: course-lm knows the Factbook and little else."""
    return PROMPTS.get(name, OTHERS)


@dataclass(frozen=True)
class Continuations:
    """What each model wrote after the prompt, by its name."""

    prompt: str
    texts: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.texts))
        indent = " " * (width + 2)
        lines = [
            textwrap.fill(
                f"{name:{width}}  {' '.join(text.split())}", 100, subsequent_indent=indent
            )
            for name, text in self.texts.items()
        ]
        return "\n".join([f"{self.prompt} ...", *lines])


def continuations(
    models: Mapping[str, nn.Module], tokenizer, prompt: str, *, new_tokens: int = 32
) -> Continuations:
    """Continue `prompt` with each of `models` by up to `new_tokens` tokens, always the likeliest.

    Nothing is drawn at random. A model stops where it ends the text (`tokenizer.eos_token`). Raises
    `ValueError` for a prompt of no tokens and a model in training mode.
    """
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"the prompt {prompt!r} holds no token: write something to continue.")
    texts = {}
    for name, model in models.items():
        if model.training:
            raise ValueError(f"model {name!r} is in training mode: call .eval() first.")
        texts[name] = tokenizer.decode(_greedy(model, ids, tokenizer.eos_token_id, new_tokens))
    return Continuations(prompt, texts)


@torch.no_grad()
def _greedy(model: nn.Module, ids: list[int], end: int | None, new_tokens: int) -> list[int]:
    """The likeliest next token, again and again; the end of the text is not among them."""
    device = next(model.parameters()).device
    inputs, cache, written = torch.tensor([ids], device=device), None, []
    while len(written) < new_tokens:
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        inputs, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        if inputs.item() == end:
            break
        written.append(inputs.item())
    return written
