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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/gptq_ablations.ipynb)
# # GPTQ, part by part: what calibration, order and grids are worth
#
# *Large Model Quantization: a deep dive. Chronology, companion of `gptq_demo`.*

# %% [markdown]
# GPTQ [@frantar2022gptq] is a recipe of many parts. When you have worked through this notebook you will be able to
#
# - tell a difference between two settings from the noise of the calibration text, by comparing them on the same text, several times;
# - say how much calibration text GPTQ needs, and what the wrong text costs;
# - say what damping, the order of the columns, the grids and the choice of inputs do on a small model, and at which price in bits;
# - find in a layer's Hessian what makes a model with massive features hard.
#
# It takes about 45 minutes to read and work. You need `gptq_demo`. No profile needs a GPU; `quick` runs in under a minute, `cpu` in under ten.

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
import math
import statistics
import warnings
from dataclasses import dataclass
from typing import ClassVar

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.compression.hessian import Hessian
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import blocks, linear_layers, load_model
from course_utils.plotting import error_against_bits
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
# Every result of GPTQ hangs on the text that it was calibrated on. Cut the text at another place, and another model comes out. So a setting that is
# better by less than that, tried once, has shown nothing. Two things help:
#
# - **pairs**: two settings get the *same* text, and what is compared is their difference, so that a text that is good for both favours none;
# - **repetition**: on several texts. If the sign of the difference changes with the text, there is no difference to speak of.
#
# All that follows is 3 bits, where differences show, and is measured as the loss in nats a token, the logarithm of the perplexity: there,
# differences add up.


# %%
def fresh(name):
    """The float model anew, and its tokenizer."""
    return load_model(name, dtype=profile.dtype, device=profile.device)


def loss(name, model):
    """Nats a token on held-out text."""
    window = min(512, model.config.max_position_embeddings)
    return math.log(perplexity(model, texts[name], window=window).perplexity)


def after(name, method, calibration=None):
    """(loss, bits per weight) of a fresh model, quantized."""
    model, _ = fresh(name)
    report = quantize_model(model, method, calibration=calibration)
    return loss(name, model), report.bits_per_weight


n_tokens, texts = profile.pick(quick=1024, cpu=4096), {}
model, tokenizer = fresh("course-lm")
texts["course-lm"] = evaluation_tokens(tokenizer, n_tokens)
of_float = loss("course-lm", model)
nearest, bits = after("course-lm", get_method("affine", n_bits=3, group_size=128))
print(f"loss on {n_tokens:,} tokens: float {of_float:.4f}, nearest {nearest:.4f}")

# %% [markdown]
# First the noise: the paper's recipe on texts from several places.

# %%
amount = profile.pick(quick=4, cpu=32)  # sequences of 256 tokens
cuts = [
    calibration_tokens(tokenizer, amount, 256, seed=profile.seed + i)
    for i in range(profile.pick(quick=2, cpu=3))
]
paper = GPTQ(n_bits=3)
standard = [after("course-lm", paper, cut)[0] for cut in cuts]
print(f"{paper}, {amount} x 256 tokens from {len(cuts)} places:")
print("loss", ", ".join(f"{value:.4f}" for value in standard))
noise = max(standard) - min(standard)
gain = nearest - statistics.fmean(standard)
print(f"from the best to the worst {noise:.4f}; gained over nearest {gain:.4f}")

# %% [markdown]
# ## How much calibration text?
#
# Without any there are no correlations to learn, and the package refuses. At 0 we put round-to-nearest, which is what a Hessian without
# correlations gives (exercise 1). Then we double the amount.

# %%
amounts = profile.pick(quick=(1, 4), cpu=(1, 2, 4, 8, 16, 32, 64, 128))
by_amount = {0: nearest}
for n in amounts:
    some = calibration_tokens(tokenizer, n, 256, seed=profile.seed)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        by_amount[n] = (
            standard[0] if n == amount else after("course-lm", paper, some)[0]
        )
    print(f"{n:4} sequences: loss {by_amount[n]:.4f}", end="")
    singular = sum("singular" in str(w.message) for w in warned)
    print(f"; {singular} Hessians of fewer tokens than features" if singular else "")

# %%
levels = {"GPTQ": by_amount.values(), "round-to-nearest": [nearest] * len(by_amount)}
levels["float"] = [of_float] * len(by_amount)
figure = error_against_bits(
    {"course-lm, 3 bits": {k: (list(by_amount), list(v)) for k, v in levels.items()}},
    "loss in nats a token",
    xlabel="calibration sequences of 256 tokens",
)
figure.axes[0].set_xscale("symlog", base=2, linthresh=1)
figure.axes[0].set_xticks(list(by_amount), list(by_amount))
plt.show()

# %%
best = min(by_amount.values())
enough = next(n for n, value in by_amount.items() if value <= best + noise)
helps = next(n for n, value in by_amount.items() if value < nearest - noise)
print(f"first amount to beat round-to-nearest by more than the noise: {helps};")
print(f"first amount within the noise of the best: {enough}")

# %% [markdown]
# *Figure: loss of course-lm with 3 bits against the number of calibration sequences, on an axis that doubles, with the levels of
# round-to-nearest and of the float model. At 0 stands round-to-nearest.*
#
# Where there are fewer tokens than a layer has features its Hessian is singular, and the package warns. Damping alone carries it then.
#
# ## Does it have to be the right text?
#
# The same amount, from elsewhere: the source code of a Python module, and tokens drawn at random.

# %%
generator = torch.Generator().manual_seed(profile.seed)
code = tokenizer(inspect.getsource(argparse), verbose=False).input_ids
wrong = {
    "Python source": torch.tensor(code[: amount * 256]).view(-1, 256),
    "random tokens": torch.randint(len(tokenizer), (amount, 256), generator=generator),
}
found = {"float": of_float, "round-to-nearest": nearest, "the right text": standard[0]}
found |= {name: after("course-lm", paper, text)[0] for name, text in wrong.items()}
for name, value in found.items():
    won = (nearest - value) / (nearest - of_float)
    print(f"{name:17} loss {value:.4f}: {won:4.0%} of what nearest lost is won back")

# %% [markdown]
# The right text is best. What the others win back all the same, random tokens among them, has nothing to do with what the text says: which features of a layer go together is to
# a part a matter of the model's weights, whatever it reads.
#
# ## Damping, order, grids, and whose inputs
#
# Now the settings, one changed at a time, each on all the texts, and subtracted from the paper's setting on the same text. Beside it stand the bits
# that are stored: some settings buy their gain. "Float inputs" feeds every block with what the *float* blocks before it put out, as AWQ does and GPTQ does
# not.


# %%
@dataclass(frozen=True)
class FloatInputs(GPTQ):
    """GPTQ whose Hessians come from the float model."""

    prefix: ClassVar[str] = "float"


settings = {
    "act-order": {"act_order": True},
    "static grids": {"static_groups": True},
    "act-order, static": {"act_order": True, "static_groups": True},
    "symmetric grids": {"symmetric": True},
    "groups of 32": {"group_size": 32},
    "groups of 32, current": {"group_size": 32, "current_groups": True},
    "one group a row": {"group_size": "row"},
}
settings |= {f"damping {d:g}": {"damping": d} for d in (1e-4, 1e-3, 0.1, 1.0)}
tried = {label: GPTQ(n_bits=3, **changed) for label, changed in settings.items()}
tried["float inputs"] = FloatInputs(n_bits=3)
tried = dict(list(tried.items())[: profile.pick(quick=3, cpu=len(tried))])


# %%
def compared(losses, others):
    """Mean, smallest and largest difference, in pairs, and what to make of them."""
    gaps = [a - b for a, b in zip(losses, others, strict=True)]
    clear = min(gaps) > 0 or max(gaps) < 0
    verdict = ("worse" if min(gaps) > 0 else "better") if clear else "no difference"
    return statistics.fmean(gaps), min(gaps), max(gaps), verdict


print("setting                bits   loss less the paper's     on every text")
for label, method in tried.items():
    runs = [after("course-lm", method, cut) for cut in cuts]
    losses, bits = [value for value, _ in runs], runs[0][1]
    mean, low, high, verdict = compared(losses, standard)
    print(f"{label:21} {bits:.3f}  {mean:+.4f} ({low:+.4f} to {high:+.4f})  {verdict}")

# %% [markdown]
# "No difference" means that the sign changed with the text. Smaller groups cost bits, one group a row and symmetric grids save some, and act-order without static grids has the
# group of every column to store: at equal bytes are only settings with the same bits. Current grids lower the error of a layer (`gptq_demo`); whether they help the model, the two lines
# with groups of 32 tell. And whose inputs a block gets has to count for less here than one might think: GPTQ measures a layer's error on
# the inputs it will get, but leaves what went wrong before as it is.
#
# ## Massive features: where the order counts
#
# Act-order was made for models with features of very unequal size, and in many models a few are massive on a few tokens [@sun2024massive]. How unequal are they here? The inputs of every MLP's second layer, by the diagonal of its Hessian: for each
# model the layer in which the largest mean square stands out most.


# %%
@torch.no_grad()
def diagonals(name, sequences):
    """The Hessian's diagonal for the second MLP layer of each block."""
    model, tokenizer = fresh(name)
    window = min(512, model.config.max_position_embeddings)
    found = {}
    for layer in linear_layers(model):
        if not layer.name.endswith(("mlp.c_proj", "mlp.down_proj")):
            continue
        gathered = found[layer.name] = Hessian(layer.weight.shape[1], profile.device)
        layer.module.register_forward_pre_hook(
            lambda _, args, to=gathered: to.update(args[0].flatten(0, -2))
        )
    assert len(found) == len(blocks(model))
    for sequence in calibration_tokens(tokenizer, sequences, window, seed=profile.seed):
        model(input_ids=sequence[None].to(profile.device))
    return {layer: gathered.matrix().diagonal() for layer, gathered in found.items()}


# %%
names = [name.replace("q4_1", "dithered") for name in profile.models]
for name in names:
    all_of = diagonals(name, profile.pick(quick=4, cpu=8))
    layer, d = max(all_of.items(), key=lambda item: item[1].max() / item[1].median())
    place, damping = int(d.argmax()), 0.01 * d.mean()
    print(f"{name}, {layer}: {len(d)} features")
    times = d.max() / d.median()
    print(f"  the largest mean square is {times:,.0f} times the median one,")
    print(f"  and comes as column {place}, with {len(d) - 1 - place} behind it;")
    print(f"  damping adds {damping / d.median():.2f} of the median one to each")

# %% [markdown]
# Where one feature is so much larger than the others, as in SmolLM2, it has two effects. What its weights lose counts most, and only columns behind it can make up for it. And since damping is a share of the *mean*
# diagonal, which that one feature lifts, it can drown the ordinary features: then GPTQ knows little of how they go together.
#
# Four settings tell these things apart, on one text for each model (a run of the larger model takes about a minute on two cores): columns as they come with grids found on the way; the same
# with a hundredth of the damping; with static grids; and act-order with static grids, at the same bytes.

# %%
orders = {
    "as they come": {},
    "as they come, damping 0.0001": {"damping": 1e-4},
    "as they come, static": {"static_groups": True},
    "act-order, static": {"act_order": True, "static_groups": True},
}
for name in names:
    model, tokenizer = fresh(name)
    window = min(512, model.config.max_position_embeddings)
    texts[name] = evaluation_tokens(tokenizer, n_tokens)
    size = 128 if model.config.hidden_size % 128 == 0 else 64
    n = profile.pick(quick=4, cpu=32 if name == "course-lm" else 16)
    text = calibration_tokens(tokenizer, n, window, seed=profile.seed)
    print(f"{name}, 3 bits in groups of {size}: float {loss(name, model):.3f} nats")
    for label, changed in orders.items():
        value, bits = after(name, GPTQ(n_bits=3, group_size=size, **changed), text)
        print(f"  {label:28} {bits:.3f} bits per weight, loss {value:.3f}")
        by = {"model": name, "corpus": "factbook", "tokens": n_tokens, "window": window}
        key = (
            f"gptq_ablations.{name}.order.{label.replace(', ', '_').replace(' ', '_')}"
        )
        record(f"{key}.perplexity", math.exp(value), "", 0.05 * math.exp(value), **by)
        record(f"{key}.bits_per_weight", bits, "bits", 0, **by)

# %% [markdown]
# Each setting differs from the first in one thing, but for the last, which is to be read against the one before it: if static grids alone change little and act-order much, it is the order
# that helps. Where no feature is massive there is little for it to gain. And if less damping makes things worse, that the ordinary features are drowned is not what hurts: damping also keeps GPTQ
# from moving large errors about on the strength of few tokens.
#
# ## Limits
#
# - One model of a few million weights for most of it. On another the noise and the differences are others. (On SmolLM2 another text moves the perplexity by some percent: see the README.)
# - Three texts tell whether a sign holds, not how large a difference is. The held-out text is one, too.
# - The settings are changed one at a time. Two changes together need not add up.
# - What serves the layers' errors is not asked here; `gptq_demo` looks at a single layer.
#
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

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
    assert torch.equal(h, h.T) and torch.linalg.eigvalsh(h).min() > 0
assert torch.equal(h := two_hessians(5)[0], h.diagonal().diag()), "for *every* weight"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: the error of a difference
# *Difficulty 2/5 · 15 minutes · 3 points · no GPU*
#
# Two settings were tried on the same texts. Return the mean difference of their losses and its standard error, once in pairs, and once as if the texts had not been the
# same. Which of the two errors is smaller, and why?


# %% tags=["exercise"]
def difference(a, b):
    """(mean of a - b, its standard error in pairs, and unpaired); `a`, `b`: lists of n.

    Approach: the standard error of a mean of n values is their standard deviation (that
    with n - 1) over sqrt(n). Unpaired, the two variances of the means add up.
    Example: [3, 5], [2, 4] give 1, an error of 0 in pairs, and of sqrt(2) unpaired.
    Hint: statistics.stdev and statistics.variance.
    """
    ### BEGIN SOLUTION
    gaps, n = [x - y for x, y in zip(a, b, strict=True)], len(a)
    unpaired = (statistics.variance(a) / n + statistics.variance(b) / n) ** 0.5
    return statistics.fmean(gaps), statistics.stdev(gaps) / n**0.5, unpaired
    ### END SOLUTION


# %% tags=["exercise-tests"]
mean, paired, unpaired = difference([3, 5], [2, 4])
assert mean == 1, "the mean of the differences"
assert paired == 0, "in pairs the difference is 1 both times: no error at all"
assert abs(unpaired - 2**0.5) < 1e-9, "2 / 2 + 2 / 2, and the root of it"
a, b = [3.62, 3.70, 3.66, 3.74], [3.60, 3.69, 3.63, 3.72]
mean, paired, unpaired = difference(a, b)
print(f"difference {mean:.3f}, error in pairs {paired:.3f}, unpaired {unpaired:.3f}")
assert paired < unpaired / 5, "the texts move both losses together"
### BEGIN HIDDEN TESTS
gaps = torch.tensor(a).double() - torch.tensor(b).double()
assert abs(paired - (gaps.std() / 2).item()) < 1e-6
assert abs(difference(b, a)[0] + mean) < 1e-12
### END HIDDEN TESTS

# %% [markdown]
# In pairs, what a text does to both settings alike drops out. If it did nothing alike, pairs would not help, and the two errors would be about the same.
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
