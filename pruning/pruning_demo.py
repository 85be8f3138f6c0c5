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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/pruning/pruning_demo.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/pruning/pruning_demo.ipynb)
#
# # Pruning by magnitude: what goes, and what it saves
#
# *Large Model Quantization: a deep dive. Pruning, first of three.*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - prune a model by magnitude, layer by layer or all layers at once, and say what 10% to 90% cost;
# - prune gradually while training [@zhu2017prune], with masks that hold, and compare that with one shot;
# - rewind a pruned model to its first weights [@frankle2018lottery], with two controls;
# - say why a pruned model has the same size as before, and from which sparsity on each sparse format is smaller or faster;
# - explain what became of the 2:4 pattern in production.
#
# It takes about 55 minutes to read and work. You need to know what a linear layer is, and perplexity.
# No profile needs a GPU; `quick` runs in about a minute, `cpu` in under five.

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
import math
import tempfile
import time
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import quantize_model
from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.data.corpora import documents
from course_utils.evaluation import (
    Estimate,
    Protocol,
    compare_all,
    continuations,
    difference,
    file_bytes,
    format_difference,
    prompt_of,
    time_per_token,
)
from course_utils.evaluation.estimate import with_error

# %%
from course_utils.models import linear_layers, load_model
from course_utils.plotting import nats_against_bits, table
from course_utils.plotting.pruning import (
    against_sparsity,
    mask_pictures,
    schedule_and_loss,
    share_of_layers,
)
from course_utils.profiles import resolve
from course_utils.results import record
from course_utils.training.loop import TrainConfig, next_token_loss, train
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # the larger model of one section; course-lm is used in all
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# Quantization stores every weight with fewer bits. **Pruning** removes weights: it sets them to zero. The share that is removed is the **sparsity**. Which
# weights can go? The oldest answer that is still in use looks at nothing but their size: the smallest go [@han2015learning].
#
# That is **magnitude pruning**. It needs no text and no gradient. Two questions follow. How many weights can go before the model suffers? And what is saved
# when they are gone? The second is the one that most tutorials leave out.
#
# ## By hand
#
# Of $N$ weights the $k = \mathrm{round}(s N)$ smallest go, for a sparsity $s$. A **mask** $M$ says which stay. The layer then computes with $M \odot W$. For a
# given $k$ no other mask leaves a smaller $\|W - M \odot W\|^2$: magnitude pruning is the best one could do if only weights counted. Here $s = 0.5$.

# %% tags=["nbval-check-output"]
W = torch.tensor(
    [
        [0.875, -0.125, 0.375, -0.75],
        [0.25, -1.125, 0.3125, -0.0625],
        [-0.625, 0.5, -0.8125, 0.1875],
    ]
)  # [out=3, in=4]
k = round(0.5 * W.numel())  # 6 of 12 go
lowest = W.abs().flatten().sort(stable=True).indices[:k]
M = torch.ones(W.numel(), dtype=torch.bool).index_fill(0, lowest, False).view(W.shape)
print(W.where(M, 0.0).tolist())

# %%
from course_utils.plotting.diagrams import masked_matrix, row_in_formats

figure = masked_matrix(W, M)
plt.show()

# %% [markdown]
# *Figure: the 3 by 4 matrix, the rank of each magnitude, and what the mask leaves. Grey weights go.*
#
# The six smallest are gone, and one row keeps a single weight. Nothing forces rows to lose alike. The package and `torch.nn.utils.prune` make the same mask.
# We check it on a larger matrix too, at several sparsities.

# %% tags=["nbval-check-output"]
from course_utils.pruning.masks import layer_mask, n_m_mask, sparsity_of
from torch.nn.utils import prune

draw = torch.Generator().manual_seed(profile.seed)
assert torch.equal(layer_mask(W.abs(), 0.5), M)
for share in (0.1, 0.3, 0.5, 0.9):
    layer = nn.Linear(64, 48)
    layer.weight.data = torch.randn(48, 64, generator=draw)
    ours = layer_mask(layer.weight.detach().abs(), share)
    prune.l1_unstructured(layer, "weight", share)
    same = torch.equal(ours, layer.weight_mask.bool())
    print(f"{share:.0%}: {int((~ours).sum())} of 3072 go, the same as torch's: {same}")

# %% [markdown]
# Counts and masks agree at every sparsity.
#
# ## A whole model: the 30% case
#
# Now course-lm, all 16 linear layers of it. Embeddings and the LM head are left alone, as in the papers. We begin with 30%, **layer-wise**: of every layer goes
# the same share.

# %%
from course_utils.pruning.magnitude import Magnitude, magnitude_masks

dense, tokenizer = load_model("course-lm", device=profile.device)
measured_on = Protocol("factbook", profile.pick(quick=1024, cpu=2048), 256)
text = measured_on.text(tokenizer)


# %%
@torch.no_grad()
def pruned(model, masks):
    """A copy of `model` with zeros where `masks` have them."""
    changed = copy.deepcopy(model)
    for layer in linear_layers(changed):
        layer.weight.mul_(masks[layer.name])
    return changed


at_30 = pruned(dense, magnitude_masks(dense, 0.3))
weights = [layer.weight for layer in linear_layers(at_30)]
zeros, total = (
    sum(int((w == 0).sum()) for w in weights),
    sum(w.numel() for w in weights),
)
print(f"{zeros:,} of {total:,} weights in linear layers are zero: {zeros / total:.1%}")

# %% [markdown]
# Three ways to choose are compared at each sparsity. *Layer-wise* as above. *Global*: the smallest of all layers together go, so that layers may lose different
# shares. *Random* is the control, which looks at nothing.


# %%
def random_masks(model, share):
    """Masks of all linear layers that remove any weights."""
    return {
        layer.name: layer_mask(torch.rand(layer.weight.shape, generator=draw), share)
        for layer in linear_layers(model)
    }


ways = {
    "layer-wise": lambda s: magnitude_masks(dense, s),
    "global": lambda s: magnitude_masks(dense, s, across="model"),
    "random": lambda s: random_masks(dense, s),
}

# %%
shares = profile.pick(quick=[30, 50, 70, 90], cpu=list(range(10, 100, 10)))
asked = {way: shares for way in ways} | {"random": [30, 50, 70]}
sparse = {
    (way, s): pruned(dense, ways[way](s / 100)) for way in ways for s in asked[way]
}
two_four = {
    layer.name: n_m_mask(layer.weight.abs(), "2:4") for layer in linear_layers(dense)
}
sparse["2:4", 50] = pruned(dense, two_four)
found = compare_all(sparse, dense, text)

# %%
curves = {
    way: tuple(zip(*[(s, found[way, s].loss.value, found[way, s].loss.error)
                     for s in asked[way]], strict=True))
    for way in ways
}  # fmt: skip
figure = nats_against_bits({"course-lm": curves}, xlabel="% of weights removed")
plt.show()

# %% [markdown]
# *Figure: nats lost per token against the share removed, for the three ways. Bars are two standard errors over documents.*


# %%
def pm(estimate):
    """A difference with its standard error."""
    return with_error(estimate.value, estimate.error, "+")


rows = []
for s in shares:
    row = {"removed": f"{s}%"}
    row |= {w: pm(found[w, s].loss) if (w, s) in found else ""
            for w in ways}  # fmt: skip
    rows.append(
        row | {"perplexity, layer-wise": found["layer-wise", s].perplexity.perplexity}
    )
table(rows, {"perplexity, layer-wise": ".1f"})

# %% tags=["folded"]
# Records of the sweep, and of the paired differences of two ways.
by = {"model": "course-lm", **measured_on.fields}
for (way, s), c in found.items():
    key = f"pruning.{way.replace('-', '_').replace(':', '_')}.{s}"
    record(f"{key}.loss", c.loss.value, "nats", max(0.02, 0.1 * c.loss.value), **by)
    record(f"{key}.loss_error", c.loss.error, "nats", **by)
    record(f"{key}.perplexity", c.perplexity.perplexity, "", **by)
record("pruning.dense.perplexity", found["2:4", 50].reference.perplexity, "", 0.1, **by)
for s in (50, 70, 90):
    apart = difference(found["global", s], found["layer-wise", s])
    record(f"pruning.global_less_layer.{s}", apart.value, "nats", 0.1, **by)
    record(f"pruning.global_less_layer.{s}_error", apart.error, "nats", **by)
    print(f"global less layer-wise at {s}%: {format_difference(apart)}")

# %% [markdown]
# In the recorded run 30% layer-wise costs {{pruning.layer_wise.30.loss:+.3f}} ± {{pruning.layer_wise.30.loss_error:.3f}} nats per token, and 50% costs
# {{pruning.layer_wise.50.loss:+.2f}} ± {{pruning.layer_wise.50.loss_error:.2f}}. Random removal costs {{pruning.random.30.loss:+.2f}} at 30%: the size of a
# weight tells much. At 90% the model is broken: {{pruning.layer_wise.90.loss:+.2f}} nats.
#
# Global pruning is often said to be better, since it can spare the layers that matter. Here it is {{pruning.global_less_layer.50:+.2f}} ±
# {{pruning.global_less_layer.50_error:.2f}} nats *worse* at 50%, paired over the same tokens. Why?
#
# ## What each layer loses

# %%
names = {
    layer.name: layer.name.replace("transformer.h.", "")
    for layer in linear_layers(dense)
}
of_layer = {
    way: {names[n]: sparsity_of(mask) for n, mask in ways[way](0.5).items()}
    for way in ("layer-wise", "global")
}
figure = share_of_layers(of_layer, 0.5)
plt.show()

# %% tags=["folded"]
# Records of the shares.
lost = of_layer["global"]
print(f"global: from {min(lost.values()):.0%} ({min(lost, key=lost.get)})", end=" ")
print(f"to {max(lost.values()):.0%} ({max(lost, key=lost.get)})")
record("pruning.global.most", max(lost.values()), "", 0.01, model="course-lm")
record("pruning.global.least", min(lost.values()), "", 0.01, model="course-lm")

# %% [markdown]
# *Figure: the share that each linear layer loses when half of all weights go. The dashed line is the share asked for.*
#
# A global threshold compares weights of different layers as if a small weight meant the same in each. It does not: layers differ in the scale of their weights.
# In the recorded run one layer loses {{pruning.global.most:.0%}} and another {{pruning.global.least:.0%}}, and the first may need its small weights as much.
#
# What does a mask look like? Here is one whole layer, 256 by 256, a pixel a weight.

# %%
place = "transformer.h.0.attn.c_proj"
size = {layer.name: layer.weight.abs().cpu() for layer in linear_layers(dense)}[place]
noise = torch.rand(size.shape, generator=draw)
pictures = {f"{s:.0%} removed": layer_mask(size, s) for s in (0.3, 0.5, 0.9)}
figure = mask_pictures(pictures | {"90%, at random": layer_mask(noise, 0.9)})
plt.show()

# %% tags=["folded"]
# How unevenly the columns are hit, against what chance alone would give.
spread = {
    name: mask.float().mean(0).std().item()
    for name, mask in (
        ("magnitude", pictures["90% removed"]),
        ("random", layer_mask(noise, 0.9)),
    )
}
print(f"kept share of a column at 90%: spread {spread['magnitude']:.3f},", end=" ")
print(f"at random {spread['random']:.3f}")
record("pruning.spread.magnitude", spread["magnitude"], "", 0.005, model="course-lm")
record("pruning.spread.random", spread["random"], "", 0.01, model="course-lm")

# %% [markdown]
# *Figure: the mask of one attention output layer at three sparsities, and a random mask. Dark pixels stay.*
#
# The mask has bands, 64 columns wide: the inputs of this layer are the outputs of four attention heads, and two heads have lost nearly all. In the recorded run the share that a column keeps spreads by
# {{pruning.spread.magnitude:.3f}} at 90%, and by {{pruning.spread.random:.3f}} in the random mask. Whole structures are half empty already; `structured_pruning`
# will remove such.
#
# ## The same 30%, another model
#
# How far does the result for 30% carry? We prune the profile's larger model the same way, if it has one. SmolLM2 has 135 million parameters, and was trained on far more
# text than course-lm.

# %%
larger = profile.models[-1].replace("q4_1", "dithered")
rows, others = [], {}
if larger != "course-lm":
    big, big_tokenizer = load_model(larger, dtype=profile.dtype, device=profile.device)
    few = Protocol("factbook", 512, 256)
    changed = {s: pruned(big, magnitude_masks(big, s / 100)) for s in (30, 50)}
    others = compare_all(changed, big, few.text(big_tokenizer))
    rows = [
        {"model": larger, "removed": f"{s}%", "nats lost": format_difference(c.loss)}
        for s, c in others.items()
    ]
rows += [
    {"model": "course-lm", "removed": f"{s}%",
     "nats lost": format_difference(found["layer-wise", s].loss)} for s in (30, 50)
]  # fmt: skip
table(rows)

# %% tags=["folded"]
# Records of the larger model; its copies are given back.
for s, c in others.items():
    of = {"model": larger, **few.fields}
    record(f"pruning.larger.{s}.loss", c.loss.value, "nats", 0.2 * c.loss.value, **of)
    record(f"pruning.larger.{s}.loss_error", c.loss.error, "nats", **of)
changed = big = None

# %% [markdown]
# In the recorded run the same 30% costs SmolLM2 {{pruning.larger.30.loss:.2f}} ± {{pruning.larger.30.loss_error:.2f}} nats, and 50% costs
# {{pruning.larger.50.loss:.2f}} ± {{pruning.larger.50.loss_error:.2f}}: it is ruined where course-lm hardly notices. (The two models cut text
# into different tokens, so compare orders of magnitude.) So "30% is free" is a property of a model, not of the method. A likely reason: SmolLM2 has a few
# input features that are far larger than the others (`llm_int8_demo` shows them). A small weight on such an input matters, and its magnitude does not say so.
# `one_shot_pruning` looks at inputs.
#
# ## Let the model speak
#
# The same prompt, continued by course-lm after layer-wise pruning.

# %%
speakers = {"0%": dense} | {f"{s}%": sparse["layer-wise", s] for s in (30, 50, 70, 90)}
print(continuations(speakers, tokenizer, prompt_of("course-lm"), new_tokens=24))

# %% [markdown]
# At 30% and 50% the text keeps the Factbook's phrases. At 70% it begins to repeat itself, and at 90% it has lost the words.
#
# ## Masks that hold
#
# A broken model can be trained again: that is what Han and others did after each pruning. But an optimizer knows nothing of masks. We prune 50%, and count the
# zeros after two updates.

# %%
from course_utils.pruning.masked import hold_masks, masks_of, release_masks

context, batch_size = 64, 4
end = tokenizer.eos_token_id
stream = token_stream(tokenizer.backend_tokenizer, documents("factbook", "train"), end)
batches = TrainingBatches(
    stream, context=context, batch_size=batch_size, seed=profile.seed
)


# %%
def zeros_after(hold, updates=2):
    """Share of zeros in all linear layers after some updates of AdamW."""
    model = copy.deepcopy(sparse["layer-wise", 50])
    if hold:
        hold_masks(model, masks_of(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(updates):
        optimizer.zero_grad()
        next_token_loss(model, batches(step).to(profile.device)).backward()
        optimizer.step()
    kept = masks_of(model)
    return 1 - sum(int(m.sum()) for m in kept.values()) / total


for hold in (False, True):
    print(f"masks held: {hold}; zeros after two updates: {zeros_after(hold):.1%}")

# %% [markdown]
# Without a mask that holds, all zeros are gone at once. So the layer computes with $M \odot W$ in every pass: a removed weight gets no gradient, and whatever
# the optimizer's momentum does to the number behind it, the layer sees zero. `hold_masks` does this by `torch.nn.utils.parametrize`.
#
# ## One shot, or little by little?
#
# 90% at once leaves a broken model to start from. Zhu and Gupta remove the weights while training goes on [@zhu2017prune]. From update $t_0$ on, every
# $\Delta t$ updates, $n$ times, the mask grows, to a sparsity of
#
# $$ s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{n\, \Delta t}\right)^3 . $$
#
# $s_i$ is the sparsity at the start, here 0, and $s_f$ the final one. The cube takes many weights early, when small ones abound, and few late, when each counts.

# %% tags=["nbval-check-output"]
from course_utils.pruning.gradual import GradualPruning

example = GradualPruning(final=0.9, begin=0, times=6, every=10)
by_hand = [0.9 * (1 - (1 - t / 60) ** 3) for t in range(0, 61, 10)]
steps = [example.sparsity_at(t) for t in range(0, 61, 10)]
print([round(s, 4) for s in by_hand])
assert all(
    math.isclose(a, b, abs_tol=1e-12) for a, b in zip(by_hand, steps, strict=True)
)

# %% [markdown]
# After a third of the way, two thirds of the weights are gone; the last steps take only a few.
#
# Now the comparison: the same model, the same batches in the same order, the same number of updates, the same learning rate, 90% in the end. **One shot** prunes before
# the first update. **Gradual** follows the cube over the first three fifths. Two controls with one seed: **random** removes any 90% in one shot, and **dense**
# removes nothing and only trains. Embeddings are frozen in all. The rate, 4e-3, was the best of 1e-3, 2e-3 and 4e-3 for both ways, in runs of 60 updates with another seed and sequences twice as long.

# %%
updates = profile.pick(quick=6, cpu=40)
seeds = range(profile.seed, profile.seed + profile.pick(quick=2, cpu=3))
schedule = GradualPruning(final=0.9, begin=0, times=3 * updates // 10, every=2)
CONFIG = TrainConfig(
    updates, lr=4e-3, warmup=updates // 10, decay=2 * updates // 5, weight_decay=0.0,
    eval_every=max(1, updates // 12),
)  # fmt: skip


# %%
def retrained(arm, seed):
    """(course-lm after its updates, its curve of training losses)."""
    model, before_step = copy.deepcopy(dense), None
    for embedding in (model.transformer.wte, model.transformer.wpe):
        embedding.requires_grad_(False)
    if arm == "one shot":
        hold_masks(model, magnitude_masks(model, 0.9))
    elif arm == "random":
        hold_masks(model, random_masks(model, 0.9))
    elif arm == "gradual":
        before_step = schedule.masking(model)
    cut = TrainingBatches(stream, context=context, batch_size=batch_size, seed=seed)
    curve = train(model, lambda step: cut(step).to(profile.device), CONFIG,
                  before_step=before_step, progress=False)  # fmt: skip
    release_masks(model)
    return model, curve


# %%
arms = {"one shot": seeds, "gradual": seeds, "random": seeds[:1], "dense": seeds[:1]}
runs = {(arm, seed): retrained(arm, seed) for arm in arms for seed in arms[arm]}
against_dense = compare_all(
    {key: model for key, (model, _) in runs.items()}, dense, text
)
first = runs["gradual", profile.seed][0]
kept = masks_of(first).values()
print(f"gradual, zeros: {1 - sum(int(m.sum()) for m in kept) / total:.1%}")

# %%
with torch.no_grad():
    level = next_token_loss(dense, batches(0).to(profile.device)).item()
at = list(range(updates))
planned = {
    "one shot": (at, [0.9] * updates),
    "gradual": (at, [schedule.sparsity_at(t) for t in at]),
}
losses = {
    arm: ([row["step"] for row in curve], [row["loss"] for row in curve])
    for (arm, seed), (_, curve) in runs.items()
    if seed == profile.seed
}
figure = schedule_and_loss(planned, losses, level)
plt.show()

# %% [markdown]
# *Figure: on the left the share removed over the updates. On the right the training loss of all four, for the first seed; the dashed line is the dense model's loss on
# one batch.*
#
# One shot starts high and climbs down. Gradual starts low, and rises while weights are taken. What counts is text that none was trained on.


# %%
def over_seeds(values):
    """Mean and standard error over seeds."""
    values = torch.tensor(values).double()
    error = values.std().item() / len(values) ** 0.5
    return Estimate(values.mean().item(), error, len(values), "seeds")


ends = {arm: over_seeds([against_dense[arm, s].loss.value for s in seeds])
        for arm in ("one shot", "gradual")}  # fmt: skip
gap = over_seeds(
    [against_dense["gradual", s].loss.value - against_dense["one shot", s].loss.value
     for s in seeds]
)  # fmt: skip
rows = [
    {"90%": "no training", "nats lost": format_difference(found["layer-wise", 90].loss)}
]
rows += [{"90%": arm, "nats lost": format_difference(ends[arm])} for arm in ends]
rows += [
    {"90%": arm, "nats lost": format_difference(against_dense[arm, profile.seed].loss)}
    for arm in ("random", "dense")
]
print("gradual less one shot, seed by seed:", format_difference(gap))
table(rows)

# %% tags=["folded"]
# Records of the training.
of = {
    "model": "course-lm",
    "updates": updates,
    "seeds": len(seeds),
    **measured_on.fields,
}


def record_estimate(key, estimate, tolerance=0.3, **by):
    """Value under `key`, standard error under `key` with _error."""
    record(key, estimate.value, "nats", tolerance, **by)
    record(f"{key}_error", estimate.error, "nats", **by)


for arm, end_of_arm in ends.items():
    record_estimate(f"pruning.trained.{arm.replace(' ', '_')}", end_of_arm, **of)
record_estimate("pruning.trained.gradual_less_one_shot", gap, **of)
for arm in ("random", "dense"):
    record_estimate(
        f"pruning.trained.{arm}", against_dense[arm, profile.seed].loss, **of
    )
record("pruning.trained.updates", updates, "", 0, **of)

# %% [markdown]
# In the recorded run {{pruning.trained.updates:.0f}} updates bring the loss at 90% from {{pruning.layer_wise.90.loss:.2f}} down to
# {{pruning.trained.one_shot:.2f}} nats in one shot, and to {{pruning.trained.gradual:.2f}} gradually. Gradual is *worse*, by
# {{pruning.trained.gradual_less_one_shot:+.3f}} ± {{pruning.trained.gradual_less_one_shot_error:.3f}} over three seeds. One shot has all updates to mend its last mask, and
# gradual has those after its last pruning only. At the lowest of the three rates gradual ended ahead, in the one run that we made. So this is no verdict on gradual pruning: a
# short run at a high rate favours one shot.
#
# A random mask ends at {{pruning.trained.random:.2f}}: the choice of weights still counts after training. And the dense control *loses* {{pruning.trained.dense:.2f}} nats by
# the training alone. The rate suits a broken model, and harms a good one. So part of what one shot still lacks is due to the training, and not to the missing weights.
#
# (± is over seeds for one shot and gradual, and over documents for the controls.) What does the pruned and trained model say?

# %%
again = {"90%, no training": sparse["layer-wise", 90]}
again |= {f"90%, {arm}": runs[arm, profile.seed][0] for arm in ("one shot", "gradual")}
print(continuations(again, tokenizer, prompt_of("course-lm"), new_tokens=24))

# %% [markdown]
# Words come back with the training. The text is still far from the dense model's.
#
# ## Lottery tickets
#
# Is a mask only good for the trained weights, or is the *small network itself* good? The **lottery ticket hypothesis** says: put the weights that stay back to their
# first, untrained values, train again, and the small network learns as well as the large one [@frankle2018lottery]. With other first values it does not.
#
# We can test that in minutes on a tiny model alone: two blocks of width 64 with bytes as tokens, trained from nothing. 80% are pruned, in one shot, layer-wise. **Ticket**:
# the mask of the trained weights, and their first values. **Fresh weights**: the same mask, other first values. **Random mask**: the first values, any mask. **Trained
# on**: the mask on the trained weights, with as many updates once more.


# %%
def fresh(seed):
    """A tiny GPT-2 for bytes, with the first weights of `seed`."""
    sizes = dict(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=None, eos_token_id=None)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).to(profile.device)


def as_bytes(split, every):
    """The Factbook's documents as one stream of bytes."""
    chosen = documents("factbook", split)[::every]
    return torch.cat([torch.tensor(list(d.text.encode())) for d in chosen])


byte_stream, others = as_bytes("train", 4), as_bytes("evaluation", 1)
held_out = others[: 128 * 65].view(128, 65).to(profile.device)

# %%
short = profile.pick(quick=20, cpu=160)
TICKETS = TrainConfig(
    short, lr=6e-3, warmup=short // 10, decay=short // 4, eval_every=short
)


def trained(model, seed, masks=None):
    """`model` after its updates, with masks held."""
    if masks:
        hold_masks(model, masks)
    cut = TrainingBatches(byte_stream, context=64, batch_size=8, seed=seed)
    train(model, lambda step: cut(step).to(profile.device), TICKETS, progress=False)
    release_masks(model)
    return model


@torch.no_grad()
def loss_of(model):
    """Nats per byte on other documents."""
    return next_token_loss(model, held_out).item()


# %%
tickets = {}
for seed in seeds:
    whole = trained(fresh(seed), seed)
    masks = magnitude_masks(whole, 0.8)
    tickets[seed] = {
        "dense": loss_of(whole),
        "ticket": loss_of(trained(fresh(seed), seed, masks)),
        "fresh weights": loss_of(trained(fresh(seed + 1000), seed, masks)),
        "random mask": loss_of(trained(fresh(seed), seed, random_masks(whole, 0.8))),
        "trained on": loss_of(trained(whole, seed + 1, masks)),
    }


# %%
def paired(a, b):
    """Loss of `a` less that of `b`, seed by seed."""
    return over_seeds([of_seed[a] - of_seed[b] for of_seed in tickets.values()])


rows = []
for arm in tickets[profile.seed]:
    row = {
        "80% pruned": arm,
        "nats per byte": over_seeds([t[arm] for t in tickets.values()]).value,
    }
    row["less dense"] = "" if arm == "dense" else pm(paired(arm, "dense"))
    row["less ticket"] = "" if arm == "ticket" else pm(paired(arm, "ticket"))
    rows.append(row)
table(rows, {"nats per byte": ".3f"})

# %% tags=["folded"]
# Records of the tickets.
of = {"model": "bytes-64", "updates": short, "seeds": len(seeds)}
record("pruning.ticket.dense", rows[0]["nats per byte"], "nats", 0.4, **of)
for arm in ("ticket", "fresh weights", "random mask", "trained on"):
    key = f"pruning.ticket.{arm.replace(' ', '_')}"
    record_estimate(f"{key}.less_dense", paired(arm, "dense"), **of)
    if arm != "ticket":
        record_estimate(f"{key}.less_ticket", paired(arm, "ticket"), **of)

# %% [markdown]
# In the recorded run the ticket ends {{pruning.ticket.ticket.less_dense:+.2f}} ± {{pruning.ticket.ticket.less_dense_error:.2f}} nats per byte from the dense model, below it. But
# so do the controls, even the random mask ({{pruning.ticket.random_mask.less_dense:+.2f}} ± {{pruning.ticket.random_mask.less_dense_error:.2f}}). So the dense model is a poor measure
# here: it has learned little in so few updates at this rate, which suits sparse networks better. What can be compared are the sparse ones. The same mask with fresh weights is at
# {{pruning.ticket.fresh_weights.less_ticket:+.3f}} ± {{pruning.ticket.fresh_weights.less_ticket_error:.3f}} from the ticket, and a random mask at
# {{pruning.ticket.random_mask.less_ticket:+.2f}} ± {{pruning.ticket.random_mask.less_ticket_error:.2f}}. The mask counts, and the first values count a little.
#
# This is a small control, and no test of the hypothesis. The paper prunes in many rounds, on networks for images, with far longer training. For large networks
# such small ones reach full accuracy only when rewound to an early update, not to the first weights [@frankle2019linear]. We did neither.
#
# ## What a sparse model really costs
#
# "Why is the pruned model as large as the original?" ask users of a pruning repository [@wandasize2024]. We save course-lm in float16 and look: dense, and with half of
# its weights zero.


# %%
def saved_bytes(model):
    """(bytes of the saved file, bytes after zlib)."""
    with tempfile.TemporaryDirectory() as folder:
        nn.Module.half(copy.deepcopy(model)).cpu().save_pretrained(folder)
        content = (Path(folder) / "model.safetensors").read_bytes()
        return file_bytes(folder), len(zlib.compress(content))


on_disk = {
    "dense": saved_bytes(dense),
    "50%, zeros": saved_bytes(sparse["layer-wise", 50]),
}
for name, setting in (("50%, bitmask", 0.5), ("2:4", "2:4"), ("90%, bitmask", 0.9)):
    packed = copy.deepcopy(dense)
    report = quantize_model(packed, Magnitude(setting))
    on_disk[name] = saved_bytes(packed)
table(
    [
        {"model": name, "file": size, "zipped": small}
        for name, (size, small) in on_disk.items()
    ],
    {"file": ",", "zipped": ","},
)

# %% tags=["folded"]
# Records of the files.
for name, (size, small) in on_disk.items():
    key = name.replace(":", "_").replace("%, ", "_")
    record(f"pruning.file.{key}", size, "bytes", 200, model="course-lm")
    record(f"pruning.zipped.{key}", small, "bytes", 2000, model="course-lm")
    record(
        f"pruning.file_share.{key}",
        size / on_disk["dense"][0],
        "",
        0.001,
        model="course-lm",
    )

# %% [markdown]
# In the recorded run the file with zeros has {{pruning.file_share.50_zeros:.1%}} of the dense one's bytes: a zero is stored like any number. Zipped it is smaller, but
# it must be unzipped to be used. A **bitmask** takes {{pruning.file_share.50_bitmask:.0%}} at 50%, and {{pruning.file_share.90_bitmask:.0%}} at 90%. Embeddings are in all
# of them, at full size.
#
# ### Three sparse formats, drawn
#
# A sparse format stores the values that stay, and where they were. **Bitmask**: a bit for every weight. **2:4**: two of every four neighbours stay, and each has
# 2 bits for its place. **CSR**, compressed sparse rows: a column index for each value, and for each row where it starts.

# %%
row = torch.tensor([0.9, -0.1, 0.4, -0.7, 0.2, -1.1, 0.3, -0.5])
figure = row_in_formats(row, n_m_mask(row.abs()[None], "2:4")[0])
plt.show()

# %% [markdown]
# *Figure: a row of eight float16 weights in four formats, each bit of the same width. Blue: values that stay. Orange: where they are. Grey: zeros.*
#
# Per weight, at sparsity $s$ and $b$ bits a value: dense $b$; bitmask $1 + (1 - s)\, b$; 2:4 $b / 2 + 1$; CSR $(1 - s)(b + i)$ with $i$ bits an index, plus the row
# starts. So with $b = 16$ a bitmask is smaller from $s = 1/16$ on, and CSR with $i = 16$ from one half on. Now the same, measured on stored tensors of 512 by 512.

# %%
from course_utils.pruning.sparse import BitmaskWeight, CsrWeight, TwoFourWeight

W = torch.randn(512, 512, generator=draw)
grid = [i / 20 for i in range(20)]
kinds = {"bitmask": BitmaskWeight, "CSR, int16 indices": CsrWeight}
bits = {"dense": (grid, [16.0] * len(grid))}
for name, kind in kinds.items():
    stored = [kind.from_mask(W, layer_mask(W.abs(), s), "float16") for s in grid]
    bits[name] = grid, [w.bits_per_weight for w in stored]
pattern = TwoFourWeight.from_mask(W, n_m_mask(W.abs(), "2:4"), "float16")
wide = [
    w + 16 * (1 - s) for s, w in zip(grid, bits["CSR, int16 indices"][1], strict=True)
]
bits["CSR, int32 indices"] = grid, wide  # 16 bits more for each value that stays
bits["2:4"] = [0.5], [pattern.bits_per_weight]

# %% [markdown]
# And time: one product with a matrix of 1024 by 1024 in float32. The dense form multiplies zeros like anything else. The bitmask is decoded first. CSR is multiplied by torch's
# own kernel, which skips what is not there.


# %%
def milliseconds(runs, times=25):
    """The fastest of some runs of each, in turns, after two that do not count."""
    taken = {name: [] for name in runs}
    for _ in range(times + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: min(of_run[2:]) for name, of_run in taken.items()}


large = torch.randn(1024, 1024, generator=draw)
x = torch.randn(1, 1024, generator=draw)  # [tokens, in]
tried = [0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]

# %%
times = {"dense": [], "CSR, int16 indices": [], "bitmask": []}
for s in tried:
    mask = layer_mask(large.abs(), s)
    zeroed, stored = large * mask, BitmaskWeight.from_mask(large, mask, "float32")
    csr = CsrWeight.from_mask(large, mask, "float32").as_torch()
    torch.testing.assert_close(csr @ x.T, zeroed @ x.T, rtol=1e-3, atol=1e-3)
    found_times = milliseconds(
        {
            "dense": lambda z=zeroed: nn.functional.linear(x, z),
            "CSR, int16 indices": lambda c=csr: c @ x.T,
            "bitmask": lambda b=stored: nn.functional.linear(x, b.dequantize()),
        }
    )
    for name, ms in found_times.items():
        times[name].append(ms)
print(f"on {torch.get_num_threads()} threads of the CPU")

# %%
drawn = {name: (tried, times[name]) for name in ("dense", "CSR, int16 indices")}
panels = {"bytes": bits, "time, one token": drawn}
figure = against_sparsity(panels, ["bits per weight", "milliseconds"], "dense")
plt.show()

# %% tags=["folded"]
# The break-even points, and their records.
from course_utils.plotting.pruning import break_even

points = {name: break_even(*bits[name], bits["dense"][1]) for name in list(bits)[1:4]}
points["CSR in time"] = break_even(tried, times["CSR, int16 indices"], times["dense"])
for name, point in points.items():
    key = name.split(" indices")[0].replace(", ", "_").replace(" ", "_").lower()
    if point is not None:
        record(f"pruning.break_even.{key}", point, "", None if "time" in name else 0.01,
               model="random")  # fmt: skip
print({name: point and round(point, 3) for name, point in points.items()})
slower = times["bitmask"][tried.index(0.9)] / times["dense"][tried.index(0.9)]
faster = (
    times["dense"][tried.index(0.9)] / times["CSR, int16 indices"][tried.index(0.9)]
)
halved = times["CSR, int16 indices"][1] / times["dense"][1]
print(f"at 90%: bitmask {slower:.0f} times as long, CSR {faster:.1f} times as fast")
for key, value in (("bitmask_90", slower), ("csr_90", faster), ("csr_50", halved)):
    record(f"pruning.time.{key}", value, "", model="random")

# %% [markdown]
# *Figure: on the left bits per weight of four formats against sparsity, 2:4 as a point. On the right the time of one product on this machine, one float32 matrix of
# 1024 by 1024 and one token, the fastest of 25 runs. Dotted lines: from there on a format beats dense.*
#
# In the recorded run bitmask beats dense from {{pruning.break_even.bitmask:.2f}} on, CSR from {{pruning.break_even.csr_int16:.2f}} with int16 indices and from
# {{pruning.break_even.csr_int32:.2f}} with int32. At 50%, the usual sparsity of papers, CSR takes {{pruning.time.csr_50:.1f}} times as *long* as dense. At 90% it is
# {{pruning.time.csr_90:.1f}} times as fast. The bitmask, decoded by torch's own operations, takes {{pruning.time.bitmask_90:.0f}} times as long: it saves bytes only.
# Dense zeros gain no time at any sparsity.
#
# The whole model, milliseconds per generated token. The fastest of 32 tokens is the one that other programs disturbed least:

# %%
prompt = torch.tensor(tokenizer(prompt_of("course-lm")).input_ids)
packed = copy.deepcopy(dense)
quantize_model(packed, Magnitude(0.9))
speeds = {
    "dense": dense,
    "90%, zeros": sparse["layer-wise", 90],
    "90%, bitmask": packed,
}
taken = {name: [] for name in speeds}
for _ in range(4):  # in turns, so that what disturbs one disturbs all
    for name, model in speeds.items():
        taken[name] += time_per_token(
            model, prompt, new_tokens=8, warmup=2
        ).milliseconds
rows = []
for name, of_model in taken.items():
    rows.append({"model": name, "fastest": min(of_model)})
    rows[-1]["median"] = sorted(of_model)[len(of_model) // 2]
    key = f"pruning.token.{name.replace('%, ', '_')}"
    record(key, min(of_model), "ms", model="course-lm")
table(rows, {"fastest": ".1f", "median": ".1f"})

# %% [markdown]
# In the recorded run the model full of zeros takes {{pruning.token.90_zeros:.1f}} ms where the dense one takes {{pruning.token.dense:.1f}}: nothing is won. The packed
# one takes {{pruning.token.90_bitmask:.1f}}, since it decodes every layer for every token.
#
# ## What became of 2:4
#
# 2:4 was to be the way out: sparse tensor cores of NVIDIA's GPUs read it, and can multiply at up to twice the dense rate [@mishra2021sparse]. What it costs in quality
# shows above: at 50%, free choice loses {{pruning.layer_wise.50.loss:.2f}} nats in the recorded run, and 2:4 loses {{pruning.2_4.50.loss:.2f}} ±
# {{pruning.2_4.50.loss_error:.2f}}.
#
# vLLM, a widely used inference server, took in 2:4 kernels in December 2024 [@vllm2024sparse24]. In March 2026 a pull request removed them, "to reduce maintainer burden":
# such models were "not widely used", and a reviewer added that there were "no downloads on the models" [@vllm2026sparse24]. 2:4 leaves 9 of 16 bits a weight. Codes of 4
# bits leave about 4, and most hardware reads them.
#
# ## What you saw
#
# All numbers are from the recorded run.
#
# - **Magnitude finds weights that can go.** 30% cost course-lm {{pruning.layer_wise.30.loss:+.3f}} nats, at random {{pruning.random.30.loss:+.2f}}. SmolLM2
#   loses {{pruning.larger.30.loss:.2f}} with the same 30%: that is no property of the method.
# - **Global was not better.** At 50% it lost {{pruning.global_less_layer.50:+.2f}} ± {{pruning.global_less_layer.50_error:.2f}} nats more than layer-wise here.
# - **Training repairs much.** At 90%, {{pruning.layer_wise.90.loss:.2f}} nats became {{pruning.trained.one_shot:.2f}} in one shot and {{pruning.trained.gradual:.2f}} gradually, in
#   {{pruning.trained.updates:.0f}} updates. Gradual did not win in so short a run. Masks must be held.
# - **A ticket is a mask first.** Fresh weights under the same mask ended {{pruning.ticket.fresh_weights.less_ticket:+.3f}} ±
#   {{pruning.ticket.fresh_weights.less_ticket_error:.3f}} nats per byte from it, a random mask {{pruning.ticket.random_mask.less_ticket:+.2f}}.
# - **Zeros save nothing.** A format must store places as well: bitmask pays in bytes from {{pruning.break_even.bitmask:.0%}} on, CSR from
#   {{pruning.break_even.csr_int16:.0%}}, and in time only beyond.
#
# ## Limits
#
# - course-lm is tiny, and trained to its end on little text. Large models are hurt much earlier, as SmolLM2 shows.
# - The training is some tens of updates, three seeds, one learning rate for all arms: the highest of three that were tried. A longer run may order them otherwise.
# - Lottery tickets were tried on one tiny network that had barely learned, in one round, at one sparsity and one rate.
# - Times are those of one CPU and of torch's kernels. There are faster sparse kernels, and GPUs differ.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: exactly so many
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# A published pruning code removes all weights that are at most a threshold, and so one more than asked for, and more where weights are equal. Remove exactly
# $\mathrm{round}(s N)$.


# %% tags=["exercise"]
def prune_smallest(W, sparsity):
    """`W` `[out, in]` with its `round(sparsity * N)` smallest magnitudes set to 0.

    Approach: order the magnitudes of all N weights, and zero the first ones by place.
    Of equal magnitudes the first in row order go first. `W` stays as it is.
    Example: [[3.0, -1.0], [-4.0, 2.0]] at 0.5 gives [[3.0, 0.0], [-4.0, 0.0]].
    Hint: a stable sort gives places; a threshold gives too many.
    """
    ### BEGIN SOLUTION
    flat = W.flatten().clone()
    order = flat.abs().sort(stable=True).indices
    flat[order[: round(sparsity * flat.numel())]] = 0
    return flat.view(W.shape)
    ### END SOLUTION


# %% tags=["exercise-tests"]
tried = torch.tensor([[3.0, -1.0], [-4.0, 2.0]])
found = prune_smallest(tried, 0.5).tolist()
assert found != [[0.0, 0.0], [-4.0, 0.0]], "one too many: count, do not compare"
assert found != [[3.0, 0.0], [-4.0, 2.0]], "one too few: two of four go at 0.5"
assert found != [[0.0, -1.0], [0.0, 2.0]], "the smallest go, not the largest"
assert found != [[3.0, 0.0], [0.0, 2.0]], "magnitudes count, not signed values"
assert found == [[3.0, 0.0], [-4.0, 0.0]], "the two smallest go, the others stay"
assert tried.tolist() == [[3.0, -1.0], [-4.0, 2.0]], "work on a copy of W"
assert prune_smallest(tried, 0.0).tolist() == tried.tolist(), "at 0 nothing goes"
equal = prune_smallest(torch.ones(2, 3), 0.5).tolist()
assert equal != [[0.0] * 3] * 2, "of equal magnitudes only three of six go"
assert equal == [[0.0] * 3, [1.0] * 3], "of equal ones the first in row order go"
print(found)
### BEGIN HIDDEN TESTS
many = torch.arange(100.0, 0, -1).view(10, 10)
assert int((prune_smallest(many, 0.29) == 0).sum()) == 29, "round, do not cut off"
assert prune_smallest(many.double(), 0.3).flatten()[:70].tolist() == list(
    range(100, 30, -1)
)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: the cubic schedule
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Write the schedule of Zhu and Gupta, as training asks for it in every update. The mask grows at $t_0, t_0 + \Delta t, \ldots, t_0 + n \Delta t$ only.


# %% tags=["exercise"]
def share_at(t, final, begin, times, every):
    """Share of weights that is removed in update `t`; it starts from 0.

    Approach: find how many whole intervals of `every` have passed since `begin`, at
    most `times` of them; with d of them done it is final * (1 - (1 - d / times)^3).
    Example: final 0.8, begin 10, times 2, every 5: 0 at 14, 0.7 at 15, 0.8 at 20.
    Hint: before `begin` nothing is removed, and after the end it stays `final`.
    """
    ### BEGIN SOLUTION
    done = min(max(t - begin, 0) // every, times)
    return final * (1 - (1 - done / times) ** 3)
    ### END SOLUTION


# %% tags=["exercise-tests"]
def near(a, b):
    return abs(a - b) < 1e-9


assert near(share_at(10, 0.8, 10, 2, 5), 0.0), "at begin nothing has been removed yet"
assert not near(share_at(15, 0.8, 10, 2, 5), 0.1), (
    "cube what is left: 1 - (1 - d / n)^3"
)
assert not near(share_at(15, 0.8, 10, 2, 5), 0.4), "the schedule is cubic, not linear"
assert near(share_at(15, 0.8, 10, 2, 5), 0.7), "half way: 0.8 * (1 - 1/8)"
assert near(share_at(19, 0.8, 10, 2, 5), 0.7), "between two times the mask is held"
assert near(share_at(20, 0.8, 10, 2, 5), 0.8), "at the end it is final"
assert near(share_at(500, 0.8, 10, 2, 5), 0.8), "after the end it stays final"
assert near(share_at(3, 0.8, 10, 2, 5), 0.0), "before begin nothing is removed"
print([round(share_at(t, 0.8, 10, 2, 5), 3) for t in (9, 10, 15, 20)])
### BEGIN HIDDEN TESTS
grown = [share_at(t, 0.9, 0, 10, 3) for t in range(40)]
assert grown == sorted(grown) and grown[0] == 0
assert near(grown[6], 0.9 * (1 - 0.8**3)) and near(grown[-1], 0.9)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: compressed sparse rows
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# Take a matrix apart into the three lists of CSR.


# %% tags=["exercise"]
def to_csr(W):
    """(starts, columns, values) of `W` `[out, in]`, three lists of Python numbers.

    Approach: go through the rows; note the column and the value of every weight that is
    not 0; after each row append how many values there are so far. starts begins with 0.
    Example: [[0.0, 5.0], [0.0, 0.0], [7.0, 8.0]] gives ([0, 1, 1, 3], [1, 0, 1],
    [5.0, 7.0, 8.0]).
    Hint: an empty row repeats the start before it; starts has one entry more than rows.
    """
    ### BEGIN SOLUTION
    starts, columns, values = [0], [], []
    for row in W.tolist():
        for j, value in enumerate(row):
            if value != 0:
                columns.append(j)
                values.append(value)
        starts.append(len(values))
    return starts, columns, values
    ### END SOLUTION


# %% tags=["exercise-tests"]
starts, columns, values = to_csr(torch.tensor([[0.0, 5.0], [0.0, 0.0], [7.0, 8.0]]))
assert list(values) == [5.0, 7.0, 8.0], "the values that are not 0, row after row"
assert list(starts) != [1, 0, 2], "starts add up: 0, then all values so far"
assert list(starts) != [0, 1, 1], (
    "one more than rows: the last says where the last row ends"
)
assert list(starts) != [0, 1, 3], "an empty row has a start as well"
assert list(starts) == [0, 1, 1, 3], "after each row, how many values there are so far"
assert list(columns) != [1, 4, 5], (
    "columns count from 0 in each row, not over the matrix"
)
assert list(columns) == [1, 0, 1], "the column of each value"
print(list(starts), list(columns), list(values))
### BEGIN HIDDEN TESTS
matrix = torch.tensor([[0, -2.0, 0, 3], [0, 0, 0, 0], [1, 0, 0, 0]]).double()
assert tuple(map(list, to_csr(matrix))) == ([0, 2, 2, 3], [1, 3, 0], [-2.0, 3.0, 1.0])
assert tuple(map(list, to_csr(torch.zeros(2, 2)))) == ([0, 0, 0], [], [])
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: which format is smallest?
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Count bytes for float16 values: dense, bitmask, and CSR with 2-byte column indices and 4-byte row starts.


# %% tags=["exercise"]
def smallest_format(rows, columns, kept):
    """(name, bytes) of the smallest of "dense", "bitmask" and "csr".

    Approach: dense takes 2 bytes a weight; a bitmask 2 a kept value and a bit a weight,
    each row in whole bytes; csr 2 + 2 a kept value and 4 for each of rows + 1 starts.
    Of equal ones the first in this order counts as the smallest.
    Example: 4 rows of 8 columns with 20 kept: ("bitmask", 44).
    Hint: -(-a // b) rounds a / b up, in whole numbers.
    """
    ### BEGIN SOLUTION
    sizes = {
        "dense": 2 * rows * columns,
        "bitmask": rows * -(-columns // 8) + 2 * kept,
        "csr": 4 * kept + 4 * (rows + 1),
    }
    name = min(sizes, key=sizes.get)
    return name, sizes[name]
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert smallest_format(4, 8, 20) != ("dense", 64), "a bit a weight, not a byte"
assert smallest_format(4, 8, 20) == ("bitmask", 44), "4 bytes of mask, 40 of values"
assert smallest_format(4, 8, 32) == ("dense", 64), (
    "a full matrix is smallest when dense"
)
assert smallest_format(4, 9, 20) != ("bitmask", 45), (
    "each row of the mask in whole bytes"
)
assert smallest_format(4, 9, 20) == ("bitmask", 48), "9 columns take 2 bytes of mask"
assert smallest_format(2, 800, 10) != ("csr", 48), "rows + 1 starts, not rows"
assert smallest_format(2, 800, 10) == ("csr", 52), (
    "40 for the values, 12 for the starts"
)
print(smallest_format(4, 8, 20), smallest_format(2, 800, 10))
### BEGIN HIDDEN TESTS
assert smallest_format(1, 16, 15) == ("dense", 32), "of equal ones dense is named first"
assert smallest_format(1024, 1024, 0) == ("csr", 4100)
assert smallest_format(1024, 1024, 2**19) == ("bitmask", 2**17 + 2**20)
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - S. Han, J. Pool, J. Tran, W. Dally, *Learning both Weights and Connections for Efficient Neural Networks*, NeurIPS 2015, arXiv 1506.02626 [@han2015learning].
# - M. Zhu, S. Gupta, *To prune, or not to prune: exploring the efficacy of pruning for model compression*, 2017, arXiv 1710.01878 [@zhu2017prune].
# - J. Frankle, M. Carbin, *The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks*, ICLR 2019, arXiv 1803.03635 [@frankle2018lottery].
# - J. Frankle, G. K. Dziugaite, D. M. Roy, M. Carbin, *Linear Mode Connectivity and the Lottery Ticket Hypothesis*, ICML 2020, arXiv 1912.05671
#   [@frankle2019linear].
# - A. Mishra and others, *Accelerating Sparse Deep Neural Networks*, 2021, arXiv 2104.08378 [@mishra2021sparse].
# - The question on sizes [@wandasize2024], and vLLM's pull requests that took in [@vllm2024sparse24] and removed [@vllm2026sparse24] its 2:4 kernels.
#
# ## Next
#
# `structured_pruning` removes whole heads, neurons and layers, so that the model is smaller without any sparse format. `one_shot_pruning` looks at inputs before it
# removes a weight.
