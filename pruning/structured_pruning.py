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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/pruning/structured_pruning.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/pruning/structured_pruning.ipynb)
#
# # Structured pruning: models that are really smaller
#
# *Large Model Quantization: a deep dive. Pruning, second of three.*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - remove neurons, attention heads and whole layers from a transformer, so that its matrices get smaller;
# - score them by magnitude, by activation [@muralidharan2024minitron], by Taylor expansion [@ma2023llmpruner] and by layer similarity [@men2024shortgpt], against random removal;
# - measure what that saves in parameters, file and time, and load the result as a plain `transformers` model;
# - recover a pruned model by distillation from the unpruned one, with controls;
# - rotate a model's hidden states without changing its output, which SliceGPT [@ashkboos2024slicegpt] builds on.
#
# It takes about 50 minutes to read and work. You need `pruning_demo`, and the idea of distillation (`distillation_demo`).
# No profile needs a GPU; `quick` runs in under a minute, `cpu` in about four.

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

import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.data.batches import TrainingBatches, token_stream
from course_utils.data.corpora import documents
from course_utils.data.tokens import calibration_tokens
from course_utils.distillation.trainer import DistilSettings, distil
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
from course_utils.evaluation.turns import in_turns

# %%
from course_utils.models import load_model
from course_utils.plotting import nats_against_bits, table
from course_utils.plotting.structured import (
    layers_worth,
    neurons_removed,
    prune_and_recover,
)
from course_utils.profiles import resolve
from course_utils.results import record
from course_utils.training.loop import TrainConfig
from transformers import AutoModelForCausalLM

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
# `pruning_demo` ended with a warning: a matrix full of zeros is as large and as slow as before. **Structured pruning** removes whole rows and columns instead. The
# matrices that are left are dense and smaller, so every kernel and every file gains. The price is a coarser choice. Which structures can go, how do we find them,
# and how much of the loss can training win back?
#
# ## By hand
#
# An MLP has two matrices. A **neuron** is a row of the first, its bias, and a column of the second: $y = W_\text{out}\, f(W_\text{in}\, x + b)$. Remove
# one without the other, and the shapes no longer fit. Here are four neurons on two features; we keep 0 and 2.

# %% tags=["nbval-check-output"]
W_in = torch.tensor([[2.0, -1.0], [0.0, 0.0], [1.0, 1.0], [-0.5, 0.25]])
W_out = torch.tensor([[1.0, 3.0, -1.0, 0.5], [0.5, -2.0, 2.0, 0.0]])
# W_in is [neurons, in], W_out is [out, neurons]
keep = [0, 2]
small_in, small_out = W_in[keep], W_out[:, keep]
x = torch.tensor([[1.0, 1.0], [2.0, 0.0]])  # [tokens, in]
print("all four:", (torch.relu(x @ W_in.T) @ W_out.T).tolist())
print("two kept:", (torch.relu(x @ small_in.T) @ small_out.T).tolist())

# %%
figure = neurons_removed(W_in, W_out, keep)
plt.show()

# %% [markdown]
# *Figure: the two matrices of the small MLP. Grey: the row and the column of each neuron that goes. On the right what is left, 2 by 2 and 2 by 2. Values are shown with one decimal.*
#
# The outputs agree, since the neurons that went give zero on these inputs. That is the test of exactness: what contributes nothing can go without a trace.
#
# An attention **head** is such a unit too. It owns rows of the query, key and value layers, and columns of the output layer. In grouped-query attention, several query heads share keys and values. Such a group is
# one unit here, since none of its heads works without them. A **layer** is the largest unit: it adds its output to the hidden states, so without it they pass unchanged.
#
# ## Where the parameters are
#
# We work on course-lm, a GPT-2 with 4 layers of 4 heads and 1,024 neurons. Before we cut, let us see what there is to gain.

# %%
from course_utils.models.walk import blocks
from course_utils.pruning.structured import best_units, keep_layers, keep_units

dense, tokenizer = load_model("course-lm", device=profile.device)
# %%
total = dense.num_parameters()
parameters = {
    part: sum(p.numel() for name, p in dense.named_parameters() if f".{key}." in name)
    for part, key in {"embeddings": "wte", "attention": "attn", "MLP": "mlp"}.items()
}
rows = [
    {"part": part, "parameters": n, "share": n / total}
    for part, n in parameters.items()
]
table(rows, {"parameters": ",", "share": ".0%"})

# %% [markdown]
# The MLP holds twice what attention holds. The embeddings stay in all that follows, so the shares below are smaller than the sparsity sounds.
#
# Now exactness on the real model. We silence 100 neurons of each layer (zeros in their output columns), and then remove them.

# %%
silent = copy.deepcopy(dense)
for _, block in blocks(silent):
    block.mlp.c_proj.weight.data[:100] = 0.0  # Conv1D keeps [in, out]
smaller = keep_units(
    silent, "neurons", {n: range(100, 1024) for n, _ in blocks(silent)}
)
# %%
tokens = calibration_tokens(tokenizer, 1, 64, seed=profile.seed).to(profile.device)
with torch.no_grad():
    apart = (silent(tokens).logits - smaller(tokens).logits).abs().max().item()
print(f"{silent.num_parameters() - smaller.num_parameters():,} parameters fewer, "
      f"logits apart by at most {apart:.0e}")  # fmt: skip

# %% [markdown]
# Rounding aside, nothing changed: sums are taken in another order. Every layer keeps the same number of neurons. That is a choice, and a limit: a plain
# `transformers` config has one number for all layers.
#
# ## Four ways to score
#
# **Magnitude**: the length of all weights that a unit owns. **Activation**, as in Minitron [@muralidharan2024minitron]: how large the unit's output is on text. $|a|$ is averaged over the tokens of a
# sequence, squares are summed over sequences, and the root is the score.
#
# **Taylor**, as in LLM-Pruner [@ma2023llmpruner]: if weight $w$ becomes zero, the loss $L$ changes by about $w\, \partial L / \partial w$. A unit's score is the sum of $|w\, \partial L/\partial w|$. It needs
# a backward pass. **Random** is the control. Activation needs no more than forward passes.

# %%
from course_utils.pruning.importance import (
    activation,
    best_layers,
    block_influence,
    magnitude,
    random_scores,
    taylor,
)

# %%
sequences = profile.pick(quick=4, cpu=8)
calibration = calibration_tokens(tokenizer, sequences, 256, seed=profile.seed)
draws = [profile.seed + i for i in range(3)]


# %%
def scores_of(kind):
    """Scores of all units by each way; random ones for three draws."""
    scores = {
        "magnitude": magnitude(dense, kind),
        "Taylor": taylor(dense, kind, calibration),
    }
    similar = kind == "layers"
    scores["similarity" if similar else "activation"] = (
        block_influence(dense, calibration)
        if similar
        else activation(dense, kind, calibration)
    )
    return scores | {f"random {s}": random_scores(dense, kind, s) for s in draws}


# %%
scores = {kind: scores_of(kind) for kind in ("neurons", "heads", "layers")}
# %%
of_first = scores["neurons"]
pairs = [("magnitude", "activation"), ("magnitude", "Taylor"), ("activation", "Taylor")]
ranks = {
    way: of_way["transformer.h.0"].argsort().argsort().double()
    for way, of_way in of_first.items()
}
for a, b in pairs:
    agree = torch.corrcoef(torch.stack([ranks[a], ranks[b]]))[0, 1].item()
    print(f"first layer, {a} and {b}: rank correlation {agree:+.2f}")
    record(f"structured.rank.{a}_{b}".lower(), agree, "", 0.05, model="course-lm")

# %% [markdown]
# In the recorded run activation and Taylor rank the neurons of the first layer alike ({{structured.rank.activation_taylor:+.2f}}). Magnitude agrees with neither
# ({{structured.rank.magnitude_activation:+.2f}} and {{structured.rank.magnitude_taylor:+.2f}}): it looks at weights, and the other two at text.
#
# ## Neurons
#
# We keep 768, 512 and 256 of the 1,024 neurons of every layer, and measure what the model loses on other text. No training yet.

# %%
measured_on = Protocol("factbook", profile.pick(quick=1024, cpu=2048), 256)
text = measured_on.text(tokenizer)
ways = ("magnitude", "activation", "Taylor")
NEURONS = profile.pick(quick=(768, 512), cpu=(768, 512, 256))


# %%
def cut(kind, way, count):
    """course-lm with the `count` best units of each layer."""
    return keep_units(dense, kind, best_units(scores[kind][way], count))


# %%
def over_seeds(values):
    """Mean and standard error over seeds."""
    values = torch.tensor(values).double()
    error = values.std().item() / len(values) ** 0.5
    return Estimate(values.mean().item(), error, len(values), "seeds")


# %%
neurons = {(w, n): cut("neurons", w, n) for w in scores["neurons"] for n in NEURONS}
found = {"neurons": compare_all(neurons, dense, text)}


# %%
def lost(kind, way, count):
    """Nats lost: errors over documents, and for random removal over draws."""
    if way != "random":
        return found[kind][way, count].loss
    return over_seeds([found[kind][f"random {s}", count].loss.value for s in draws])


# %%
curves = {}
for way in (*ways, "random"):
    losses = [lost("neurons", way, n) for n in NEURONS]
    removed = [100 - 100 * n / 1024 for n in NEURONS]
    curves[way] = removed, [e.value for e in losses], [e.error for e in losses]
figure = nats_against_bits({"course-lm": curves}, xlabel="% of neurons removed")
plt.show()

# %% tags=["folded"]
# Records of the three kinds of removal.
by = {"model": "course-lm", **measured_on.fields}


def record_estimate(key, estimate, **by):
    """Value under `key`, standard error under `key` with _error."""
    tolerance = max(0.02, 0.1 * abs(estimate.value))
    record(key, estimate.value, "nats", tolerance, **by)
    record(f"{key}_error", estimate.error, "nats", **by)


for n in NEURONS:
    for way in (*ways, "random"):
        key = f"structured.neurons.{way}.{n}".lower()
        record_estimate(key, lost("neurons", way, n), **by)
    gap = difference(found["neurons"]["activation", n], found["neurons"]["Taylor", n])
    record_estimate(f"structured.neurons.activation_less_taylor.{n}", gap, **by)
    print(f"{n} neurons: activation less Taylor {format_difference(gap)}")

# %% [markdown]
# *Figure: nats lost per token against the share of neurons removed. Bars are two standard errors: over documents, and for random removal over three draws.*
#
# In the recorded run half of the neurons cost {{structured.neurons.taylor.512:.2f}} ± {{structured.neurons.taylor.512_error:.2f}} nats by Taylor,
# {{structured.neurons.activation.512:.2f}} ± {{structured.neurons.activation.512_error:.2f}} by activation and {{structured.neurons.magnitude.512:.2f}} ± {{structured.neurons.magnitude.512_error:.2f}} by magnitude.
# **Random removal costs {{structured.neurons.random.512:.2f}} ± {{structured.neurons.random.512_error:.2f}}.** At half no score beats it; without the control we would have praised
# them. Magnitude is worse than chance. Activation less Taylor, paired, is {{structured.neurons.activation_less_taylor.512:+.2f}} ± {{structured.neurons.activation_less_taylor.512_error:.2f}} nats with 512 neurons
# left and {{structured.neurons.activation_less_taylor.256:+.2f}} ± {{structured.neurons.activation_less_taylor.256_error:.2f}} with 256: neither of the two is the better one throughout.
#
# Why? The work of this small MLP seems to be spread over all neurons, so that there are few idle ones to find. We did not test that. Keep it in mind: a larger model below answers otherwise.
#
# ## Heads
#
# The same for heads: of 4 in each layer we keep 3, 2 and 1.

# %%
HEADS = (3, 2, 1)
heads = {(w, n): cut("heads", w, n) for w in scores["heads"] for n in HEADS}
found["heads"] = compare_all(heads, dense, text)

# %% tags=["folded"]
# The table, with its records.
rows = []
for n in HEADS:
    row = {"heads kept": f"{n} of 4"}
    for way in (*ways, "random"):
        e = lost("heads", way, n)
        row[way] = with_error(e.value, e.error, "+")
        record_estimate(f"structured.heads.{way}.{n}".lower(), e, **by)
    rows.append(row)
table(rows)

# %% [markdown]
# Heads are another story. In the recorded run one of four heads costs next to nothing by Taylor ({{structured.heads.taylor.3:+.3f}} ± {{structured.heads.taylor.3_error:.3f}} nats). With half of the heads the
# model loses {{structured.heads.taylor.2:.2f}} by Taylor and {{structured.heads.activation.2:.2f}} by activation, but {{structured.heads.random.2:.1f}} ± {{structured.heads.random.2_error:.1f}} at random. Here the scores
# earn their name. Even magnitude ({{structured.heads.magnitude.2:.2f}}) does well: heads differ much, as the bands in `pruning_demo`'s mask showed.
#
# ## Layers
#
# ShortGPT scores a layer by how little it turns the hidden states [@men2024shortgpt]. **Block Influence** is $1 - \cos(x_\text{in}, x_\text{out})$, averaged over tokens. Is a layer that turns little also one that matters little? With four
# layers we can ask the model itself: we remove each one alone.

# %%
without = {i: keep_layers(dense, [j for j in range(4) if j != i]) for i in range(4)}
alone = compare_all(without, dense, text)
influence = [s.item() for s in scores["layers"]["similarity"].values()]
costs = [alone[i].loss for i in range(4)]
figure = layers_worth(influence, [c.value for c in costs], [c.error for c in costs])
plt.show()

# %% tags=["folded"]
# What each way would remove first, and its price.
rows = []
for way, of_way in scores["layers"].items():
    [gone] = set(range(4)) - set(best_layers(of_way, 3))
    price = format_difference(alone[gone].loss)
    rows.append({"way": way, "removes layer": gone, "nats lost": price})
    if not way.startswith("random"):
        record_estimate(f"structured.layers.{way}".lower(), alone[gone].loss, **by)
for i, cost in enumerate(costs):
    record_estimate(f"structured.layer.{i}", cost, **by)
    record(f"structured.influence.{i}", influence[i], "", 0.02, model="course-lm")
mean = over_seeds([c.value for c in costs])
record("structured.layers.any", mean.value, "nats", 0.1, **by)
table(rows)

# %% [markdown]
# *Figure: on the left Block Influence of each layer, on the right the nats lost without it, with two standard errors. The table says which layer each way removes.*
#
# In the recorded run the first layer has the highest influence ({{structured.influence.0:.2f}}), and it is vital: without it {{structured.layer.0:.2f}} nats are lost. The other three cost
# {{structured.layer.1:.2f}}, {{structured.layer.2:.2f}} and {{structured.layer.3:.2f}}. Similarity avoids the first, and loses {{structured.layers.similarity:.2f}} ± {{structured.layers.similarity_error:.2f}}. Magnitude removes it,
# and loses {{structured.layers.magnitude:.2f}}: small weights do not mean an idle layer. The mean over all four, what blind choice costs, is {{structured.layers.any:.2f}}.
#
# ## The same parameters, three ways
#
# One layer of course-lm has as many weights as 3 heads of all four layers, or as 384 neurons of all four. So we can ask which structure is cheapest at the same size.

# %%
same = {("neurons", w): cut("neurons", w, 640) for w in scores["neurons"]}
found_same = compare_all(same, dense, text)

# %%
for way in scores["heads"]:
    found_same["heads", way] = found["heads"][way, 1]
for way, of_way in scores["layers"].items():
    [gone] = set(range(4)) - set(best_layers(of_way, 3))
    found_same["layers", way] = alone[gone]
made = {
    "neurons": same["neurons", "Taylor"],
    "heads": heads["Taylor", 1],
    "layers": without[3],
}

# %% tags=["folded"]
# The table, with its records; a layer's "activation" is its similarity.
rows = []
titles = {
    "neurons": "384 of 1,024 neurons",
    "heads": "3 of 4 heads",
    "layers": "1 of 4 layers",
}
for kind, model in made.items():
    row = {"removed": titles[kind], "parameters": total - model.num_parameters()}
    of_text = "similarity" if kind == "layers" else "activation"
    for way in ("magnitude", "activation", "Taylor", "random"):
        if way == "random":
            drawn = [found_same[kind, f"random {s}"].loss.value for s in draws]
            estimate = over_seeds(drawn)
        else:
            named = of_text if way == "activation" else way
            estimate = found_same[kind, named].loss
        row[way] = with_error(estimate.value, estimate.error, "+")
        record_estimate(f"structured.same.{kind}.{way}".lower(), estimate, **by)
    key = f"structured.same.{kind}.parameters"
    record(key, row["parameters"], "", 0, model="course-lm")
    rows.append(row)
table(rows, {"parameters": ","})

# %% [markdown]
# In the recorded run the coarsest structure is the cheapest: a whole layer costs {{structured.same.layers.taylor:.2f}} ± {{structured.same.layers.taylor_error:.2f}} nats by Taylor, three heads of four
# {{structured.same.heads.taylor:.2f}} ± {{structured.same.heads.taylor_error:.2f}}, and 384 neurons {{structured.same.neurons.taylor:.2f}} ± {{structured.same.neurons.taylor_error:.2f}}. It is also the riskiest: magnitude picks the first layer. The three random draws for layers
# happened to miss the first layer, so their small error misleads. (For layers "activation" means similarity.)
#
# ## What it saves: parameters, file, time
#
# Nothing is simulated: these models are smaller. We time a forward pass of 256 tokens and one generated token, in turns, so that what disturbs one disturbs all.

# %%
kept_layers = best_layers(scores["layers"]["Taylor"], 3)
both = keep_layers(cut("neurons", "Taylor", 512), kept_layers)
sizes = {"dense": dense, "512 neurons": neurons["Taylor", 512],
         "2 heads": heads["Taylor", 2], "3 layers": keep_layers(dense, kept_layers),
         "3 layers, 512 neurons": both}  # fmt: skip
# %%
passage = calibration_tokens(tokenizer, 1, 256, seed=1).to(profile.device)
prompt = torch.tensor(tokenizer(prompt_of("course-lm")).input_ids)


def forward(model):
    """A call that runs `model` on the passage."""
    return lambda: torch.no_grad()(model)(passage)


# %%
passes = in_turns({n: [forward(m)] for n, m in sizes.items()}, rounds=20, calls=1)
steps = {name: [] for name in sizes}
for _ in range(6):
    for name, model in sizes.items():
        timing = time_per_token(model, prompt, new_tokens=8, warmup=2)
        steps[name] += timing.milliseconds

# %% tags=["folded"]
# Saves each model, where its config can say what it is.
from course_utils.pruning.structured import save_plain


def saved(model):
    """Bytes of the file, or None where the model has no plain config."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_plain(torch.nn.Module.half(copy.deepcopy(model)), folder)
        except ValueError as error:
            print(error, end="\n\n")
            return None
        return file_bytes(folder)


rows = []
for name, model in sizes.items():
    row = {"kept": name, "parameters": model.num_parameters(), "file": saved(model)}
    rows.append(row | {"pass, ms": min(passes[name]), "token, ms": min(steps[name])})

# %% tags=["folded"]
# Records of sizes and times; the fastest is what other programs disturbed least.
columns = {"parameters": 0.001, "file": 0.001, "pass, ms": None, "token, ms": None}
before = dict(rows[0])
for row in rows:
    key = f"structured.size.{row['kept'].replace(', ', '_').replace(' ', '_')}"
    for column, tolerance in columns.items():
        if row[column]:
            share = row[column] / before[column]
            name = column.split(",")[0]
            record(f"{key}.{name}", share, "", tolerance, model="course-lm")
    row["file"] = f"{row['file']:,}" if row["file"] else "no plain config"
table(rows, {"parameters": ",", "pass, ms": ".1f", "token, ms": ".1f"})

# %% [markdown]
# In the recorded run half of the neurons leave {{structured.size.512_neurons.parameters:.0%}} of the parameters, {{structured.size.512_neurons.file:.0%}} of the file and
# {{structured.size.512_neurons.pass:.0%}} of the time of a pass. With one layer gone as well it is {{structured.size.3_layers_512_neurons.parameters:.0%}}, {{structured.size.3_layers_512_neurons.file:.0%}} and
# {{structured.size.3_layers_512_neurons.pass:.0%}}. No special kernel is needed. Times are the fastest of all runs, but the machine ran other programs as well. The times of a pass fall with the parameters. Those of a token are short, and scatter too much here to rank the models.
#
# GPT-2's config has no number of heads apart from the width: `n_embd` is heads times head size. So the message above refuses to save the model with fewer heads, which would not load. It lives in memory only. Llama's config has `head_dim`, and can say it.
#
# What is saved is a plain model with a config of its own. `transformers` loads it without this course:

# %%
with tempfile.TemporaryDirectory() as folder:
    save_plain(both, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    equal = torch.equal(loaded.to(profile.device)(passage).logits, both(passage).logits)
shape = f"{loaded.config.n_layer} layers, {loaded.config.n_inner} neurons"
print(type(loaded).__name__, shape)
print("the same logits:", equal)

# %% [markdown]
# The logits are equal to the last bit.
#
# ## Another model
#
# SmolLM2 is a Llama with 30 layers, 1,536 neurons in each, and 9 heads in 3 groups. The profile `cpu` prunes it as well: a quarter of its neurons, one group of heads, or three layers.


# %% tags=["folded"]
# One cut of SmolLM2 by scores, and by chance.
def cut_larger(big, kind, count, score, probe):
    """Two smaller models, by score and at random."""
    chosen = {
        "by score": score(big, probe) if kind == "layers" else score(big, kind, probe),
        "random": random_scores(big, kind, profile.seed),
    }
    if kind == "layers":
        return {w: keep_layers(big, best_layers(c, count)) for w, c in chosen.items()}
    return {w: keep_units(big, kind, best_units(c, count)) for w, c in chosen.items()}


# %% tags=["folded"]
# Cuts and evaluates SmolLM2, one kind after the other.
larger = profile.models[-1].replace("q4_1", "dithered")
rows = []
if larger == "smollm2-135m-dithered":
    big, big_tokenizer = load_model(larger, device=profile.device)
    few = Protocol("factbook", 512, 256)
    probe = calibration_tokens(big_tokenizer, 2, 256, seed=profile.seed)
    plans = {("neurons", 1152): activation, ("heads", 2): activation,
             ("layers", 27): block_influence}  # fmt: skip
    for (kind, count), score in plans.items():
        smaller = cut_larger(big, kind, count, score, probe)
        for way, c in compare_all(smaller, big, few.text(big_tokenizer)).items():
            gone = 1 - smaller[way].num_parameters() / big.num_parameters()
            rows.append({"kept": f"{count} {kind}", "way": way, "parameters": -gone,
                         "nats lost": format_difference(c.loss)})  # fmt: skip
            key = f"structured.larger.{kind}.{way.replace(' ', '_')}"
            record_estimate(key, c.loss, model=larger, **few.fields)
            record(f"{key}.gone", gone, "", 0.001, model=larger)
    big = smaller = None
table(rows, {"parameters": ".1%"}) if rows else print("only in the profile cpu")

# %% [markdown]
# In the recorded run (profile `cpu`) the scores win by far on SmolLM2. A quarter of its neurons costs {{structured.larger.neurons.by_score:.2f}} ± {{structured.larger.neurons.by_score_error:.2f}} nats by activation and
# {{structured.larger.neurons.random:.2f}} ± {{structured.larger.neurons.random_error:.2f}} at random. A group of heads costs {{structured.larger.heads.by_score:.2f}} by activation and {{structured.larger.heads.random:.1f}} at random, and three layers
# {{structured.larger.layers.by_score:.2f}} ± {{structured.larger.layers.by_score_error:.2f}} by similarity and {{structured.larger.layers.random:.1f}} at random. (Random is one draw, and errors are over documents.)
#
# So whether a score beats chance is a property of the model too. In SmolLM2 some units matter far more than others, and blind choice hits them.
#
# ## Recover: prune, evaluate, distil, evaluate
#
# Minitron's recipe is to prune, and then to distil from the unpruned model [@muralidharan2024minitron]. We take half of the neurons *and* one layer away, by Taylor scores. The **distilled** model is told the unpruned
# model's probabilities, with KL(teacher || student). The control, **fine-tuned**, gets the same tokens in the same order and no teacher. A second control removes **random** neurons (and the same layer), and is distilled. A third trains the *unpruned* model without a teacher: what
# does the training alone do?

# %%
updates = profile.pick(quick=3, cpu=20)
seeds = [profile.seed, profile.seed + 1]
CONFIG = TrainConfig(
    updates, 0.5e-3, warmup=2, decay=updates // 2, eval_every=max(1, updates // 6)
)

# %%
end = tokenizer.eos_token_id
stream = token_stream(tokenizer.backend_tokenizer, documents("factbook", "train"), end)
TOLD = {"distilled": DistilSettings(), "fine-tuned": DistilSettings(mix=0)}
width = profile.pick(quick=128, cpu=256)


# %%
def recover(model, told, seed):
    """A copy of `model` after its updates."""
    cut_text = TrainingBatches(stream, context=width, batch_size=4, seed=seed)
    batches = lambda step: cut_text(step).to(profile.device)  # noqa: E731
    student, settings = copy.deepcopy(model), TOLD[told]
    teacher = dense if settings.mix else None
    distil(student, teacher, batches, settings, CONFIG)
    return student


# %%
by_chance = keep_layers(cut("neurons", f"random {draws[0]}", 512), kept_layers)
runs = {(told, s): recover(both, told, s) for s in seeds for told in TOLD}
runs["random, distilled", seeds[0]] = recover(by_chance, "distilled", seeds[0])
runs["unpruned, fine-tuned", seeds[0]] = recover(dense, "fine-tuned", seeds[0])
runs["pruned", seeds[0]], runs["random, pruned", seeds[0]] = both, by_chance
after = compare_all(runs, dense, text)

# %%
order = ("random, pruned", "pruned", "random, distilled", "fine-tuned", "distilled",
         "unpruned, fine-tuned")  # fmt: skip
first = {name: after[name, seeds[0]] for name in order}
figure = prune_and_recover({n: (c.loss.value, c.loss.error) for n, c in first.items()})
plt.show()

# %%
rows = []
for name, c in first.items():
    rows.append({"model": name, "nats lost": format_difference(c.loss),
                 "perplexity": c.perplexity.perplexity,
                 "KL divergence": c.divergence.value,
                 "same top token": c.agreement.value})  # fmt: skip
table(rows, {"perplexity": ".1f", "KL divergence": ".3f", "same top token": ".1%"})

# %% tags=["folded"]
# Records of the recovery, and the paired differences of two ways, seed by seed.
gaps = [difference(after["fine-tuned", s], after["distilled", s]) for s in seeds]
for s, gap in zip(seeds, gaps, strict=True):
    print(f"fine-tuned less distilled, seed {s}: {format_difference(gap)}")
    record_estimate(f"structured.recovered.gain.{s}", gap, **by)
chance = difference(first["random, distilled"], first["distilled"])
print(f"random less Taylor, both distilled: {format_difference(chance)}")
record_estimate("structured.recovered.chance", chance, **by)
for name, c in first.items():
    key = f"structured.recovered.{name.replace(', ', '_').replace('-', '_')}"
    record_estimate(key, c.loss, **by)
    record(f"{key}.perplexity", c.perplexity.perplexity, "", **by)
    record(f"{key}.divergence", c.divergence.value, "nats", 0.05, **by)
    record(f"{key}.agreement", c.agreement.value, "", 0.03, **by)
record("structured.recovered.tokens", updates * 4 * width, "", 0, model="course-lm")
record("structured.recovered.updates", updates, "", 0, model="course-lm")

# %% [markdown]
# *Figure: nats lost against the unpruned model, on other documents, for the first seed. Bars are two standard errors over documents.*
#
# In the recorded run the pruned model goes from {{structured.recovered.pruned:.2f}} nats lost to {{structured.recovered.distilled:.2f}} ± {{structured.recovered.distilled_error:.2f}} when distilled, with
# {{structured.recovered.tokens:,.0f}} tokens. Fine-tuned on the same tokens it ends at {{structured.recovered.fine_tuned:.2f}}. The paired gain of the teacher is {{structured.recovered.gain.0:.3f}} ±
# {{structured.recovered.gain.0_error:.3f}} nats with the first seed and {{structured.recovered.gain.1:.3f}} ± {{structured.recovered.gain.1_error:.3f}} with the second. KL divergence says the same: {{structured.recovered.distilled.divergence:.2f}} against
# {{structured.recovered.fine_tuned.divergence:.2f}}.
#
# The controls. Random neurons begin *lower*, at {{structured.recovered.random_pruned:.2f}}, and end {{structured.recovered.chance:+.2f}} ± {{structured.recovered.chance_error:.2f}} nats from the Taylor choice when distilled as long, which is not distinguished from it.
# So here the training matters, and the choice of neurons does not. The unpruned model, fine-tuned alike, *loses* {{structured.recovered.unpruned_fine_tuned:.2f}} ± {{structured.recovered.unpruned_fine_tuned_error:.2f}}. The training
# alone improves nothing: what the pruned models win is recovery.
#
# ## Let the model speak

# %%
speakers = {"unpruned": dense, "pruned": both}
speakers |= {name: runs[name, seeds[0]] for name in ("fine-tuned", "distilled")}
print(continuations(speakers, tokenizer, prompt_of("course-lm"), new_tokens=24))

# %% [markdown]
# The pruned model repeats one phrase. Fine-tuned, it wanders. Distilled, it is stuck in a phrase, though its loss is the lowest of the three. Loss is won back long before text is, and one prompt with greedy choice is a weak witness.
#
# ## Outlook: rotate, then cut
#
# So far whole neurons, heads or layers went, and the width of the hidden states stayed. SliceGPT cuts that width [@ashkboos2024slicegpt]. Its first step is free. RMSNorm divides $x$ by its length, and a rotation $Q$ keeps lengths: $\mathrm{norm}(xQ) = \mathrm{norm}(x)\, Q$.
# So we may multiply all that writes the hidden states by $Q$, and all that reads them by its transpose. LayerNorm also subtracts the mean, which depends on the axes. The mean must move into the matrices that write $x$ first, which leaves an RMSNorm.

# %%
from course_utils.compression.rotation import random_rotation, rotated

Q = random_rotation(8, 0).float()  # the Q of a QR decomposition
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
layer_norm, rms_norm = torch.nn.LayerNorm(8), torch.nn.RMSNorm(8, 1e-5)
centred = x - x.mean(1, keepdim=True)

# %%
for name, norm, of in (("RMSNorm", rms_norm, x), ("LayerNorm", layer_norm, x)):
    apart = (norm(of @ Q) - norm(of) @ Q).abs().max().item()
    print(f"{name:10} rotated before or after, apart by {apart:.1e}")
apart = (rms_norm(centred) - layer_norm(x)).abs().max().item()
print(f"RMSNorm of x without its mean, and LayerNorm: apart by {apart:.1e}")

# %% [markdown]
# RMSNorm turns with its input, LayerNorm does not. And LayerNorm is RMSNorm after the mean has gone. So all of course-lm can be rotated:

# %%
turned = rotated(dense, random_rotation(256, profile.seed))
with torch.no_grad():
    ours, theirs = turned(passage).logits, dense(passage).logits
    hidden = [m.transformer.wte(passage) for m in (turned, dense)]
apart = (ours - theirs).abs().max().item()
moved = (hidden[0] - hidden[1]).abs().max().item()
print(f"hidden states apart by {moved:.2f}, logits by {apart:.0e}")
record("structured.rotation.apart", apart, "", 0.01, model="course-lm")

# %% [markdown]
# Other hidden states everywhere, and the same logits but for rounding. SliceGPT does not choose $Q$ at random: it takes the principal directions of the hidden states, block by block. Then the last rows and columns carry little, and they are cut. We stop at the rotation.
#
# ## What you saw
#
# All numbers are from the recorded run.
#
# - **Removed for real.** With half of the neurons and one layer gone, {{structured.size.3_layers_512_neurons.parameters:.0%}} of the parameters are left, {{structured.size.3_layers_512_neurons.file:.0%}} of the file, and {{structured.size.3_layers_512_neurons.pass:.0%}} of a pass's time.
#   `transformers` loads it as a plain model, with equal logits.
# - **Scores need the control.** For heads of course-lm they beat chance by far ({{structured.heads.taylor.2:.2f}} against {{structured.heads.random.2:.1f}} nats at half). For its neurons none did at half ({{structured.neurons.taylor.512:.2f}} against
#   {{structured.neurons.random.512:.2f}}). For SmolLM2's neurons they do ({{structured.larger.neurons.by_score:.2f}} against {{structured.larger.neurons.random:.2f}}).
# - **Layers differ most.** Similarity spares the first layer. Magnitude removes it, and loses {{structured.layers.magnitude:.2f}} nats instead of {{structured.layers.similarity:.2f}}.
# - **Distillation recovers more than text alone**: {{structured.recovered.pruned:.2f}} nats became {{structured.recovered.distilled:.2f}} with the teacher, and {{structured.recovered.fine_tuned:.2f}} without.
# - **A rotation is free** once LayerNorm has become RMSNorm. SliceGPT builds on that.
#
# ## Limits
#
# - course-lm is tiny. It has four layers, so one of them is a quarter of its depth. Its embeddings are not cut here.
# - All layers keep equally many units. Papers that let layers differ need a format of their own.
# - Biases do not count in the scores, and Taylor is of first order only. LLM-Pruner has other variants, and recovers with LoRA.
# - In the recorded run recovery is {{structured.recovered.updates:.0f}} updates at one learning rate, which `distillation_demo` chose for another student. Minitron trains on billions of tokens.
# - Times are those of one CPU, which ran other programs too.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: Minitron's score
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Score neurons by what they give on text.


# %% tags=["exercise"]
def activation_scores(a):
    """Scores `[neurons]` of activations `a` `[sequences, tokens, neurons]`.

    Approach: average |a| over the tokens of each sequence, square that, sum over
    sequences, and take the root.
    Example: [[[1.0], [-3.0]], [[2.0], [4.0]]] gives sqrt(2^2 + 3^2), that is 3.6056.
    Hint: the absolute value comes before the average.
    """
    ### BEGIN SOLUTION
    return a.abs().mean(1).square().sum(0).sqrt()
    ### END SOLUTION


# %% tags=["exercise-tests"]
a = torch.tensor([[[4.0, 0.0], [-2.0, 8.0]], [[4.0, 0.0], [4.0, 0.0]]])
found = [round(v, 4) for v in activation_scores(a).tolist()]
assert found != [4.1231, 4.0], "signs cancel: take |a| before the average"
assert found != [10.0, 8.0], "average over the tokens of a sequence, do not add them up"
assert found != [25.0, 16.0], "the root is missing"
assert found != [3.5355, 2.8284], "sum the squares over sequences, no average there"
assert found != [7.0, 4.0], "square before the sum over sequences, and take the root"
assert found == [5.0, 4.0], "sqrt(3^2 + 4^2) and sqrt(4^2 + 0^2)"
print(found)
### BEGIN HIDDEN TESTS
one = torch.tensor([[[1.0], [-3.0]], [[2.0], [4.0]]]).double()
assert abs(activation_scores(one).item() - 13**0.5) < 1e-9
assert activation_scores(torch.zeros(2, 3, 4)).tolist() == [0.0] * 4
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: remove neurons
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Cut an MLP: all three of its tensors.


# %% tags=["exercise"]
def remove_neurons(W_in, b, W_out, gone):
    """(W_in, b, W_out) without the neurons whose numbers are in the list `gone`.

    Approach: list the numbers that stay, in order; take these rows of `W_in`
    `[neurons, in]`, these entries of `b` `[neurons]`, these columns of `W_out`
    `[out, neurons]`.
    Example: of 3 neurons without [1] stay 0 and 2.
    Hint: W_out[:, keep] takes columns.
    """
    ### BEGIN SOLUTION
    keep = [j for j in range(len(W_in)) if j not in gone]
    return W_in[keep], b[keep], W_out[:, keep]
    ### END SOLUTION


# %% tags=["exercise-tests"]
W_1 = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
b_1, W_2 = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([[1.0, 2.0, 3.0]] * 3)
first, bias, second = remove_neurons(W_1, b_1, W_2, [1])
assert first.tolist() != [[3.0, 4.0]], "`gone` names what goes, not what stays"
assert first.tolist() == [[1.0, 2.0], [5.0, 6.0]], "rows 0 and 2 of W_in stay"
assert bias.shape != b_1.shape, "a neuron takes its bias with it"
assert torch.equal(bias, b_1[[0, 2]]), "entries 0 and 2 of b stay"
assert second.tolist() != [[1.0, 2.0, 3.0]] * 2, "of W_out columns go, not rows"
assert second.tolist() == [[1.0, 3.0]] * 3, "columns 0 and 2 of W_out stay"
print(first.tolist(), second.tolist())
### BEGIN HIDDEN TESTS
same = remove_neurons(W_1, b_1, W_2, [])
assert all(torch.equal(m, n) for m, n in zip(same, (W_1, b_1, W_2), strict=True))
last = remove_neurons(W_1.double(), b_1.double(), W_2.double(), [2, 0])
assert last[0].tolist() == [[3.0, 4.0]] and last[2].tolist() == [[2.0]] * 3
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: the rows of a head
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# GPT-2 computes queries, keys and values in one layer. Its rows are the queries of all heads, then the keys of all heads, then the values.


# %% tags=["exercise"]
def rows_of_heads(heads, size, keep):
    """Rows of the fused layer that the heads in `keep` own: a list, ascending.

    The layer has 3 * heads * size rows.
    Approach: for each of the three parts, for each kept head, `size` rows in turn.
    Example: 2 heads of size 1, keep [1]: rows 1, 3 and 5.
    Hint: a part begins at part * heads * size.
    """
    ### BEGIN SOLUTION
    return [
        (part * heads + head) * size + i
        for part in range(3)
        for head in sorted(keep)
        for i in range(size)
    ]
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = list(rows_of_heads(3, 2, [2, 0]))
assert found != [0, 1, 4, 5], "keys and values go as well: three parts"
assert found != [0, 1, 6, 7, 12, 13, 4, 5, 10, 11, 16, 17], (
    "ascending: part by part, or queries and keys are mixed up"
)
assert found != [4, 5, 0, 1, 10, 11, 6, 7, 16, 17, 12, 13], "heads in ascending order"
assert found != [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17], (
    "parts come first in the layer, then heads in each part"
)
assert found == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17], "2 heads of 2 rows, 3 parts"
print(found)
### BEGIN HIDDEN TESTS
assert list(rows_of_heads(2, 1, [1])) == [1, 3, 5]
assert list(rows_of_heads(4, 64, [0, 1, 2, 3])) == list(range(768))
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 4: Block Influence
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# How much does a layer turn the hidden states?


# %% tags=["exercise"]
def influence_of(before, after):
    """1 - the mean cosine of states `before` and `after` a layer, `[tokens, width]`.

    Approach: for each token the product of both, summed, over the product of the two
    lengths; average over tokens; 1 minus that. A float.
    Example: [[1.0, 0.0]] and [[1.0, 1.0]] give 1 - sqrt(1/2), that is 0.2929.
    Hint: x.norm(dim=1) has the length of each token's vector.
    """
    ### BEGIN SOLUTION
    lengths = before.norm(dim=1) * after.norm(dim=1)
    return 1 - ((before * after).sum(1) / lengths).mean().item()
    ### END SOLUTION


# %% tags=["exercise-tests"]
u = torch.tensor([[3.0, 4.0], [10.0, 0.0]])
v = torch.tensor([[6.0, 8.0], [3.0, 4.0]])
found = round(float(influence_of(u, v)), 4)
assert found != 0.8, "1 minus the cosine: 0 where nothing turns"
assert found != 0.36, "the cosine of each token, not of all tokens at once"
assert found != 0.1913, "average cosines, not hidden states"
assert found != -39.0, "divide by both lengths"
assert found == 0.2, "cosines 1 and 0.6, mean 0.8"
assert abs(float(influence_of(u, 3 * u))) < 1e-6, "a longer vector is not turned"
print(found)
### BEGIN HIDDEN TESTS
assert abs(influence_of(u, -u) - 2) < 1e-6, "1 minus the cosine: opposite states give 2"
half = influence_of(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
assert abs(half - 0.2929) < 1e-4
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - S. Muralidharan and others, *Compact Language Models via Pruning and Knowledge Distillation* (Minitron), NeurIPS 2024, arXiv 2407.14679 [@muralidharan2024minitron].
# - X. Ma, G. Fang, X. Wang, *LLM-Pruner: On the Structural Pruning of Large Language Models*, NeurIPS 2023, arXiv 2305.11627 [@ma2023llmpruner].
# - X. Men and others, *ShortGPT: Layers in Large Language Models are More Redundant Than You Expect*, 2024, arXiv 2403.03853 [@men2024shortgpt].
# - S. Ashkboos and others, *SliceGPT: Compress Large Language Models by Deleting Rows and Columns*, ICLR 2024, arXiv 2401.15024 [@ashkboos2024slicegpt].
#
# ## Next
#
# `one_shot_pruning` goes back to single weights, and looks at inputs before it removes one.
