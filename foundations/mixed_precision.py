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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/mixed_precision.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/foundations/mixed_precision.ipynb)
#
# # Mixed precision: bits for the layers that need them
#
# *Large Model Quantization: a deep dive. Foundations, companion of `dynamic_range`.*

# %% [markdown]
# Layers differ in how much they suffer from few bits. When you have worked through this notebook you will be able to
#
# - measure the sensitivity of each layer of a language model, and of each block of a larger one;
# - say what such a measurement assumes, and check the assumption against the model;
# - spend a budget of bytes greedily, and compare the result with the same bits everywhere and with the same bits in
#   the wrong places, at equal bytes;
# - store a model whose layers have different bits, and load it again.
#
# It takes about 45 minutes to read and work. You need to know what a scale and a group are (`linear_mapping`). No
# profile needs a GPU; `quick` runs in half a minute, `cpu` in a few minutes.

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
import itertools
import random
import tempfile
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from course_utils.compression import QuantizedLinear, get_method, quantize_model
from course_utils.compression.sensitivity import Choice, allocate, sensitivity
from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import file_bytes, perplexity, time_per_token
from course_utils.models import linear_layers, load_model, replace_module
from course_utils.plotting import (
    error_against_bits,
    predicted_against_measured,
    sensitivity_bars,
)
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

# %% [markdown]
# ## The question
#
# Give layer $l$ one of a few numbers of bits $b_l$. It then takes $B_l(b_l)$ bytes, and the model loses something. We
# want to lose little with few bytes:
#
# $$ \min_{b_1 \ldots b_L} \ \mathcal{L}(b_1, \ldots, b_L) - \mathcal{L}(\text{float})
# \quad \text{subject to} \quad \sum_l B_l(b_l) \le B, $$
#
# with $\mathcal{L}$ the mean negative log-likelihood in nats a token. With 4 choices and 16 layers there are $4^{16}$
# assignments, four thousand million; nobody tries them all. So one assumes that losses **add up**,
#
# $$ \mathcal{L}(b_1, \ldots, b_L) - \mathcal{L}(\text{float}) \approx \sum_l \Delta_l(b_l), $$
#
# where the **sensitivity** $\Delta_l(b)$ is the loss when layer $l$ alone has $b$ bits. That takes one measurement for each
# layer and each $b$. (HAWQ orders layers by the Hessian's largest eigenvalues instead [@dong2019hawq]; we measure.)
#
# ## By hand: three layers, one budget
#
# Layer A is large and tough, B is small and touchy, C is in between. All start from 2 bits. **Greedy** takes, again and
# again, the step that lowers the loss most *per byte*, among those that still fit into the budget. Follow it: from 2 bits, B gains
# 0.30 for 100 bytes, more per byte than the others.


# %%
def greedy(choices, budget):
    """{layer: bits} from `choices[layer][bits] = (bytes, loss)`."""
    chosen = {layer: min(options) for layer, options in choices.items()}
    while True:
        left = budget - sum(choices[layer][b][0] for layer, b in chosen.items())
        steps = []  # (gain per byte, layer, bits)
        for layer, now in chosen.items():
            size, loss = choices[layer][now]
            for bits, (larger, lower) in choices[layer].items():
                if 0 < larger - size <= left and lower < loss:
                    steps.append(((loss - lower) / (larger - size), layer, bits))
        if not steps:
            return chosen
        _, layer, bits = max(steps)
        chosen[layer] = bits


# %% tags=["nbval-check-output"]
choices = {  # bits: (bytes, loss)
    "A": {2: (400, 0.20), 3: (600, 0.08), 4: (800, 0.03)},
    "B": {2: (200, 0.50), 3: (300, 0.20), 4: (400, 0.06)},
    "C": {2: (200, 0.12), 3: (300, 0.05), 4: (400, 0.02)},
}


def total(chosen):
    """(bytes, loss) of an assignment."""
    pairs = [choices[layer][bits] for layer, bits in chosen.items()]
    return tuple(round(sum(column), 2) for column in zip(*pairs, strict=True))


for budget in (900, 1000, 1100, 1200):
    found = greedy(choices, budget)
    print(f"budget {budget}: {found}, bytes and loss {total(found)}")
print("3 bits everywhere:", total(dict.fromkeys(choices, 3)))

# %% [markdown]
# At the 1,200 bytes of "3 bits everywhere" greedy finds something better: B gets 4 bits, since it needs them. Greedy is not always
# optimal. A large step that no longer fits is lost to small ones taken before; exercise 1 looks for the best
# assignment by trying all.

# %% [markdown]
# ## One layer at a time
#
# The quantizer is round-to-nearest with groups of 64 weights and an asymmetric grid (`linear_mapping`). To measure a
# sensitivity we put *one* quantized layer into the float model, measure the loss, and put the float layer back. The texts
# are calibration texts: those of the evaluation must not choose the bits.


# %%
BITS = (2, 3, 4, 6)  # what a layer may choose from


def method_of(bits):
    return get_method("affine", n_bits=bits, group_size=64)


def nats(model, tokens):
    return perplexity(model, tokens, window=256).nats


@torch.no_grad()
def single_losses(model, bits, tokens):
    """Loss in nats a token by layer, if that layer alone has so many bits."""
    before, losses = nats(model, tokens), {}
    for layer in linear_layers(model):
        weight = method_of(bits).quantize(layer.weight)
        replace_module(
            model, layer.name, QuantizedLinear(method_of(bits), weight, layer.bias)
        )
        losses[layer.name] = nats(model, tokens) - before
        replace_module(model, layer.name, layer.module)
    return losses


# %%
model, tokenizer = load_model("course-lm", device=profile.device)
n = profile.pick(quick=1024, cpu=16384)  # tokens of the evaluation
texts = profile.pick(quick=4, cpu=8)  # of 256 tokens, to measure sensitivities on
text = calibration_tokens(tokenizer, texts, 256, seed=profile.seed).flatten()
held_out = evaluation_tokens(tokenizer, n)
start = time.perf_counter()
losses = {bits: single_losses(model, bits, text) for bits in BITS}
print(f"{len(BITS) * len(losses[2])} measurements: {time.perf_counter() - start:.1f} s")
short = {name: name.removeprefix("transformer.") for name in losses[2]}
print(f"{'layer':16} {'weights':>8}" + "".join(f"{b:>5} bits" for b in BITS))
for layer in linear_layers(model):
    row = "".join(f"{losses[b][layer.name]:+10.4f}" for b in BITS)
    print(f"{short[layer.name]:16} {layer.weight.numel():>8}{row}")

# %%
figure = sensitivity_bars(
    {f"{b} bits": {short[k]: v for k, v in losses[b].items()} for b in (2, 3, 4)},
    "loss in nats a token, that layer alone",
)
plt.show()

# %% [markdown]
# *Figure: for each linear layer of course-lm three bars, the loss of the model when that layer alone has 2, 3 or 4
# bits. The numbers are those of the table.*

# %%
for bits in BITS:
    ordered = sorted(losses[bits].values(), reverse=True)
    whole, worst = sum(ordered), sum(ordered[: len(ordered) // 4])
    share = f"{worst / whole:.0%} of it" if whole > 0.02 else "mostly noise"
    print(f"{bits} bits: sum {whole:+.4f}, worst quarter of the layers", end=" ")
    print(f"{worst:+.4f} ({share});")
    below = sum(v < 0 for v in ordered)
    print(f"  {below} of {len(ordered)} losses are negative, least {ordered[-1]:+.4f}")
few = text[:256]
ours = single_losses(model, 3, few)
theirs = sensitivity(model, method_of(3), few, window=256)
off = max(abs(theirs[name] - ours[name]) for name in ours)
print(f"The package's sensitivity() differs by at most {off:.1e} nats.")
assert off < 1e-5

# %% [markdown]
# A negative loss says that rounding helped, on these tokens, by chance: it shows how far the noise reaches. A positive loss
# of the same size says no more. The fewer the bits, the more layers stand out of the noise.
#
# ## Would something cheaper do?
#
# The error of the weights costs no forward pass at all. Does it tell which layers suffer? We compare ranks: Spearman's
# correlation is 1 if two quantities order the layers alike, 0 if they have nothing to do with each other.


# %%
def spearman(a, b):
    """Correlation of the ranks of two lists."""
    ranks = [torch.tensor(v).argsort().argsort().float() for v in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


layers = linear_layers(model)
for bits in (2, 3):
    quantized = [
        method_of(bits).quantize(layer.weight).dequantize() for layer in layers
    ]
    pairs = list(zip((layer.weight for layer in layers), quantized, strict=True))
    squared = [(W - Q).square().sum().item() for W, Q in pairs]
    relative = [
        e / W.square().sum().item() for e, (W, _) in zip(squared, pairs, strict=True)
    ]
    measured, other = (list(losses[b].values()) for b in (bits, 5 - bits))
    found = [spearman(estimate, measured) for estimate in (relative, squared, other)]
    print(f"{bits} bits, rank correlation with the loss:")
    print(f"  relative error of the weights {found[0]:+.2f},", end=" ")
    print(f"squared error {found[1]:+.2f},")
    print(f"  loss at {5 - bits} bits {found[2]:+.2f}")

# %% [markdown]
# The last number compares the losses at 2 with those at 3 bits: how well one measurement predicts the other. Whatever the weight error reaches,
# it knows nothing of where in the model the error lands, or of the inputs that meet it.
#
# ## Do losses add up?
#
# The assumption behind all this can be checked: quantize several layers at once, and compare with the sum of their single
# losses. We take the same bits everywhere, and random assignments.


# %%
@torch.no_grad()
def with_bits(model, bits_of):
    """A copy of the model with these bits by layer, and its bytes."""
    mixed = copy.deepcopy(model)
    report = quantize_model(mixed, {k: method_of(b) for k, b in bits_of.items()})
    return mixed, report.nbytes


draw = random.Random(profile.seed)
before = nats(model, text)
samples = {f"{b} bits everywhere": [dict.fromkeys(short, b)] for b in (2, 3, 4)}
samples["random bits"] = [
    {name: draw.choice(BITS) for name in short}
    for _ in range(profile.pick(quick=4, cpu=10))
]
points = {}
print("assignment            predicted  measured   ratio")
for label, assignments in samples.items():
    points[label] = [], []
    for bits_of in assignments:
        predicted = sum(losses[b][name] for name, b in bits_of.items())
        measured = nats(with_bits(model, bits_of)[0], text) - before
        points[label][0].append(predicted)
        points[label][1].append(measured)
        print(
            f"{label:20} {predicted:10.4f} {measured:9.4f} {measured / predicted:7.2f}"
        )

# %%
figure = predicted_against_measured(points, "nats a token")
plt.show()

# %% [markdown]
# *Figure: measured loss against the sum of single losses on logarithmic axes, one mark an assignment; on the dashed diagonal
# they would be equal. An assignment whose predicted or measured loss is not positive has no place on such axes.*

# %%
at_2 = points["2 bits everywhere"]
ratio = at_2[1][0] / at_2[0][0]
print(f"With 2 bits everywhere the loss is {ratio:.2f} times the sum of single losses:")
print("  errors feed each other." if ratio > 1.05 else "  the sum is close, or above.")
predicted, measured = ([v for pair in points.values() for v in pair[i]] for i in (0, 1))
rank = spearman(predicted, measured)
print(f"Rank correlation over all {len(measured)} assignments: {rank:+.2f}")

# %% [markdown]
# For choosing, the order matters more than the size: a sum that is too small everywhere by the same factor still picks the same bits.
#
# ## Spending a budget
#
# Now the budget is the bytes of the model at 3 bits everywhere, measured, scales and zero points included. `allocate` in the package is the
# greedy search from above; it also compares its result with each uniform assignment, and returns whichever has the least sum.

# %%
layers = {layer.name: layer for layer in linear_layers(model)}
sizes = {
    name: {b: method_of(b).quantize(layer.weight).nbytes for b in BITS}
    for name, layer in layers.items()
}
choices = {
    name: {b: (sizes[name][b], losses[b][name]) for b in BITS} for name in layers
}
offers = {
    name: [Choice(method_of(b), *choices[name][b]) for b in BITS] for name in layers
}
budget = sum(sizes[name][3] for name in layers)
ours = greedy(choices, budget)
theirs = {name: m.n_bits for name, m in allocate(offers, budget).items()}
sums = [sum(losses[b][k] for k, b in found.items()) for found in (ours, theirs)]
print(f"budget {budget:,} bytes; greedy finds a sum of {sums[0]:.4f}, ", end="")
print(f"3 bits everywhere has {sum(losses[3].values()):.4f}")
assert sums[1] <= sums[0] + 1e-12
print("The package's assignment is " + ("ours." if ours == theirs else "another one."))


def in_order(bits_of):
    """Bits of the layers in the table's order, a bar after each block of four."""
    bits = [str(b) for b in bits_of.values()]
    return " | ".join(" ".join(bits[i : i + 4]) for i in range(0, len(bits), 4))


print("bits, in the order of the table:", in_order(ours))

# %% [markdown]
# Is that sum to be believed? Greedy picks the smallest of many noisy numbers, so what it picks is smaller than the truth on average: the
# **winner's curse**. A remedy is to measure where the signal is strong, and to fill in the rest. At 2 bits the losses stand out of the
# noise best. From there to $b$ bits the step of every group shrinks by $3 / (2^b - 1)$, the squared error by the square of that; we let the
# loss shrink in proportion, and call these the **scaled** losses. (Near a minimum a loss grows with the square of what is changed: that is the thought behind HAWQ, too.)

# %%
falls = {b: (3 / (2**b - 1)) ** 2 for b in BITS}
scaled = {b: {k: max(v, 0.0) * falls[b] for k, v in losses[2].items()} for b in BITS}
for b in BITS[1:]:
    share = sum(losses[b].values()) / sum(losses[2].values())
    print(f"{b} bits: {falls[b]:.4f} of the loss at 2 bits; measured {share:+.4f}")


def assign(estimate, budget):
    """Bits by layer that the package's greedy search finds with these estimates."""
    offers = {
        name: [Choice(method_of(b), sizes[name][b], estimate[b][name]) for b in BITS]
        for name in layers
    }
    return {name: method.n_bits for name, method in allocate(offers, budget).items()}


bits_of = assign(scaled, budget)
print("bits, in the order of the table:", in_order(bits_of))

# %% [markdown]
# Is the result good because of *which* layers got the bits, or would any mixture do? The **control** keeps greedy's bits, and deals them out at
# random among layers of the same shape: exactly equal bytes, other places.
#
# All losses are now measured on the evaluation texts, and kept token by token. Two assignments read the *same* tokens: the mean of
# the tokens' differences comes with a standard error, which says whether it is more than noise.


# %%
@torch.no_grad()
def token_nats(model, tokens):
    """Negative log-likelihood of each token `[windows, 255]`, in windows of 256."""
    found = []
    for piece in tokens.view(-1, 256).to(model.device).split(8):
        logits = model(input_ids=piece[:, :-1]).logits.float()  # [8, 255, vocabulary]
        found.append(F.cross_entropy(logits.mT, piece[:, 1:], reduction="none"))
    return torch.cat(found).cpu()


reference = token_nats(model, held_out)
assert abs(reference.mean().item() - nats(model, held_out)) < 1e-3
print(f"float: {reference.mean():.4f} nats a token over {reference.numel():,} tokens")


# %%
def dealt(bits_of, shape_of, draw):
    """The same bits, dealt out at random among parts of the same shape."""
    names = {}
    for name in bits_of:
        names.setdefault(shape_of[name], []).append(name)
    result = {}
    for alike in names.values():
        bits = [bits_of[name] for name in alike]
        result |= dict(zip(alike, draw.sample(bits, len(bits)), strict=True))
    return result


shape_of = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
by = {"model": "course-lm", "corpus": "factbook", "tokens": n, "window": 256}
size_at = {b: sum(of_bits[b] for of_bits in sizes.values()) for b in BITS}
budgets = {"3": size_at[3], "4": size_at[4]}
budgets |= {"2.5": sum(size_at[b] for b in (2, 3)) // 2}
budgets |= {"3.5": sum(size_at[b] for b in (3, 4)) // 2}
budgets = dict(sorted(budgets.items()))
for label, b in budgets.items():
    print(f"as much as {label:3} bits everywhere: {b:,} bytes")

# %%
kinds = ("greedy", "greedy, scaled", "random places", "uniform")
curves = {kind: ([], []) for kind in kinds}
found = {}


def measured(kind, label, *deals):
    """Loss on the evaluation texts, the median of the deals, noted and recorded."""
    losses = []
    for bits_of in deals:
        mixed, nbytes = with_bits(model, bits_of)
        losses.append(token_nats(mixed, held_out) - reference)
    losses.sort(key=lambda of_tokens: of_tokens.mean())
    found[kind, label] = losses[len(losses) // 2]  # [windows, 255]
    loss = found[kind, label].mean().item()
    curves[kind][0].append(nbytes / 1e3)  # of every deal
    curves[kind][1].append(loss)
    part = kind.replace(", ", "_").replace(" ", "_")
    key = f"mixed_precision.course-lm.{label.replace('.', '_')}.{part}.loss"
    record(key, loss, "nats", max(0.02, 0.3 * abs(loss)), **by)
    return nbytes, loss


# %%
many = profile.pick(quick=3, cpu=5)
print(f"{'':15}{'greedy':>18}{'greedy, scaled':>18}{'random':>9}{'uniform':>9}")
print("budget     kB        sum     loss      sum     loss     loss     loss")
for label, budget in budgets.items():
    line = ""
    for kind, estimate in (("greedy", losses), ("greedy, scaled", scaled)):
        bits_of = assign(estimate, budget)
        nbytes, loss = measured(kind, label, bits_of)
        expected = sum(estimate[b][k] for k, b in bits_of.items())
        line += f"{expected:+9.4f}{loss:+9.4f}"
    deals = [dealt(bits_of, shape_of, draw) for _ in range(many)]
    line += f"{measured('random places', label, *deals)[1]:+9.4f}"
    if label in ("3", "4"):
        everywhere = dict.fromkeys(layers, int(label))
        line += f"{measured('uniform', label, everywhere)[1]:+9.4f}"
    print(f"{label:>6} {nbytes / 1e3:6.0f}  {line}")

# %%
figure = error_against_bits(
    {"course-lm": curves}, "loss in nats a token", xlabel="kilobytes of linear layers"
)
plt.show()

# %% [markdown]
# *Figure: loss on the evaluation texts against the bytes of the linear layers, for greedy with measured losses, for greedy with scaled ones,
# for the bits of the latter in random places, and for uniform bits.*

# %%
pairs = (
    ("greedy", "uniform"),
    ("greedy, scaled", "uniform"),
    ("greedy, scaled", "random places"),
)
for label in ("3", "4"):
    for one, other in pairs:
        change = found[one, label] - found[other, label]
        mean, error = change.mean().item(), change.std().item() / change.numel() ** 0.5
        verdict = "lower" if mean < 0 else "higher"
        if abs(mean) < 2 * error:
            verdict = "within two errors: not told apart"
        print(f"{label} bits, {one} against {other}:")
        print(f"  {mean:+.4f} nats, standard error {error:.4f}: {verdict}")

# %% [markdown]
# In the table, "sum" is what greedy expected and "loss" what was measured. Random places stand for the median of a few deals. Where they lose more than uniform bits, mixing for its own sake does harm: a layer
# loses more at 2 bits than another gains at 4. What the sensitivities add is the places, and it is as good as they are.
#
# The bits of "greedy, scaled" and those in random places are the same, and so are their bytes: their difference is due to the places
# alone. Against uniform bits, greedy has even left a few bytes of the budget unspent. A difference of less than two standard errors may be chance;
# exercise 3 works the error out, and shows why it is taken over differences.
#
# ## A model to keep
#
# A mixed model is stored as any other: each layer's entry holds its own method. We save the one of the 3-bit budget, and load it again.

# %%
bits_of = assign(scaled, budgets["3"])
mixed, nbytes = with_bits(model, bits_of)
uniform, uniform_bytes = with_bits(model, dict.fromkeys(layers, 3))
with tempfile.TemporaryDirectory() as folder:
    mixed.save_pretrained(folder)
    stored = file_bytes(folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    again = again.to(profile.device).eval()
with torch.no_grad():
    probe = held_out[None, :64].to(profile.device)
    assert torch.equal(mixed(input_ids=probe).logits, again(input_ids=probe).logits)
print("Loaded again, the model gives the same logits, exactly.")
print(
    f"linear layers: mixed {nbytes:,} bytes, uniform {uniform_bytes:,}; file {stored:,}"
)
for label, which in (("float", model), ("uniform", uniform), ("mixed", mixed)):
    timing = time_per_token(
        which, held_out[:32], new_tokens=profile.pick(quick=8, cpu=16)
    )
    print(f"{label:8} {timing}")

# %% [markdown]
# ## A larger model, block by block
#
# SmolLM2 has seven times as many blocks and thirty times as many weights, and measuring each layer at each number of bits would take too long
# here. Blocks are coarser and fewer: all layers of a block get the same bits. We measure at 3 bits only, and scale from there as above. The
# weights of `smollm2-135m-q4_1` lie on a 4-bit grid. Its copy with noise inside the cells, `smollm2-135m-dithered`, does not
# (`linear_mapping` says how it is made), and is the reference for 4 bits and less.

# %%
others = [name.replace("q4_1", "dithered") for name in profile.models]
large, block_losses = {}, {}
for name in others:
    if name == "course-lm":
        continue
    large[name] = load_model(name, dtype=profile.dtype, device=profile.device)
    one = calibration_tokens(large[name].tokenizer, 1, 512, seed=profile.seed)[0]
    start = time.perf_counter()
    block_losses[name] = sensitivity(
        large[name].model, method_of(3), one, window=512, parts="blocks"
    )
    seconds = time.perf_counter() - start
    print(f"{name}: {len(block_losses[name])} blocks at 3 bits, {seconds:.0f} s")
if not large:
    print("This profile has course-lm only; `cpu` measures SmolLM2 as well.")

# %%
for name, of_block in block_losses.items():
    place = {block: block.rpartition(".")[2] for block in of_block}
    bars = {"3 bits": {place[block]: loss for block, loss in of_block.items()}}
    figure = sensitivity_bars(bars, f"loss in nats a token, that block of {name} alone")
    plt.show()
    ordered = sorted(of_block, key=of_block.get, reverse=True)
    text_of = [f"{place[block]} ({of_block[block]:+.3f})" for block in ordered]
    print(f"{name}: most sensitive blocks {', '.join(text_of[:3])};")
    print(f"  median {of_block[ordered[len(ordered) // 2]]:+.4f}, least {text_of[-1]}")

# %% [markdown]
# *Figure, where the profile has a second model: a bar for each of its blocks, the loss of the model when that block alone
# has 3 bits.*

# %%
block_bits, plans = (3, 4, 5, 6), {}
for name, of_block in block_losses.items():
    big = large[name].model
    offers, alike, members = {}, {}, {}
    for block, loss in of_block.items():
        own = [x for x in linear_layers(big) if x.name.startswith(f"{block}.")]
        size = {
            b: sum(method_of(b).quantize(x.weight).nbytes for x in own)
            for b in block_bits
        }
        estimate = {b: max(loss, 0.0) * (7 / (2**b - 1)) ** 2 for b in block_bits}
        offers[block] = [Choice(method_of(b), size[b], estimate[b]) for b in block_bits]
        members[block], alike[block] = own, size[4]
    budget = sum(alike.values())
    bits = {block: m.n_bits for block, m in allocate(offers, budget).items()}
    print(f"{name}: blocks with 3, 4, 5, 6 bits:", end=" ")
    print([sum(b == v for v in bits.values()) for b in block_bits])
    variants = {"4 bits everywhere": dict.fromkeys(bits, 4), "greedy, scaled": bits}
    variants |= {f"random places {i}": dealt(bits, alike, draw) for i in (1, 2)}
    plans[name] = variants, members, budget

# %%
for name, (variants, members, budget) in plans.items():
    big, tokenizer = large[name]
    evaluation = evaluation_tokens(tokenizer, 1024)
    before = perplexity(big, evaluation, window=512).nats
    print(f"  float: {before:.4f} nats a token; loss at {budget / 1e6:.1f} MB:")
    by = {"model": name, "corpus": "factbook", "tokens": 1024, "window": 512}
    for label, of_bits in variants.items():
        bits_of = {x.name: of_bits[k] for k, own in members.items() for x in own}
        mixed, nbytes = with_bits(big, bits_of)
        loss = perplexity(mixed, evaluation, window=512).nats - before
        print(f"  {label:18} {nbytes / 1e6:5.1f} MB, loss {loss:+.4f}")
        part = label.replace(", ", "_").replace(" ", "_")
        key = f"mixed_precision.{name}.blocks4.{part}.loss"
        record(key, loss, "nats", max(0.03, 0.25 * abs(loss)), **by)

# %% [markdown]
# ## Limits
#
# - The sum of single losses is a model of the model, and the table above shows where it is off. Search methods that measure whole
#   assignments cost more passes and assume less.
# - Small sensitivities are noise: exercise 3 says how large it is. Greedy takes every positive difference at its word.
# - Greedy and uniform were compared at equal bytes, not at equal speed. Kernels for 3 bits are rarer than for 4, and a
#   runtime has to hold one for each number of bits it meets.
# - Better rounding (GPTQ) lowers all sensitivities, and not by the same factor: measure with the method that you will use.
# - Embedding and LM head stay float here. In a small model they are most of the bytes, and belong into the budget.

# %% [markdown]
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with
# the cell folded away.

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: the best assignment of all
# *Difficulty 2/5 · 15 minutes · 2 points · no GPU*
#
# For a few layers all assignments can be tried. Write the search, and see where the package's greedy `allocate` misses the
# best.


# %% tags=["exercise"]
def best_assignment(choices, budget):
    """(loss, {layer: bits}) of the least loss with at most `budget` bytes.

    `choices[layer][bits] = (bytes, loss)`.
    Approach: itertools.product over the layers' bits; skip what is too large; keep the
    least loss.
    Example: one layer {2: (10, 0.5), 3: (20, 0.1)} and budget 15: (0.5, {layer: 2}).
    Hint: itertools.product(*choices.values()) runs over tuples of bits.
    """
    ### BEGIN SOLUTION
    best = (float("inf"), None)
    for bits in itertools.product(*choices.values()):
        chosen = dict(zip(choices, bits, strict=True))
        if sum(choices[k][b][0] for k, b in chosen.items()) <= budget:
            loss = sum(choices[k][b][1] for k, b in chosen.items())
            best = min(best, (loss, chosen), key=lambda pair: pair[0])
    return best
    ### END SOLUTION


# %% tags=["exercise-tests"]
one = {"a": {2: (10, 0.5), 3: (20, 0.1)}}
assert best_assignment(one, 15) == (0.5, {"a": 2}), "3 bits do not fit into 15 bytes"
assert best_assignment(one, 20) == (0.1, {"a": 3}), "the budget may be used up"
trap = {  # a small step with a good rate shuts out the large one
    "small": {2: (100, 0.10), 3: (110, 0.05)},
    "large": {2: (100, 1.00), 3: (300, 0.10)},
}
best_loss, best_bits = best_assignment(trap, 400)
offered = {
    k: [Choice(get_method("affine", n_bits=b), *v) for b, v in options.items()]
    for k, options in trap.items()
}
taken = {k: m.n_bits for k, m in allocate(offered, 400).items()}
by_greed = sum(trap[k][b][1] for k, b in taken.items())
print(f"best {best_loss:.2f} with {best_bits}; allocate {by_greed:.2f} with {taken}")
assert best_loss <= by_greed
### BEGIN HIDDEN TESTS
assert best_bits == {"small": 2, "large": 3} and abs(best_loss - 0.2) < 1e-12
assert best_assignment(trap, 150)[1] is None
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: bits that the codes do not show
# *Difficulty 1/5 · 10 minutes · 1 point · no GPU*
#
# Each group of 64 weights also stores a scale of 16 bits and a zero point of `n_bits`. What is the average number of bits of a mixed
# model?


# %% tags=["exercise"]
def average_bits(weights, bits_of, group_size=64):
    """Stored bits per weight; `weights[layer]` numbers, `bits_of[layer]` bits.

    Approach: a weight of b bits costs b + (16 + b) / group_size; weigh by the layers'
    sizes.
    Example: one layer at 4 bits, groups of 64: 4 + 20 / 64 = 4.3125.
    Hint: sum over layers, then divide by the sum of the weights.
    """
    ### BEGIN SOLUTION
    stored = sum(
        n * (bits_of[k] + (16 + bits_of[k]) / group_size) for k, n in weights.items()
    )
    return stored / sum(weights.values())
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert average_bits({"a": 640}, {"a": 4}) == 4.3125, "scale and zero point count"
mixed_bits = average_bits({"a": 6400, "b": 6400}, {"a": 2, "b": 4})
print(f"half at 2, half at 4 bits: {mixed_bits:.4f} bits per weight")
assert abs(mixed_bits - (2.28125 + 4.3125) / 2) < 1e-12, "average the stored bits"
### BEGIN HIDDEN TESTS
assert abs(average_bits({"a": 100, "b": 300}, {"a": 2, "b": 6}, 32) - 5.65625) < 1e-12
probe = get_method("affine", n_bits=3, group_size=64).quantize(torch.randn(64, 512))
assert abs(average_bits({"a": 64 * 512}, {"a": 3}) - probe.bits_per_weight) < 1e-9
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: signal or noise?
# *Difficulty 2/5 · 15 minutes · 2 points · no GPU*
#
# A sensitivity is a mean difference over tokens, and comes with a standard error. Both models read the *same* tokens, so the
# differences are paired. Compare the paired error with the one you would get from two separate texts.


# %% tags=["exercise"]
def difference(before, after):
    """(mean, paired standard error, unpaired one) of after - before, both `[tokens]`.

    Approach: paired: the standard deviation of the differences over the square root of
    their number. Unpaired: the root of the sum of both variances over that number.
    Example: before [1, 2, 3], after [2, 3, 4]: mean 1, paired error 0.
    Hint: Tensor.std() and Tensor.var(), with their default correction.
    """
    ### BEGIN SOLUTION
    change, n = after - before, len(before)
    paired = change.std() / n**0.5
    unpaired = ((before.var() + after.var()) / n).sqrt()
    return change.mean().item(), paired.item(), unpaired.item()
    ### END SOLUTION


# %% tags=["exercise-tests"]
mean, paired, unpaired = difference(
    torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 3, 4])
)
assert mean == 1.0, "after minus before"
assert paired == 0.0, "take the deviation of the differences, not of the values"
generator = torch.Generator().manual_seed(0)
tokens_nats = 3 * torch.rand(2000, generator=generator)  # a loss a token, in nats
noisy = tokens_nats + 0.01 + 0.1 * torch.randn(2000, generator=generator)
mean, paired, unpaired = difference(tokens_nats, noisy)
print(f"difference {mean:.4f}, error paired {paired:.4f}, unpaired {unpaired:.4f}")
assert paired < unpaired / 5, "the tokens' own spread must cancel"
### BEGIN HIDDEN TESTS
assert abs(unpaired - (2 * tokens_nats.var().item() / 2000) ** 0.5) < 2e-3
assert abs(mean - 0.01) < 4 * paired
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - Z. Dong, Z. Yao, A. Gholami, M. Mahoney, K. Keutzer, *HAWQ: Hessian AWare Quantization of Neural Networks with
#   Mixed-Precision*, 2019, arXiv 1905.03696 [@dong2019hawq].
# - The models: course-lm (trained by this project, see its model card), SmolLM2 [@allal2025smollm2], GPT-2
#   [@radford2019gpt2].
#
# ## Next
#
# `ptq_vs_qat`: if rounding a trained model costs too much, train it with the rounding in place.
