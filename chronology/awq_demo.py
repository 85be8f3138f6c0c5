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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/awq_demo.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/awq_demo.ipynb)
#
# # AWQ: weights that meet large inputs get finer steps
#
# *Large Model Quantization: a deep dive. Milestone 3 of the chronology (2023).*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - show which 1% of a model's channels carry most of the loss at 3 bits, and which do not;
# - explain why multiplying a column before rounding protects it, and when that stops working;
# - build the search of AWQ [@lin2023awq] for scales and for ranges, and get the package's numbers;
# - fold the scales into a GPT-2 and a Llama block, and say where no fold exists;
# - compare AWQ with GPTQ and with round-to-nearest at equal bytes, with an error bar.
#
# It takes about 50 minutes to read and work. You need scales, zero points and groups (`linear_mapping`), and the idea that a layer's output
# counts, not its weights (`gptq_demo`). No profile needs a GPU; `quick` takes less than a minute, `cpu` about five on one core.

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

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.compression.decoding import decode_model
from course_utils.compression.folding import FOLDS
from course_utils.data.tokens import calibration_tokens
from course_utils.evaluation import Protocol, compare_all, continuations, difference
from course_utils.evaluation.continuations import prompt_of
from course_utils.evaluation.estimate import format_difference
from course_utils.models import linear_layers, load_model
from course_utils.models.walk import BlockInputs, blocks
from course_utils.plotting import loss_against_ratio, sorted_sizes
from course_utils.plotting.diagrams import four_matrices
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
# ## The question
#
# Round-to-nearest treats all weights alike. Are they? A weight's rounding error reaches the output multiplied by its input. So a weight that
# meets large inputs should matter more, whatever its own size.
#
# The test is an experiment that the paper opens with. Round a whole model to 3 bits, but keep 1% of every layer's **channels** as floats.
# A channel is one input feature $j$ together with column $j$ of `W` `[out, in]`. The 1% are chosen in three ways: by the mean size of the inputs, by the size
# of the weights, and at random.
#
# The model is the largest of the profile. SmolLM2 comes as a file of 4-bit codes, on whose grid some methods would be unfairly good. We take
# `smollm2-135m-dithered`, the same weights with seeded noise inside each cell of that grid, except in the few columns with the largest inputs. `linear_mapping` measures what the noise costs.

# %%
name = profile.models[-1].replace("q4_1", "dithered")
model, tokenizer = load_model(name, dtype=profile.dtype, device=profile.device)
group_size = 128 if model.config.hidden_size % 128 == 0 else 64
window = min(512, model.config.max_position_embeddings)
calibration = calibration_tokens(tokenizer, 4, window, seed=profile.seed)
print(f"{name}: groups of {group_size}, calibration {list(calibration.shape)} tokens")

# %% [markdown]
# **Calibration** is a little text that the model reads before it is quantized, so that we see its inputs. For each layer we take the mean $|x_j|$ of every input feature.


# %%
@torch.no_grad()
def input_sizes(model, calibration):
    """Mean |x| of every input feature `[in]`, by layer."""
    total, hooks = {}, []
    for layer in linear_layers(model):

        def add(module, args, output, name=layer.name):
            sizes = args[0].flatten(0, -2).float().abs().sum(0)  # [in]
            total[name] = total.get(name, 0) + sizes

        hooks.append(layer.module.register_forward_hook(add))
    for sequence in calibration:
        model(input_ids=sequence[None].to(profile.device))
    for hook in hooks:
        hook.remove()
    return {name: sizes / calibration.numel() for name, sizes in total.items()}


sizes = input_sizes(model, calibration)


# %%
def share_of_largest(x):
    """Share of the sum that the largest 1% hold."""
    return (x.topk(max(1, round(0.01 * len(x)))).values.sum() / x.sum()).item()


tails = {place: share_of_largest(x) for place, x in sizes.items()}
heaviest = max(tails, key=tails.get)
layer = next(x for x in linear_layers(model) if x.name == heaviest)
curves = {
    "mean |x|": sizes[heaviest],
    "norm of the weight's column": layer.weight.float().norm(dim=0),
}
figure = sorted_sizes(curves)
plt.show()
record("awq.tail.share", tails[heaviest], "", 0.05, model=name)

# %% [markdown]
# *Figure: the channels of one layer in descending order, each curve divided by its median, on a logarithmic axis. The inputs' curve has a steep head,
# the weights' curve is nearly flat.*
#
# In the recorded run the largest 1% of this layer's input features hold {{awq.tail.share:.0%}} of all $|x|$. The columns of the weight differ far less.
#
# Now the experiment. `rounded` is round-to-nearest with a scale and a zero point for each group. Here the values stay floats on the grid: a **simulation**, since no byte is saved.


# %%
nearest = get_method("affine", n_bits=3, group_size=group_size)


def rounded(W, method=nearest):
    """The values that the codes of `W` `[out, in]` stand for."""
    return method.quantize(W.contiguous()).dequantize().to(W)


# %%
@torch.no_grad()
def simulated(change):
    """A copy of the model whose weights are `change(name, W)`."""
    changed = copy.deepcopy(model)
    for layer in linear_layers(changed):
        layer.weight.copy_(change(layer.name, layer.weight.float()))
    return changed


# %%
def keeping(size_of):
    """Rounding that leaves the 1% of columns with the largest `size_of` as they are."""

    def change(name, W):
        kept = size_of(name, W).topk(max(1, round(0.01 * W.shape[1]))).indices
        return rounded(W).index_copy(1, kept, W[:, kept])

    return simulated(change)


# %%
story = {
    "all rounded": simulated(lambda name, W: rounded(W)),
    "1% kept: largest inputs": keeping(lambda name, W: sizes[name]),
    "1% kept: largest weights": keeping(lambda name, W: W.norm(dim=0)),
    "1% kept: at random": keeping(
        lambda name, W: torch.rand(W.shape[1], generator=draw)
    ),
}
# Half as many tokens as in other notebooks: seven models are measured, and differ much.
measured_on = Protocol("factbook", profile.pick(quick=2048, cpu=4096), window)
text = measured_on.text(tokenizer)

# %% [markdown]
# Third step of the story: keep nothing as float, but multiply the same 1% of columns by 2 before rounding, and divide them by 2 afterwards.


# %%
def doubled(name, W):
    """Rounding with the columns of the largest inputs twice as large."""
    s = torch.ones(W.shape[1])
    s[sizes[name].topk(max(1, round(0.01 * len(s)))).indices] = 2.0
    return rounded(W * s) / s


# %%
story["no float, 1% doubled"] = simulated(doubled)
found = compare_all(story, model, text)
print(f"{name}, 3 bits, {measured_on}")
table(
    [
        {
            "variant": label,
            "nats lost": format_difference(c.loss),
            "perplexity": c.perplexity.perplexity,
            "same top token": c.agreement.value,
        }
        for label, c in found.items()
    ],
    {"perplexity": ".2f", "same top token": ".1%"},
)

# %% tags=["folded"]
# Records of the story.
keys = ("nearest", "inputs", "weights", "random", "doubled")
by = {"model": name, **measured_on.fields}
for key, c in zip(keys, found.values(), strict=True):
    tolerance = max(0.02, 0.15 * abs(c.loss.value))
    record(f"awq.story.{key}.loss", c.loss.value, "nats", tolerance, **by)
    record(f"awq.story.{key}.loss_error", c.loss.error, "nats", **by)
    record(f"awq.story.{key}.perplexity", c.perplexity.perplexity, "", **by)
of_float = next(iter(found.values())).reference.perplexity
record("awq.story.float.perplexity", of_float, "", 0.05, **by)
saved = difference(found["all rounded"], found["1% kept: largest inputs"])
print("largest inputs kept, against all rounded:", format_difference(saved))

# %% [markdown]
# In the recorded run rounding everything costs {{awq.story.nearest.loss:.2f}} ± {{awq.story.nearest.loss_error:.2f}} nats per token. With 1% of the channels kept by their inputs
# {{awq.story.inputs.loss:.2f}} ± {{awq.story.inputs.loss_error:.2f}} nats are lost; with 1% kept by their weights {{awq.story.weights.loss:.2f}} ± {{awq.story.weights.loss_error:.2f}}, and at random
# {{awq.story.random.loss:.2f}} ± {{awq.story.random.loss_error:.2f}}. The inputs find the channels that matter. The size of the weights hardly does.
#
# Floats among packed codes are awkward to store and to multiply with. Scaling needs none. But a blind factor of 2 loses {{awq.story.doubled.loss:.2f}} ± {{awq.story.doubled.loss_error:.2f}}, no less than
# plain rounding. (On OPT-6.7B the paper's perplexity falls from 23.54 to 11.92 by doubling [@lin2023awq].) Why can scaling protect a channel, and when does it not?
#
# ## Why scaling protects, by hand
#
# One row of four weights, 3 bits, one group. The first weight meets an input of 10, the others meet 1. We multiply the first weight by $s$, and
# divide its input by $s$: the product is the same.


# %% tags=["nbval-check-output"]
def grid(W):
    """Step and zero point of each row, 3 bits, with 0 in the range."""
    low, high = (
        W.amin(1, keepdim=True).clamp(max=0),
        W.amax(1, keepdim=True).clamp(min=0),
    )
    S = (high - low) / 7
    return S, (-low / S).round()


w, x = torch.tensor([[0.4, 1.2, -0.9, 0.5]]), torch.tensor([10.0, 1, 1, 1])
for s in (1.0, 1.5, 2.0, 3.0, 4.0):
    scaled = w * torch.tensor([s, 1, 1, 1])
    S, Z = grid(scaled)
    q = ((scaled / S).round() + Z).clamp(0, 7)
    back = S * (q - Z) / torch.tensor([s, 1, 1, 1])
    error = (back - w)[0] * x
    print(f"s = {s}: step {S.item():.3f}, first weight {back[0, 0]:.3f},", end=" ")
    print(f"output errors {[round(e, 2) for e in error.tolist()]}")

# %% [markdown]
# At $s = 2$ the first weight's error in the output is halved, and nothing else changes. At $s = 3$ the step is the same still, and the first weight happens to lie well. At $s = 4$ the
# scaled weight is the largest of its group: the step grows, and the others pay.
#
# In the paper's terms: rounding errs by a share of the step $\Delta$ that does not depend on $s$ on average. The error that reaches the output is
#
# $$ \Delta' \cdot \mathrm{RoundErr}\left(\frac{w s}{\Delta'}\right) \cdot \frac{x}{s}, $$
#
# that is $\Delta' / (\Delta s)$ times what it was. As long as the column is not the largest of its group, $\Delta' = \Delta$, and the error shrinks by
# $1/s$. (The paper argues with a symmetric step, $\Delta = \max|w| / 2^{n-1}$; its code and ours have a zero point. The argument is the same.)
#
# The picture shows it for four rows, before and after doubling the first column.

# %%
W = torch.tensor(
    [
        [0.02, -0.09, -0.03, -0.12, 0.16],
        [0.05, 0.01, 0.08, 0.10, -0.14],
        [-0.065, -0.01, 0.14, 0.21, -0.13],
        [0.02, -0.15, -0.04, -0.07, 0.12],
    ]
)
for s in (1.0, 2.0):
    columns = torch.tensor([s, 1, 1, 1, 1])
    S, Z = grid(W * columns)
    q = ((W * columns / S).round() + Z).clamp(0, 7)
    figure = four_matrices(W, q.int(), S * (q - Z) / columns)
    plt.show()

# %% [markdown]
# *Figure: a small matrix as floats, codes, reconstruction and error, twice. Above, all columns are rounded as they are. Below, the first column is doubled before rounding, and
# divided by two in the reconstruction.*
#
# The first column of the last panel shows it: the errors there shrink, and no other column changes. The doubled weights are still not the largest of their rows, so all steps stay as they are.
#
# Four rows are an anecdote. Here are 4,096 groups of 64 normal weights, with one column scaled.


# %%
groups = torch.randn(4096, 64, generator=draw)


def with_scale(s):
    """Steps `[4096, 1]` and mean squared errors `[64]` with column 0 scaled by `s`."""
    columns = torch.ones(64).index_fill(0, torch.tensor([0]), s)
    S, Z = grid(groups * columns)
    back = S * (((groups * columns / S).round() + Z).clamp(0, 7) - Z) / columns
    return S, (back - groups).square().mean(0)


# %%
S_1, errors_1 = with_scale(1.0)
rows = []
for s in (1.0, 1.25, 1.5, 2.0, 4.0):
    S, errors = with_scale(s)
    rows.append(
        {
            "s": s,
            "1/s": 1 / s,
            "error of the column": (errors[0] / errors_1[0]).sqrt().item(),
            "groups whose step grew": (S > 1.0001 * S_1).float().mean().item(),
            "error of the others": (errors[1:] / errors_1[1:]).mean().sqrt().item(),
        }
    )
table(
    rows,
    {
        "1/s": ".3f",
        "error of the column": ".3f",
        "groups whose step grew": ".0%",
        "error of the others": ".3f",
    },
)

# %% tags=["folded"]
# Records of the scaled column.
record("awq.column.double", rows[3]["error of the column"], "", 0.03)
record("awq.column.four", rows[4]["error of the column"], "", 0.03)
record("awq.column.grown", rows[4]["groups whose step grew"], "", 0.03)
record("awq.column.others", rows[4]["error of the others"], "", 0.03)

# %% [markdown]
# In the recorded run doubling leaves {{awq.column.double:.2f}} of the column's error, close to the predicted half. At $s = 4$ the step grew in {{awq.column.grown:.0%}} of the groups:
# {{awq.column.four:.2f}} of the error is left instead of a quarter, and the others err {{awq.column.others:.2f}} times as much. So $s$ must be
# chosen, and the right $s$ depends on how much larger the inputs of a channel are.
#
# ## From one number to a search
#
# AWQ gives every channel a scale from the size of its inputs:
#
# $$ s_j = \frac{\bar x_j^{\,r}}{\sqrt{\max_j \bar x_j^{\,r} \cdot \min_j \bar x_j^{\,r}}}, \qquad \bar x_j = \mathrm{mean}\,|x_j|. $$
#
# One number is left per place, the **ratio** $r$. At $r = 0$ all scales are 1. The paper tries 20 values. The authors' code takes 0, 0.05 to 0.95; llm-compressor
# takes $i/19$ up to 1. Judge is the output of the *module* that the layers stand in, attention or MLP, so that what nonlinearities and softmax forgive is forgiven.
#
# We build it for the MLP of a GPT-2 block: `ln_2` feeds `c_fc`, and the inspected module is the whole `mlp`.

# %%
small, small_tokenizer = load_model("course-lm", device=profile.device)
small_texts = calibration_tokens(small_tokenizer, 8, 256, seed=profile.seed)
awq = get_method("awq", n_bits=3, group_size=128)
_, block = blocks(small)[0]
inputs = BlockInputs.of_first_block(small, small_texts)
with torch.no_grad():
    calls = list(inputs.calls(block, "mlp"))
x = torch.cat([call.args[0].flatten(0, -2) for call in calls])  # [2048, 256]
wanted = torch.cat([call.output.flatten(0, -2) for call in calls])
print(f"inputs of the MLP {list(x.shape)}, its outputs {list(wanted.shape)}")


# %%
def scale_of(mean, ratio):
    """s `[in]` from mean |x| `[in]`."""
    s = mean**ratio
    return s / (s.max() * s.min()).sqrt()


@torch.no_grad()
def search(mlp, x, wanted, n_bits=3):
    """Mean squared output errors of the authors' ratios; best ratio and scale."""
    mlp, W = copy.deepcopy(mlp), mlp.c_fc.weight.T.float()  # [out, in]
    method, losses, scales = get_method("affine", n_bits=n_bits, group_size=128), [], []
    for i in range(20):
        s = scale_of(x.abs().mean(0), i / 20)
        mlp.c_fc.weight.copy_((rounded(W * s, method) / s).T)  # Conv1D keeps [in, out]
        losses.append((mlp(x) - wanted).square().mean().item())
        scales.append(s)
    best = min(range(20), key=losses.__getitem__)
    return losses, best / 20, scales[best]


losses, ratio, s = search(block.mlp, x, wanted)
print(f"best ratio {ratio}, scales from {s.min():.2f} to {s.max():.2f}")
print(f"{min(losses) / losses[0]:.3f} times the output error of round-to-nearest")

# %% [markdown]
# The package searches all places of a block, and finds the same for this one.

# %%
exact = get_method("awq", n_bits=3, group_size=128, finalists=None)
places = {found.fold.source: found for found in exact.search(block, inputs)}
theirs = places["ln_2"]
assert theirs.ratio == ratio
torch.testing.assert_close(theirs.scale, s, rtol=1e-5, atol=0)
torch.testing.assert_close(list(theirs.losses), losses, rtol=1e-3, atol=0)
print("The package finds the same ratio, scales and losses.")

# %% tags=["folded"]
# Records of the search.
by = {"model": "course-lm"}
record("awq.search.ratio", ratio, "", 0, **by)
record("awq.search.left", min(losses) / losses[0], "", 0.02, **by)

# %% [markdown]
# In the recorded run the best ratio here is {{awq.search.ratio:.2f}}, and {{awq.search.left:.1%}} of the error is left: course-lm has no large inputs to protect.
# Now the same search in the block of the larger model that holds the layer of the first figure.

# %%
walk = BlockInputs.of_first_block(model, calibration)
for label, large_block in blocks(model):
    if heaviest.startswith(f"{label}."):
        break
    with torch.no_grad():
        walk.advance(large_block)  # what the next block reads
exact = get_method("awq", n_bits=3, group_size=group_size, finalists=None)
found_there = exact.search(large_block, walk)

# %%
curves = {}
for place in found_there:
    layers = ", ".join(layer.rpartition(".")[2] for layer in place.fold.layers)
    errors = [loss / place.losses[0] for loss in place.losses]
    curves[f"{place.fold.source} -> {layers}"] = errors
figure = loss_against_ratio(curves, [i / 20 for i in range(20)])
plt.show()

# %% tags=["folded"]
# Records of the place where scaling helps most.
best = min(found_there, key=lambda place: min(place.losses) / place.losses[0])
print(f"{name}, {label}: most is won at {', '.join(best.fold.layers)}")
record("awq.search.large.ratio", best.ratio, "", 0.1, model=name)
record("awq.search.large.left", min(best.losses) / best.losses[0], "", 0.1, model=name)

# %% [markdown]
# *Figure: the error of the module's output against the ratio, relative to ratio 0, a curve for each place of the block. The dashed line is round-to-nearest; a dot marks the best ratio.*
#
# In the recorded run the best place of this block keeps {{awq.search.large.left:.0%}} of round-to-nearest's error, with a ratio of {{awq.search.large.ratio:.2f}}.
# Too large a ratio does harm: it scales so far that the groups' steps grow. Ratio 0 is in the grid, so on its own measure the search never loses to
# round-to-nearest. (The package saves time where a module must run for each candidate: all run on an eighth of the text, and the best four on the rest.)
#
# ## Folding: the division is free
#
# Dividing the inputs at run time would cost a pass. But something made those inputs, and can make them smaller. A norm multiplies each feature by a
# weight: divide that weight by $s_j$ (LayerNorm's bias too), and multiply column $j$ of all layers that read it.


# %%
def output_of(block):
    """The block's hidden states on the calibration, `[8, 256, 256]`."""
    with torch.no_grad():
        return torch.cat(list(inputs.outputs(block)))


before, folded = output_of(block), copy.deepcopy(block)
with torch.no_grad():
    folded.ln_2.weight.div_(s)
    folded.ln_2.bias.div_(s)
    folded.mlp.c_fc.weight.mul_(s[:, None])  # [in, out]
off = ((output_of(folded) - before).norm() / before.norm()).item()
print(f"relative change of the block's output: {off:.1e}")
assert off < 1e-4

# %% [markdown]
# The float function is the same up to float32's rounding. Two more places need a thought; no published code has a branch for GPT-2, so we derive it.
#
# **Values to output projection.** A head's output is a weighted mean of its value vectors: $o = \sum_t a_t v_t$. Each feature of $v$ is averaged by itself, and so a factor
# passes through: divide feature $j$ of $v$, multiply column $j$ of the projection. GPT-2 has q, k and v in one matrix: v is its last third, bias included.
#
# **Through an activation.** $\mathrm{GELU}(h / s) \ne \mathrm{GELU}(h) / s$, so GPT-2's second MLP layer has no fold. Llama's MLP is
# $\mathrm{SiLU}(g) \odot u$: linear in $u$, so `up_proj` folds into `down_proj`.

# %%
d, v_scale = 256, places["attn.c_attn"].scale
with torch.no_grad():
    folded.attn.c_attn.weight[:, -d:].div_(v_scale)  # [in, 3 d]: v is the last third
    folded.attn.c_attn.bias[-d:].div_(v_scale)
    folded.attn.c_proj.weight.mul_(v_scale[:, None])
off = ((output_of(folded) - before).norm() / before.norm()).item()
h = torch.linspace(-3, 3, 7)
print(f"with the values folded too: {off:.1e}")
print(
    "2 GELU(h / 2) - GELU(h):",
    [round(v, 2) for v in (2 * F.gelu(h / 2) - F.gelu(h)).tolist()],
)
assert off < 1e-4

# %% [markdown]
# The values' fold leaves the function as it is; through GELU it would not. The package keeps these places as data: another architecture is another entry.

# %% tags=["nbval-check-output"]
for kind, folds in FOLDS.items():
    for fold in folds:
        layers = ", ".join(fold.layers)
        print(f"{kind}: {fold.source} -> {layers}; judged by {fold.inspected}")

# %% [markdown]
# With **grouped-query attention** several query heads read the same values. Then those heads must share a scale: we take the mean $|x|$ over the heads that read
# a value feature. The authors' code leaves this place out where the shapes differ.
#
# ## The second search: ranges
#
# After folding, AWQ looks for a range for each group of a row. It clips the group at 1.00, 0.95, ... 0.55 of its largest
# magnitude, and keeps what changes the group's share of the *output* least. Queries and keys are left out: their errors meet in a product. GPT-2's fused `c_attn` stays out with them.


# %%
@torch.no_grad()
def clipped(W, x, method, size=128):
    """`W` `[out, in]` clamped group by group; the factors `[out, groups]` chosen."""
    groups = W.unflatten(1, (-1, size))  # [out, groups, size]
    features = x.unflatten(1, (-1, size))  # [tokens, groups, size]
    absmax, least = groups.abs().amax(2, keepdim=True), torch.inf
    factors = torch.ones(groups.shape[:2])
    for factor in [1 - i / 20 for i in range(10)]:
        tried = rounded(
            groups.clamp(-factor * absmax, factor * absmax).flatten(1), method
        )
        change = groups - tried.unflatten(1, (-1, size))
        cost = torch.einsum("tgi,ogi->tog", features, change).square().mean(0)
        factors = torch.where(cost < least, factor, factors)
        least = torch.minimum(cost, torch.as_tensor(least))
    limit = factors[..., None] * absmax
    return groups.clamp(-limit, limit).flatten(1), factors


W, fed = folded.mlp.c_fc.weight.T.float(), x / s  # both scaled
three_bits = get_method("affine", n_bits=3, group_size=128)
ours, factors = clipped(W, fed[:512], three_bits)
products = fed[:512].T @ fed[:512] / 512
torch.testing.assert_close(ours, awq.clipped(W, products), rtol=0, atol=1e-5)
print("The package chooses the same ranges.")


# %%
def layer_error(V):
    """Mean squared error of the layer's output with the rounded weight `V`."""
    return (fed @ (W - rounded(V, three_bits)).T).square().mean().item()


left = layer_error(ours) / layer_error(W)
kept = (factors == 1).float().mean().item()
print(f"{kept:.0%} of the groups keep their range; mean factor {factors.mean():.2f}")
print(f"{left:.3f} times the output error of the unclipped ranges")

# %% tags=["folded"]
# Records of the ranges.
record("awq.clip.left", left, "", 0.05, model="course-lm")
record("awq.clip.kept", kept, "", 0.05, model="course-lm")

# %% [markdown]
# In the recorded run {{awq.clip.kept:.0%}} of the groups keep their range, and clipping the rest leaves {{awq.clip.left:.0%}} of the layer's output error. At 3 bits a step is wide, so
# a shorter range pays.
#
# ## A whole model
#
# `quantize_model` walks the model block by block: it searches the scales on the block's float inputs, folds them, searches the ranges, rounds and packs. AWQ feeds each
# block with what the *float* blocks before it put out, where GPTQ takes the outputs of the quantized ones. What is stored are the same bytes as for round-to-nearest:
# codes, scales, zero points. No trace of $s$ is left.


# %%
def quantized(method, calibration):
    """A fresh model with the values of the codes, and the report on the packed one."""
    packed = load_model(name, dtype=profile.dtype, device=profile.device).model
    report = quantize_model(packed, method, calibration=calibration)
    return decode_model(packed), report


# %%
models, reports = {}, {}
for label in ("AWQ", "GPTQ"):
    method = get_method(label.lower(), n_bits=3, group_size=group_size)
    models[label], reports[label] = quantized(method, calibration)
assert reports["AWQ"].nbytes == reports["GPTQ"].nbytes
whole = {"round-to-nearest": found["all rounded"], **compare_all(models, model, text)}
bits = reports["AWQ"].bits_per_weight  # of all three: codes, scales, zero points

# %%
rows = [
    {
        "method": label,
        "bits per weight": bits,
        "nats lost": format_difference(c.loss),
        "KL": c.divergence.value,
        "same top token": c.agreement.value,
        "perplexity": c.perplexity.perplexity,
    }
    for label, c in whole.items()
]
print(f"{name}, {measured_on}")
table(
    rows,
    {
        "bits per weight": ".3f",
        "KL": ".3f",
        "same top token": ".1%",
        "perplexity": ".2f",
    },
)

# %% tags=["folded"]
# Records of the whole model, and the paired differences.
by = {"model": name, **measured_on.fields}
record("awq.whole.bits_per_weight", bits, "bits", 0, **by)
for key, c in zip(("affine", "awq", "gptq"), whole.values(), strict=True):
    key, tolerance = f"awq.whole.{key}", max(0.02, 0.15 * abs(c.loss.value))
    record(f"{key}.loss", c.loss.value, "nats", tolerance, **by)
    record(f"{key}.loss_error", c.loss.error, "nats", **by)
    record(f"{key}.perplexity", c.perplexity.perplexity, "", **by)
for key, other in (("nearest", "round-to-nearest"), ("gptq", "GPTQ")):
    less = difference(whole["AWQ"], whole[other])
    record(f"awq.whole.awq_less_{key}", less.value, "nats", 0.05, **by)
    record(f"awq.whole.awq_less_{key}_error", less.error, "nats", 0.02, **by)
    print(f"AWQ, less {other}: {format_difference(less)}")

# %% [markdown]
# In the recorded run, at the same bytes, round-to-nearest loses {{awq.whole.affine.loss:.3f}} nats per token, AWQ {{awq.whole.awq.loss:.3f}} and GPTQ {{awq.whole.gptq.loss:.3f}}.
# The paired difference, AWQ less GPTQ, is {{awq.whole.awq_less_gptq:+.2f}} ± {{awq.whole.awq_less_gptq_error:.2f}} nats. GPTQ even loses more
# than rounding: 2,048 tokens tell little of how 1,536 features go together, and it fits what they tell. (`gptq_demo` reads twice as many.) AWQ asks the text for one mean per
# feature. The errors are over documents; the calibration is one text here. `awq_ablations` takes six, on the small model.
#
# What do the models of this notebook write?

# %%
speakers = {"float": model, "all rounded": story["all rounded"], **models}
print(continuations(speakers, tokenizer, prompt_of(name)))

# %% [markdown]
# None of the three still says what the float model says. Round-to-nearest repeats a sentence, GPTQ loses the thread, and AWQ is fluent and wrong. One text proves nothing, but it shows what such
# losses do to a language.
#
# ## What you saw
#
# - **Which 1%.** On the larger model, in the recorded run, keeping the channels with the largest inputs takes the loss from {{awq.story.nearest.loss:.2f}} to {{awq.story.inputs.loss:.2f}} nats; the
#   largest weights leave {{awq.story.weights.loss:.2f}}, random ones {{awq.story.random.loss:.2f}}.
# - **Why scaling protects.** Doubling a column left {{awq.column.double:.2f}} of its error, nearly $1/s$. Larger factors make the column the largest of its groups, and then all pay.
# - **Two searches.** At its best place the scale search left {{awq.search.large.left:.0%}} of the output error. The range search left {{awq.clip.left:.0%}} in a layer of course-lm.
# - **Folding.** Norms and values take the scales; the block's output changed by float32's rounding only. GELU lets none through.
# - **Against GPTQ, at the same bytes.** On SmolLM2 at 3 bits AWQ loses {{awq.whole.awq.loss:.2f}} nats and GPTQ {{awq.whole.gptq.loss:.2f}}, in pairs {{awq.whole.awq_less_gptq:+.2f}} ± {{awq.whole.awq_less_gptq_error:.2f}}. With
#   large inputs and little text, protecting the inputs decides. `awq_ablations` shows the other case.
#
# ## Limits
#
# - AWQ knows mean $|x|$ and one number per place. It does not look at how features go together, as GPTQ does.
# - It needs a place to fold into. Models without a mapping are refused, and GPT-2's second MLP layer keeps its columns.
# - A search judges one module at a time, with everything else in float. Errors that add up over blocks are not seen.
# - The story's 1% is a simulation: its weights are floats on a grid. The whole models hold packed codes.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: the scale of a channel
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Write the scale of every channel from the inputs themselves. A channel that was 0 on the whole calibration gets the scale 1, and does not take part in the normalisation.


# %% tags=["exercise"]
def channel_scales(x, ratio):
    """s `[in]` of `x` `[tokens, in]`: mean|x|^ratio over sqrt(largest * smallest).

    Approach: the mean of |x| over tokens, to the power; normalise by the channels seen.
    Example: x = [[4, -1]], ratio 0.5 gives [sqrt 2, 1 / sqrt 2].
    Hint: choose the seen channels with a mask, mean > 0.
    """
    ### BEGIN SOLUTION
    mean = x.abs().mean(0)
    seen = mean > 0
    s = mean**ratio
    s = s / (s[seen].max() * s[seen].min()).sqrt()
    return torch.where(seen, s, torch.ones_like(s))
    ### END SOLUTION


# %% tags=["exercise-tests"]
s = channel_scales(torch.tensor([[4.0, -1.0]]), 0.5)
assert torch.allclose(s, torch.tensor([2.0, 0.5]).sqrt()), (
    "means 4 and 1, normalised by 2"
)
s = channel_scales(torch.tensor([[3.0, 1.0], [-1.0, 1.0]]), 1.0)
assert not torch.allclose(s[0] / s[1], torch.tensor(1.0)), (
    "take |x| before the mean: signs must not cancel"
)
assert torch.allclose(s[0] / s[1], torch.tensor(2.0)), (
    "the mean of |x|, not its maximum: SmoothQuant takes that"
)
assert torch.isclose(s.max() * s.min(), torch.tensor(1.0)), (
    "divide by the root of largest times smallest"
)
assert torch.equal(channel_scales(torch.tensor([[5.0, 0.1]]), 0.0), torch.ones(2)), (
    "ratio 0: all 1"
)
s = channel_scales(torch.tensor([[4.0, 0.0, 1.0]]), 0.5)
assert torch.isfinite(s).all() and s[1] == 1, (
    "a channel that is always 0 gets the scale 1"
)
print("scales:", [round(v, 3) for v in s.tolist()])
### BEGIN HIDDEN TESTS
expected = torch.tensor([2.0, 0.5]).sqrt()
assert torch.allclose(s[[0, 2]], expected), "silent channels stay out of the norm"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: fold the values, with grouped queries
# *Difficulty 3/5 · 20 minutes · 3 points · no GPU*
#
# Attention has `heads` query heads and `kv_heads` heads of values, each of width `d`. Query head $i$ reads value head $i \cdot$ `kv_heads` // `heads`. Fold a scale into both
# weights, so that the function stays as it is.


# %% tags=["exercise"]
def fold_values(V, b, P, s, heads, kv_heads):
    """New (V, b, P): values `[kv_heads * d, in]`, bias, projection `[out, heads * d]`.

    `s` `[kv_heads * d]` is the scale of each value feature.
    Approach: divide V's rows and b by s; multiply P's columns, where each value head's
    part of s comes once for every query head that reads it.
    Example: with heads == kv_heads, P's columns are multiplied by s itself.
    Hint: s.view(kv_heads, d).repeat_interleave(heads // kv_heads, 0).flatten().
    """
    ### BEGIN SOLUTION
    of_columns = s.view(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()
    return V / s[:, None], b / s, P * of_columns
    ### END SOLUTION


# %% tags=["exercise-tests"]
def attend(V, b, P, x, heads, kv_heads, mix):
    """Outputs `[tokens, out]`; `mix` `[heads, tokens, tokens]`: softmax's weights."""
    values = (x @ V.T + b).unflatten(1, (kv_heads, -1))  # [tokens, kv_heads, d]
    read = values[:, torch.arange(heads) * kv_heads // heads]  # [tokens, heads, d]
    return torch.einsum("hts,shd->thd", mix, read).flatten(1) @ P.T


seeded = torch.Generator().manual_seed(1)
for heads, kv_heads in ((2, 2), (4, 2)):
    V, P = (
        torch.randn(3 * kv_heads, 5, generator=seeded),
        torch.randn(6, 3 * heads, generator=seeded),
    )
    b, x = (
        torch.randn(3 * kv_heads, generator=seeded),
        torch.randn(7, 5, generator=seeded),
    )
    mix = torch.rand(heads, 7, 7, generator=seeded).softmax(-1)
    s = torch.rand(3 * kv_heads, generator=seeded) + 0.5
    kept = V.clone(), b.clone(), P.clone()
    new = fold_values(V, b, P, s, heads, kv_heads)
    assert all(map(torch.equal, (V, b, P), kept)), "work on copies"
    assert torch.allclose(new[0], V / s[:, None]), (
        "row j of V makes feature j: divide it by s_j"
    )
    assert torch.allclose(new[1], b / s), "the bias is part of the value: divide it too"
    same = torch.allclose(
        attend(*new, x, heads, kv_heads, mix),
        attend(V, b, P, x, heads, kv_heads, mix),
        atol=1e-4,
    )
    assert same, (
        f"{heads} heads on {kv_heads}: which s meets each query head's columns?"
    )
print("The function is the same with and without grouped queries.")
### BEGIN HIDDEN TESTS
V, b, P = torch.randn(2, 3, generator=seeded), torch.zeros(2), torch.ones(1, 8)
new = fold_values(V, b, P, torch.tensor([2.0, 4.0]), 4, 1)
expected = torch.tensor([[2.0, 4.0] * 4])
assert torch.equal(new[2], expected), "four query heads read one key-value head"
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - J. Lin, J. Tang, H. Tang, S. Yang, X. Dang, C. Gan, S. Han, *AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration*, preprint 2023, MLSys 2024, arXiv
#   2306.00978 [@lin2023awq]; code at github.com/mit-han-lab/llm-awq.
# - The libraries llm-compressor [@llmcompressor] and AutoAWQ [@autoawq], no longer maintained; the models course-lm (trained by this project, see its model card) and
#   SmolLM2 [@allal2025smollm2].
#
# ## Next
#
# `awq_ablations`: what each part is worth, and where AWQ loses. Then `nf4_demo`: another grid, for weights that are spread as a normal distribution.
