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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/gptq_ablations.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/gptq_ablations.ipynb)
# # GPTQ, part by part: what calibration, order and grids are worth
#
# *Large Model Quantization: a deep dive. Chronology, companion of `gptq_demo`.*

# %% [markdown]
# GPTQ [@frantar2022gptq] is a recipe of many parts, and `gptq_demo` builds it. Here one part is changed at a time, at 3 bits, where differences show.
# The question is: **which parts matter, and how do we know?** When you have worked through this notebook you will be able to
#
# - tell a difference between two settings from chance, by pairs on six calibration texts and by two standard errors;
# - say how much calibration text GPTQ needs on a small model, and what the wrong text costs;
# - say what grids, damping, the order of the columns and the choice of inputs do there, and how many bits they store;
# - explain with a layer's Hessian why the order matters so much more in SmolLM2.
#
# It takes about 45 minutes to read and work. You need `gptq_demo`. No profile needs a GPU; `quick` runs in about a minute, `cpu` in about five on two cores.

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
import argparse
import inspect
import itertools
import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import (
    compare_all,
    continuations,
    difference,
    format_difference,
    over_cuts,
    prompt_of,
)
from course_utils.models import linear_layers, load_model
from course_utils.plotting import COLOURS, nats_against_bits, new_figure, table
from course_utils.plotting.diagrams import block_walk
from course_utils.profiles import resolve
from course_utils.quantizers.gptq import GPTQ, gptq_codes
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto, or the name of one model
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## What counts as a difference
#
# GPTQ reads a **calibration text**. For every layer it sums up the layer's inputs into the **Hessian** $H = \frac2n x^\top x$, which says how much an
# error of each weight disturbs the outputs. A **cut** is a set of windows from random places of the calibration text. Another cut gives
# another Hessian, other codes, and another loss. A setting that was tried on one cut has therefore shown little. Three things help:
#
# - **pairs**: both settings read the *same* cut and are evaluated on the same tokens, and their losses are subtracted;
# - **repetition**: six cuts give six differences, whose standard error says how far other cuts would move their mean;
# - **documents**: the evaluation text is a sample, too. A second standard error says how far other documents would move it.
#
# A difference counts below only if it exceeds twice *both* errors. All else is called "not distinguished".

# %%
model, tokenizer = load_model("course-lm", dtype=profile.dtype, device=profile.device)
protocol = profile.protocol(model)
text = protocol.text(tokenizer)
print(f"course-lm, evaluated on {protocol}")


# %% [markdown]
# `quantize_model` walks through the model and packs the codes. The helper decodes them once, into a float copy. The copy computes what the packed model
# computes, and faster here; the bits are those of the packed codes.


# %%
@torch.no_grad()
def quantized(name, method, cut=None):
    """A float copy with the values of the codes, and the stored bits per weight."""
    options = {"dtype": profile.dtype, "device": profile.device}
    packed, copy = (load_model(name, **options).model for _ in range(2))
    report = quantize_model(packed, method, calibration=cut)
    for layer in linear_layers(copy):
        codes = packed.get_submodule(layer.name).quantized_weight
        layer.weight.copy_(codes.dequantize())  # [out, in]
    return copy, report.bits_per_weight


def on_cuts(method, cuts):
    """A comparison with float course-lm for each cut, and the stored bits."""
    made = [quantized("course-lm", method, cut) for cut in cuts]
    models = {i: quantized_model for i, (quantized_model, _) in enumerate(made)}
    return list(compare_all(models, model, text).values()), made[0][1]


# %% [markdown]
# Two settings are then two lists of comparisons, one for each cut. `gap` gives their mean difference with both errors. For the second it takes each
# token's mean loss over the cuts, and asks how much that varies from document to document.


# %%
def gap(runs, others):
    """Nats that `runs` lose more than `others`: error over cuts, and over documents."""
    pairs = zip(runs, others, strict=True)
    of_cuts = over_cuts([difference(a, b).value for a, b in pairs])
    a, b = (
        replace(of[0], nats=torch.stack([run.nats for run in of]).mean(0))
        for of in (runs, others)
    )
    return of_cuts, difference(a, b)


# %% tags=["folded"]
# Helpers: the verdict of two errors, and rows of tables.
def verdict(of_cuts, of_documents):
    if not (of_cuts.distinguished and of_documents.distinguished):
        return "not distinguished"
    return "worse" if of_cuts.value > 0 else "better"


def mean(what, runs):
    return sum(getattr(run, what).value for run in runs) / len(runs)


def quality(label, runs, bits):
    row = {"model": label, "bits per weight": bits, "nats lost": mean("loss", runs)}
    row |= {"KL divergence": mean("divergence", runs)}
    perplexity = runs[0].reference.perplexity * math.exp(row["nats lost"])
    return row | {"same top token": mean("agreement", runs), "perplexity": perplexity}


def more(label, runs, others, bits):
    of_cuts, of_documents = gap(runs, others)
    row = {"setting": label, "bits per weight": bits, "nats more": of_cuts.value}
    row |= {"± cuts": of_cuts.error, "± documents": of_documents.error}
    return row | {"verdict": verdict(of_cuts, of_documents)}


# %% tags=["folded"]
# Helpers: how tables write numbers, and records.
SHOWN = {"bits per weight": ".3f", "nats lost": ".4f", "KL divergence": ".4f"}
SHOWN |= {"same top token": ".1%", "perplexity": ".2f"}
MORE = {"bits per weight": ".3f", "nats more": "+.4f"}
MORE |= {"± cuts": ".4f", "± documents": ".4f"}


def keep(key, value, tolerance, unit="nats"):
    key = f"gptq_ablations.course-lm.{key}"
    record(key, value, unit, tolerance, model="course-lm", **protocol.fields)


def keep_gap(key, runs, others):
    of_cuts, of_documents = gap(runs, others)
    keep(key, of_cuts.value, 0.005)
    keep(f"{key}_cuts_error", of_cuts.error, 0.003)
    keep(f"{key}_documents_error", of_documents.error, 0.003)


def keep_quality(key, runs, bits):
    row = quality("", runs, bits)
    error = sum(run.loss.error for run in runs) / len(runs)
    keep(f"{key}.loss", row["nats lost"], 0.005)
    keep(f"{key}.loss_error", error, 0.003)
    keep(f"{key}.perplexity", row["perplexity"], 0.005 * row["perplexity"], "")
    keep(f"{key}.bits_per_weight", bits, 0, "bits")


# %% [markdown]
# First the paper's setting against round-to-nearest, which needs no calibration. Both have groups of 128 weights that share a grid.

# %%
sequences = 8  # of 256 tokens, in a cut
n_cuts = profile.pick(quick=2, cpu=6)
cuts = [
    calibration_tokens(tokenizer, sequences, 256, seed=profile.seed + i)
    for i in range(n_cuts)
]

# %%
paper, bits = on_cuts(GPTQ(n_bits=3), cuts)
nearest, _ = on_cuts(get_method("affine", n_bits=3, group_size=128), [None])
nearest *= n_cuts  # the same whatever the cut
print("GPTQ's nats lost:", *(f"{run.loss.value:.4f}" for run in paper))
table(
    [
        quality("round-to-nearest", nearest, bits),
        quality("GPTQ, mean of the cuts", paper, bits),
    ],
    SHOWN,
)

# %%
of_cuts, of_documents = gap(paper, nearest)
print("GPTQ less round-to-nearest, over cuts:     ", format_difference(of_cuts))
print("GPTQ less round-to-nearest, over documents:", format_difference(of_documents))

# %% tags=["folded"]
# Records: the paper's setting and round-to-nearest.
of_each = [run.loss.value for run in paper]
keep_quality("order.as_they_come", paper, bits)
keep_gap("gptq_over_nearest", paper, nearest)
keep("luckiest_cut", min(of_each), 0.008)
keep("unluckiest_cut", max(of_each), 0.008)
keep("nearest.loss", nearest[0].loss.value, 0.002)
keep("float.perplexity", nearest[0].reference.perplexity, 0.05, "")

# %% [markdown]
# Rounding to nearest loses {{gptq_ablations.course-lm.nearest.loss:.3f}} nats per token in the recorded run, and GPTQ
# {{gptq_ablations.course-lm.order.as_they_come.loss:.3f}}: a difference of {{gptq_ablations.course-lm.gptq_over_nearest:+.3f}} ±
# {{gptq_ablations.course-lm.gptq_over_nearest_cuts_error:.3f}} (cuts) ± {{gptq_ablations.course-lm.gptq_over_nearest_documents_error:.3f}}
# (documents), many times both errors. The luckiest cut loses {{gptq_ablations.course-lm.luckiest_cut:.3f}} nats, the unluckiest
# {{gptq_ablations.course-lm.unluckiest_cut:.3f}}. Settings that differ by less cannot be ranked by one cut each.
#
# ## What a lost nat reads like
#
# One prompt, continued by the float model and by GPTQ's models on the first cut. Every token is the likeliest one.

# %%
widths = {n: quantized("course-lm", GPTQ(n_bits=n), cuts[0]) for n in (8, 4, 3, 2)}
written = {f"{n} bits": of_width for n, (of_width, _) in widths.items()}
speakers = {"float": model, **written}
print(continuations(speakers, tokenizer, prompt_of("course-lm"), new_tokens=24))

# %%
lost = compare_all(written, model, text).values()
table(
    [
        quality(f"GPTQ, {n} bits", [of_width], stored)
        for (n, (_, stored)), of_width in zip(widths.items(), lost, strict=True)
    ],
    SHOWN,
)

# %% tags=["folded"]
# Records: what GPTQ loses at each width, on the first cut.
for n, of_width in zip(widths, lost, strict=True):
    keep(f"width.{n}_bits.loss", of_width.loss.value, 0.01)
    keep(f"width.{n}_bits.agreement", of_width.agreement.value, 0.01, "")

# %% [markdown]
# At 8 bits the model gives the float model's likeliest token {{gptq_ablations.course-lm.width.8_bits.agreement:.1%}} of the time in the recorded
# run, at 3 bits {{gptq_ablations.course-lm.width.3_bits.agreement:.0%}}, at 2 bits {{gptq_ablations.course-lm.width.2_bits.agreement:.0%}}. Two bits
# lose {{gptq_ablations.course-lm.width.2_bits.loss:.2f}} nats. Greedy text turns at the first token that differs, so a small loss can change a sentence
# without making it worse. The 2-bit text is no longer correct English.
#
# ## How much calibration text?
#
# Without text there is no Hessian, and GPTQ without correlations is round-to-nearest (exercise 1). The widest layer of course-lm has 1,024 input features.
# A cut of one sequence has 256 tokens: then that layer's Hessian is singular, and the package warns. Only **damping** makes it
# invertible: 1% of the mean of its diagonal, added to each diagonal entry.

# %%
warnings.filterwarnings("ignore", "the Hessian of 1024 features")  # said above
by_amount = {sequences: paper}
for n in profile.pick(quick=(1,), cpu=(1, 32)):
    seeds = range(profile.seed, profile.seed + n_cuts)
    some = [calibration_tokens(tokenizer, n, 256, seed=seed) for seed in seeds]
    by_amount[n], _ = on_cuts(GPTQ(n_bits=3), some)
by_amount = dict(sorted(by_amount.items()))
table([more(f"{n} x 256", by_amount[n], nearest, bits) for n in by_amount], MORE)

# %% tags=["folded"]
# Figure: nats lost against the number of calibration sequences.
losses = [over_cuts([run.loss.value for run in runs]) for runs in by_amount.values()]
points = list(by_amount), [x.value for x in losses], [x.error for x in losses]
figure = nats_against_bits(
    {"course-lm, 3 bits": {"GPTQ, error over cuts": points}},
    xlabel="calibration sequences of 256 tokens",
)
axis = figure.axes[0]
level = {"color": COLOURS["orange"], "linestyle": ":", "label": "round-to-nearest"}
axis.axhline(nearest[0].loss.value, **level)
axis.set_xscale("log", base=2)
axis.set_xticks(list(by_amount), list(by_amount))
axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
plt.show()

# %% tags=["folded"]
# Records: what each amount gains over round-to-nearest, and over the usual amount.
for n, runs in by_amount.items():
    keep_gap(f"amount.{n}.over_nearest", runs, nearest)
if 32 in by_amount:
    keep_gap("amount.32.over_8", by_amount[32], paper)

# %% [markdown]
# *Figure: nats that course-lm loses at 3 bits against the number of calibration sequences, with bars of two standard errors over six cuts. A dotted
# line marks round-to-nearest, a dashed line the float model.*
#
# The differences are from round-to-nearest, so gains are negative. One sequence is not distinguished from it: {{gptq_ablations.course-lm.amount.1.over_nearest:+.3f}} ± {{gptq_ablations.course-lm.amount.1.over_nearest_cuts_error:.3f}} (cuts) ± {{gptq_ablations.course-lm.amount.1.over_nearest_documents_error:.3f}} (documents) nats
# in the recorded run. Eight sequences gain clearly, and 32 gain more: against eight {{gptq_ablations.course-lm.amount.32.over_8:+.4f}} ± {{gptq_ablations.course-lm.amount.32.over_8_cuts_error:.4f}} (cuts) ± {{gptq_ablations.course-lm.amount.32.over_8_documents_error:.4f}} (documents).
# A Hessian that is mostly damping knows little of which features go together.
#
# ## Does it have to be the right text?
#
# The same amount from elsewhere: source code of a Python module, and tokens drawn at random. Six cuts of each. These are other texts, so the cuts
# do not pair up; only the evaluation's tokens do. The rows are compared with the paper's setting on Factbook text.

# %%
draw = torch.Generator().manual_seed(profile.seed)
shape = n_cuts, sequences
source = inspect.getsource(argparse)
code = tokenizer(source, verbose=False, return_tensors="pt").input_ids[0]  # [tokens]
places = torch.randint(len(code) - 255, (*shape, 1), generator=draw)
wrong = {
    "Python source": code[places + torch.arange(256)],  # [cuts, sequences, 256]
    "random tokens": torch.randint(len(tokenizer), (*shape, 256), generator=draw),
}

# %%
texts = {label: on_cuts(GPTQ(n_bits=3), many)[0] for label, many in wrong.items()}
table([more(label, runs, paper, bits) for label, runs in texts.items()], MORE)

# %% [markdown]
# And against round-to-nearest, which reads nothing:

# %%
table([more(label, runs, nearest, bits) for label, runs in texts.items()], MORE)

# %% tags=["folded"]
# Records: the wrong texts, against the right one and against round-to-nearest.
for label, runs in texts.items():
    key = f"text.{label.replace(' ', '_')}"
    keep_gap(f"{key}.over_right", runs, paper)
    keep_gap(f"{key}.over_nearest", runs, nearest)

# %% [markdown]
# The text matters. Python source costs {{gptq_ablations.course-lm.text.Python_source.over_right:+.3f}} ± {{gptq_ablations.course-lm.text.Python_source.over_right_cuts_error:.3f}} (cuts) ± {{gptq_ablations.course-lm.text.Python_source.over_right_documents_error:.3f}} (documents) more than Factbook text in the recorded run, random tokens
# {{gptq_ablations.course-lm.text.random_tokens.over_right:+.3f}} ± {{gptq_ablations.course-lm.text.random_tokens.over_right_cuts_error:.3f}} (cuts) ± {{gptq_ablations.course-lm.text.random_tokens.over_right_documents_error:.3f}} (documents). Yet both still gain over round-to-nearest: {{gptq_ablations.course-lm.text.Python_source.over_nearest:+.3f}} and
# {{gptq_ablations.course-lm.text.random_tokens.over_nearest:+.3f}}. So a part of what GPTQ uses belongs to the model, whatever it reads. The two wrong texts were not compared with each other.
#
# ## Grids, order, damping, and whose inputs
#
# Now the settings, one changed at a time, each on the same six cuts as the paper's setting. Three of them need a word.
#
# - **Static grids** are all found on the float weights, before any column is rounded. By default a group's grid is found when its first column is reached, on weights
#   that have taken up errors by then.
# - **Act-order** rounds the columns with the largest inputs first, by the Hessian's diagonal. With static grids the groups stay where they are. Without
#   them the group of each column must be stored (exercise 2).
# - **Float inputs**: GPTQ calibrates a **block** (attention and MLP of one layer) on what the *quantized* blocks before it put out. AWQ takes the *float* blocks' outputs.

# %% tags=["folded"]
# Diagram: calibration with the outputs of quantized blocks, and of float blocks.
block_walk()
plt.show()


# %% [markdown]
# *Diagram: three steps of calibration block by block. On the left the text passes the blocks that are quantized already, as in GPTQ; on the right the
# float blocks, as in AWQ.*


# %%
@dataclass(frozen=True)
class FloatInputs(GPTQ):
    """GPTQ whose Hessians come from the float model."""

    prefix: ClassVar[str] = "float"


# %%
settings = {
    "static grids": GPTQ(n_bits=3, static_groups=True),
    "act-order, static grids": GPTQ(n_bits=3, static_groups=True, act_order=True),
    "groups of 32": GPTQ(n_bits=3, group_size=32),
    "damping 0.0001": GPTQ(n_bits=3, damping=1e-4),
    "float inputs": FloatInputs(n_bits=3),
}

# %%
chosen = list(settings)[: profile.pick(quick=2, cpu=len(settings))]
tried = {label: on_cuts(settings[label], cuts) for label in chosen}
rows = [more(label, runs, paper, stored) for label, (runs, stored) in tried.items()]
table(rows, MORE)

# %% tags=["folded"]
# Figure: what each setting loses more than the paper's, with both errors.
figure, axis = new_figure(height=0.9 + 0.45 * len(rows))
for place, row in enumerate(rows):
    face = "white" if row["verdict"] == "not distinguished" else None
    for shift, kind, colour in ((-0.1, "cuts", "blue"), (0.1, "documents", "orange")):
        bar = {"xerr": 2 * row[f"± {kind}"], "color": COLOURS[colour], "capsize": 3}
        label = None if place else f"error over {kind}"
        at = row["nats more"], place + shift
        axis.errorbar(*at, marker="o", markerfacecolor=face, label=label, **bar)
axis.axvline(0, color=COLOURS["grey"], linestyle="--", label="the paper's setting")
names = [f"{row['setting']} ({row['bits per weight']:.2f} bits)" for row in rows]
axis.set_yticks(range(len(rows)), names)
axis.invert_yaxis()
axis.set_xlabel("nats lost more per token (bars: 2 standard errors)")
figure.legend(fontsize=8, loc="outside lower center", ncols=3)
plt.show()

# %% tags=["folded"]
# Records: every setting, and how it differs from the paper's.
keys = {"static grids": "order.as_they_come_static"}
keys |= {"act-order, static grids": "order.act-order_static"}
for label, (runs, stored) in tried.items():
    key = keys.get(label, "setting." + label.replace(" ", "_").replace(".", "_"))
    keep_quality(key, runs, stored)
    keep_gap(f"{key}.over_paper", runs, paper)
if "act-order, static grids" in tried:
    ordered = (tried[label][0] for label in ("act-order, static grids", "static grids"))
    keep_gap("order.act-order_over_static", *ordered)

# %% [markdown]
# *Figure: for each setting the nats that it loses more than the paper's, left of the dashed line fewer. The bars are two standard errors, blue over cuts
# and orange over documents; hollow points are not distinguished.*
#
# Two settings are distinguished in the recorded run. Groups of 32 lose less, {{gptq_ablations.course-lm.setting.groups_of_32.over_paper:+.3f}} ± {{gptq_ablations.course-lm.setting.groups_of_32.over_paper_cuts_error:.3f}} (cuts) ± {{gptq_ablations.course-lm.setting.groups_of_32.over_paper_documents_error:.3f}} (documents), and they buy it:
# {{gptq_ablations.course-lm.setting.groups_of_32.bits_per_weight:.2f}} bits instead of {{gptq_ablations.course-lm.order.as_they_come.bits_per_weight:.2f}}. A hundredth of the damping costs
# {{gptq_ablations.course-lm.setting.damping_0_0001.over_paper:+.4f}} ± {{gptq_ablations.course-lm.setting.damping_0_0001.over_paper_cuts_error:.4f}} (cuts) ± {{gptq_ablations.course-lm.setting.damping_0_0001.over_paper_documents_error:.4f}} (documents): eight sequences do not support so sharp a Hessian.
#
# Static grids, act-order with them, and float inputs are not distinguished from the paper's setting. Between act-order and static grids alone, the order's share is
# {{gptq_ablations.course-lm.order.act-order_over_static:+.4f}} ± {{gptq_ablations.course-lm.order.act-order_over_static_cuts_error:.4f}} (cuts) ± {{gptq_ablations.course-lm.order.act-order_over_static_documents_error:.4f}} (documents): not distinguished either. For float inputs we see one likely reason. GPTQ
# measures a layer's error on the inputs that it gets, but never repairs what went wrong before.
#
# ## Massive features: where the order counts
#
# In many models a few features are massive on a few tokens [@sun2024massive]. The input's mean square is the Hessian's diagonal (but for a factor of 2). We look at
# each block's second MLP layer, and take the layer whose largest feature exceeds the median one most.
#
# SmolLM2 comes as a file of 4-bit codes. On their grid methods of 4 bits would look better than they are. `smollm2-135m-dithered` is the same model with seeded noise of
# one step on its weights, except in the 5% of each layer's columns with the largest inputs. Its values lie on no grid. By `course dither` the noise
# costs 0.07 nats per token on this text. The course keeps this one reference at 3 bits as well.


# %% tags=["folded"]
# Helper: the mean square of every input feature of the second MLP layers.
@torch.no_grad()
def mean_squares(name, sequences):
    """Mean square `[in]` of the inputs, for the second MLP layer of each block."""
    options = {"dtype": profile.dtype, "device": profile.device}
    model, tokenizer = load_model(name, **options)
    window, sums = profile.protocol(model).window, {}

    def add(layer, x):  # x: [1, window, in]
        sums[layer] = sums.get(layer, 0) + x.double().square().sum((0, 1))

    for layer in linear_layers(model):
        if layer.name.endswith(("mlp.c_proj", "mlp.down_proj")):
            layer.module.register_forward_pre_hook(
                lambda _, args, name=layer.name: add(name, args[0])
            )
    cut = calibration_tokens(tokenizer, sequences, window, seed=profile.seed)
    for sequence in cut:
        model(input_ids=sequence[None].to(profile.device))
    return {layer: total / cut.numel() for layer, total in sums.items()}


# %%
big = profile.models[-1].replace("q4_1", "dithered")
hardest = {}
for name in dict.fromkeys(["course-lm", big]):
    layers = mean_squares(name, 4)
    layer = max(layers, key=lambda of: layers[of].max() / layers[of].median())
    hardest[f"{name}, {layer}"] = layers[layer].cpu()

# %%
rows = [
    {
        "layer": layer,
        "largest / median": (d.max() / d.median()).item(),
        "columns behind": len(d) - 1 - int(d.argmax()),
        "damping / median": (0.01 * d.mean() / d.median()).item(),
    }
    for layer, d in hardest.items()
]
table(rows, {"largest / median": ",.0f", "damping / median": ".2f"})

# %% tags=["folded"]
# Figure: the mean square of every feature of these layers.
figure, axes = new_figure(1, len(hardest), squeeze=False)
for axis, (title, d) in zip(axes[0], hardest.items(), strict=True):
    axis.scatter(range(len(d)), d, s=5, color=COLOURS["blue"], label="a feature")
    level = {"color": COLOURS["green"], "linestyle": "--", "label": "median"}
    axis.axhline(d.median().item(), **level)
    level = {"color": COLOURS["red"], "linestyle": ":", "label": "damping"}
    axis.axhline(0.01 * d.mean().item(), linewidth=2, **level)
    axis.set_yscale("log")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("input feature, in the order of the columns")
axes[0][0].set_ylabel("mean square")
handles = axes[0][0].get_legend_handles_labels()
figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
plt.show()

# %% tags=["folded"]
# Records: how unequal the features are.
for row in rows:
    name = row["layer"].split(", ")[0]
    for key, what in (("ratio", "largest / median"), ("damping", "damping / median")):
        key = f"gptq_ablations.{name}.massive.{key}"
        record(key, row[what], "", 0.05 * row[what], model=name)

# %% [markdown]
# *Figure: mean square of every input feature of one layer, on a logarithmic axis, a panel a model. Dashed: the median feature. Dotted: what damping adds to
# each.*
#
# The largest mean square is {{gptq_ablations.course-lm.massive.ratio:.0f}} times the median in course-lm, and {{gptq_ablations.smollm2-135m-dithered.massive.ratio:,.0f}} times in SmolLM2 in the recorded run.
# That has two effects. The rounding errors of this feature's weights count most, and only columns behind it can make up for them: so it should come first. And
# damping is a share of the *mean*, which this one feature lifts. It adds {{gptq_ablations.course-lm.massive.damping:.2f}} of the median in course-lm, and
# {{gptq_ablations.smollm2-135m-dithered.massive.damping:.1f}} times the median in SmolLM2. There damping exceeds nearly all ordinary features of this layer, and GPTQ learns little of how they go together.
#
# The experiment changes the order alone: static grids both times, the same bytes, the same cut. Quantizing this model takes long, so there is one cut, and the error is over documents only.

# %%
options = {"dtype": profile.dtype, "device": profile.device}
big_model, big_tokenizer = load_model(big, **options)
big_protocol = profile.protocol(big_model)
size = 128 if big_model.config.hidden_size % 128 == 0 else 64
print(f"{big}, 3 bits in groups of {size}, evaluated on {big_protocol}")

# %%
cut = calibration_tokens(big_tokenizer, 4, big_protocol.window, seed=profile.seed)
static = GPTQ(n_bits=3, group_size=size, static_groups=True)
ordered, stored = {}, {}
for label, act_order in (("as they come", False), ("act-order", True)):
    method = replace(static, act_order=act_order)
    ordered[label], stored[label] = quantized(big, method, cut)

# %%
found = compare_all(ordered, big_model, big_protocol.text(big_tokenizer))
of_order = difference(found["act-order"], found["as they come"])
print(f"act-order less as they come: {format_difference(of_order)}")
table([quality(label, [found[label]], stored[label]) for label in found], SHOWN)

# %%
speakers = {"float": big_model, **ordered}
print(continuations(speakers, big_tokenizer, prompt_of(big)))

# %% tags=["folded"]
# Records: the two orders on the larger model.
by, key = {"model": big, **big_protocol.fields}, f"gptq_ablations.{big}"
for label, comparison in found.items():
    of = f"{key}.one_cut.{label.replace(' ', '_')}_static"
    perplexity = comparison.perplexity.perplexity
    record(f"{of}.loss", comparison.loss.value, "nats", 0.05, **by)
    record(f"{of}.loss_error", comparison.loss.error, "nats", 0.01, **by)
    record(f"{of}.perplexity", perplexity, "", 0.05 * perplexity, **by)
    record(f"{of}.agreement", comparison.agreement.value, "", 0.02, **by)
    record(f"{of}.bits_per_weight", stored[label], "bits", 0, **by)
record(f"{key}.one_cut.order", of_order.value, "nats", 0.05, **by)
record(f"{key}.one_cut.order_documents_error", of_order.error, "nats", 0.01, **by)
perplexity = found["act-order"].reference.perplexity
record(f"{key}.float.perplexity", perplexity, "", 0.05, **by)

# %% [markdown]
# The order alone changes what SmolLM2 loses by {{gptq_ablations.smollm2-135m-dithered.one_cut.order:+.2f}} ± {{gptq_ablations.smollm2-135m-dithered.one_cut.order_documents_error:.2f}} nats per token in the recorded run,
# from {{gptq_ablations.smollm2-135m-dithered.one_cut.as_they_come_static.loss:.2f}} to {{gptq_ablations.smollm2-135m-dithered.one_cut.act-order_static.loss:.2f}}, at the same bytes. Perplexity falls from
# {{gptq_ablations.smollm2-135m-dithered.one_cut.as_they_come_static.perplexity:.1f}} to {{gptq_ablations.smollm2-135m-dithered.one_cut.act-order_static.perplexity:.1f}}; the float model has {{gptq_ablations.smollm2-135m-dithered.float.perplexity:.1f}}.
# On course-lm the same change was not distinguished. Neither 3-bit model keeps to the ocean that the float model describes.
#
# ## What you saw
#
# In the recorded run, at 3 bits:
#
# - **Chance.** The same recipe on six cuts lost between {{gptq_ablations.course-lm.luckiest_cut:.3f}} and {{gptq_ablations.course-lm.unluckiest_cut:.3f}} nats. Pairs and two errors told what remains.
# - **Amount.** One sequence gained nothing that we could distinguish, eight lost {{gptq_ablations.course-lm.amount.8.over_nearest:+.3f}} nats against round-to-nearest, 32 sequences
#   {{gptq_ablations.course-lm.amount.32.over_nearest:+.3f}}.
# - **Text.** The wrong text cost {{gptq_ablations.course-lm.text.random_tokens.over_right:+.3f}} (random tokens) and {{gptq_ablations.course-lm.text.Python_source.over_right:+.3f}} nats (Python), and still beat round-to-nearest.
# - **Settings.** Smaller groups changed the loss by {{gptq_ablations.course-lm.setting.groups_of_32.over_paper:+.3f}} nats, paid with stored bits, and too little damping cost
#   {{gptq_ablations.course-lm.setting.damping_0_0001.over_paper:+.4f}}. Static grids, order and float inputs were not distinguished on course-lm.
# - **Order.** SmolLM2 has a feature {{gptq_ablations.smollm2-135m-dithered.massive.ratio:,.0f}} times the median. There act-order changed the loss by {{gptq_ablations.smollm2-135m-dithered.one_cut.order:+.2f}} nats, and stored no byte more.
#
# ## Limits
#
# - Most of it is one model of 4 million parameters, at 3 bits, on one domain. The order of columns shows how far another model can differ.
# - Six cuts give an error that is itself uncertain by a third. Chance takes one such mean in ten beyond two of its errors, and several settings were tried. That both
#   errors must be exceeded guards against it in part.
# - On SmolLM2 one cut was tried: its error says nothing of other calibration texts.
# - The settings were changed one at a time. Two changes together need not add up.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: when GPTQ does nothing
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Return a Hessian of `n` features, not a multiple of the identity, for which GPTQ gives the nearest codes for *every* weight matrix. Then
# return one for which it does not.


# %% tags=["exercise"]
def two_hessians(n):
    """(useless, useful) Hessians `[n, n]`: symmetric, positive definite.

    Approach: what does U look like when no feature is correlated with another?
    Example: for n = 3 both are [3, 3].
    Hint: torch.diag; and torch.full plus a diagonal.
    """
    ### BEGIN SOLUTION
    useless = torch.diag(torch.arange(1.0, n + 1).double())
    useful = torch.full((n, n), 0.9).double() + 0.1 * torch.eye(n)
    return useless, useful
    ### END SOLUTION


# %% tags=["exercise-tests"]
draw = torch.Generator().manual_seed(0)
useless, useful = two_hessians(16)
assert useless.diagonal().std() > 0, "not a multiple of the identity, please"
trial = torch.randn(6, 16, generator=draw)
plain_codes = gptq_codes(trial, torch.eye(16).double(), group_size="row").codes
same = gptq_codes(trial, useless, group_size="row").codes
assert torch.equal(same, plain_codes), "errors must have nowhere to go: a diagonal H"
different = gptq_codes(trial, useful, group_size="row").codes
assert not torch.equal(different, plain_codes), "correlated features move the errors"
print(f"{(different != plain_codes).float().mean():.0%} of the codes changed")
### BEGIN HIDDEN TESTS
for h in two_hessians(5):
    assert torch.equal(h, h.T), "a Hessian is symmetric"
    assert torch.linalg.eigvalsh(h).min() > 0, "a Hessian has positive eigenvalues"
assert torch.equal(h := two_hessians(5)[0], h.diagonal().diag()), "for *every* weight"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: the groups of act-order
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# With act-order and without static grids, GPTQ makes its groups of columns in the order in which it rounds them. The model file must then say which group each
# column belongs to. Return that list.


# %% tags=["exercise"]
def act_order_groups(diagonal, group_size):
    """The group `[in]` of each column, in W's own order; `diagonal` `[in]` is H's.

    Approach: round the columns with the largest diagonal first, equal ones from left to
    right. The first `group_size` columns rounded are group 0, the next ones group 1.
    Example: a diagonal of 4, 9, 1, 16, 25, 36 in groups of 2 gives 2, 1, 2, 1, 0, 0.
    Hint: one argsort says which column stands at each place; you want the reverse.
    """
    ### BEGIN SOLUTION
    order = diagonal.argsort(descending=True, stable=True)  # column at each place
    place = order.argsort()  # place of each column
    return place // group_size
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = list(map(int, act_order_groups(torch.tensor([4.0, 9, 1, 16, 25, 36]), 2)))
assert found != [0, 0, 1, 1, 2, 2], "these are the groups of neighbours: no act-order"
assert found != [0, 1, 0, 1, 2, 2], "the largest diagonal comes first, not the smallest"
assert found != [2, 2, 1, 0, 0, 1], "this is by place: say it for each column"
assert found == [2, 1, 2, 1, 0, 0], f"2, 1, 2, 1, 0, 0 expected, got {found}"
ties = list(map(int, act_order_groups(torch.ones(64), 16)))
assert ties == [i // 16 for i in range(64)], "equal columns stay from left to right"
print("groups:", found)
### BEGIN HIDDEN TESTS
draw = torch.Generator().manual_seed(1)
diagonal = torch.rand(32, generator=draw, dtype=torch.float64) + 0.1
trial = torch.randn(3, 32, generator=draw)
real = gptq_codes(trial, diagonal.diag(), group_size=8, act_order=True).group_index
assert list(map(int, act_order_groups(diagonal, 8))) == real.tolist(), (
    "as the package's"
)
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: the luckiest of three
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Somebody tries a setting on `k` cuts and tells the best loss. By how much does that flatter the setting? Return the loss that will be told on average.


# %% tags=["exercise"]
def best_of(losses, k):
    """Mean of the best loss over all choices of `k` different cuts; `losses`: a list.

    Approach: each choice of k of the cuts is as likely as any other, and tells its
    smallest loss. `k` is 1 to the number of cuts.
    Example: [1, 2, 3] and k = 2 give 4/3: the three pairs tell 1, 1 and 2.
    Hint: itertools.combinations.
    """
    ### BEGIN SOLUTION
    told = [min(chosen) for chosen in itertools.combinations(losses, k)]
    return sum(told) / len(told)
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = best_of([1, 2, 3], 2)
assert abs(found - 14 / 9) > 1e-9, "the cuts are different: none is drawn twice"
assert abs(found - 8 / 3) > 1e-9, "the best loss is the smallest"
assert abs(found - 4 / 3) < 1e-9, f"the pairs tell 1, 1 and 2: 4/3, got {found}"
losses = [0.068, 0.061, 0.074, 0.064, 0.070, 0.059]
assert abs(best_of(losses, 1) - sum(losses) / 6) < 1e-9, "of one cut: the plain mean"
assert abs(best_of(losses, 6) - 0.059) < 1e-9, "of all cuts: always the best one"
flattered = best_of(losses, 1) - best_of(losses, 3)
print(f"the luckiest of three flatters by {flattered:.4f} nats")
### BEGIN HIDDEN TESTS
assert best_of([0.3, 0.3, 0.3, 0.9], 2) == 0.3, "equal losses are different cuts"
found = best_of([0.5, 0.1, 0.9, 0.7], 2)
expected = (3 * 0.1 + 2 * 0.5 + 0.7) / 6
assert abs(found - expected) < 1e-12, "the mean over all pairs, in any order"
### END HIDDEN TESTS

# %% [markdown]
# A comparison of one setting's best cut with another's mean is therefore decided before it begins.
#
# ## References
#
# - E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*, ICLR
#   2023, arXiv 2210.17323 [@frantar2022gptq]; code at github.com/IST-DASLab/gptq.
# - M. Sun, X. Chen, J. Z. Kolter, Z. Liu, *Massive Activations in Large Language Models*, arXiv 2402.17762 [@sun2024massive].
# - The models: course-lm (trained by this project, see its model card) and SmolLM2 [@allal2025smollm2].
#
# ## Next
#
# `awq_demo`: the weights that matter most, found by looking at the activations.
