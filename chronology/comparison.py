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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/chronology/comparison.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/chronology/comparison.ipynb)
#
# # The methods side by side: one protocol, six questions
#
# *Large Model Quantization: a deep dive. The end of the chronology.*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - compare two methods in pairs, document by document, and say when they cannot be told apart;
# - read a table of methods by its two halves: what is stored, and how the codes were chosen;
# - answer six usual questions about quantization with measured numbers, and say where theory's usual answer fails and why;
# - turn nats into "retention" and back, and say why it is no further measurement;
# - test whether a ranking found on one text holds on another.
#
# It takes about 45 minutes to read and work. You need the ideas of the chronology: groups and scales, GPTQ, AWQ, NF4, HQQ. No profile needs a GPU, and each
# takes less than a minute: the long measurements were made beforehand by one command, `course leaderboard`.

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
import matplotlib.pyplot as plt
import torch
import transformers
from course_utils.compression import get_method, quantize_model
from course_utils.compression.decoding import decode_model
from course_utils.models import load_model
from course_utils.plotting.tables import table
from course_utils.profiles import resolve
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # not used: the rows are of course-lm, and of SmolLM2 once accepted
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# Which method is the best? Papers answer with tables, each with its own model, text, group size and way to count bits. Put side by side they prove little. Practitioners ask six
# questions instead:
#
# 1. Which loses least at 4 bits?
# 2. Which is fastest to quantize?
# 3. Which needs no calibration text?
# 4. Which takes least memory?
# 5. Which runs best on a CPU?
# 6. Which handles activations best?
#
# Each has a usual answer. We look whether it holds, under **one protocol**: the same float model, the same calibration text, the same evaluation tokens, every stored byte counted. The
# objective of each row is the same as well: lose as few nats per token against the float model as possible.

# %%
from course_utils.evaluation.leaderboard import leaderboard

board = leaderboard("course-lm")
rows = {name: row for name, row in board.rows.items() if name != "float"}
print(f"{len(rows)} rows of {board.model}")
for key, value in board.protocol.items():
    print(f"{key:12}", value)

# %% tags=["folded"]
# Where the rows were measured, and by which versions.
for key, value in board.machine.items():
    print(f"{key:12}", value)

# %% [markdown]
# `sequences` of `window` tokens are the calibration, for those methods that read one. `tokens` are taken from each text: the Factbook, from whose other documents course-lm was trained, and
# Wikipedia, which it never saw. The rest are settings of the tests for words and speed, which we meet below.
#
# ## Two halves of a method
#
# "Why is it not faster?" is a common question about GPTQ. The answer: GPTQ chooses codes, it does not store them in a new way. A method has two halves. The **format** says what is stored,
# and so which kernel can multiply with it. The **algorithm** says how the codes are chosen. Bytes and speed follow from the format alone. Quality follows from both.

# %%
wanted = ("affine_w4g64", "gptq_w4g64", "awq_w4g64", "hqq_w4g64", "nf4", "llm_int8")
table(
    [
        {
            "row": name,
            "stored": rows[name].stored,
            "kernel": rows[name].kernel,
            "algorithm": rows[name].algorithm,
            "bits per weight": rows[name].bits,
            "calibration": "yes" if rows[name].data else "",
        }
        for name in wanted
    ],
    {"bits per weight": ".3f"},
)

# %% [markdown]
# Round-to-nearest, GPTQ and AWQ have one format here, to the bit. So they have one size and one speed, and their difference in nats is the algorithm's alone. HQQ keeps its zero points as
# floats, which costs some bits. NF4 has other levels, and compresses its scales.
#
# ## Compare in pairs
#
# Some documents are hard for every model. The loss of a single row therefore scatters widely over documents. The *difference* of two rows on the same tokens does not. That is why every
# comparison of this course is paired. With sums $S_c$ of the differences over the $n_c$ tokens of document $c$, and the mean $m = \sum_c S_c / \sum_c n_c$, the standard error is
#
# $$ \frac{1}{n} \sqrt{\frac{C}{C-1} \sum_{c=1}^{C} (S_c - m\, n_c)^2} . $$

# %%
tokens = torch.tensor(board.tokens["factbook"])  # [documents]


def per_token(name):
    """Nats per token of each Factbook document `[documents]`."""
    nats = torch.tensor(board.rows[name].scores["factbook"].nats)
    return (nats / tokens).tolist()


# %%
from course_utils.plotting import leaderboard as figures

pair = {"nearest, 4 bits": "affine_w4g64", "nearest, 3 bits": "affine_w3g64"}
figure = figures.paired_documents(
    {label: per_token(name) for label, name in pair.items()}, per_token("float")
)
plt.show()

# %% [markdown]
# *Figure: left, the loss on each Factbook document of the float model and of two rows; right, the same less the float model's. Dashed: means.*

# %% tags=["folded"]
# The error with pairs and without.
paired = board.loss("affine_w4g64", "factbook")
alone = torch.tensor(per_token("affine_w4g64")).std() / len(tokens) ** 0.5
print(f"paired: +-{paired.error:.4f} nats; one loss alone: +-{alone:.4f}")
by = {"model": "course-lm", "corpus": "factbook", "tokens": board.protocol["tokens"]}
record("comparison.pairs.alone", alone.item(), "nats", 1e-4, **by)
record("comparison.pairs.error", paired.error, "nats", 1e-4, **by)

# %% [markdown]
# On the left nothing can be told. On the right the two rows lie apart in every document. In the recorded run the standard error of one loss alone is {{comparison.pairs.alone:.3f}} nats, and that
# of the difference to float {{comparison.pairs.error:.4f}}.
#
# ## Is the table true?
#
# A table that nobody can check is worth little. Two rows take seconds, so we measure them again, here: round-to-nearest and HQQ at 4 bits, on the Factbook, by the same protocol.

# %%
from course_utils.evaluation import Protocol, compare_all

again = {
    "affine_w4g64": get_method("affine", n_bits=4, group_size=64),
    "hqq_w4g64": get_method("hqq", n_bits=4, group_size=64),
}
dense, tokenizer = load_model("course-lm")
reports, models = {}, {}
for name, method in again.items():
    packed = load_model("course-lm").model
    reports[name] = quantize_model(packed, method)
    models[name] = decode_model(packed)

# %%
measured_on = Protocol("factbook", board.protocol["tokens"], board.protocol["window"])
found = compare_all(models, dense, measured_on.text(tokenizer))
checked = [
    {
        "row": name,
        "bits: table": rows[name].bits,
        "now": reports[name].bits_per_weight,
        "nats lost: table": board.loss(name, "factbook").value,
        "here": found[name].loss.value,
    }
    for name in again
]
shown = dict.fromkeys(("bits: table", "now"), ".4f")
table(checked, shown | dict.fromkeys(("nats lost: table", "here"), "+.5f"))

# %% tags=["folded"]
# The tolerance: bits agree exactly, losses within a tenth of a thousandth of a nat.
for name, row in zip(again, checked, strict=True):
    assert row["bits: table"] == row["now"], f"{name} stores other bits than its row"
    off = abs(row["nats lost: table"] - row["here"])
    assert off < 1e-4, f"{name} lies {off:.5f} nats from its row"
print("Both rows are as the table says.")

# %% [markdown]
# Bits agree exactly, and losses to four digits. The other rows can be measured again by `course leaderboard`.
#
# ## Nats, perplexity, retention
#
# A loss of $\Delta$ nats multiplies perplexity by $e^{\Delta}$. Comparisons of methods often quote a **retention** in percent. We define it once:
#
# $$ \text{retention} = \frac{\text{perplexity of the float model}}{\text{perplexity of the row}} = e^{-\Delta} . $$
#
# It is nats lost in other clothes, and no further measurement. The divergence from the float model is one: it asks for the whole distribution, not only for the word that came. So is a task
# with answers. Ours takes {{comparison.words.count:.0f}} words at the end of a clause, each after 32 tokens, and counts the words that a model finds likeliest. LAMBADA [@paperno2016lambada] chose its words
# by hand so that only a long context gives them away. Ours are any words, and many cannot be guessed. The count is that of the recorded run; in the recorded run the float model finds {{comparison.words.float:.0%}} of them.

# %%
from course_utils.evaluation.estimate import with_error
from course_utils.evaluation.leaderboard import retention


def line(name):
    """What was measured of one row, for a table."""
    row, loss = rows[name], board.loss(name, "factbook")
    words = board.cloze_difference(name)
    return {
        "row": name,
        "bits": row.bits,
        "nats lost": with_error(loss.value, loss.error),
        "retention": retention(loss.value),
        "KL": row.scores["factbook"].divergence,
        "same top token": row.scores["factbook"].agreement,
        "words, less float": with_error(words.value, words.error, "+"),
    }


forms = {"bits": ".3f", "retention": ".1%", "KL": ".4f", "same top token": ".1%"}
table([line(f"affine_{w}") for w in ("w8", "w4g64", "w3g64", "w2g64")], forms)


# %% tags=["folded"]
# Record every row, for the text and for the README.
def keep(key, value, unit="", tolerance=1e-3):
    record(f"comparison.{key}", value, unit, tolerance, **by)


for name, row in rows.items():
    loss = board.loss(name, "factbook")
    keep(f"{name}.bits", row.bits, "bits")
    keep(f"{name}.loss", loss.value, "nats")
    keep(f"{name}.loss_error", loss.error, "nats")
    keep(f"{name}.memory", row.bits / 16)
    keep(f"{name}.retention", 100 * retention(loss.value), "%", 0.1)
keep("words.count", len(board.words), "words", 0)
keep("words.float", sum(board.rows["float"].cloze) / len(board.words))

# %% [markdown]
# In the recorded run 8 bits keep {{comparison.affine_w8.retention:.1f}}% of the perplexity, 4 bits in groups {{comparison.affine_w4g64.retention:.1f}}%, 3 bits {{comparison.affine_w3g64.retention:.1f}}% and 2 bits
# {{comparison.affine_w2g64.retention:.1f}}%. The test for words is blunt: with so few words a difference of some percent is within its error. It would not have told 8 bits from 3. Nats do.
#
# What do the models write at such losses?

# %%
from course_utils.evaluation import continuations, prompt_of

speaking = {"float": dense}
for n_bits in (4, 3, 2):
    packed = load_model("course-lm").model
    quantize_model(packed, get_method("affine", n_bits=n_bits, group_size=64))
    speaking[f"nearest, {n_bits} bits"] = decode_model(packed)
print(continuations(speaking, tokenizer, prompt_of("course-lm")))

# %% [markdown]
# At 4 bits the model still writes what the float model writes, or nearly. At 3 bits it goes another way, and at 2 bits it loses the thread. One prompt proves nothing; it gives the nats a meaning.
#
# ## 1. Which loses least at 4 bits?
#
# The usual answer: GPTQ and AWQ, since they look at data; then NF4 and HQQ. The difference to the best row is again paired. A row within two standard errors of the best is **not
# distinguished** from it.

# %%
four = sorted(
    (name for name, row in rows.items() if 3.9 <= row.bits <= 5.1),
    key=lambda name: board.loss(name, "factbook").value,
)
best = four[0]


def behind(name, first, text="factbook"):
    """Nats that a row loses more than the first, and whether that is a difference."""
    more = board.difference(name, first, text)
    said = with_error(more.value, more.error, "+")
    return said if more.distinguished else f"{said}, not distinguished"


table(
    [
        {
            "row": name,
            "bits": rows[name].bits,
            "nats lost": line(name)["nats lost"],
            "more than the best": "" if name == best else behind(name, best),
        }
        for name in four
    ],
    {"bits": ".3f"},
)


# %% tags=["folded"]
# Record what the text says of 4 bits, at equal bytes and in all.
def keep_pair(key, one, other, text="factbook"):
    more = board.difference(one, other, text)
    keep(key, more.value, "nats")
    keep(f"{key}_error", more.error, "nats")


keep_pair("four.nearest_less_gptq", "affine_w4g64", "gptq_w4g64")
keep_pair("four.awq_less_gptq", "awq_w4g64", "gptq_w4g64")
keep_pair("four.nf4_less_gptq", "nf4", "gptq_w4g64")
keep_pair("four.hqq_less_nearest", "hqq_w4g64", "affine_w4g64")
keep_pair("four.finer", "affine_w4g32", "affine_w4g64")

# %% [markdown]
# In the recorded run, at the same bytes, GPTQ loses {{comparison.gptq_w4g64.loss:.4f}} ± {{comparison.gptq_w4g64.loss_error:.4f}} nats, AWQ {{comparison.awq_w4g64.loss:.4f}}, and round-to-nearest {{comparison.affine_w4g64.loss:.4f}}.
# The paired difference of round-to-nearest and GPTQ is {{comparison.four.nearest_less_gptq:.4f}} ± {{comparison.four.nearest_less_gptq_error:.4f}} nats, that of AWQ and GPTQ {{comparison.four.awq_less_gptq:.4f}} ±
# {{comparison.four.awq_less_gptq_error:.4f}}. So the half of the usual answer that names GPTQ holds on this model. The half that names AWQ holds less: AWQ protects columns that meet large inputs, and course-lm has none that stand out.
# NF4 reads no text and has fewer bits than the integer rows, and loses {{comparison.nf4.loss:.4f}}. HQQ has more bits, and in pairs with round-to-nearest its loss differs by {{comparison.four.hqq_less_nearest:+.4f}} ±
# {{comparison.four.hqq_less_nearest_error:.4f}}.
#
# Bits and nats belong together. A **Pareto front** joins the rows that no other row beats in both.

# %%
PLAIN = ("affine", "gptq", "awq", "hqq", "nf4")  # drawn apart; the rest together
families = {}
for name, row in rows.items():
    loss = board.loss(name, "factbook")
    label = row.method if row.method in PLAIN else "others"
    bits, nats, errors = families.setdefault(label, ([], [], []))
    bits.append(row.bits)
    nats.append(loss.value)
    errors.append(loss.error)
figure = figures.bits_and_nats(families, near=(3.9, 4.8), most=1.0)
plt.show()

# %% [markdown]
# *Figure: every row by its measured bits and its loss on the Factbook; on the right the rows near 4 bits. Lower and further left is better.*
#
# On the left, bits decide: from 4 to 2 bits every method loses more than any two methods differ. On the right, methods decide: at nearly the same bits GPTQ lies lowest. The front is drawn
# by rows that read text, and near 4 bits by NF4 as well, which stores less than 4.2 bits.
#
# ## 2. Which is fastest to quantize?
#
# The usual answer: HQQ and NF4, which read no text; then AWQ and GPTQ. Seconds are this machine's, one thread, beside other work; only factors of 2 and more mean anything.

# %%
quick_first = sorted(four, key=lambda name: rows[name].seconds)
table(
    [
        {
            "row": name,
            "seconds": rows[name].seconds,
            "added MB": rows[name].added_bytes / 1e6,
            "calibration": "yes" if rows[name].data else "",
            "nats lost": line(name)["nats lost"],
        }
        for name in quick_first
    ],
    {"seconds": ".2f", "added MB": ".0f"},
)

# %% tags=["folded"]
# Record the seconds.
for name in ("affine_w4g64", "nf4", "hqq_w4g64", "gptq_w4g64", "awq_w4g64"):
    keep(f"{name}.seconds", rows[name].seconds, "s", None)

# %% [markdown]
# In the recorded run round-to-nearest takes {{comparison.affine_w4g64.seconds:.2f}} s for the model, NF4 {{comparison.nf4.seconds:.2f}} s and HQQ {{comparison.hqq_w4g64.seconds:.2f}} s. GPTQ takes {{comparison.gptq_w4g64.seconds:.1f}} s and AWQ
# {{comparison.awq_w4g64.seconds:.1f}} s, since they run the model on calibration text and search. The usual answer holds. It leaves out that the seconds are paid once, and the nats with every token.
#
# ## 3. Which needs no calibration text?
#
# By construction: round-to-nearest, NF4, HQQ, LLM.int8(). The question worth asking is what the lack of text costs. At each width we take the best row that reads no text, and the best that does.

# %%
gaps = []
for n_bits in (4, 3, 2):
    near = [name for name in rows if name.endswith(f"_w{n_bits}g64")]
    near.sort(key=lambda name: board.loss(name, "factbook").value)
    blind = next(name for name in near if not rows[name].data)
    reading = next(name for name in near if rows[name].data)
    keep_pair(f"blind.w{n_bits}", blind, reading)
    gaps.append(
        {
            "bits": n_bits,
            "best without text": blind,
            "with text": reading,
            "nats more without": behind(blind, reading),
        }
    )
table(gaps)

# %% [markdown]
# In the recorded run going without text costs {{comparison.blind.w4:.3f}} ± {{comparison.blind.w4_error:.3f}} nats at 4 bits, {{comparison.blind.w3:.3f}} ± {{comparison.blind.w3_error:.3f}} at 3 bits and {{comparison.blind.w2:.3f}} ±
# {{comparison.blind.w2_error:.3f}} at 2 bits. Text is worth little where codes are fine, and much where they are coarse. HQQ's rows have the advantage of some more bits, and still lie behind.
#
# ## 4. Which takes least memory?
#
# The usual answer: the fewest bits. But a model is more than its linear layers. We count three ways: all tensors of the model, the file, and what a fresh process grows by when it loads the file.

# %%
sizes = ("float", "affine_w8", "affine_w4g64", "affine_w2g64", "ultra_low_w1g64")
whole = board.rows["float"]
table(
    [
        {
            "row": name,
            "bits": board.rows[name].bits,
            "tensors, MB": board.rows[name].tensor_bytes / 1e6,
            "file, MB": board.rows[name].file_bytes / 1e6,
            "process, MB": board.rows[name].resident_bytes / 1e6,
            "tensors, of float": board.rows[name].tensor_bytes / whole.tensor_bytes,
        }
        for name in sizes
    ],
    {"bits": ".2f", "tensors, of float": ".0%"}
    | dict.fromkeys(("tensors, MB", "file, MB", "process, MB"), ".1f"),
)

# %% tags=["folded"]
# Record the shares of bytes.
for name in sizes[1:]:
    share = rows[name].tensor_bytes / whole.tensor_bytes
    keep(f"{name}.share", share)
keep("embedding.share", dense.transformer.wte.weight.nbytes / whole.tensor_bytes)

# %% [markdown]
# In the recorded run one bit a weight leaves {{comparison.ultra_low_w1g64.share:.0%}} of the model's bytes, and four bits {{comparison.affine_w4g64.share:.0%}}. The float embedding alone
# is {{comparison.embedding.share:.0%}} of the float model, and no row touches it. Below 4 bits a small model wins few bytes and loses many nats. On large models, whose embeddings are a small share, the usual
# answer is nearer.
#
# ## 5. Which runs best on a CPU?
#
# The usual answer: INT8 and BitNet, since CPUs have integer units. Speed belongs to the format, so one row for each kernel is enough. Each was timed in turns with the float model.

# %%
timed = ("affine_w8", "affine_w4g64", "nf4", "hqq_w4g64", "llm_int8", "smoothquant")
timed += tuple(n for n in ("bitnet_rounded", "ultra_low_w1g64", "e8p") if n in rows)
table(
    [
        {
            "row": name,
            "kernel": rows[name].kernel,
            "ms a token": rows[name].milliseconds,
            "times as fast as float": rows[name].times_as_fast,
        }
        for name in sorted(timed, key=lambda name: -rows[name].times_as_fast)
    ],
    {"ms a token": ".1f", "times as fast as float": ".2f"},
)

# %% tags=["folded"]
# Record the speeds.
for name in timed:
    keep(f"{name}.times_as_fast", rows[name].times_as_fast, "", None)

# %% [markdown]
# In the recorded run the 4-bit rows with packed codes run at {{comparison.affine_w4g64.times_as_fast:.2f}} times the speed of float32, and LLM.int8() at {{comparison.llm_int8.times_as_fast:.2f}} times. So nothing is faster than float here, and the usual
# answer fails on this model. Its layers are so small that their float weights lie in the processor's cache: there is no reading to save, and unpacking costs. `packed_kernels` shows a matrix of 4096 x 4096, where the same kernel is several times
# as fast as float32. Two points stay true. What is decoded before each product is always slow. And the algorithm does not matter: GPTQ's codes go to the same kernel as rounded ones.
#
# ## 6. Which handles activations best?
#
# The usual answer: LLM.int8(), SmoothQuant and AWQ, since they treat large input features apart. Two rows here round their inputs to 8 bits. Round-to-nearest with float inputs is the control.

# %%
eight = ("affine_w8", "llm_int8", "smoothquant")
table(
    [
        line(name)
        | {"less control": "" if name == eight[0] else behind(name, eight[0])}
        for name in eight
    ],
    forms | {"KL": ".5f"},
)

# %% tags=["folded"]
# Record the differences to the control.
for name in eight[1:]:
    keep_pair(f"{name}.more", name, "affine_w8")

# %% [markdown]
# In the recorded run LLM.int8() loses {{comparison.llm_int8.more:+.4f}} ± {{comparison.llm_int8.more_error:.4f}} nats more than the control, whose inputs stay float, and SmoothQuant {{comparison.smoothquant.more:+.4f}} ±
# {{comparison.smoothquant.more_error:.4f}}. That is less than anything that happens at 4 bits. course-lm has no outliers among its inputs, so there is nothing to handle, and the question cannot be answered on it. `dynamic_range`, `smoothing` and `llm_int8_demo` answer it on
# SmolLM2, where one static range breaks the model, and a range for every token with large features kept apart does not.
#
# ## Does the ranking hold on another text?
#
# A ranking is worth something if it holds elsewhere. Wikipedia is a text that course-lm never saw. **Kendall's** $\tau$ compares two orders: of all pairs of rows, the share in the same order
# less the share in the other. 1 is the same ranking, 0 none. Its interval comes from a **bootstrap**: documents of both texts are drawn again with replacement, a thousand times.

# %%
from course_utils.evaluation.leaderboard import kendall_interval

texts = ("factbook", "wikipedia")
taus = {
    label: kendall_interval(board, texts, names, draws=1000, seed=profile.seed)
    for label, names in (("all rows", list(rows)), ("4 to 5 bits", four))
}
for label, (tau, low, high) in taus.items():
    print(f"{label:12} tau {tau:.2f}, 95% of the draws {low:.2f} to {high:.2f}")

# %%
orders = [
    sorted(four, key=lambda name, text=text: board.loss(name, text).value)
    for text in texts
]
places = {name: tuple(order.index(name) + 1 for order in orders) for name in four}
figure = figures.ranks(places, ("Factbook", "Wikipedia"))
plt.show()

# %% tags=["folded"]
# Record the ranks' agreement.
for key, found_tau in zip(("all", "four"), taus.values(), strict=True):
    for part, value in zip(("tau", "low", "high"), found_tau, strict=True):
        keep(f"ranks.{key}.{part}", value, "", 0.02)

# %% [markdown]
# *Figure: the ranks of the rows from 4 to 5 bits on the two texts; red where a row moves by two places or more.*
#
# In the recorded run $\tau$ is {{comparison.ranks.all.tau:.2f}} over all rows, with 95% of the draws between {{comparison.ranks.all.low:.2f}} and {{comparison.ranks.all.high:.2f}}: mostly because bits order them. Among the rows of 4 to 5 bits it is
# {{comparison.ranks.four.tau:.2f}}, between {{comparison.ranks.four.low:.2f}} and {{comparison.ranks.four.high:.2f}}. Close rows swap places from text to text. A ranking of rows that differ by less than their errors is a ranking of noise.
#
# ## A larger model
#
# course-lm has no massive activations, and its linear layers are small. SmolLM2 has both. Its rows take hours, so they are measured apart, by
# `course leaderboard --model smollm2-135m-dithered`, and join here once they are accepted.

# %%
larger = leaderboard("smollm2-135m-dithered")
if larger is None:
    print("The rows of SmolLM2 are not measured yet: what stands here is of course-lm.")
else:
    both = [name for name in rows if name in larger.rows]
    both.sort(key=lambda name: larger.loss(name, "factbook").value)
    for name in both:
        loss = larger.loss(name, "factbook")
        print(f"{name:16} {larger.rows[name].bits:.3f} bits, {loss} nats lost")

# %% [markdown]
# Until then `awq_demo`, `gptq_demo` and `dynamic_range` have some of its figures, by protocols of their own.
#
# ## Theory and table
#
# | Question | The usual answer | On course-lm | Why they differ |
# | --- | --- | --- | --- |
# | least loss, 4 bits | GPTQ, AWQ | GPTQ; AWQ behind it | no large inputs for AWQ to protect |
# | fastest to quantize | HQQ, NF4 | nearest, NF4, HQQ | as expected |
# | no calibration text | NF4, HQQ | NF4 by its bits; the price grows below 4 bits | as expected |
# | least memory | BitNet and below | 2 bits, if its nats are borne; the embedding stays | the float embedding is a quarter of this model |
# | best on a CPU | BitNet, INT8 | float32 | the layers fit into the cache |
# | activations | LLM.int8(), SmoothQuant, AWQ | cannot be told | no outliers in this model |
#
# ## What you saw
#
# - **Pairs.** The error of a difference on the same tokens was a small part of a single loss's error. Without pairs no two rows of 4 bits could be told apart.
# - **Two halves.** Rows of one format have the same bytes and the same speed, whatever chose their codes.
# - **Least loss.** At equal bytes GPTQ loses {{comparison.gptq_w4g64.loss:.4f}} nats in the recorded run, round-to-nearest {{comparison.affine_w4g64.loss:.4f}}; at 2 bits {{comparison.gptq_w2g64.loss:.2f}} and {{comparison.affine_w2g64.loss:.2f}}.
# - **Text or none.** The price of going without calibration text grows as bits get fewer.
# - **Memory and speed.** Four bits leave {{comparison.affine_w4g64.share:.0%}} of the bytes, not an eighth, and no row is faster than float: the model is too small for both usual answers.
# - **Retention.** It is $e^{-\Delta}$, and says what nats say.
# - **Ranks.** The order of the widths holds on another text. The order of close rows does not.
#
# ## Limits
#
# - One small model, trained in float32 on little text. Its weights have no massive activations behind them, which is where methods differ most.
# - The errors are over documents. They do not hold what another calibration text would change: one cut was taken. `awq_ablations` and `gptq_ablations` take several.
# - Settings are the usual ones and their neighbours. Nobody tuned each method to its best.
# - Seconds, speeds and memory are of one machine, on which other work ran. They are medians, in turns with the float model, and bear factors only.
# - Rows that were trained, as BitNet's own models, are not here: a model that never had float weights has no float reference.
# - The test for words is small and has no known human score.
#
# ## Exercises
#
# Each exercise has a function to write and tests that check it. The solution is shown; try it first, with the cell folded away.

# %% [markdown] tags=["exercise-statement", "refuses:course_utils.evaluation"]
# ### Exercise 1: a difference and its error, from sums
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Two models were measured on the same documents. Given are the summed nats of each document, and its number of tokens. Return the mean difference per token, and its standard error over documents by the formula above.


# %% tags=["exercise"]
def paired(first, second, tokens):
    """(mean, error) of first - second in nats per token; a number for each document.

    Approach: the mean is over all tokens; then the residual of each document.
    Example: first [3, 5], second [1, 1], tokens [2, 2] gives (1.5, 0.5).
    Hint: residual of document c: S_c - m * n_c.
    """
    ### BEGIN SOLUTION
    sums = torch.tensor(first).double() - torch.tensor(second).double()
    sizes = torch.tensor(tokens).double()
    mean = sums.sum() / sizes.sum()
    count = len(sizes)
    squares = (sums - mean * sizes).square().sum() * count / (count - 1)
    return mean.item(), (squares.sqrt() / sizes.sum()).item()
    ### END SOLUTION


# %% tags=["exercise-tests"]
mean, error = paired([3, 5], [1, 1], [2, 2])
assert abs(mean - 3) > 1e-6, "per token, not per document: divide by the tokens"
assert abs(mean - 1.5) < 1e-9, "the mean of first - second is 1.5 here"
assert abs(error - 0.5 / 2**0.5) > 1e-6, "C / (C - 1): two documents have one degree"
assert abs(error - 0.5) < 1e-9, "sums 2 and 4, mean 3 a document"
mean, _ = paired([2, 9], [0, 0], [1, 9])
assert abs(mean - 1.5) > 1e-6, "longer documents count for more: sum first, then divide"
assert abs(mean - 1.1) < 1e-9, "11 nats over 10 tokens"
_, error = paired([1, 2, 6], [1, 2, 6], [3, 3, 3])
assert error == 0, "in pairs: equal models differ by nothing, without any error"
### BEGIN HIDDEN TESTS
mean, error = paired([4, 0, 2], [1, 0, 0], [2, 1, 2])
assert abs(mean - 1) < 1e-9, "5 nats over 5 tokens"
assert abs(error - (1.5 * 2) ** 0.5 / 5) < 1e-9, "residuals 1, -1 and 0"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement", "refuses:course_utils.plotting.ladder"]
# ### Exercise 2: the Pareto front
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Return the names of the rows that no other row beats. A row beats another if it is at most as large in both numbers, and smaller in one.


# %% tags=["exercise"]
def front(points):
    """Names on the front, sorted by bits; `points[name] = (bits, nats)`.

    Approach: keep a name unless some other point is <= in both and < in one.
    Example: {"a": (4, 0.1), "b": (4, 0.2), "c": (2, 0.5)} gives ["c", "a"].
    Hint: of equal points none beats the other, so both stay, in the order given.
    """

    ### BEGIN SOLUTION
    def beaten(bits, nats):
        return any(
            b <= bits and n <= nats and (b < bits or n < nats)
            for b, n in points.values()
        )

    kept = [name for name, point in points.items() if not beaten(*point)]
    return sorted(kept, key=lambda name: points[name][0])
    ### END SOLUTION


# %% tags=["exercise-tests"]
small = {"a": (4, 0.1), "b": (4, 0.2), "c": (2, 0.5)}
found_front = front(small)
assert "b" not in found_front, "b has the bits of a and loses more: it is beaten"
assert "c" in found_front, "c loses more than a, but no row of its bits loses less"
assert found_front != ["a", "c"], "sort by bits: the smallest first"
assert found_front == ["c", "a"], "two rows are on the front: c and a"
twins = {"x": (3, 0.3), "y": (3, 0.3)}
assert front(twins) == ["x", "y"], "equal points beat each other in nothing: both stay"
### BEGIN HIDDEN TESTS
many = {"p": (8, 0.0), "q": (4, 0.1), "r": (5, 0.1), "s": (3, 0.4), "t": (3.5, 0.5)}
assert front(many) == ["s", "q", "p"], "r and t are beaten, by q and by s"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement", "refuses:course_utils.evaluation.leaderboard"]
# ### Exercise 3: Kendall's tau
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Two lists hold the losses of the same rows on two texts. Return $\tau$: the pairs in the same order, less those in the other order, over all pairs. A pair that is tied in a list counts for neither.


# %% tags=["exercise"]
def tau(a, b):
    """Kendall's tau of two lists of n numbers.

    Approach: go through all pairs i < j; compare the signs of a's and b's difference.
    Example: [1, 2, 3] and [1, 3, 2] give 1/3.
    Hint: there are n (n - 1) / 2 pairs; the product of two differences has a sign.
    """
    ### BEGIN SOLUTION
    n, score = len(a), 0
    for i in range(n):
        for j in range(i + 1, n):
            product = (a[i] - a[j]) * (b[i] - b[j])
            score += (product > 0) - (product < 0)
    return score / (n * (n - 1) / 2)
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert tau([1, 2, 3], [10, 20, 30]) == 1, "the order counts, not the size"
assert tau([1, 2, 3], [3, 2, 1]) == -1, "subtract the pairs in the other order"
value = tau([1, 2, 3], [1, 3, 2])
assert abs(value - 2 / 3) > 1e-9, "same less other: 2 pairs agree, and 1 does not"
assert abs(value - 1 / 3) < 1e-9, "divide by all 3 pairs"
tied = tau([1, 2, 2], [1, 2, 3])
assert tied != 1, "a tied pair counts for neither"
assert abs(tied - 2 / 3) < 1e-9, "a tied pair stays among all pairs"
### BEGIN HIDDEN TESTS
assert abs(tau([4, 1, 3, 2], [4, 2, 1, 3]) - 1 / 3) < 1e-9, "4 pairs agree, 2 do not"
value = tau([0.1, 0.4, 0.2, 0.9, 0.5], [1, 2, 3, 5, 4])
assert abs(value - 0.8) < 1e-9, "one of ten pairs changes places"
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# The methods are cited where they are built. The usual answers are those of their authors: LLM.int8() [@dettmers2022llmint8], GPTQ [@frantar2022gptq], AWQ [@lin2023awq], NF4 [@dettmers2023qlora], HQQ [@badri2023hqq],
# BitNet [@ma2024era]. Errors over whole documents follow Miller [@miller2024errorbars], words at the end follow LAMBADA [@paperno2016lambada].
#
# ## Next
#
# The chronology ends here. `pruning_demo` removes weights instead of rounding them; `distillation_demo` makes the network smaller.
