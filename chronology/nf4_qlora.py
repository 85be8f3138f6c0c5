# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/nf4_qlora.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/nf4_qlora.ipynb)
#
# # QLoRA: fine-tuning a model that stays in 4 bits
#
# *Large Model Quantization: a deep dive. Milestone 4 of the chronology, its second half (2023).*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - write LoRA [@hu2021lora] by hand, and say which gradients it needs and which it does not;
# - train adapters over a model that is packed in 4 bits, as QLoRA does [@dettmers2023qlora], and show that no decoded weight is kept;
# - say from measured bytes what full fine-tuning, LoRA and QLoRA each hold in memory;
# - compare what the three gain on a new text and lose on the old one, with error bars;
# - explain which part of an adapter disappears when it is merged into 4 bits, and what to do instead.
#
# It takes about 60 minutes to read and work. You need NF4 (`nf4_demo`), gradients of a matrix product, and AdamW by name. No profile needs a GPU; `quick` runs in
# about a minute of CPU time, `cpu` in about four.

# %% tags=["setup"]
# Set-up: installs the course's package where it is missing, as on Colab.
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile

VERSION = "0.1.0"
ARCHIVE = "https://github.com/adiel2012/model-size-reduction/archive/main.zip"
if importlib.util.find_spec("course_utils") is None:
    spec = "course_utils[oracles] @ " + os.environ.get("COURSE_UTILS_SPEC", ARCHIVE)
    # What is installed already stays as it is: pip may only add to it.
    pins = {}
    for d in reversed(list(importlib.metadata.distributions())):
        pins[re.sub("[-_.]+", "-", str(d.name)).lower()] = f"{d.name}=={d.version}\n"
    pin = re.compile(r"\S+==\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*(\+[\w.]+)?\n")
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/constraints.txt", "w") as file:
            file.writelines(filter(pin.fullmatch, pins.values()))
        command = [sys.executable, "-m", "pip", "install", "-c", file.name, spec]
        pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        hint = "If versions conflict on Colab: Runtime > Change runtime type > latest."
        raise RuntimeError(f"pip failed:\n{(pip.stdout + pip.stderr)[-2000:]}{hint}")
    importlib.invalidate_caches()
import course_utils

if course_utils.__version__ != VERSION:
    found = f"The notebook needs course_utils {VERSION}, not {course_utils.__version__}"
    remedy = "On Colab open it by its badge; elsewhere install its commit, and restart"
    raise RuntimeError(f"{found}. {remedy}.")

# %%
import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.data.batches import TrainingBatches
from course_utils.data.figures import figures
from course_utils.evaluation import Text, compare_all, continuations, difference
from course_utils.evaluation.estimate import format_difference
from course_utils.evaluation.footprint import tensor_bytes
from course_utils.finetuning import lora
from course_utils.finetuning.memory import SavedBytes, training_memory
from course_utils.grids.codebook import NF4 as LEVELS
from course_utils.models import linear_layers, load_model
from course_utils.plotting import finetuning as plots
from course_utils.plotting import table, training_curves
from course_utils.profiles import resolve
from course_utils.results import record
from course_utils.training.loop import TrainConfig, next_token_loss, train

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto, or the name of one model
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# A model that is packed in 4 bits is small, and frozen: a code is an integer, and has no gradient. Yet one wants to teach it something new. Full fine-tuning would
# unpack it. With AdamW each float32 weight then takes 16 bytes: itself, its gradient, and two running means. NF4 stores a weight in about half a byte.
#
# QLoRA leaves the packed model as it is, and trains a small float correction beside each layer. We ask two things. What does that cost in memory? And what does
# it give, compared with LoRA on a float model and with full fine-tuning?
#
# ## LoRA by hand
#
# **LoRA** (low-rank adaptation) freezes the weight `W` `[out, in]`, and adds a product of two thin matrices:
#
# $$ y = x W^\top + s\, (x A^\top) B^\top, \qquad s = \alpha / r $$
#
# `A` is `[r, in]` and `B` `[out, r]`. The **rank** $r$ is small, and $\alpha$ is a constant that sets the size of the update $s B A$. Here is a layer of 4 by 4 with
# $r = 1$ and $\alpha = 2$.

# %% tags=["nbval-check-output"]
W = torch.tensor([[1.0, -0.5, 0, 2], [0, 1, 1, -1], [-2, 0.5, 1, 0], [0.5, 0, -1, 1]])
A = torch.tensor([[0.5, 0, -0.25, 0.25]])  # [r=1, in=4]
B = torch.tensor([[1.0], [0], [-1], [0.5]])  # [out=4, r=1]
scaling = 2 / 1  # alpha / r
x = torch.tensor([[1.0, 2, 0, -1]])  # [tokens=1, in=4]
beside = x @ W.T + scaling * (x @ A.T) @ B.T
merged = x @ (W + scaling * B @ A).T
print(f"beside {beside.tolist()}\nmerged {merged.tolist()}")
print(f"{W.numel()} weights, {A.numel() + B.numel()} trained numbers")

# %%
figure = plots.low_rank_update(W, A, B, scaling)
plt.show()

# %% [markdown]
# *Figure: the frozen 4 by 4 matrix, the column B, the row A, their product times 2, and the sum. Red is positive and blue negative.*
#
# Both ways give the same output. Row 2 of the sum is that of `W`, since `B` is 0 there. All rows of the update are multiples of one another: that is rank 1. Here 8 numbers
# stand for 16. At 768 by 256 with $r = 16$ it is 16,384 for 196,608.
#
# At the start `B` is zero and `A` is random, so the model begins as what it was. The package's layer does the same:

# %% tags=["nbval-check-output"]
base = torch.nn.Linear(4, 4, bias=False)
base.weight.data.copy_(W)
layer = lora.LoRALinear(base, rank=1, alpha=2.0)
assert torch.equal(layer(x), x @ W.T)  # B is 0
layer.A.data.copy_(A), layer.B.data.copy_(B)
assert torch.equal(layer(x), beside)
print(layer)

# %% [markdown]
# ## Which gradients are needed
#
# Let $G$ `[tokens, out]` be the gradient of the loss with respect to $y$. The chain rule gives three products:
#
# $$ \frac{\partial L}{\partial B} = s\, G^\top (x A^\top), \qquad \frac{\partial L}{\partial A} = s\, (G B)^\top x, \qquad
# \frac{\partial L}{\partial x} = G\, \hat W + s\, (G B) A $$
#
# The first two train the adapter. The third goes on to the layers below. The weight occurs only there, as $G \hat W$: we have to *read* it, and it needs no gradient of
# its own. So $\hat W$ may be anything that can be decoded, such as NF4's level times absmax. That is all of QLoRA's backward pass. No straight-through
# estimator is needed, since no code is trained.
#
# We test the formulas in float64 on a layer that is packed in NF4. Autograd does the same on a float layer that holds the decoded weight.


# %%
draw = torch.Generator().manual_seed(profile.seed)
method = get_method("nf4")  # blocks of 64, double quantization
packed = method.quantize(torch.randn(96, 128, generator=draw) / 11)
layer = lora.LoRALinear(
    QuantizedLinear(method, packed, None), rank=4, alpha=8.0
).double()
_ = layer.B.data.normal_(generator=draw)

# %%
x = torch.randn(32, 128, generator=draw).double().requires_grad_()
G = torch.randn(32, 96, generator=draw).double()
layer(x).backward(G)

# %%
A, B, s = layer.A.detach(), layer.B.detach(), layer.scaling
W_hat = packed.dequantize().double()
by_formula = {
    "A": s * (G @ B).T @ x.detach(),
    "B": s * G.T @ (x.detach() @ A.T),
    "x": G @ W_hat + s * (G @ B) @ A,
}

# %%
leaves = [t.detach().clone().requires_grad_() for t in (layer.A, layer.B, x)]
a, b, x_float = leaves
(F.linear(x_float, W_hat) + s * (x_float @ a.T) @ b.T).backward(G)  # all float
rows = []
for name, ours, of_float in zip("ABx", (layer.A, layer.B, x), leaves, strict=True):
    assert torch.allclose(by_formula[name], of_float.grad, rtol=1e-12, atol=1e-12)
    error = (ours.grad - of_float.grad).abs().max().item()
    rows.append(
        {"gradient of": name, "largest": ours.grad.abs().max().item(), "error": error}
    )
    assert error < 1e-11
table(rows, {"largest": ".2f", "error": ".0e"})

# %% [markdown]
# The packed layer gives the gradients of the float one, to float64's last digits. And where does the decoded weight live? PyTorch keeps for the backward pass what an operation saves.
# A hook sees each such tensor. We count those that are not the model's own, for three ways to write the same layer.

# %%
float_base = torch.nn.Linear(128, 96, bias=False).requires_grad_(False)
float_base.weight.data.copy_(packed.dequantize())
x = torch.randn(32, 128, generator=draw).requires_grad_()
ways = {
    "float weight, frozen": (float_base, float_base),
    "packed, decoded in the forward pass": (
        layer,
        lambda x: F.linear(x, packed.dequantize()),
    ),
    "packed, decoded again in the backward pass": (layer, layer.base),
}

# %%
rows = []
for name, (owner, call) in ways.items():
    with SavedBytes(owner) as saved:
        call(x)
    rows.append({"layer": name, "bytes kept for the backward pass": saved.total})
table(rows, {"bytes kept for the backward pass": ",.0f"})

# %% tags=["folded"]
# The package keeps nothing, the plain way the whole decoded weight.
kept = [row["bytes kept for the backward pass"] for row in rows]
assert kept == [0, 4 * 96 * 128, 0]

# %% [markdown]
# Decoded in the plain way, the whole float weight waits for the backward pass. Over all layers a packed model would then take its float size after all. The package decodes
# twice, and keeps nothing beside the packed tensors. The price is time: each decode is work that a float layer does not have.
#
# ## A text that the model knows badly
#
# Our small model `course-lm` was trained on the *prose* of the CIA World Factbook. The Factbook has other lines too: names, dates, shares and amounts, which the corpus leaves out.
# The model has seen none of these **figures**. They are split by country as the prose is, so no country of the evaluation is in the training text.

# %%
name = profile.models[0]
float_model, tokenizer = load_model(
    name, device=profile.device
)  # float32: it is trained
context, batch_size = 128, profile.pick(quick=2, cpu=4)


def tokens_of(document, n=None):
    ids = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[:n])


print("\n".join(figures("evaluation")[0].text.splitlines()[12:18]))

# %%
protocol = profile.protocol(float_model)  # on prose, as in all notebooks
prose = protocol.text(tokenizer)
shares = [tokens_of(d, protocol.tokens // 15) for d in figures("evaluation")]
places = torch.arange(len(shares)).repeat_interleave(
    torch.tensor([len(s) for s in shares])
)
new_text = Text(torch.cat(shares), protocol.window, places)
texts = {"figures": new_text, "prose": prose}

# %%
stream = torch.cat([tokens_of(document) for document in figures("train")[::8]])
print(f"{len(stream):,} tokens to train on; to evaluate: {len(new_text.tokens):,}")

# %% [markdown]
# ## Memory, counted
#
# Four things live in a training step. The **weights** are all tensors of the model, trained or not. Each trained number has a **gradient**, and AdamW keeps two
# running means for it (**optimizer**). **Activations** are what the forward pass keeps for the backward pass. We run one step, with a learning rate of 0, and count bytes tensor by tensor.
#
# The three ways: full fine-tuning trains everything, embeddings and norms too. LoRA trains `A` and `B` of rank 16 in all linear layers of the blocks. QLoRA does the same over NF4.

# %%
rank, alpha = 16, 32.0


def memory_of(model, batch):
    """Bytes of one step in the three ways; leaves `model` packed."""
    found = {"full": training_memory(model, batch, next_token_loss)}
    lora.add_adapters(model, rank=rank, alpha=alpha)
    found["LoRA"] = training_memory(model, batch, next_token_loss)
    lora.remove_adapters(model)
    quantize_model(model, method)
    lora.add_adapters(model, rank=rank, alpha=alpha)
    found["QLoRA"] = training_memory(model, batch, next_token_loss)
    return found


# %%
batches = TrainingBatches(
    stream, context=context, batch_size=batch_size, seed=profile.seed
)
memory = {name: memory_of(copy.deepcopy(float_model), batches(0).to(profile.device))}

# %%
larger = [other for other in profile.models if other != name]  # in the profile cpu
for other, loaded in profile.load_models().items() if larger else ():
    if other != name:
        ids = loaded.tokenizer(figures("train")[0].text, verbose=False).input_ids[:129]
        memory[other] = memory_of(loaded.model.float(), torch.tensor([ids]))


# %%
figure = plots.memory_bars(
    {of: {way: vars(m) for way, m in ways.items()} for of, ways in memory.items()}
)
plt.show()

# %% [markdown]
# *Figure: stacked bars of megabytes for full fine-tuning, LoRA and QLoRA: weights, gradients, optimizer states, activations. One panel a model; the total stands beside each bar.*

# %%
rows = [
    {"model": of, "way": way}
    | {p: v / 1e6 for p, v in vars(m).items()}
    | {"total": m.total / 1e6}
    for of, ways in memory.items()
    for way, m in ways.items()
]
table(rows, dict.fromkeys(list(rows[0])[2:], ",.1f"))

# %% tags=["folded"]
# Record the bytes, and what the other two take of full fine-tuning's.
for of, ways in memory.items():
    for way, found in ways.items():
        key = f"qlora.memory.{of}.{way.lower()}"
        for part, nbytes in (vars(found) | {"total": found.total}).items():
            record(f"{key}.{part}", nbytes / 1e6, "MB", 0.05 * nbytes / 1e6, model=of)
        steady = [(f.total - f.activations) / 1e6 for f in (found, ways["full"])]
        record(f"{key}.steady", steady[0], "MB", 0.01 * steady[0], model=of)
        record(f"{key}.steady_share", steady[0] / steady[1], "", 0.01, model=of)

# %% [markdown]
# In the recorded run, on SmolLM2, weights, gradients and optimizer of full fine-tuning are {{qlora.memory.smollm2-135m-q4_1.full.steady:,.0f}} MB. LoRA needs
# {{qlora.memory.smollm2-135m-q4_1.lora.steady:,.0f}} MB, since it has few gradients. QLoRA needs {{qlora.memory.smollm2-135m-q4_1.qlora.steady:,.0f}} MB, or
# {{qlora.memory.smollm2-135m-q4_1.qlora.steady_share:.0%}}, since it packs the weights as well. What is left is mostly the float embedding.
#
# The activations hardly change: {{qlora.memory.smollm2-135m-q4_1.full.activations:,.0f}}, {{qlora.memory.smollm2-135m-q4_1.lora.activations:,.0f}} and
# {{qlora.memory.smollm2-135m-q4_1.qlora.activations:,.0f}} MB. Neither method is about them. The usual remedy is **gradient checkpointing**, which keeps only each block's input and computes the rest
# again; QLoRA's code switches it on [@dettmers2023qloracode].
#
# **Paged optimizers** are QLoRA's third part, beside NF4 and double quantization. They need a GPU: the optimizer's states lie in CUDA's unified memory, and move to the CPU's memory when the GPU's is
# full [@bitsandbytes]. They save no byte in all. They keep a short peak from ending the run. On a CPU there is nothing to page from, so we do not run them.
#
# ## Training, three ways
#
# All runs see the same batches in the same order. The learning rate rises over the first tenth and falls over the last quarter. Each way has a rate of its own: 0.0005 for full fine-tuning, of 0.00025,
# 0.0005, 0.001, 0.002 and 0.003, and 0.003 for adapters, of 0.0015, 0.003, 0.006 and 0.01. These were the best in short runs, beforehand, on the countries of the calibration split. As 0.001 was as good
# as 0.0005 for full fine-tuning, it takes part as well.

# %%
steps = profile.pick(quick=8, cpu=40)
packed_model = copy.deepcopy(float_model)
report = quantize_model(packed_model, method)
print(str(report).splitlines()[0])


# %%
def fine_tune(model, lr, seed=profile.seed):
    """Train what requires a gradient; the curve `(updates, training loss)`."""
    every, decay = max(1, steps // 10), steps // 4
    config = TrainConfig(steps, lr, warmup=steps // 10, decay=decay, weight_decay=0.0,
                         betas=(0.9, 0.999), eval_every=every)  # fmt: skip
    batches = TrainingBatches(stream, context=context, batch_size=batch_size, seed=seed)
    curve = train(
        model, lambda step: batches(step).to(profile.device), config, progress=False
    )
    return [row["step"] for row in curve], [row["loss"] for row in curve]


# %%
models, curves = {}, {}
rates = {"full": 5e-4, "full, twice the rate": 1e-3, "LoRA": 3e-3, "QLoRA": 3e-3}
for way, rate in rates.items():
    model = copy.deepcopy(packed_model if way == "QLoRA" else float_model)
    if "full" not in way:
        trained = lora.add_adapters(model, rank=rank, alpha=alpha, seed=profile.seed)
        print(f"{way}: {sum(p.numel() for p in trained):,} numbers are trained")
    curves[way] = fine_tune(model, lr=rate)
    models[way] = model

# %%
figure = training_curves(curves, "training loss (nats per token)")
plt.show()

# %% [markdown]
# *Figure: training loss over updates for the three ways, full fine-tuning at two rates. The curves of LoRA and QLoRA lie on each other.*
#
# A float base and a packed one are trained alike, batch by batch. Full fine-tuning falls faster. What counts is text that was not trained on. We compare each model with the float model before
# training, token by token; ± is the standard error over the countries.

# %%
before = {"NF4, untrained": packed_model}
found = {
    n: compare_all(before | models, float_model, text) for n, text in texts.items()
}


# %%
def shown(estimate):
    """Value and standard error."""
    return f"{estimate.value:+.3f} ± {estimate.error:.3f}"


# %%
rows = [{"model": "float, untrained"}] + [{"model": way} for way in found["prose"]]
for text, of_text in found.items():
    rows[0][f"{text}: nats"] = next(iter(of_text.values())).reference.nats
    for row, of_way in zip(rows[1:], of_text.values(), strict=True):
        row |= {
            f"{text}: nats": of_way.perplexity.nats,
            f"{text}: change": shown(of_way.loss),
        }
table(rows, {"figures: nats": ".3f", "prose: nats": ".3f"}).fillna("")


# %%
pairs = {"QLoRA less LoRA": ("QLoRA", "LoRA"), "LoRA less full": ("LoRA", "full")}
rows = [
    {"difference": label}
    | {t: format_difference(difference(f[a], f[b])) for t, f in found.items()}
    for label, (a, b) in pairs.items()
]
table(rows)


# %% tags=["folded"]
# Record changes and differences.
def record_estimate(key, estimate, tolerance=0.05):
    """Value under `key`, standard error under `key` with _error."""
    record(key, estimate.value, "nats", tolerance, model=name, steps=steps)
    record(f"{key}_error", estimate.error, "nats", tolerance, model=name, steps=steps)


for text, of_text in found.items():
    for way, of_way in of_text.items():
        key = f"qlora.{text}.{way.lower().replace(',', '').replace(' ', '_')}"
        record_estimate(f"{key}.change", of_way.loss)
        record(
            f"{key}.nats", of_way.perplexity.nats, "nats", 0.05, model=name, steps=steps
        )
        record(
            f"qlora.{text}.float.nats", of_way.reference.nats, "nats", 0.01, model=name
        )
    for label, (a, b) in pairs.items():
        key = f"qlora.{text}.{label.lower().replace(' ', '_')}"
        record_estimate(key, difference(of_text[a], of_text[b]))

# %% [markdown]
# In the recorded run the float model finds figures hard: {{qlora.figures.float.nats:.2f}} nats per token, where prose takes {{qlora.prose.float.nats:.2f}}. {{qlora.settings.steps:.0f}} updates change
# that by {{qlora.figures.full.change:.2f}} ± {{qlora.figures.full.change_error:.2f}} with full fine-tuning, by {{qlora.figures.lora.change:.2f}} ± {{qlora.figures.lora.change_error:.2f}} with LoRA and by
# {{qlora.figures.qlora.change:.2f}} ± {{qlora.figures.qlora.change_error:.2f}} with QLoRA. QLoRA less LoRA is {{qlora.figures.qlora_less_lora:+.3f}} ± {{qlora.figures.qlora_less_lora_error:.3f}}.
#
# That difference is far below what another seed does, as the next section shows. LoRA less full fine-tuning is {{qlora.figures.lora_less_full:+.2f}} ± {{qlora.figures.lora_less_full_error:.2f}} in the
# recorded run: at this length of training the adapters learn less.
#
# **Forgetting** is what the old text loses. On prose full fine-tuning costs {{qlora.prose.full.change:+.2f}} ± {{qlora.prose.full.change_error:.2f}} nats, LoRA {{qlora.prose.lora.change:+.2f}} ±
# {{qlora.prose.lora.change_error:.2f}} and QLoRA {{qlora.prose.qlora.change:+.2f}} ± {{qlora.prose.qlora.change_error:.2f}}. But the rate counts as much as the method: at twice its rate full fine-tuning costs
# {{qlora.prose.full_twice_the_rate.change:+.2f}} ± {{qlora.prose.full_twice_the_rate.change_error:.2f}} on prose, for {{qlora.figures.full_twice_the_rate.change:.2f}} ±
# {{qlora.figures.full_twice_the_rate.change_error:.2f}} on figures. So who says
# that adapters forget less has to say at which rates. What is certain: an adapter can be taken off again.
#
# ## Rank, alpha, and chance
#
# The rank sets how many numbers are trained, and $\alpha / r$ how far an update of the same `B` reaches. We vary them over the NF4 base. One more run repeats the main one with another draw of `A` and
# other batches: what differs there is chance.

# %%
variants = {
    "rank 1, alpha 32": {"rank": 1, "alpha": 32.0},
    "rank 4, alpha 32": {"rank": 4, "alpha": 32.0},
    "rank 16, alpha 4": {"rank": 16, "alpha": 4.0},
    "rank 16, alpha 32, another seed": {"rank": 16, "alpha": 32.0, "seed": SEED + 1},
}

# %%
varied = {}
for label, settings in variants.items():
    varied[label] = copy.deepcopy(packed_model)
    settings = {"seed": profile.seed} | settings
    lora.add_adapters(varied[label], **settings)
    fine_tune(varied[label], lr=3e-3, seed=settings["seed"])
of_variants = {n: compare_all(varied, float_model, text) for n, text in texts.items()}


# %%
main = {"rank 16, alpha 32 (as above)": "QLoRA"}
rows = []
for label in [*main, *variants]:
    model = models["QLoRA"] if label in main else varied[label]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows.append({"QLoRA with": label, "trained": trained})
    for text in texts:
        of_main = found[text]["QLoRA"]
        of_label = of_main if label in main else of_variants[text][label]
        less = "" if label in main else shown(difference(of_label, of_main))
        rows[-1] |= {
            f"{text}: change": of_label.loss.value,
            f"{text}: less the first": less,
        }
table(rows, {"trained": ",", "figures: change": "+.3f", "prose: change": "+.3f"})

# %% tags=["folded"]
# Record the variants against the main run.
keys = dict(zip(variants, ("rank1", "rank4", "low_alpha", "seed1"), strict=True))
for text, of_text in of_variants.items():
    for label, of_label in of_text.items():
        record_estimate(f"qlora.{text}.{keys[label]}.change", of_label.loss)
        less = difference(of_label, found[text]["QLoRA"])
        record_estimate(f"qlora.{text}.{keys[label]}.less_main", less)
record("qlora.settings.steps", steps, "", 0, model=name)
record("qlora.settings.tokens", steps * context * batch_size, "", 0, model=name)

# %% [markdown]
# In the recorded run rank 1 ends {{qlora.figures.rank1.less_main:+.3f}} ± {{qlora.figures.rank1.less_main_error:.3f}} nats from rank 16 on figures, and rank 4 {{qlora.figures.rank4.less_main:+.3f}} ±
# {{qlora.figures.rank4.less_main_error:.3f}}. With $\alpha = 4$ it is {{qlora.figures.low_alpha.less_main:+.3f}} ± {{qlora.figures.low_alpha.less_main_error:.3f}}, and it forgets less: on prose
# {{qlora.prose.low_alpha.less_main:+.3f}} ± {{qlora.prose.low_alpha.less_main_error:.3f}}.
#
# Another seed moves the result by {{qlora.figures.seed1.less_main:+.3f}} ± {{qlora.figures.seed1.less_main_error:.3f}}. The errors are over countries, and do not hold this chance. So rank 4 is not told apart
# from rank 16 here; rank 1 and $\alpha = 4$ differ by more than one other seed did. QLoRA and LoRA above shared their seed, so their difference is free of it.
#
# Why is $\alpha$ held at 32 when the rank changes? Each of the $r$ products $B_{:,k} A_{k,:}$ moves about equally far under AdamW, which divides the size of a gradient out. So the whole update moves with $s\, r =
# \alpha$. Who lowers $\alpha$ makes it smaller at the same learning rate.
#
# ## What quantizing the base costs, and what training heals
#
# NF4 costs this model little. To see healing we need a base that lost much: the same model at 2 bits (affine, groups of 64). Our layers take any packed base.

# %%
two_bits = copy.deepcopy(float_model)
quantize_model(two_bits, get_method("affine", n_bits=2, group_size=64))
trained_two = copy.deepcopy(two_bits)
lora.add_adapters(trained_two, rank=rank, alpha=alpha, seed=profile.seed)
fine_tune(trained_two, lr=3e-3)
both = {"before": two_bits, "after": trained_two}
of_two = compare_all(both, float_model, new_text)

# %%
of_nf4 = found["figures"]
costs = {
    "NF4": (of_nf4["NF4, untrained"].loss, of_nf4["QLoRA"]),
    "2 bits": (of_two["before"].loss, of_two["after"]),
}
rows = []
for label, (cost, after) in costs.items():
    left = difference(after, found["figures"]["LoRA"])
    rows.append(
        {"base": label, "before training": shown(cost), "after training": shown(left)}
    )
table(rows)

# %% tags=["folded"]
# Record what a base of fewer bits costs before and after.
for label, (cost, after) in costs.items():
    key = f"qlora.healing.{label.lower().replace(' ', '_')}"
    record_estimate(f"{key}.before", cost)
    record_estimate(f"{key}.after", difference(after, found["figures"]["LoRA"]))

# %% [markdown]
# Both columns are nats per token on figures, against the float base: untrained beside untrained, and trained beside LoRA on float. In the recorded run the 2-bit base costs
# {{qlora.healing.2_bits.before:+.3f}} ± {{qlora.healing.2_bits.before_error:.3f}} before training and {{qlora.healing.2_bits.after:+.3f}} ± {{qlora.healing.2_bits.after_error:.3f}} after it. For NF4 it is
# {{qlora.healing.nf4.before:+.3f}} ± {{qlora.healing.nf4.before_error:.3f}} and {{qlora.healing.nf4.after:+.3f}} ± {{qlora.healing.nf4.after_error:.3f}}: on figures, which it knows badly, the rounded model is
# no worse to begin with. So training heals a part of a large loss, and where little is lost there is little to heal.
#
# ## Saving, and loading on the right base
#
# An adapter is small, and means nothing without its base. So the file holds a hash of the base. The same model in other bits is another base, and is refused.

# %%
path = Path(tempfile.mkdtemp()) / "figures.safetensors"
lora.save_adapters(models["QLoRA"], path)

# %%
again = copy.deepcopy(packed_model)
lora.load_adapters(again, path)
with torch.no_grad():
    ids = new_text.tokens[None, :64].to(profile.device)
    assert torch.equal(
        again(input_ids=ids).logits, models["QLoRA"](input_ids=ids).logits
    )
print(f"adapter {path.stat().st_size:,} bytes, base {tensor_bytes(packed_model):,}")

# %%
try:
    lora.load_adapters(copy.deepcopy(float_model), path)
except ValueError as error:
    print("on the float model:", str(error).replace(str(path), path.name))

# %% [markdown]
# On its own base the loaded adapter gives the same logits, bit for bit. On the float model it is refused.
#
# ## Merging
#
# Two more products in each layer take time. **Merging** adds $s B A$ to the weight. Into a float weight that is exact, and the model is as large as any float model again. One would rather merge into 4 bits
# *again*: decode, add, round. A report on
# `transformers` says that this ruins the model [@aktsvigun2024merge]. Here is one reason, on one weight.
#
# Suppose a decoded weight is $\hat w$, which is a point of the grid. The nearest other point is a step away. An update of less than half a step leaves it nearest to where it was. So rounding does not make
# a small error: it takes the *whole* update away.
#
# A second way starts from the float weights from before NF4. There $w$ lies anywhere between two points. An update of a tenth of a step then carries about one weight in ten over the middle. Few codes change, but
# on average the right amount. One needs the original weights for that.


# %%
def merged_ways(adapted):
    """The model `adapted`, of adapters over NF4, and what merging makes of it."""
    found = {"beside the base": adapted}
    for label, requantize in (("into float", False), ("into NF4 again", True)):
        found[label] = copy.deepcopy(adapted)
        lora.merge_adapters(found[label], requantize=requantize)
    lora.save_adapters(adapted, path)
    onto_float = copy.deepcopy(float_model)
    lora.load_adapters(onto_float, path, other_base=True)
    lora.merge_adapters(onto_float)
    found["onto the float weights"] = onto_float
    found["onto the float weights, then NF4"] = copy.deepcopy(onto_float)
    quantize_model(found["onto the float weights, then NF4"], method)
    return found


# %%
adapted = {"32": models["QLoRA"], "4": varied["rank 16, alpha 4"]}
merged = {
    (size, way): model
    for size, m in adapted.items()
    for way, model in merged_ways(m).items()
}

# %%
nothing = copy.deepcopy(models["QLoRA"])  # the control: rounded again without an update
for layer in lora.adapters(nothing).values():
    layer.B.data.zero_()
lora.merge_adapters(nothing, requantize=True)
merged["none", "into NF4 again"] = nothing


# %% tags=["folded"]
# Helpers: packed layers by name, and how a model differs from its base.
def packed_layers(model):
    """Packed weights by name."""
    modules = model.named_modules()
    return {n: m.quantized_weight for n, m in modules if isinstance(m, QuantizedLinear)}


deltas = {
    size: {n: a.update() for n, a in lora.adapters(m).items()}
    for size, m in adapted.items()
}
start = packed_layers(packed_model)


def against_base(model, updates):
    """Share of codes that differ from the base's, and share of `updates` kept."""
    dots = sizes = changed = total = 0
    for n, new in packed_layers(model).items():
        change = new.dequantize() - start[n].dequantize()
        changed += (new.integer_codes() != start[n].integer_codes()).sum().item()
        total += change.numel()
        if updates:
            dots += (change * updates[n]).sum().item()
            sizes += updates[n].square().sum().item()
    return changed / total, dots / sizes if updates else None


# %%
of_merged = compare_all({str(k): m for k, m in merged.items()}, float_model, new_text)
rows = []
for (size, way), model in merged.items():
    of_way = of_merged[str((size, way))]
    of_beside = of_merged[str(("4" if size == "4" else "32", "beside the base"))]
    rows.append({"alpha": size, "merged": way, "MB": tensor_bytes(model) / 1e6})
    found_codes = (
        against_base(model, deltas.get(size)) if "NF4" in way else (None, None)
    )
    rows[-1] |= {"figures: change": of_way.loss.value}
    rows[-1] |= dict(zip(("codes changed", "kept"), found_codes, strict=True))
    rows[-1]["less beside"] = difference(of_way, of_beside)

# %%
formats = {
    "MB": ".1f",
    "figures: change": "+.3f",
    "codes changed": ".1%",
    "kept": ".0%",
}
table([r | {"less beside": shown(r["less beside"])} for r in rows], formats)

# %% tags=["folded"]
# Record the merges.
ways = ("beside", "float", "again", "onto_float", "onto_float_nf4")
for row, way in zip(rows, (*ways, *ways, "nothing"), strict=True):
    key = (
        f"qlora.merge.{way}"
        if way == "nothing"
        else f"qlora.merge.alpha{row['alpha']}.{way}"
    )
    record(
        f"{key}.change", row["figures: change"], "nats", 0.05, model=name, steps=steps
    )
    record_estimate(f"{key}.less_beside", row["less beside"])
    record(f"{key}.megabytes", row["MB"], "MB", 0.01, model=name)
    for part, short in (("codes changed", "changed"), ("kept", "kept")):
        if row[part] is not None:
            record(f"{key}.{short}", row[part], "", 0.05, model=name, steps=steps)

# %% [markdown]
# *Kept* is the part of the update that arrived: the change of the decoded weights, projected on the update. The control shows that rounding without an update changes no code.
#
# In the recorded run merging into float changes the loss by {{qlora.merge.alpha32.float.less_beside:+.0e}} nats: nothing but rounding. Merging into NF4 again keeps
# {{qlora.merge.alpha32.again.kept:.0%}} of the update of $\alpha = 32$, as {{qlora.merge.alpha32.again.changed:.1%}} of the codes change, and gives back
# {{qlora.merge.alpha32.again.less_beside:.3f}} ± {{qlora.merge.alpha32.again.less_beside_error:.3f}} nats. Of the smaller update of $\alpha = 4$ it keeps {{qlora.merge.alpha4.again.kept:.0%}},
# and gives back {{qlora.merge.alpha4.again.less_beside:.3f}} ± {{qlora.merge.alpha4.again.less_beside_error:.3f}} nats.
#
# From the float weights {{qlora.merge.alpha32.onto_float_nf4.changed:.1%}} of the codes change. That keeps {{qlora.merge.alpha32.onto_float_nf4.kept:.0%}} of the larger update and
# {{qlora.merge.alpha4.onto_float_nf4.kept:.0%}} of the smaller. The loss is {{qlora.merge.alpha32.onto_float_nf4.less_beside:+.3f}} ± {{qlora.merge.alpha32.onto_float_nf4.less_beside_error:.3f}} and
# {{qlora.merge.alpha4.onto_float_nf4.less_beside:+.3f}} ± {{qlora.merge.alpha4.onto_float_nf4.less_beside_error:.3f}} from that beside the base, at the bytes of NF4.
#
# Now the mechanism itself. We measure each update of the adapter with $\alpha = 4$ in half steps of its weight's own grid, in the direction in which it points.


# %%
def in_half_steps(weight, update):
    """|update| over half the gap to the next level; 0 where there is none."""
    codes, update = weight.integer_codes().long().cpu(), update.cpu()
    end = torch.tensor([torch.inf])
    up, down = (
        torch.cat([LEVELS.diff(), end])[codes],
        torch.cat([end, LEVELS.diff()])[codes],
    )
    absmax = weight.block_absmax().repeat_interleave(weight.block_size).cpu()
    absmax = absmax[: codes.numel()].view(codes.shape)
    return update.abs() / (torch.where(update > 0, up, down) / 2 * absmax)


ratio = torch.cat(
    [in_half_steps(start[n], d).flatten() for n, d in deltas["4"].items()]
)


# %%
changed = {}
for label, way in {
    "from the grid's points": "into NF4 again",
    "from the float weights": "onto the float weights, then NF4",
}.items():
    ends = packed_layers(merged["4", way])
    moved = [
        (ends[n].integer_codes() != start[n].integer_codes()).flatten() for n in ends
    ]
    changed[label] = torch.cat(moved).cpu()
figure = plots.updates_in_half_steps(ratio, changed)
plt.show()

# %% [markdown]
# *Figure: on the left, a histogram of the updates in half steps, with a dashed line at 1. On the right, the share of codes that change against the same ratio: a stair when one starts on the grid's
# points, and a ramp from the float weights.*
#
# From the grid's points few updates below half a step change a code, and most above it do. (The stair is not sharp, since a block whose largest weight moves gets another absmax.) From the float weights
# the share rises evenly with the update, so small updates count too. How much is lost therefore depends on the update's size. We scale the trained update of the first block up and down, and round each time.


# %%
def kept_at(scale, from_grid):
    """Share kept of `scale` times the updates of the first block."""
    dots = sizes = 0
    for n, layer in first_block.items():
        update = scale * deltas["4"][n]
        weight = start[n].dequantize() if from_grid else layer.weight
        change = method.quantize(weight + update).dequantize() - start[n].dequantize()
        dots, sizes = dots + (change * update).sum(), sizes + update.square().sum()
    return (dots / sizes).item()


# %%
layers = linear_layers(float_model)
first_block = {layer.name: layer for layer in layers[: len(layers) // 4]}
scales = [2.0**i for i in range(-5, 2)]
by_scale = {
    label: (scales, [kept_at(scale, from_grid) for scale in scales])
    for label, from_grid in (
        ("from the grid's points", True),
        ("from the float weights", False),
    )
}

# %%
figure = plots.kept_against_scale(
    by_scale, xlabel="size of the update, times the trained one"
)
plt.show()

# %% tags=["folded"]
# Record the sizes of the updates, and what is kept of them.
below = (ratio < 1).float().mean().item()
record("qlora.merge.below_half", below, "", 0.03, model=name, steps=steps)
record(
    "qlora.merge.median_ratio", ratio.median().item(), "", 0.05, model=name, steps=steps
)
for key, (_, shares) in zip(("grid", "float"), by_scale.values(), strict=True):
    record(f"qlora.merge.eighth.{key}", shares[2], "", 0.05, model=name, steps=steps)

# %% [markdown]
# *Figure: the share of the update that is kept, against its size from 1/32 to 2 times the trained one. The line from the float weights stays near 1; that from the grid's points falls towards 0.*
#
# In the recorded run {{qlora.merge.below_half:.0%}} of the trained updates are below half a step, and the median is {{qlora.merge.median_ratio:.2f}} of it. Rounding from the grid's points lives off the
# large ones. Of an eighth of the update it keeps {{qlora.merge.eighth.grid:.0%}}, and from the float weights {{qlora.merge.eighth.float:.0%}}. Where updates are small against the grid, as with a low
# learning rate or a low $\alpha$, merging into 4 bits again loses most of them.
#
# ## What the model writes

# %%
speaking = {
    "float, untrained": float_model,
    "full": models["full"],
    "QLoRA": models["QLoRA"],
}
speaking["alpha 4"] = adapted["4"]
speaking["alpha 4, into NF4 again"] = merged["4", "into NF4 again"]
print(continuations(speaking, tokenizer, "Population:", new_tokens=32))

# %% [markdown]
# The float model writes the prose that it knows. After full fine-tuning and with QLoRA it writes a figure with its year. The adapter with $\alpha = 4$ has learnt less, and writes of shares and years after a
# few words. Merged into NF4 again it is back at prose on this prompt: it has lost a part of what it had learnt.
#
# ## QLoRA as published
#
# The released code [@dettmers2023qloracode] sets these defaults. We quote them, and do not run them.
#
# | setting | default | here |
# | --- | --- | --- |
# | base | NF4 with double quantization | the same |
# | adapters | all linear layers but the LM head | the same |
# | rank, $\alpha$, dropout | 64, 16, 0 | 16, 32, none |
# | optimizer | `paged_adamw_32bit`, rate 0.0002, constant, warm-up over 3% | AdamW, 0.003, warm-up and decay |
# | gradients clipped at a norm of | 0.3 | 1 |
# | batch | 1 sequence, 16 batches to an update | 4 sequences of 128 tokens |
# | updates | 10,000 | 40 in the profile `cpu` |
# | gradient checkpointing | on | off |
#
# With rank 64 and $\alpha = 16$ the factor $\alpha / r$ is 0.25, an eighth of ours. The paper's headline is a model of 65 billion parameters, fine-tuned on one GPU of 48 GB [@dettmers2023qlora].
#
# ## The package against peft
#
# The library peft [@mangrulkar2022peft] is what most people train adapters with. The course's tests give both the same `A` and `B`, and compare. On GPT-2 and Llama in float the logits and the gradients of
# `A` and `B` are the same to float32's rounding. So they are over NF4, where peft wraps the 4-bit layers of bitsandbytes. Our layer leaves out dropout, several adapters at once and peft's variants.
#
# ## What you saw
#
# - **LoRA is two thin matrices beside a frozen one.** It needs gradients of `A`, `B` and the input, and of the weight none. So the weight may be packed: on NF4 the gradients were those of the decoded layer.
# - **Nothing decoded is kept.** The plain way kept the whole float weight for the backward pass; the package's layer kept 0 bytes.
# - **Memory.** On SmolLM2 weights, gradients and optimizer took {{qlora.memory.smollm2-135m-q4_1.full.steady:,.0f}} MB with full fine-tuning, {{qlora.memory.smollm2-135m-q4_1.lora.steady:,.0f}} MB with LoRA and
#   {{qlora.memory.smollm2-135m-q4_1.qlora.steady:,.0f}} MB with QLoRA in the recorded run. The activations stayed.
# - **Gain and forgetting.** In the recorded run the loss on figures changed by {{qlora.figures.full.change:.2f}}, {{qlora.figures.lora.change:.2f}} and {{qlora.figures.qlora.change:.2f}} nats. On prose it rose by
#   {{qlora.prose.full.change:.2f}}, {{qlora.prose.lora.change:.2f}} and {{qlora.prose.qlora.change:.2f}}.
# - **Healing.** Over a base of 2 bits, training brought a loss of {{qlora.healing.2_bits.before:.2f}} nats down to {{qlora.healing.2_bits.after:.2f}}. Over NF4 there was nothing to heal.
# - **Merging.** Into NF4 again {{qlora.merge.alpha32.again.kept:.0%}} of the larger and {{qlora.merge.alpha4.again.kept:.0%}} of the smaller update stayed. From the float weights it was
#   {{qlora.merge.alpha32.onto_float_nf4.kept:.0%}} and {{qlora.merge.alpha4.onto_float_nf4.kept:.0%}}. The reason is the half step.
#
# ## Limits
#
# - Both models are small, and training is short. How the gap between LoRA and full fine-tuning closes with more updates, we do not measure.
# - The errors are over countries. One run with another seed shows the size of chance, and no more.
# - On a CPU decoding costs time that a fused kernel on a GPU hides. We compare memory and quality here, not speed.
# - The count of memory does not see what lives within an operation: one decoded layer at a time.
# - An embedding stays float in QLoRA. In a model this small it is most of what is left.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: the bytes of a step
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Before you rent a GPU you want to know what the weights, gradients and optimizer will take. Count them for LoRA on packed layers.


# %% tags=["exercise"]
def adapter_bytes(shapes, rank, bits_per_weight):
    """Bytes of packed weights, adapters, their gradients and AdamW's states: a float.

    shapes: list of (out, in), one a layer. Adapters, gradients and states are float32.
    Approach: a layer has rank * (out + in) trained numbers; each takes 4 bytes itself,
    4 for its gradient and 8 for AdamW's two means. The base has its bits only.
    Example: one layer of 4 x 4, rank 1, 4 bits: 8 + 8 * 16 = 136 bytes.
    Hint: 8 bits are a byte.
    """
    ### BEGIN SOLUTION
    base = sum(out * columns for out, columns in shapes) * bits_per_weight / 8
    trained = sum(rank * (out + columns) for out, columns in shapes)
    return base + 16 * trained
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert adapter_bytes([(4, 4)], 1, 4) != 64 + 8 * 16, (
    "4 bits are half a byte: divide by 8"
)
found = adapter_bytes([(4, 4)], 1, 4)
assert found != 8 + 16 * 16, "the base is frozen: it has no gradient and no states"
assert found != 8 + 8 * 4 and found != 8 + 8 * 8, (
    "a gradient and two means as well: 16 bytes"
)
assert found == 136, "8 for the base, and 8 trained numbers of 16 bytes"
assert adapter_bytes([(8, 2)], 1, 4) == 8 + 10 * 16, (
    "out + in numbers a rank, not 2 * in"
)
assert adapter_bytes([(4, 4)], 3, 4) == 8 + 24 * 16, (
    "rank r has r times as many numbers"
)
print(f"{adapter_bytes([(768, 256)] * 4, 16, 4.127) / 1e6:.2f} MB")
### BEGIN HIDDEN TESTS
assert adapter_bytes([(4, 4), (8, 2)], 2, 2) == 8 + 2 * 18 * 16
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: the backward pass of an adapter
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# Write the three gradients without autograd. The frozen weight comes as a function that decodes it.


# %% tags=["exercise"]
def lora_backward(G, x, A, B, scaling, decode):
    """Gradients (of A, of B, of x), shaped as these, for y = x W^T + scaling x A^T B^T.

    G: gradient of y `[tokens, out]`; x `[tokens, in]`, A `[r, in]`, B `[out, r]`;
    decode() gives W `[out, in]`.
    Approach: the three products of the section "Which gradients are needed".
    Example: with B = 0 the gradient of A is 0, and that of x is G W.
    Hint: both paths reach x, so its gradient has two terms.
    """
    ### BEGIN SOLUTION
    GB = G @ B
    return (
        scaling * GB.T @ x,
        scaling * G.T @ (x @ A.T),
        G @ decode() + scaling * GB @ A,
    )
    ### END SOLUTION


# %% tags=["exercise-tests"]
maker = torch.Generator().manual_seed(1)


def whole(*shape):
    return torch.randint(-3, 4, shape, generator=maker).double()


g, inputs, a, b, w = whole(5, 3), whole(5, 4), whole(2, 4), whole(3, 2), whole(3, 4)
of_a, of_b, of_x = lora_backward(g, inputs, a, b, 0.5, lambda: w)
assert of_a.shape == a.shape and of_b.shape == b.shape, (
    "gradients have their tensor's shape"
)
assert not torch.equal(of_x, g @ w), "x also acts through A and B: a second term"
assert not torch.equal(of_x, 0.5 * g @ b @ a), "x also acts through W: decode it"
assert not torch.equal(of_x, g @ w + g @ b @ a), (
    "x: the scaling is missing in the second term"
)
assert torch.equal(of_x, g @ w + 0.5 * g @ b @ a)
assert not torch.equal(of_b, g.T @ (inputs @ a.T)), "B: the scaling is missing"
assert not torch.equal(of_a, (g @ b).T @ inputs), "A: the scaling is missing"
zero = lora_backward(g, inputs, a, 0 * b, 0.5, lambda: w)
assert not zero[0].any() and torch.equal(zero[2], g @ w), (
    "with B = 0 only B has a gradient"
)
print("largest gradients:", [t.abs().max().item() for t in (of_a, of_b, of_x)])
### BEGIN HIDDEN TESTS
ones = [t.clone().requires_grad_() for t in (a, b, inputs)]
(ones[2] @ w.T + 0.5 * ones[2] @ ones[0].T @ ones[1].T).backward(g)
for ours, of_autograd in zip((of_a, of_b, of_x), ones, strict=True):
    assert torch.equal(ours, of_autograd.grad)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: which codes survive
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# One block of weights has an absmax that stays. Add an update to its decoded weights, and round again.


# %% tags=["exercise"]
def round_again(codes, levels, absmax, update):
    """New codes (int64 `[n]`) of decoded weights plus `update` `[n]`, on the same grid.

    levels: ascending `[k]`; a weight is levels[code] * absmax. A tie goes to the lower
    code. Beyond the ends the outermost code is the nearest.
    Approach: decode, add, divide by absmax, take the nearest level.
    Example: levels -1, 0, 1, absmax 2, code 1, update 0.9: the code stays 1.
    Hint: distances to all levels [n, k]; argmin gives the first of equal ones.
    """
    ### BEGIN SOLUTION
    scaled = (levels[codes] * absmax + update) / absmax
    return (scaled[:, None] - levels).abs().argmin(1)
    ### END SOLUTION


# %% tags=["exercise-tests"]
levels = torch.tensor([-1.0, -0.5, 0.0, 0.25, 1.0])
codes = torch.tensor([2, 2, 2, 2])


def after(*update):
    return round_again(codes, levels, 2.0, torch.tensor(update)).tolist()


assert after(0, 0, 0, 0) == [2, 2, 2, 2], "no update, no change"
ends = torch.tensor([0, 4])
still = round_again(ends, levels, 4.0, torch.zeros(2)).tolist()
assert still == [0, 4], "a weight is level times absmax: the update is added to that"
far = round_again(ends, levels, 4.0, torch.tensor([0.9, -1.0])).tolist()
assert far != [2, 2], "the update is divided by absmax as well"
assert far == [0, 4], "the nearest level: both updates are below half a step"
assert after(0.2, 0.4, -0.4, -0.6)[0] == 2, "0.2 is below half a step, 0.25: it is lost"
assert after(0.2, 0.4, -0.4, -0.6) != [2, 4, 2, 1], "nearest level, not the next one up"
assert after(0.2, 0.4, -0.4, -0.6)[1] == 3, (
    "0.4 is above half a step, and moves the code"
)
assert after(0.2, 0.4, -0.4, -0.6) == [2, 3, 2, 1], "below 0 half a step is 0.5"
assert after(0.25, -0.5, 9, -9)[:2] == [2, 1], "a tie goes to the lower code"
assert after(0.25, -0.5, 9, -9)[2:] == [4, 0], "beyond the ends: the outermost code"
print("half a step up is 0.25, down 0.5:", after(0.2, 0.4, -0.4, -0.6))
### BEGIN HIDDEN TESTS
sizes = round_again(ends, levels, 4.0, torch.tensor([1.5, -1.6]))
assert sizes.tolist() == [1, 3]
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen, *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, arXiv 2106.09685 [@hu2021lora].
# - T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, *QLoRA: Efficient Finetuning of Quantized LLMs*, NeurIPS 2023, arXiv 2305.14314 [@dettmers2023qlora]; code at github.com/artidoro/qlora
#   [@dettmers2023qloracode].
# - *merge_and_unload for a quantized model ruins its quality*, a report on Hugging Face transformers [@aktsvigun2024merge].
# - The libraries peft [@mangrulkar2022peft] and bitsandbytes [@bitsandbytes]; the models course-lm (trained by this project, see its model card) and SmolLM2 [@allal2025smollm2].
#
# ## Next
#
# `hqq_demo` quantizes without data as NF4 does, and fits the zero points of a uniform grid.
