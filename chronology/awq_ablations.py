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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/awq_ablations.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/awq_ablations.ipynb)
# # AWQ, part by part: scales, ranges, text, and GPTQ after it
#
# *Large Model Quantization: a deep dive. Chronology, companion of `awq_demo`.*

# %% [markdown]
# AWQ [@lin2023awq] searches two things: a scale for each channel, and a range for each group of weights. `awq_demo` builds both. The question here is: **which of them
# helps, on which model, and do they add to GPTQ?** When you have worked through this notebook you will be able to
#
# - tell what scales and ranges win alone and together, with an error over six calibration texts;
# - show by controls that a scale belongs to *its* channel, and what text it has to be found on;
# - say at which widths AWQ and GPTQ [@frantar2022gptq] differ on a model without large inputs;
# - round by GPTQ in a model into which AWQ's scales are folded, and say whether that pays.
#
# It takes about 40 minutes to read and work. You need `awq_demo` and `gptq_demo`. No profile needs a GPU; `quick` takes less than a minute, `cpu` about five on two cores.

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

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.compression.decoding import decode_model
from course_utils.compression.folding import apply_fold
from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import (
    Protocol,
    compare,
    compare_all,
    continuations,
    difference,
)
from course_utils.evaluation.continuations import prompt_of
from course_utils.evaluation.estimate import format_difference, over_cuts
from course_utils.models import load_model
from course_utils.models.walk import BlockInputs, blocks
from course_utils.plotting import COLOURS, nats_against_bits, new_figure
from course_utils.plotting.tables import table
from course_utils.profiles import resolve
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto, or the name of one model
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
draw = torch.Generator().manual_seed(profile.seed)

# %% [markdown]
# ## One search, many models
#
# The model is course-lm, at 2 bits in groups of 128, where most is lost. A **cut** is a set of windows from random places of the calibration text. Each setting is
# calibrated on six cuts. Its loss is compared with round-to-nearest on the same evaluation tokens, cut by cut, and the error is that of the mean over the cuts.

# %%
options = {"dtype": profile.dtype, "device": profile.device}
small, tokenizer = load_model("course-lm", **options)
protocol = profile.protocol(small)
text = protocol.text(tokenizer)
n_cuts = profile.pick(quick=2, cpu=6)
sequences = profile.pick(quick=4, cpu=8)
cuts = [calibration_tokens(tokenizer, sequences, 256, seed=i) for i in range(n_cuts)]
print(f"course-lm, evaluated on {protocol}; {n_cuts} cuts of {list(cuts[0].shape)}")

# %% [markdown]
# Folding leaves the float function as it is. So the search runs once a cut, and its scales go into as many fresh models as we like: as they are, or dealt out to other channels.


# %%
@torch.no_grad()
def found_scales(model, method, cut):
    """What the search finds for each place, by block; the model stays as it is."""
    inputs, places = BlockInputs.of_first_block(model, cut), []
    for _, block in blocks(model):
        places.append(method.search(block, inputs))
        inputs.advance(block)
    return places


# %%
def folded_model(name, places=(), dealt=False):
    """A fresh model with scales folded in; `dealt`: each place's in another order."""
    model = load_model(name, **options).model
    for (_, block), found in zip(blocks(model), places, strict=False):
        for place in found:
            order = torch.randperm(len(place.scale), generator=draw)
            scale = place.scale[order] if dealt else place.scale
            apply_fold(block, place.fold, scale)
    return model


# %% [markdown]
# After quantizing, `decode_model` turns the codes back into floats, once. The copy computes what the packed model computes, and faster here.


# %%
def rounded_by(method, model, cut=None):
    """The float model with the values of the codes, quantized in place."""
    quantize_model(model, method, calibration=cut)
    return decode_model(model)


# %%
base = {"n_bits": 2, "group_size": 128}
nearest = get_method("affine", **base)
searching = get_method("awq", clip=False, **base)  # the scales alone
ranges = get_method("awq", ratio=0.0, **base)  # ratio 0: the ranges alone
plain = compare(rounded_by(nearest, folded_model("course-lm")), small, text)
print(f"round-to-nearest: {format_difference(plain.loss)}")

# %% [markdown]
# ## Scales, ranges, and text
#
# The controls ask whether it is the *inputs* that AWQ gets right. Scales dealt out at random have the same spread, at the wrong channels. Two wrong texts stand for inputs of
# another domain: the source of a Python module, and tokens drawn at random.

# %%
source = tokenizer(inspect.getsource(argparse), verbose=False, return_tensors="pt")
code = source.input_ids[0]  # [tokens]


def wrong_texts(shape):
    """Calibration of other domains, as large as a cut."""
    places = torch.randint(len(code) - shape[1] + 1, (shape[0], 1), generator=draw)
    python = code[places + torch.arange(shape[1])]
    return python, torch.randint(len(tokenizer), tuple(shape), generator=draw)


# %%
def scaled(places, dealt=False):
    """Course-lm with folded scales, rounded to nearest."""
    return rounded_by(nearest, folded_model("course-lm", places, dealt))


def settings_on(cut):
    """The models of all settings without GPTQ, calibrated on `cut`."""
    places = found_scales(small, searching, cut)
    python, noise = (found_scales(small, searching, t) for t in wrong_texts(cut.shape))
    fixed = get_method("awq", ratio=0.5, clip=False, **base)
    return {
        "scales and ranges (AWQ)": rounded_by(
            ranges, folded_model("course-lm", places), cut
        ),
        "scales": scaled(places),
        "ranges": rounded_by(ranges, folded_model("course-lm"), cut),
        "ratio 0.5 everywhere": rounded_by(fixed, folded_model("course-lm"), cut),
        "scales dealt out at random": scaled(places, dealt=True),
        "scales of Python source": scaled(python),
        "scales of random tokens": scaled(noise),
    } | with_gptq(places, cut)


# %% [markdown]
# The last two settings are GPTQ, alone and in the model that AWQ's scales are folded into. GPTQ then reads inputs divided by the scales.


# %%
def with_gptq(places, cut):
    """GPTQ alone, and in the folded model."""
    gptq = get_method("gptq", **base)
    return {
        "GPTQ": rounded_by(gptq, folded_model("course-lm"), cut),
        "scales, then GPTQ": rounded_by(gptq, folded_model("course-lm", places), cut),
    }


lost = {}
for cut in cuts:
    for label, c in compare_all(settings_on(cut), small, text).items():
        lost.setdefault(label, []).append(c.loss.value)

# %%
gains = {
    label: over_cuts([plain.loss.value - value for value in values])
    for label, values in lost.items()
}
rows = [
    {"setting": label, "nats lost": sum(values) / n_cuts, "won": gains[label].value}
    | {"±": gains[label].error}
    for label, values in lost.items()
]
print(
    f"course-lm, 2 bits; won: nats less than round-to-nearest ({plain.loss.value:.4f})"
)
table(rows, {"nats lost": ".4f", "won": "+.4f", "±": ".4f"})

# %% tags=["folded"]
# Figure: what each setting wins over round-to-nearest.
figure, axis = new_figure(height=3.4)
for place, gain in enumerate(gains.values()):
    axis.errorbar(
        gain.value, place, xerr=2 * gain.error, fmt="o", color=COLOURS["blue"]
    )
axis.axvline(0, color="black", linewidth=0.8)
axis.set_yticks(range(len(gains)), list(gains))
axis.invert_yaxis()
axis.set_xlabel("nats per token won over round-to-nearest (bars: two standard errors)")
plt.show()

# %% tags=["folded"]
# Records of the controls, and differences in pairs.
by = {"model": "course-lm", **protocol.fields}
record("awq.controls.nearest.loss", plain.loss.value, "nats", 0.005, **by)
keys = ["awq", "scales", "ranges", "fixed", "dealt", "python", "noise", "gptq", "both"]
for (label, values), key in zip(lost.items(), keys, strict=True):
    tolerance = 0.03 if key in ("gptq", "both") else 0.01  # see below
    stem = f"awq.controls.{key}"
    record(f"{stem}.loss", over_cuts(values).value, "nats", tolerance, **by)
    record(f"{stem}.gain", gains[label].value, "nats", tolerance, **by)
    record(f"{stem}.gain_error", gains[label].error, "nats", tolerance, **by)
named = dict(zip(keys, lost, strict=True))
# One code of GPTQ's that falls the other way moves all that follow: hence 0.03.
for key, other, tolerance in (
    ("awq", "gptq", 0.03),
    ("both", "gptq", 0.03),
    ("awq", "ranges", 0.01),
    ("dealt", "scales", 0.01),
    ("python", "scales", 0.01),
    ("noise", "scales", 0.01),
):
    values = zip(lost[named[key]], lost[named[other]], strict=True)
    pairs = over_cuts([a - b for a, b in values])
    stem = f"awq.controls.{key}_less_{other}"
    record(stem, pairs.value, "nats", tolerance, **by)
    record(f"{stem}_error", pairs.error, "nats", tolerance, **by)
    print(f"{named[key]}, less {named[other]}: {format_difference(pairs)}")

# %% [markdown]
# *Figure: a row for each setting, with a dot at the mean of what it wins over round-to-nearest on the same tokens, and a bar of two standard errors to each side. The
# settings with ranges or GPTQ stand far right; scales alone stand near the line at 0.*
#
# In the recorded run AWQ wins {{awq.controls.awq.gain:.3f}} ± {{awq.controls.awq.gain_error:.3f}} nats over round-to-nearest. Nearly all of it comes from the ranges: they win
# {{awq.controls.ranges.gain:.3f}} alone, and the scales {{awq.controls.scales.gain:.3f}} ± {{awq.controls.scales.gain_error:.3f}}. Where the ranges are
# searched, scales before them do not help: the loss changes by {{awq.controls.awq_less_ranges:+.3f}} ± {{awq.controls.awq_less_ranges_error:.3f}}. Course-lm has few large inputs to protect.
#
# Are the scales right where they are? Dealt out to other channels of their place they lose {{awq.controls.dealt_less_scales:.3f}} ± {{awq.controls.dealt_less_scales_error:.3f}} nats more. A ratio of 0.5 everywhere
# wins {{awq.controls.fixed.gain:+.3f}} ± {{awq.controls.fixed.gain_error:.3f}}, so less than nothing: the search is needed.
#
# The text counts too. Scales found on Python source lose {{awq.controls.python_less_scales:.3f}} ± {{awq.controls.python_less_scales_error:.3f}} nats more than those of the right text, and are worse than none. Those of random tokens lose
# {{awq.controls.noise_less_scales:.3f}} ± {{awq.controls.noise_less_scales_error:.3f}} more.
#
# AWQ less GPTQ is {{awq.controls.awq_less_gptq:+.3f}} ± {{awq.controls.awq_less_gptq_error:.3f}} nats here. Folding AWQ's scales before GPTQ changes what GPTQ
# loses by {{awq.controls.both_less_gptq:+.3f}} ± {{awq.controls.both_less_gptq_error:.3f}}. A difference within two errors is not distinguished.
#
# ## From 8 bits to 2
#
# The three ways at all widths, on course-lm and one cut, and what AWQ's models write.

# %%
WIDTHS = profile.pick(quick=(3,), cpu=(8, 4, 3, 2))
methods = {"round-to-nearest": "affine", "AWQ": "awq", "GPTQ": "gptq"}
curves, at_width = {label: ([], [], []) for label in methods}, {}
speakers = {"float": small}


def at(label, bits):
    """A model at this width, and its stored bits per weight."""
    method = get_method(methods[label], n_bits=bits, group_size=128)
    model = load_model("course-lm", **options).model
    report = quantize_model(
        model, method, calibration=None if label == "round-to-nearest" else cuts[0]
    )
    return decode_model(model), report.bits_per_weight


# %%
for bits in WIDTHS:
    made = {label: at(label, bits) for label in methods}
    of_width = compare_all({n: m for n, (m, _) in made.items()}, small, text)
    for label, c in of_width.items():
        at_width[label, bits] = c
        point = made[label][1], c.loss.value, c.loss.error
        for values, value in zip(curves[label], point, strict=True):
            values.append(value)
    speakers[f"{bits} bits"] = made["AWQ"][0]

# %%
figure = nats_against_bits({"course-lm": curves})
plt.show()
print(continuations(speakers, tokenizer, prompt_of("course-lm")))

# %% tags=["folded"]
# Records of the widths, and AWQ less GPTQ in pairs.
for (label, bits), c in at_width.items():
    key = f"awq.widths.{methods[label]}.w{bits}.loss"
    record(key, c.loss.value, "nats", max(0.005, 0.15 * abs(c.loss.value)), **by)
for bits in WIDTHS:
    less = difference(at_width["AWQ", bits], at_width["GPTQ", bits])
    record(f"awq.widths.awq_less_gptq.w{bits}", less.value, "nats", 0.02, **by)
    record(f"awq.widths.awq_less_gptq.w{bits}_error", less.error, "nats", 0.01, **by)
    print(f"{bits} bits: AWQ, less GPTQ: {format_difference(less)}")

# %% [markdown]
# *Figure: nats lost against measured bits per weight for round-to-nearest, AWQ and GPTQ on course-lm; the dashed line at 0 is the float model.*
#
# At 3 bits AWQ loses {{awq.widths.awq.w3.loss:.3f}} nats in the recorded run, GPTQ {{awq.widths.gptq.w3.loss:.3f}} and round-to-nearest {{awq.widths.affine.w3.loss:.3f}}. In pairs AWQ loses
# {{awq.widths.awq_less_gptq.w3:+.3f}} ± {{awq.widths.awq_less_gptq.w3_error:.3f}} more than GPTQ. This is where AWQ loses: course-lm has few large inputs, and features that go together, which GPTQ makes use of and
# AWQ does not see. The continuations at 8 and 4 bits stay near the float model's. At 3 bits the model repeats itself, and at 2 bits words break.
#
# ## The larger model: both in turn
#
# SmolLM2 has the large inputs that course-lm lacks. At 3 bits, on one calibration text: round-to-nearest, both methods, and GPTQ in the model that AWQ's scales are folded into. (`quick` takes
# course-lm again.) As in `awq_demo` we take `smollm2-135m-dithered`, and 4,096 tokens.

# %%
big = profile.models[-1].replace("q4_1", "dithered")
large, large_tokenizer = load_model(big, **options)
window = min(512, large.config.max_position_embeddings)
size = 128 if large.config.hidden_size % 128 == 0 else 64
of_large = Protocol("factbook", profile.pick(quick=2048, cpu=4096), window)
large_cut = calibration_tokens(large_tokenizer, 4, window, seed=profile.seed)
three = {"n_bits": 3, "group_size": size}

# %%
scales_alone = get_method("awq", clip=False, **three)
places = found_scales(large, scales_alone, large_cut)
ranges_alone, gptq = get_method("awq", ratio=0.0, **three), get_method("gptq", **three)
turns = {
    "round-to-nearest": rounded_by(get_method("affine", **three), folded_model(big)),
    "AWQ": rounded_by(ranges_alone, folded_model(big, places), large_cut),
    "GPTQ": rounded_by(gptq, folded_model(big), large_cut),
    "scales, then GPTQ": rounded_by(gptq, folded_model(big, places), large_cut),
}
measured = compare_all(turns, large, of_large.text(large_tokenizer))

# %%
rows = [
    {"method": label, "nats lost": format_difference(c.loss)}
    | {"perplexity": c.perplexity.perplexity, "same top token": c.agreement.value}
    for label, c in measured.items()
]
print(f"{big}, 3 bits, {of_large}")
table(rows, {"perplexity": ".2f", "same top token": ".1%"})

# %% tags=["folded"]
# Records of the larger model, and differences in pairs.
by = {"model": big, **of_large.fields}
for c, key in zip(measured.values(), ["affine", "awq", "gptq", "both"], strict=True):
    tolerance = max(0.02, 0.15 * abs(c.loss.value))
    record(f"awq.turns.{key}.loss", c.loss.value, "nats", tolerance, **by)
    record(f"awq.turns.{key}.loss_error", c.loss.error, "nats", **by)
    record(f"awq.turns.{key}.perplexity", c.perplexity.perplexity, "", **by)
both = "scales, then GPTQ"
for key, a, b in (("both_less_gptq", both, "GPTQ"), ("both_less_awq", both, "AWQ")):
    less = difference(measured[a], measured[b])
    record(f"awq.turns.{key}", less.value, "nats", 0.05, **by)
    record(f"awq.turns.{key}_error", less.error, "nats", 0.02, **by)
    print(f"{a}, less {b}: {format_difference(less)}")

# %% [markdown]
# In the recorded run AWQ loses {{awq.turns.awq.loss:.2f}} nats, GPTQ {{awq.turns.gptq.loss:.2f}}, and GPTQ on AWQ's scales {{awq.turns.both.loss:.2f}}. In pairs, both in turn less GPTQ alone is
# {{awq.turns.both_less_gptq:+.2f}} ± {{awq.turns.both_less_gptq_error:.2f}} nats, and less AWQ alone {{awq.turns.both_less_awq:+.2f}} ± {{awq.turns.both_less_awq_error:.2f}}. All four hold the same bytes.
#
# So the scales help GPTQ as well: they shrink the large inputs that its Hessian is full of. But AWQ's own searched ranges do better here than GPTQ's corrections, which rest on 2,048 tokens for
# up to 1,536 features.
#
# ## What you saw
#
# - **Parts.** On course-lm at 2 bits, in the recorded run, ranges win {{awq.controls.ranges.gain:.3f}} nats and scales {{awq.controls.scales.gain:.3f}}.
# - **Controls.** Scales at the wrong channels lose {{awq.controls.dealt_less_scales:.3f}} nats against those at the right ones; a ratio that nobody searched does harm.
# - **Text.** Scales of Python source lose {{awq.controls.python_less_scales:.3f}} ± {{awq.controls.python_less_scales_error:.3f}} nats more than those of the right text, of random tokens {{awq.controls.noise_less_scales:.3f}} ±
#   {{awq.controls.noise_less_scales_error:.3f}}.
# - **Against GPTQ.** At 3 bits on course-lm AWQ loses {{awq.widths.awq_less_gptq.w3:+.3f}} nats more. On SmolLM2, with little text, it loses {{awq.turns.awq.loss:.2f}} where GPTQ loses {{awq.turns.gptq.loss:.2f}}.
# - **Both in turn.** On SmolLM2, AWQ's scales change GPTQ's loss by {{awq.turns.both_less_gptq:+.2f}} ± {{awq.turns.both_less_gptq_error:.2f}} nats.
#
# ## Limits
#
# - Six cuts give an error that is itself uncertain by a third, and the cuts are of one corpus.
# - SmolLM2 was quantized on one cut of 2,048 tokens: its errors are over documents, and say nothing of other cuts.
# - GPTQ took the columns as they come. Act-order helps it on SmolLM2 (`gptq_ablations`).
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: the range of one group
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# A group of a row's weights gets the range that costs its share of the output least. Return the best of the factors.


# %% tags=["exercise"]
def best_factor(w, x, factors, round_to_grid):
    """The factor of the largest |w| to clamp `w` `[n]` at, on inputs `x` `[tokens, n]`.

    `round_to_grid(w)` gives the values that a group's codes stand for. The cost of a
    factor is the sum of squares, over tokens, of how much x @ w changes.
    Approach: clamp, round, compare with the *unclamped* w on x; keep the first best.
    Example: with one factor, 1.0, it is 1.0.
    Hint: limit = factor * w.abs().max().
    """
    ### BEGIN SOLUTION
    costs = []
    for factor in factors:
        limit = factor * w.abs().max()
        change = w - round_to_grid(w.clamp(-limit, limit))
        costs.append((x @ change).square().sum().item())
    return factors[costs.index(min(costs))]
    ### END SOLUTION


# %% tags=["exercise-tests"]
def coarse(w):
    """Four symmetric codes, -1.5, -0.5, 0.5 and 1.5 steps; the largest is 1.5 steps."""
    step = w.abs().max() / 1.5
    return ((w / step - 0.5).round().clamp(-2, 1) + 0.5) * step


tried = [1.0, 0.8, 0.6]
w = torch.tensor([1.0, 0.2, -0.2, 0.2, -0.2])
ignored = torch.diag(torch.tensor([0.0, 1, 1, 1, 1]))
assert best_factor(w, ignored, [1.0], coarse) == 1.0, "one factor: that one"
assert best_factor(w, ignored, tried, coarse) == 0.6, (
    "the large weight meets no input: its error must not count. Measure on x"
)
watched = torch.diag(torch.tensor([9.0, 1, 1, 1, 1]))
assert best_factor(w, watched, tried, coarse) == 1.0, (
    "compare with the weights before clamping: what is cut off is an error too"
)
negative = -w
assert best_factor(negative, ignored, tried, coarse) == 0.6, (
    "the largest *magnitude*: clamp both sides"
)
pair = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])
assert best_factor(w, pair, tried, coarse) == 1.0, (
    "errors of one token add up before they are squared: here they cancel, and the "
    "first of equal factors is taken"
)
print("Ranges follow the inputs.")
### BEGIN HIDDEN TESTS
found = best_factor(w.double(), ignored.double(), tried, coarse)
assert found == 0.6, "the same in float64"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: the grid that loses groups of one sign
# *Difficulty 2/5 · 15 minutes · 2 points · no GPU*
#
# The authors' code takes the range from a group's least weight to its largest. Its zero point is clamped to the codes there are. What becomes of a group whose weights are all positive? Look at what
# `authors` returns, then write the grid that does not fail.


# %% tags=["exercise"]
def safe_round(w, n_bits=4):
    """Values of `w` `[n]` on a grid of 2^n_bits codes that holds 0.

    Approach: widen the range to hold 0; step = range / top; the zero point is a code.
    Example: [1.0, 1.1, 1.2, 1.3] comes back with errors below half a step of 1.3 / 15.
    Hint: low = min(w.min(), 0), high = max(w.max(), 0); a group of zeros has no range.
    """
    ### BEGIN SOLUTION
    top = 2**n_bits - 1
    low, high = min(w.min().item(), 0.0), max(w.max().item(), 0.0)
    if low == high:
        return torch.zeros_like(w)
    step = (high - low) / top
    zero = round(-low / step)
    return step * (((w / step).round() + zero).clamp(0, top) - zero)
    ### END SOLUTION


# %% tags=["exercise-tests"]
def authors(w, n_bits=4):
    """As the released code rounds a group."""
    top = 2**n_bits - 1
    step = (w.max() - w.min()).clamp(min=1e-5) / top
    zero = (-(w.min() / step).round()).clamp(0, top)
    return step * (((w / step).round() + zero).clamp(0, top) - zero)


positive = torch.tensor([1.0, 1.1, 1.2, 1.3])
print("authors':", [round(v, 2) for v in authors(positive).tolist()])
print("yours:   ", [round(v, 2) for v in safe_round(positive).tolist()])
assert (safe_round(positive) - positive).abs().max() <= 1.3 / 30 + 1e-6, (
    "errors of half a step at most: does the range hold 0?"
)
assert (safe_round(-positive) + positive).abs().max() <= 1.3 / 30 + 1e-6, (
    "negative groups too"
)
assert safe_round(torch.tensor([-1.0, 0.0, 0.5]))[1] == 0, "0 has a code of its own"
assert torch.equal(safe_round(torch.zeros(4)), torch.zeros(4)), (
    "a group of zeros has no range: return zeros"
)
mixed = torch.tensor([-0.7, -0.1, 0.2, 0.8])
assert (safe_round(mixed) - mixed).abs().max() <= 0.1 / 2 + 1e-6, (
    "15 steps, not 16: step = range / 15"
)
### BEGIN HIDDEN TESTS
equal = safe_round(torch.full((4,), 0.5))
assert (equal - 0.5).abs().max() < 1e-6, "equal weights: the range still holds 0"
### END HIDDEN TESTS

# %% [markdown]
# The authors' grid gives back a constant: the zero point would have to be negative. Groups of one sign are rare among 128 weights, and real.
#
# ## References
#
# - J. Lin, J. Tang, H. Tang, S. Yang, X. Dang, C. Gan, S. Han, *AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration*, preprint 2023, MLSys 2024, arXiv
#   2306.00978 [@lin2023awq]; code at github.com/mit-han-lab/llm-awq.
# - E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*, ICLR
#   2023, arXiv 2210.17323 [@frantar2022gptq].
# - The models: course-lm (trained by this project, see its model card) and SmolLM2 [@allal2025smollm2].
#
# ## Next
#
# `nf4_demo`: another grid, for weights that are spread as a normal distribution.
