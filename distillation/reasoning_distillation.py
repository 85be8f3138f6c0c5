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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/distillation/reasoning_distillation.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/distillation/reasoning_distillation.ipynb)
#
# # Reasoning distillation: a student learns the steps
#
# *Large Model Quantization: a deep dive. Distillation, third part (2023 to 2025).*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - say what is distilled when a small model learns from a large one's traces ("logic distillation"), and what is not;
# - let a teacher write, sort its traces by a verifier, and say what the verifier lets pass;
# - train students on answers, on traces, on dots, on shuffled and on wrong traces at equal tokens, and tell the effects apart;
# - put an interval on a share of solved problems, and an error on a paired difference;
# - say what traces of five tokens can show about DeepSeek-R1's, and what they cannot.
#
# It takes about 50 minutes to read and work. You need to know what a language model's logits are. No profile needs a GPU; `quick` runs in under a minute,
# `cpu` in about three.

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
import torch.nn.functional as F
import transformers
from course_utils.distillation.arithmetic import (
    HELD_OUT_LENGTHS,
    TRAINED,
    character_tokenizer,
    on_form,
    parts,
)
from course_utils.distillation.traces import write_traces
from course_utils.evaluation.estimate import Estimate, format_difference, with_error
from course_utils.plotting import table, training_curves
from course_utils.plotting.traces import (
    one_step_or_all,
    solved_by_length,
    written_steps,
)
from course_utils.profiles import resolve
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto, or a causal language model that tries the task as a teacher
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(profile)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# ## The question
#
# A label says what the answer is. A **trace** says how to get there: the text that a model writes before its answer. DeepSeek-R1's authors let their large model
# write about 800 thousand samples and fine-tuned small models on them. They ran no reinforcement learning on the small ones [@deepseek2025r1]. That is
# **reasoning distillation**. The README's older name for it, "logic distillation", means the same: the student learns the
# steps, not the answer alone, and not the teacher's probabilities. Distilling step-by-step did it before with rationales as a second task
# [@hsieh2023stepbystep].
#
# Does the student learn *from the steps*? Or would longer text, more computation or more examples do as well? On a real task this is hard to tell, for nobody
# can check each step. We take a task that is tiny, and whose every step can be checked. Each explanation then gets its own control.
#
# ## A task whose steps can be checked
#
# A problem is a chain of additions and subtractions. Of every result only the **last digit** goes on. In `7+5-3+8` we get 12, keep 2; 2 - 3 is -1, which is 9 on
# the circle of ten digits; 9 + 8 is 17, keep 7. The steps are `7297`, begun with the first digit. The last one is the answer.


# %% tags=["nbval-check-output"]
def worked_steps(problem):
    """The first digit, then the last digit of every result."""
    value, steps = int(problem[0]), problem[0]
    for operation, digit in zip(problem[1::2], problem[2::2], strict=True):
        value = (value + int(digit) * (1 if operation == "+" else -1)) % 10
        steps += str(value)
    return steps


print(worked_steps("7+5-3+8"))

# %%
figure = one_step_or_all("7+5-3+8", worked_steps("7+5-3+8"))
plt.show()

# %% [markdown]
# *Figure: on the left the steps. Each comes from one operation (grey), one digit (black) and the step before (red). On the right the answer alone: one token must
# be computed from all symbols at once.*
#
# On the left a step is one of 200 facts: ten digits, two operations, ten digits. On the right four operations make 1.6 million problems, and a
# network of two blocks must do all of them in one go. That is the hypothesis. The model reads a problem on a **form** with room for six operations, a token for each symbol.
# The package works problems as we do.

# %% tags=["nbval-check-output"]
from course_utils.distillation.arithmetic import random_problems, steps_of, worked

tokenizer = character_tokenizer()
some = random_problems(200, 4, split="evaluation", seed=SEED)
assert all(worked_steps(problem) == steps_of(problem) for problem in some)
line = worked("7+5-3+8")
print(repr(line), len(tokenizer(line).input_ids), "tokens")
print(len(tokenizer), "symbols in the vocabulary")

# %% [markdown]
# A fifth of all problems, chosen by a hash, is for evaluation and never trained on. Training problems have one to four operations. Those with five and six are held out
# as *lengths*.
#
# ## The teacher writes
#
# The teacher is a GPT-2 of two blocks and width 96. It learned from solutions that a program worked, and was stopped before it was perfect. (R1 learned by
# reinforcement instead; a program is our stand-in.) We load it, and let it write. A next token is drawn from $\mathrm{softmax}(z / T)$, where
# $z$ are the logits and $T$ is the temperature; at $T = 0$ the likeliest is taken.

# %%
from course_utils.distillation.reasoning_lm import shipped_logs, shipped_model

logs = shipped_logs()
teacher = shipped_model("teacher").to(profile.device)
print(f"{logs['teacher']['parameters']:,} parameters,", end=" ")
print(f"trained on {logs['teacher']['tokens_seen']:,} tokens")


# %%
@torch.no_grad()
def write(model, prompts, T, draw):
    """What `model` writes after `prompts`, all of one length in tokens."""
    ids = torch.tensor([tokenizer("\n" + p).input_ids for p in prompts])
    for _ in range(8):
        z = model(input_ids=ids.to(model.device)).logits[:, -1].cpu()  # [prompts, 16]
        if T == 0:
            token = z.argmax(-1, keepdim=True)
        else:
            token = torch.softmax(z / T, -1).multinomial(1, generator=draw)
        ids = torch.cat([ids, token], 1)
    texts = map(tokenizer.decode, ids[:, 1:].tolist())
    return [text.partition("\n")[0] + "\n" for text in texts]


# %%
draw = torch.Generator().manual_seed(profile.seed)
for T in (0.0, 1.0, 1.0, 1.0, 1.0, 1.0):
    print(f"T = {T}:", repr(write(teacher, [on_form("9+0-5+7")], T, draw)[0]))

# %% [markdown]
# The right steps are `9941`. The likeliest tokens always give the same text; sampling gives several, and not all are right.
# We compare with the package's `write_traces`, which keeps a cache and takes any causal language model, and with `generate` of `transformers`.

# %%
prompts = [on_form(problem) for problem in some]
ours = write(teacher, prompts, 0, draw)
of_package = write_traces(
    teacher, tokenizer, ["\n" + p for p in prompts], max_new_tokens=8
)
ids = torch.tensor([tokenizer("\n" + p).input_ids for p in prompts]).to(teacher.device)
greedy = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
library = teacher.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
library = [tokenizer.decode(row[1:]).partition("\n")[0] + "\n" for row in library]
assert ours == [text[1:] for text in of_package] == library
print(f"{len(ours)} lines, the same from all three")

# %% [markdown]
# All 200 lines agree.
#
# ## A verifier sorts
#
# The teacher errs, so its traces are sorted. A **verifier** needs the answer only, as in R1's recipe for problems whose result can be checked. Traces
# that pass are kept, the others rejected: that is **rejection sampling**. STaR repeats this loop with its own student as the next teacher [@zelikman2022star].


# %%
def verify(line):
    """Whether the last symbol written is the answer."""
    problem, written = parts(line)
    return line.endswith("\n") and written[-1:] == worked_steps(problem)[-1]


from course_utils.distillation.reasoning_lm import teacher_traces
from course_utils.distillation.traces import rejection_sample

traces = teacher_traces(teacher, profile.pick(quick=300, cpu=3000))
found = rejection_sample(traces, verify)
print(f"{len(traces):,} traces, {len(found.accepted):,} accepted: {found.rate:.1%}")

# %% [markdown]
# How good is such a verifier? It does not look at the steps. Our task lets us look: `first_wrong_step` gives the number of the first symbol that does not follow
# from the one before.

# %%
from course_utils.distillation.arithmetic import first_wrong_step
from course_utils.evaluation.proportion import wilson

rows = []
for n in TRAINED:
    of_length = [t for t in traces if len(parts(t)[0]) == 1 + 2 * n]
    right = [t for t in of_length if verify(t)]
    flawed = [t for t in right if first_wrong_step(t) is not None]
    low, high = wilson(len(right), len(of_length))
    row = {"operations": n, "accepted": len(right) / len(of_length)}
    row |= {"95% interval": f"{low:.1%} to {high:.1%}", "traces": len(of_length)}
    rows.append(row | {"flawed among accepted": len(flawed) / len(right)})
table(rows, {"accepted": ".1%", "flawed among accepted": ".1%"})

# %% tags=["folded"]
# Record the verifier's rates.
for row in rows:
    key = f"reasoning.accepted.{row['operations']}"
    record(key, row["accepted"], "", 0.05, model="reasoning")
flawed = sum(first_wrong_step(t) is not None for t in found.accepted)
record("reasoning.rate", found.rate, "", 0.04, model="reasoning")
share = flawed / len(found.accepted)
record("reasoning.flawed", share, "", 0.02, model="reasoning")

# %% [markdown]
# The interval is Wilson's [@wilson1927]: it has a width even where all or none are right, unlike a mean plus or minus two errors. In the recorded run the verifier accepts {{reasoning.rate:.1%}} of the
# traces, {{reasoning.accepted.1:.1%}} of those with one operation and {{reasoning.accepted.4:.1%}} of those with four. Errors add up along a chain. Of the accepted traces {{reasoning.flawed:.1%}} hold
# a wrong step all the same: two slips cancelled each other, or the answer was luck.
#
# Where do the rejected traces break?

# %%
breaks = {}
for line in found.rejected:
    place = parts(line)[0], first_wrong_step(line)
    key = len(place[0]) // 2, place[1]
    breaks[key] = breaks.get(key, 0) + 1
last = max(step for _, step in breaks)
table(
    [
        {"operations": n}
        | {f"step {k}": breaks.get((n, k), 0) for k in range(last + 1)}
        for n in TRAINED
    ]
)

# %%
shown = [line for line in found.rejected if len(parts(line)[0]) == 9][:3]
rows = {
    f"rejected trace {i}": (*parts(line), first_wrong_step(line))
    for i, line in enumerate(shown, 1)
}
figure = written_steps(rows)
plt.show()

# %% [markdown]
# *Figure: three rejected traces. Grey is the problem; blue are symbols that follow from the ones before, orange is the first that does not, and white comes after it.*
#
# The table counts, for each length, the number of the first wrong symbol. Step 0, the copied first digit, hardly ever breaks. Later steps do, and once a step is wrong
# the ones after it may follow correctly from the wrong value. One slip spoils the answer, but not the other steps. Keep that in mind.
#
# ## Six lessons from the same traces
#
# All students have the same architecture: two blocks, width 48, a quarter of the teacher's parameters. For one seed they begin with the same weights. They differ
# in what they read:
#
# - **verified**: the accepted traces;
# - **answers**: the same problems with the answer alone. If steps are of no use, this is as good;
# - **dots**: the accepted traces with a dot in the place of each step. They have the same length and the same number of computed tokens, but no information [@pfau2024dots];
# - **shuffled**: the accepted traces with the steps in another order. The same symbols, but none follows from the one before;
# - **unfiltered**: all traces, right or wrong;
# - **rejected**: only those that the verifier refused.

# %%
from course_utils.distillation.reasoning_lm import KINDS, lines_of

lines = {kind: lines_of(kind, traces) for kind in KINDS}
table(
    [
        {"student": kind, "lines": len(of), "one of them": of[40].strip()}
        for kind, of in lines.items()
    ],
    {"lines": ",d"},
)

# %% [markdown]
# The third column shows the 41st line of each. All but `unfiltered` and `rejected` are made of the same traces.
#
# ## The loss, and equal tokens
#
# A line is a row of tokens. The loss counts what the teacher wrote, up to and with the line's end. It does not count the problem, which nobody can predict,
# nor what fills a short row up.


# %%
def loss_on_trace(model, rows):
    """Cross-entropy of the symbols after the colon, nats per counted token."""
    z = model(input_ids=rows[:, :-1]).logits  # [rows, width - 1, 16]
    target = rows[:, 1:]
    colon, end = (target == tokenizer.convert_tokens_to_ids(":")), (target == 0)
    after = colon.int().cumsum(1) - colon.int() > 0
    ended = (end & after).int().cumsum(1) - (end & after).int() > 0
    return F.cross_entropy(z[after & ~ended], target[after & ~ended])


# %%
from course_utils.distillation.reasoning_lm import TOKENS, WIDTHS, new_model
from course_utils.distillation.traces import completion_loss, completion_mask, line_rows

rows = line_rows([worked("7+5-3+8"), worked("4-9")], tokenizer)  # [2, width]
counted = completion_mask(rows, tokenizer.convert_tokens_to_ids(":"), 0)
for ids, mask in zip(rows.tolist(), counted.tolist(), strict=True):
    symbols = tokenizer.decode(ids).replace("\n", "$")
    print(symbols, "".join("^" if m else " " for m in mask), sep="\n")
student = new_model(WIDTHS["student"], seed=SEED)
of_package = completion_loss(tokenizer.convert_tokens_to_ids(":"), 0)
torch.testing.assert_close(loss_on_trace(student, rows), of_package(student, rows))

# %% [markdown]
# The marked symbols are counted (`$` is the line's end), and both losses agree.
#
# **Equal tokens** needs a decision. A line with steps has up to 21 tokens, one without has 17. Each step of the training takes 714 tokens: 34 lines with
# steps, or 42 lines without. So the student of answers sees a quarter more problems. That favours the control.
#
# Train two students of your own.

# %%
from dataclasses import replace

from course_utils.distillation.reasoning_lm import Run, train_lines

steps = profile.pick(quick=40, cpu=600)
for kind in ("answers", "verified"):
    own = new_model(WIDTHS["student"], seed=profile.seed).to(profile.device)
    config = replace(Run(kind).config(), steps=steps, eval_every=max(20, steps // 10))
    curve = train_lines(own, lines[kind], config, seed=profile.seed)
    best = 1 - min(row["held_out"] for row in curve)
    print(f"{kind}: {steps * TOKENS:,} tokens, {best:.0%} of the problems right")

# %% [markdown]
# In the profile `cpu` the student of steps solves about half after 600 updates, and is still learning. The other solves little more than chance. (In `quick` you see 40 updates, too few for both.)
#
# ## What the students solve
#
# The course ships the teacher and six students, trained by `course train-reasoning` in the same way from 20,000 traces, and the logs of more seeds. Here are their curves as
# recorded then. Wrong answers are counted on 200 problems of the training split that were drawn apart.

# %%
curves = {}
for kind in KINDS:
    of = logs[f"{kind}-seed0"]["curve"]
    curves[kind] = [row["step"] for row in of], [row["held_out"] for row in of]
figure = training_curves(curves, "share of wrong answers")
plt.show()

# %% [markdown]
# *Figure: wrong answers of the six students over their updates of 714 tokens each.*
#
# With steps the errors fall, and with verified steps they fall to nearly none. Dots stay near nine wrong in ten, which is chance, and answers stay close to it.
#
# Now evaluation problems, which no model has seen, by their number of operations. Each model takes its likeliest tokens.

# %%
from course_utils.distillation.reasoning_lm import accuracy, solve

students = {kind: shipped_model(f"{kind}-seed0").to(profile.device) for kind in KINDS}
count = profile.pick(quick=100, cpu=400)
right = {
    name: accuracy(model, count)
    for name, model in ({"teacher": teacher} | students).items()
}
shares = {
    name: {n: (sum(r) / count, *wilson(sum(r), count)) for n, r in of.items()}
    for name, of in right.items()
}
lengths = (*TRAINED, *HELD_OUT_LENGTHS)
table(
    [
        {"model": m} | {f"{n} op.": of[n][0] for n in lengths}
        for m, of in shares.items()
    ],
    {f"{n} op.": ".1%" for n in lengths},
)

# %%
figure = solved_by_length(shares, TRAINED)
plt.show()

# %% tags=["folded"]
# Record sizes and shares.
for name, model in (("teacher", teacher), ("student", students["verified"])):
    size = model.num_parameters()
    record(f"reasoning.parameters.{name}", size, "", 0, model="reasoning")
for name, of in right.items():
    for n in lengths:
        key = f"reasoning.right.{name}.{n}"
        record(key, sum(of[n]) / count, "", 0.08, model="reasoning")
    record(
        f"reasoning.right.{name}.trained",
        sum(sum(of[n]) for n in TRAINED) / count / len(TRAINED),
        "",
        0.05,
        model="reasoning",
    )

# %% [markdown]
# *Figure: problems solved by length, with 95% intervals; on the grey ground lengths that nobody trained on; dashed is chance.*
#
# The story in the recorded run, for trained lengths on average:
#
# 1. From answers alone the student solves {{reasoning.right.answers.trained:.0%}}, hardly more than chance. From the verified steps, at the same number of tokens, {{reasoning.right.verified.trained:.1%}}.
# 2. It is not the length or the computation: dots give {{reasoning.right.dots.trained:.0%}}. It is not the symbols: shuffled steps give {{reasoning.right.shuffled.trained:.0%}}.
# 3. Wrong traces teach most of it: unfiltered {{reasoning.right.unfiltered.trained:.0%}}, and rejected ones alone, without one right answer among them, {{reasoning.right.rejected.trained:.0%}}.
#
# Beyond the trained lengths those with steps fall to chance or below, and the student of answers stays where it was: with six operations the verified student solves {{reasoning.right.verified.6:.0%}}. The places on the form that hold the fifth and sixth operation
# were empty in all training. Steps do not help a network at places where it has never seen one.
#
# Is one operation not easy for answers too? There are only 200 such facts, but those of the evaluation are never trained on as problems. The steps of longer traces
# contain them. So we ask the student of answers for problems that it was trained on.

# %%
rows = []
for n in TRAINED:
    seen = [parts(t)[0] for t in traces if len(parts(t)[0]) == 1 + 2 * n and verify(t)]
    solved = sum(map(verify, solve(students["answers"], seen[:count])))
    rows.append({"operations": n, "solved of those seen": solved / len(seen[:count])})
    record(
        f"reasoning.seen.answers.{n}",
        rows[-1]["solved of those seen"],
        "",
        0.1,
        model="reasoning",
    )
table(rows, {"solved of those seen": ".1%"})

# %% [markdown]
# In the recorded run it solves {{reasoning.seen.answers.1:.0%}} of one operation and {{reasoning.seen.answers.4:.0%}} of four. So it has not even learned its training problems by heart: this training is too
# short for it. Longer training would raise that. At equal tokens it is far behind.
#
# Is a difference one at all? The models solve the same problems, so we subtract problem by problem.


# %%
def paired(a, b):
    """Share that `a` solves less what `b` solves, over all trained lengths."""
    d = torch.tensor([right[a][n] for n in TRAINED]).double().flatten()
    d = (
        d - torch.tensor([right[b][n] for n in TRAINED]).double().flatten()
    )  # -1, 0 or 1
    error = d.std().item() / len(d) ** 0.5
    return Estimate(d.mean().item(), error, len(d), "problems")


rows = []
for kind in ("answers", "dots", "shuffled", "unfiltered", "rejected", "teacher"):
    gap = paired("verified", kind)
    rows.append(
        {"verified less": kind, "share of problems": format_difference(gap, "")}
    )
    record(f"reasoning.gap.{kind}", gap.value, "", 0.08, model="reasoning")
    record(f"reasoning.gap.{kind}_error", gap.error, "", model="reasoning")
table(rows)

# %% [markdown]
# In the recorded run verified less answers is {{reasoning.gap.answers:+.3f}} ± {{reasoning.gap.answers_error:.3f}} of the problems, and verified less unfiltered
# {{reasoning.gap.unfiltered:+.3f}} ± {{reasoning.gap.unfiltered_error:.3f}}: sorting is worth that much here. Against its own teacher the student gains {{reasoning.gap.teacher:+.3f}} ± {{reasoning.gap.teacher_error:.3f}}, with a quarter of
# the parameters: the verifier knew more than the teacher, which was stopped early.
#
# Three seeds of the headline pair draw other first weights and another order of the lines. The shares are those that the training recorded, at 400 problems of each length.


# %%
def of_seed(kind, seed):
    """The recorded share that is right, mean of the trained lengths."""
    recorded = logs[f"{kind}-seed{seed}"]["right"]
    return sum(recorded[str(n)] for n in TRAINED) / len(TRAINED)


rows = [
    {"seed": s} | {k: of_seed(k, s) for k in ("answers", "verified")} for s in range(3)
]
gaps = torch.tensor([row["verified"] - row["answers"] for row in rows]).double()
mean, error = gaps.mean().item(), gaps.std().item() / len(gaps) ** 0.5
record("reasoning.seeds.gap", mean, "", 1e-6, model="reasoning")
record("reasoning.seeds.gap_error", error, "", 1e-6, model="reasoning")
print(f"verified less answers over three seeds: {with_error(mean, error, '+')}")
table(rows, {"answers": ".1%", "verified": ".1%"})

# %% [markdown]
# In the recorded run the gap over three seeds is {{reasoning.seeds.gap:+.3f}} ± {{reasoning.seeds.gap_error:.3f}}. The error is over seeds here, not over problems.
#
# ## What each of them writes
#
# One problem that nobody was trained on, for all.

# %%
problem = random_problems(12, 4, split="evaluation", seed=3)[7]
rows = {}
for name, model in ({"teacher": teacher} | students).items():
    line = solve(model, [problem])[0]
    written = parts(line)[1]
    if name in ("answers", "dots", "shuffled"):  # only the last symbol can be checked
        wrong = None if verify(line) else len(written) - 1
    else:
        wrong = first_wrong_step(line)
    rows[name] = (problem, written, wrong)
figure = written_steps(rows)
plt.show()
print(f"{problem}: right steps {worked_steps(problem)}")

# %% [markdown]
# *Figure: a row for each model. Of answers, dots and shuffled steps only the last symbol is checked.*
#
# The verified student writes the right chain. Those of dots and of answers end in a digit that has little to do with the problem. One problem is an anecdote;
# the table above is the measurement.
#
# ## What wrong traces teach
#
# Why does a student learn from traces that all end wrong? A rejected trace mostly has one slip, and the slips differ from trace to trace. The right step is still the most frequent one in its
# place, and the likeliest token takes the majority. We count steps instead of answers.

# %%
rows = []
for name in ("verified", "unfiltered", "rejected"):
    row = {"student": name}
    for n in TRAINED:
        problems = random_problems(count, n, split="evaluation", seed=0)
        firsts = [first_wrong_step(line) for line in solve(students[name], problems)]
        clean = sum(n if f is None else max(0, min(f, n + 1) - 1) for f in firsts)
        tried = sum(n if f is None else min(max(f, 1), n) for f in firsts)
        row[f"{n} op."] = clean / tried
        record(
            f"reasoning.steps.{name}.{n}", row[f"{n} op."], "", 0.08, model="reasoning"
        )
    rows.append(row)
table(rows, {f"{n} op.": ".1%" for n in TRAINED})

# %% [markdown]
# The table shows the share of right steps among those that were tried before the first slip. In the recorded run the student of rejected traces does {{reasoning.steps.rejected.4:.1%}} of its steps right in problems of four operations. Over four steps that multiplies to
# far less, as the answers showed. Of verified traces the student does {{reasoning.steps.verified.4:.1%}}.
#
# At quite another size others found the same order. For a model of 32B parameters, training on traces with wrong answers cost 3.2 points, while shuffled or deleted steps
# cost much more [@li2025structure].
#
# ## Any teacher, and what is refused
#
# The code asks of a teacher only that it is a causal language model. With a GPU or a network, set `MODEL` to a reasoning model from the hub, as `owner/name@commit`: it then gets the prompt
# below and more room to write, and the same verifier idea reads the last digit of its text. We did not run a large reasoning model here. Without `MODEL` the teacher is course-lm, which has read the Factbook and no arithmetic.

# %%
from course_utils.models import load_model

name = "course-lm" if MODEL == "auto" else MODEL
other, other_tokenizer = load_model(name, dtype=profile.dtype, device=profile.device)
asked = "Work from left to right and keep only the last digit of each result. "
questions = [f"{asked}{p} =" for p in random_problems(8, 2, split="train", seed=1)]
room = 24 if name == "course-lm" else 512
texts = write_traces(
    other, other_tokenizer, questions, max_new_tokens=room, temperature=0.7, seed=SEED
)
print(texts[0].replace("\n", " "))


# %%
def last_digit_is_right(text):
    """A verifier for free text: the last digit after the question is the answer."""
    problem, _, written = text.removeprefix(asked).partition(" =")
    digits = [c for c in written if c.isdigit()]
    return bool(digits) and digits[-1] == worked_steps(problem)[-1]


try:
    kept = rejection_sample(texts, last_digit_is_right)
    print(f"{len(kept.accepted)} of {len(texts)} accepted")
except ValueError as error:
    print("refused:", str(error)[:220])

# %% [markdown]
# Course-lm writes fluent nonsense. What a verifier does with it depends on luck: a digit at random is right in one case of ten. If none passes there is nothing to learn from, and `rejection_sample` says so instead
# of training on nothing.
#
# The second thing that is refused: tokens of one vocabulary for a student with another.

# %%
try:
    line_rows(found.accepted, tokenizer, teacher_tokenizer=other_tokenizer)
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# A token's number means other text under another tokenizer. That is why distillation by probabilities needs one vocabulary. Traces are text, so here decoding and encoding anew is a way
# out. It is one reason why R1's authors could teach models of two other families.
#
# ## What you saw
#
# - **What is distilled is text.** The student saw the teacher's tokens, not its probabilities. The loss is the ordinary one, on what the teacher wrote.
# - **The verifier lets flaws pass.** It accepted {{reasoning.rate:.0%}} of the traces in the recorded run; {{reasoning.flawed:.1%}} of the accepted ones hold a wrong step.
# - **Steps are what is learned.** At equal tokens the student of answers solves {{reasoning.right.answers.trained:.0%}} and that of verified steps {{reasoning.right.verified.trained:.1%}}; over three seeds the gap is
#   {{reasoning.seeds.gap:+.2f}} ± {{reasoning.seeds.gap_error:.2f}}. Dots of the same length give {{reasoning.right.dots.trained:.0%}}.
# - **Order matters more than correctness.** Shuffled right steps give {{reasoning.right.shuffled.trained:.0%}}, wrong traces in order {{reasoning.right.rejected.trained:.0%}}.
# - **Lengths never seen stay unsolved**, with steps or without.
#
# ## Limits
#
# - Our trace has at most five symbols, and one right way. R1's traces have thousands of tokens, with detours, doubts and checks. Nothing here says anything about those.
# - Our teacher copied a program. Nothing was discovered by it, and there was no reinforcement learning.
# - Our students begin with random weights. R1's students were pretrained models that knew arithmetic already; their fine-tuning may draw out what is there.
# - The form gives each step a fixed place. That is why so little training is enough, and why no model gets beyond the lengths it was trained on.
# - One task, one size of student, three seeds for one pair and one seed for the others. All learning rates are equal; none was tuned.
# - The verifier knows every answer. For most texts in the world there is no such verifier.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: a verifier that reads the steps
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# The verifier above saw the answer only, and let flawed traces pass. Write one that accepts a trace only if every step follows.


# %% tags=["exercise"]
def all_steps_right(problem, written):
    """Whether `written` is the right solution of `problem`, step by step.

    Approach: the first symbol is the problem's first digit; each next one is the last
    digit of the step before, plus or minus the next digit; nothing is missing and
    nothing is too much.
    Example: ("7+5-3", "729") is right, ("7+5-3", "739") is not, though it ends well.
    Hint: Python's -1 % 10 is 9.
    """
    ### BEGIN SOLUTION
    if len(written) != 1 + len(problem) // 2 or written[0] != problem[0]:
        return False
    for k in range(1, len(written)):
        sign = 1 if problem[2 * k - 1] == "+" else -1
        if not (written[k - 1].isdigit() and written[k].isdigit()):
            return False
        if (int(written[k - 1]) + sign * int(problem[2 * k])) % 10 != int(written[k]):
            return False
    return True
    ### END SOLUTION


# %% tags=["exercise-tests"]
assert all_steps_right("7+5-3", "729"), "7, then 12 keeps 2, then 2 - 3 keeps 9"
assert all_steps_right("2-3", "29"), (
    "2 - 3 is -1, and its last digit on the circle is 9"
)
assert not all_steps_right("7+5-3", "739"), (
    "the answer is right, the step before is not"
)
assert not all_steps_right("7+5-3", "507"), "the first symbol is the first digit, 7"
assert not all_steps_right("7+5-3", "72"), "a step is missing at the end"
assert not all_steps_right("7+5-3", "7299"), "a symbol is too much at the end"
print(all_steps_right("7+5-3", "729"), all_steps_right("7+5-3", "739"))
### BEGIN HIDDEN TESTS
assert not all_steps_right("7+5-3", "7.9"), (
    "a dot is no digit: return False, do not fail"
)
assert not all_steps_right("7+5", ""), "nothing was written: return False, do not fail"
assert all_steps_right("9+9+9+9+9+9+9", "9876543")
assert not all_steps_right("9+9+9+9+9+9+9", "9876544")
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: how many samples does a problem need?
# *Difficulty 3/5 · 10 minutes · 2 points · no GPU*
#
# A hard problem gives no verified trace at the first try, but perhaps at the fifth. A teacher wrote `n` traces of a problem, and `c` of them passed. If we had kept
# only `k` of the `n`, picked at random, how likely is it that at least one of them passes?


# %% tags=["exercise"]
def at_least_one(n, c, k):
    """Chance that one or more of `k` traces, each of the `n` picked once, pass.

    `c` of the `n` pass; 1 <= k <= n. Approach: of all ways to pick k traces, count
    those that pick failed ones only; the chance is 1 less their share.
    Example: n = 4, c = 2, k = 2 gives 5/6.
    Hint: math.comb(a, b) is 0 where b is larger than a.
    """
    ### BEGIN SOLUTION
    import math

    return 1 - math.comb(n - c, k) / math.comb(n, k)
    ### END SOLUTION


# %% tags=["exercise-tests"]
found_chance = at_least_one(4, 2, 2)
assert abs(found_chance - 3 / 4) > 1e-9, "1 - (1 - c/n)^k picks with repetition: count"
assert abs(found_chance - 1) > 1e-9, "k c / n counts a pair that both pass twice"
assert abs(found_chance - 1 / 6) > 1e-9, "that is the chance that none passes"
assert abs(found_chance - 5 / 6) < 1e-12, "1 of the 6 pairs holds failed traces only"
assert abs(at_least_one(10, 3, 1) - 0.3) < 1e-12, "with one trace it is c / n"
assert at_least_one(5, 0, 3) == 0, "nothing passes, however many are picked"
assert at_least_one(5, 3, 3) == 1, "only two failed, so one of three passes"
print(round(found_chance, 4))
### BEGIN HIDDEN TESTS
assert abs(at_least_one(20, 2, 10) - (1 - 90 / 380)) < 1e-12
assert at_least_one(6, 6, 1) == 1
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: a difference and its error
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Two students tried the same problems. Give the difference of the shares that they solved, with its standard error. Easy problems are easy for both, so the error is that of the
# differences.


# %% tags=["exercise"]
def gap_with_error(a, b):
    """(mean, standard error) of a - b over problems; both are lists of booleans.

    Approach: subtract problem by problem, so that each difference is -1, 0 or 1; the
    error is their standard deviation (with n - 1) over the square root of n.
    Example: a = [1, 1, 0, 1], b = [1, 0, 0, 1] gives (0.25, 0.25).
    Hint: statistics.stdev divides by n - 1, statistics.pstdev by n.
    """
    ### BEGIN SOLUTION
    import statistics

    d = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    return statistics.fmean(d), statistics.stdev(d) / len(d) ** 0.5
    ### END SOLUTION


# %% tags=["exercise-tests"]
value, error = gap_with_error([True, True, False, True], [True, False, False, True])
assert abs(value - 0.25) < 1e-12, "a solved one problem of four that b did not"
assert abs(error - 0.5) > 1e-9, "that is the deviation: divide by the root of n"
assert abs(error - 0.216506) > 1e-5, "divide the squares by n - 1, not by n"
assert abs(error - 0.381881) > 1e-5, "errors of both shares added: subtract first"
assert abs(error - 0.25) < 1e-12, "differences are 0, 1, 0, 0: deviation 0.5, over 2"
value, error = gap_with_error([False, True], [True, False])
assert abs(value) < 1e-12, "one problem each way: the mean difference is 0"
assert abs(error - 1) < 1e-12, "differences -1 and 1 keep their signs"
print(value, error)
### BEGIN HIDDEN TESTS
value, error = gap_with_error([True] * 5, [True] * 5)
assert value == 0 and error == 0
value, error = gap_with_error([True] * 6 + [False] * 3, [False] * 9)
assert abs(value - 2 / 3) < 1e-12 and abs(error - 1 / 6) < 1e-12
### END HIDDEN TESTS

# %% [markdown]
# ## References
#
# - DeepSeek-AI, *DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning*, 2025, arXiv 2501.12948 [@deepseek2025r1].
# - C.-Y. Hsieh and others, *Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data and Smaller Model Sizes*, Findings of ACL 2023,
#   arXiv 2305.02301 [@hsieh2023stepbystep].
# - E. Zelikman, Y. Wu, J. Mu, N. D. Goodman, *STaR: Bootstrapping Reasoning With Reasoning*, NeurIPS 2022, arXiv 2203.14465 [@zelikman2022star].
# - J. Pfau, W. Merrill, S. R. Bowman, *Let's Think Dot by Dot: Hidden Computation in Transformer Language Models*, 2024, arXiv 2404.15758 [@pfau2024dots].
# - D. Li and others, *LLMs Can Easily Learn to Reason from Demonstrations: Structure, not content, is what matters!*, 2025, arXiv 2502.07374 [@li2025structure].
# - E. B. Wilson, *Probable Inference, the Law of Succession, and Statistical Inference*, Journal of the American Statistical Association 22, 1927 [@wilson1927].
#
# ## Next
#
# `distillation_demo` distils probabilities instead of text, and `feature_distillation` what lies between the layers.
