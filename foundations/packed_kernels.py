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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/main/foundations/packed_kernels.ipynb) to read, or [work on its exercises in Colab](https://colab.research.google.com/github/adiel2012/model-size-reduction/blob/assignments/foundations/packed_kernels.ipynb)
#
# # Packed kernels: when four bits are faster than thirty-two
#
# *Large Model Quantization: a deep dive. Foundations.*

# %% [markdown]
# When you have worked through this notebook you will be able to
#
# - say why generating one token at a time waits for memory, and draw the roofline of your own machine;
# - cut packed codes out of whole words with one shift and one mask, and say in which order they come out;
# - turn a naive loop into a fast kernel in five steps, check each for correctness, and say what each step gained;
# - say what 8-bit inputs cost in nats, and why a scale for each tile of inputs matters;
# - say why many tokens at once want another kernel, and why int8 with outliers can be slower than float.
#
# It takes about 60 minutes to read and work. You need scales, zero points and packing (`linear_mapping`), and to read a `for` loop in C++.
# No profile needs a GPU; `quick` runs in under a minute, `cpu` in under five. The steps in C++ need a compiler (Colab has one). Where there is
# none the notebook says so, and the rest of it runs.

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
import os

os.environ["TRITON_INTERPRET"] = "1"  # asked for before anything imports Triton

# %%
import copy
import ctypes
import shutil
import statistics
import subprocess
import tempfile
import textwrap
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers

# %%
from course_utils.compression import get_method, quantize_model
from course_utils.evaluation import (
    compare_all,
    continuations,
    difference,
    format_difference,
    prompt_of,
    tensor_bytes,
    time_per_token,
)
from course_utils.evaluation.turns import in_turns, times_as_fast
from course_utils.kernels import (
    GroupedCodes,
    backend,
    base3_product,
    grouped,
    grouped_linear,
    int8_matmul,
    pack,
    pack_trits,
    triton_grouped,
    unpack,
)
from course_utils.kernels.grouped import PREFILL, rounded_inputs

# %%
from course_utils.models import linear_layers
from course_utils.plotting import new_figure, series_styles, table
from course_utils.plotting.diagrams import bits_in_bytes
from course_utils.plotting.diagrams.words import codes_of_words
from course_utils.plotting.rooflines import roofline
from course_utils.profiles import resolve
from course_utils.quantizers.affine import Affine
from course_utils.quantizers.bitnet import quantize_tokens
from course_utils.results import record

# %% tags=["parameters"]
PROFILE = "auto"  # auto, quick, cpu, colab, gpu
MODEL = "auto"  # auto, or the name of one model
SEED = 0

# %%
profile = resolve(PROFILE, MODEL, SEED)
print(f"{profile}; this notebook takes its models on the CPU in float32")
profile = replace(profile, device=torch.device("cpu"), dtype=torch.float32)
generator = torch.Generator().manual_seed(profile.seed)
print(f"torch {torch.__version__}, transformers {transformers.__version__}")

# %% [markdown]
# This notebook measures the processor, so it stays on the CPU even where there is a GPU.
#
# ## The question
#
# A linear layer computes `y = x W.T` from inputs `x` `[tokens, in]` and weights `W` `[out, in]`. That takes $2 \cdot tokens \cdot out \cdot in$
# operations: a multiplication and an addition for each weight and token. While a model writes, `tokens` is 1. Then every weight is read from
# memory, used in two operations, and not needed again before the next token.
#
# Two things bound the time $t$ of such a product: the arithmetic, and the reading.
#
# $$ t \;\ge\; \max\left( \frac{\text{operations}}{\text{peak operations per second}},\;
# \frac{\text{bytes}}{\text{bandwidth in bytes per second}} \right) $$
#
# Packed codes make the second term smaller. Whether the product gets faster depends on the **kernel**, the code that reads and multiplies. A
# layer that first decodes its codes to float reads and writes far *more* than a float layer does. So: how near can a kernel for 4-bit
# codes come to the bound, and what does it take?
#
# ## The roofline of this machine
#
# We measure both sides on one thread. The bandwidth is that of reading much memory once: a long sum. The peak is that of a large float32 matrix
# product. Each is the best of many tries, because anything else that runs can only slow it down.

# %%
cores = os.cpu_count() or 1
given_threads = torch.get_num_threads()
torch.set_num_threads(1)


def best_of(n, call):
    """Seconds of the fastest of n calls."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# %%
much = torch.ones(profile.pick(quick=2**25, cpu=2**26))  # 128 or 256 MB
bandwidth = much.nbytes / best_of(40, much.sum)  # bytes per second
n = profile.pick(quick=1024, cpu=2048)
square = torch.randn(n, n, generator=generator)
peak = 2 * n**3 / best_of(10, lambda: square @ square)  # operations per second
del much
print(f"reading {bandwidth / 1e9:.1f} GB/s, arithmetic {peak / 1e9:.0f} billion/s")
print(f"they balance at {peak / bandwidth:.1f} operations per byte")

# %% tags=["folded"]
# Records the two sides of the roofline.
record("packed.bandwidth", bandwidth / 1e9, "GB/s", threads=1)
record("packed.peak", peak / 1e9, "billion/s", threads=1)
record("packed.ridge", peak / bandwidth, "operations per byte", threads=1)

# %% [markdown]
# In the recorded run one thread read {{packed.bandwidth:.1f}} GB/s and computed {{packed.peak:.0f}} billion operations a second. A kernel that
# does fewer than {{packed.ridge:.1f}} operations with each byte waits for memory, however clever it is. One with more waits for arithmetic. A
# float32 product with one token does 2 operations for 4 bytes: 0.5.
#
# ### Bytes per token of a model
#
# For each token a model reads all its linear layers and its output layer (the head) once. Of the embedding it reads one row. So bandwidth over bytes
# is the most tokens per second that memory allows, on this thread.

# %%
models = profile.load_models()


def bytes_per_token(model, bits):
    """Bytes of linear layers at `bits` a weight, and of the float head."""
    layers = sum(layer.weight.numel() for layer in linear_layers(model))
    head = model.get_output_embeddings().weight
    return layers * bits / 8 + head.nbytes


# %%
rows = []
for name, (model, _) in models.items():
    for bits in (32, 5):  # 4-bit codes with their scales
        nbytes = bytes_per_token(model, bits)
        rows.append(
            {"model": name, "bits per weight": bits, "MB per token": nbytes / 1e6}
        )
        rows[-1] |= {"tokens/s at most": bandwidth / nbytes}
table(rows, {"MB per token": ".1f", "tokens/s at most": ".0f"})

# %% tags=["folded"]
# Records how much smaller the bytes per token are.
for name, (model, _) in models.items():
    less = bytes_per_token(model, 32) / bytes_per_token(model, 5)
    record(f"packed.{name}.fewer_bytes", less, "times", 0.01, model=name)

# %% [markdown]
# A 4-bit code, and a float32 scale and zero point for every 64 of them, are 5 bits per weight: so our kernels read them. (Stored they are less, with
# float16 scales and packed zero points.) The layers shrink more than sixfold, but the head stays in float. So the bytes of course-lm fall only
# {{packed.course-lm.fewer_bytes:.1f}} times in the recorded run. Where memory is the bound, no kernel for the layers can gain more than that.
#
# ## By hand: one row, one tile
#
# Four-bit codes lie in pairs in bytes: an even code in the low half, the next in the high half. Four codes fill a word of 16 bits.

# %% tags=["nbval-check-output"]
codes = torch.tensor([[3, 14, 7, 0, 9, 5, 12, 1, 15, 2, 8, 6, 4, 11, 10, 13]])
figure = bits_in_bytes(codes[0, :8], 4)
plt.show()

# %% [markdown]
# *Figure: eight codes in four bytes, drawn with bit 0 on the right. Code 0 takes the lowest four bits of byte 0, code 1 the four above it.*
#
# To take code 2 out of the first word, shift it to the right by 8 bits and mask all but the lowest four: `word >> 8 & 15`. One at a time that is
# slow: a shift, a mask and an address for every single code. Now look at a whole tile, 16 codes in four words.

# %% tags=["nbval-check-output"]
packed = pack(codes, 4)  # uint8 [1, 8]
words = packed.view(torch.int16)[0].int() & 0xFFFF  # [4], 16 bits each
print("words:", [f"{word:04x}" for word in words.tolist()])
for c in range(4):
    print(f"words >> {4 * c:2} & 15 =", ((words >> 4 * c) & 15).tolist())

# %% [markdown]
# Each line is *one* shift and *one* mask for all four words. A vector unit with registers of 256 bits does that in two instructions, for 8
# words of 32 bits or 16 words of 16 bits. But the codes have come out of order: first 0, 4, 8 and 12, then 1, 5, 9 and 13.

# %%
figure = codes_of_words(4, 4, 4)
plt.show()

# %% [markdown]
# *Figure: the tile of 16 codes, one word a column. A row has one colour: it is what one shift and mask take out. Below, the inputs as they come, and
# re-ordered so that each block of four meets a row of codes.*
#
# To move the codes back would cost as much as we saved. So we move the *inputs* instead, into the order of the codes. That is done once a call, and every row
# of the weight uses it.


# %% tags=["nbval-check-output"]
def ordered(x, places, tile):
    """Inputs `[in]`, tile by tile in the order in which codes are cut out of words."""
    return x.view(-1, tile // places, places).mT.flatten()


x = torch.arange(16.0)
print(ordered(x, places=4, tile=16).int().tolist())
cut = torch.cat([(words >> 4 * c) & 15 for c in range(4)])
assert cut @ ordered(x, 4, 16).int() == codes[0] @ x.long()  # the sum is the same
print("sum:", (codes[0] @ x.long()).item())

# %% [markdown]
# The sum does not mind the order of its terms, as long as codes and inputs have the same one.
#
# ## From the naive loop to the kernel
#
# A square matrix of Gaussian weights gets 4-bit codes in groups of 64. Copies of it lie one behind the other in memory, and each call takes the next.
# So no call finds its weight in the cache, as in a model with many layers. `in_turns` lets the contenders take turns in blocks of a few calls.

# %%
GROUP = 64
size = profile.pick(quick=2048, cpu=4096)

# %%
W = torch.randn(size, size, generator=generator) / size**0.5
weight = get_method("affine", n_bits=4, group_size=GROUP).quantize(W).grouped()
W = weight.dequantize()  # what the codes stand for, [out, in]
x = torch.randn(size, generator=generator)  # one token
exact = W.double() @ x.double()  # the judge

# %%
nbytes = weight.codes.nbytes + weight.scale.nbytes + weight.zero.nbytes
print(
    f"{size} x {size}: {W.nbytes / 1e6:.1f} MB float32, {nbytes / 1e6:.1f} MB packed,"
)
print(
    f"{8 * nbytes / W.numel():.1f} bits per weight with float32 scales and zero points"
)

# %%
PARTS = ("codes", "scale", "zero")


def copy_of(weight):
    parts = {part: getattr(weight, part).clone() for part in PARTS}
    return replace(weight, **parts)


# %%
count = 2**27 // W.nbytes + 1  # so many copies of a float weight, 128 MB
floats = [W.clone() for _ in range(count)]
weights = [copy_of(weight) for _ in range(count * W.nbytes // nbytes)]

# %% [markdown]
# **Step 1: decode, then multiply.** This is what the package does without a compiler: unpack all codes in torch, make the float weight, call `F.linear`.


# %%
def decoded(weight, x):
    return F.linear(x, weight.dequantize())


steps = {"1 decode in torch": partial(decoded, x=x)}

# %% [markdown]
# The other steps are C++. The helper below gives a loop to the system's compiler and loads the result with `ctypes`. The preamble names the
# vector types that GCC and Clang share: 8 words of 32 bits, 8 floats, 16 numbers of 16 bits.

# %% tags=["folded"]
# The preamble of all loops: vector types, loading, and the arguments.
PREAMBLE = """
#include <cstdint>
#include <cstring>
typedef int32_t Words __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));
template <typename V> V load(const void* from) {
  V v; memcpy(&v, from, sizeof v); return v;
}
inline float total(Floats v) {
  float sum = 0; for (int l = 0; l < 8; l++) sum += v[l]; return sum;
}
// Codes, scale and zero of a weight; inputs as floats or as 16-bit codes with a scale
// for each tile; the sum of each tile of inputs; outputs.
#define KERNEL(name) extern "C" void name(const uint8_t* codes, const float* scale, \\
  const float* zero, const float* x, const int16_t* x_codes, const float* x_scale, \\
  const float* x_sum, float* y, int64_t rows, int64_t columns, int threads)
"""

# %% tags=["folded"]
# The helper: it compiles a loop, and loads the result.
names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
compiler = next(filter(None, map(shutil.which, names)), None)
workshop = tempfile.TemporaryDirectory()
print(f"compiler: {compiler or 'none. Steps 2 to 6 are shown, not run'}")


def compiled(name, loop):
    """The C++ function `name`, or None where there is no compiler."""
    if compiler is None:
        return None
    source = Path(workshop.name, f"{name}.cpp")
    source.write_text(PREAMBLE + loop)
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi"]
    files = [source, "-o", source.with_suffix(".so")]
    for best in (["-march=native", "-fopenmp"], []):
        done = subprocess.run([*command, *best, *files], capture_output=True, text=True)
        if done.returncode == 0:
            function = getattr(ctypes.CDLL(str(files[-1])), name)
            pointers, numbers = [ctypes.c_void_p] * 8, [ctypes.c_int64] * 2
            function.argtypes = [*pointers, *numbers, ctypes.c_int]
            return function
    raise RuntimeError(done.stderr[-1000:])


# %%
def product(kernel, weight, x=None, x_codes=None, x_scale=None, x_sum=None, threads=1):
    """Outputs `[out]` of a compiled kernel."""
    y = torch.empty(len(weight.codes))
    of_weight = [getattr(weight, part) for part in PARTS]
    tensors = [*of_weight, x, x_codes, x_scale, x_sum, y]
    kernel(
        *(None if t is None else t.data_ptr() for t in tensors),
        len(y),
        weight.columns,
        threads,
    )
    return y


# %% [markdown]
# **Step 2: the naive loop.** It takes code by code: find the byte, shift, mask, convert, subtract the zero point, multiply by the scale and the input.

# %%
scalar = compiled(
    "scalar",
    """
KERNEL(scalar) {
  for (int64_t row = 0; row < rows; row++) {
    float sum = 0;
    for (int64_t j = row * columns; j < (row + 1) * columns; j++) {
      int q = codes[j / 2] >> (j % 2 * 4) & 15;
      sum += (q - zero[j / 64]) * scale[j / 64] * x[j - row * columns];
    }
    y[row] = sum;
  }
}""",
)
if scalar:
    steps["2 loop over codes"] = partial(product, scalar, x=x)

# %% [markdown]
# It holds no float weight, which saves much traffic. But every single code costs an address, a shift, a mask and a conversion, and each addition waits for the one before.
#
# **Step 3: whole words.** A group of 64 codes is 8 words of 32 bits, with 8 codes each. One shift and one mask give 8 codes at once. The inputs
# come in the order of the codes.

# %%
by_words = compiled(
    "by_words",
    """
KERNEL(by_words) {
  for (int64_t row = 0; row < rows; row++) {
    Floats sums = {};
    for (int64_t g = 0; g < columns / 64; g++) {
      const int64_t at = row * (columns / 64) + g;  // group
      const Words words = load<Words>(codes + at * 32);
      for (int c = 0; c < 8; c++) {
        const Floats q = __builtin_convertvector(words >> 4 * c & 15, Floats);
        sums += (q - zero[at]) * scale[at] * load<Floats>(x + g * 64 + c * 8);
      }
    }
    y[row] = total(sums);
  }
}""",
)
if by_words:
    steps["3 whole words"] = lambda w: product(by_words, w, ordered(x, 8, GROUP))

# %% [markdown]
# **Step 4: scale and zero point leave the inner sum.** Both are the same for all 64 codes of a group [@jacob2017integer]:
#
# $$ \sum_{j} (q_j - Z)\, S\, x_j \;=\; S \Big( \sum_j q_j x_j \;-\; Z \sum_j x_j \Big) $$
#
# The last sum has no weight in it. It is computed once for all rows. In the inner loop a multiplication and an addition remain.

# %%
outside = compiled(
    "outside",
    """
KERNEL(outside) {
  for (int64_t row = 0; row < rows; row++) {
    Floats sums = {};
    float less = 0;
    for (int64_t g = 0; g < columns / 64; g++) {
      const int64_t at = row * (columns / 64) + g;
      const Words words = load<Words>(codes + at * 32);
      Floats products = {};
      for (int c = 0; c < 8; c++) {
        const Floats q = __builtin_convertvector(words >> 4 * c & 15, Floats);
        products += q * load<Floats>(x + g * 64 + c * 8);
      }
      sums += scale[at] * products;
      less += scale[at] * zero[at] * x_sum[g];
    }
    y[row] = total(sums) - less;
  }
}""",
)


# %%
def with_sums(weight, x):
    x = ordered(x, 8, GROUP)
    return product(outside, weight, x, x_sum=x.view(-1, GROUP).sum(1))


if outside:
    steps["4 scale outside"] = partial(with_sums, x=x)

# %% [markdown]
# **Step 5: 8-bit inputs.** A vector register holds 16 numbers of 16 bits, but 8 floats. So we round the inputs to int8, with a scale for each tile of
# 64, and multiply integers. Can 16 bits hold the sums? A code is at most 15, an input at most 127, and four products are added before the sum is
# widened: $4 \cdot 15 \cdot 127 = 7620 < 2^{15}$. They can.

# %%
int8 = compiled(
    "int8",
    """
KERNEL(int8) {
  #pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    Floats sums = {}, both;
    float less = 0;
    for (int64_t g = 0; g < columns / 64; g++) {
      const int64_t at = row * (columns / 64) + g;
      const Shorts words = load<Shorts>(codes + at * 32);  // 16 words of 4 codes
      Shorts products = {};
      for (int c = 0; c < 4; c++)
        products += (words >> 4 * c & 15) * load<Shorts>(x_codes + g * 64 + c * 16);
      for (int l = 0; l < 8; l++) both[l] = int(products[l]) + int(products[l + 8]);
      const float both_scales = scale[at] * x_scale[g];
      sums += both_scales * both;
      less += both_scales * zero[at] * x_sum[g];
    }
    y[row] = total(sums) - less;
  }
}""",
)


# %%
def with_int8(weight, x, threads=1):
    tiles = ordered(x, 4, GROUP).view(-1, GROUP)
    x_scale = tiles.abs().amax(1).clamp(min=1e-30) / 127  # [tiles]
    x_codes = (tiles / x_scale[:, None]).round()
    sums = x_codes.sum(1)
    return product(int8, weight, None, x_codes.short(), x_scale, sums, threads)


if int8:
    steps["5 int8 inputs"] = partial(with_int8, x=x)
    steps["6 all threads"] = partial(with_int8, x=x, threads=cores)

# %% [markdown]
# **Step 6: threads.** Rows do not depend on each other, so one line, the `#pragma omp` above, deals them out to threads. It was there in step 5 too,
# with one thread.
#
# ### Correct first
#
# A fast wrong kernel is worth nothing. Each step is held against the product in double precision: to 1e-5 with float inputs. Rounded inputs get 2e-2
# against the exact product, and 1e-5 against the exact product *of the rounded inputs*.

# %%
rounded = W.double() @ rounded_inputs(x[None], GROUP)[0].double()  # [out]


def error(y, y_exact):
    return ((y - y_exact).norm() / y_exact.norm()).item()


# %%
rows = []
for name, step in steps.items():
    y, int8_inputs = step(weight), "5" in name or "6" in name
    own = error(y, rounded if int8_inputs else exact)
    assert own < 1e-5 and error(y, exact) < 2e-2, name
    rows.append(
        {"step": name, "off the exact product": error(y, exact), "off its own": own}
    )
table(rows, {"off the exact product": ".1e", "off its own": ".1e"})

# %% [markdown]
# With float inputs all steps agree up to the order of additions. With int8 inputs the difference is the rounding of the inputs: the last column is small.
#
# ### Then the time
#
# The baseline is float32 `F.linear` on one thread. A ratio is taken round by round, and the quartiles say how far it moved.

# %%
x_row = x[None]
ways = {"float32 F.linear": [partial(F.linear, x_row, w) for w in floats]}
ways |= {name: [partial(step, w) for w in weights] for name, step in steps.items()}
rounds = profile.pick(quick=9, cpu=15)
taken = in_turns(ways, rounds=rounds, calls=3)

# %%
baseline, before = taken["float32 F.linear"], None
rows, ratios = [], {}
for name, of_way in taken.items():
    ratios[name], low, high = times_as_fast(baseline, of_way)
    gain = None if before is None else times_as_fast(before, of_way)[0]
    rows.append(
        {"step": name, "ms": statistics.median(of_way), "x the one before": gain}
    )
    rows[-1] |= {"x float32": ratios[name], "quartiles": f"{low:.2f} to {high:.2f}"}
    before = of_way
formats = {"ms": ".2f", "x the one before": ".2f", "x float32": ".2f"}
table(rows, formats)

# %% tags=["folded"]
# Records the time of each step, and its ratios.
KEYS = ("float", "decode", "scalar", "words", "outside", "int8", "threads")
for key, row in zip(KEYS, rows, strict=False):
    by = {"size": size, "rounds": rounds, "threads": cores if key == "threads" else 1}
    record(f"packed.step.{key}.ms", row["ms"], "ms", **by)
    record(f"packed.step.{key}.ratio", row["x float32"], "", **by)
    if row["x the one before"] is not None:
        record(f"packed.step.{key}.gain", row["x the one before"], "", **by)

# %% [markdown]
# In the recorded run decoding in torch ran at {{packed.step.decode.ratio:.2f}} times the speed of float, though it reads a sixth of the bytes. The naive loop gained
# {{packed.step.scalar.gain:.1f}} times over it and came to {{packed.step.scalar.ratio:.2f}}; whole words gained {{packed.step.words.gain:.1f}} times more. Taking the scale out gave
# {{packed.step.outside.gain:.2f}} times, int8 inputs {{packed.step.int8.gain:.2f}} times, and all threads {{packed.step.threads.gain:.2f}} times. So one
# thread with int8 inputs was {{packed.step.int8.ratio:.1f}} times as fast as float32.
#
# Where are they on the roofline? All packed steps do 2 operations for 5 bits, and so stand above each other.

# %%
operations = 2 * W.numel()
points = {}
for name, of_way in taken.items():
    if "threads" not in name:  # the roof is that of one thread
        read = W.nbytes if name == "float32 F.linear" else nbytes
        seconds = statistics.median(of_way) / 1e3
        points[name] = operations / read, operations / seconds
figure = roofline(points, bandwidth, peak)
plt.show()

# %% [markdown]
# *Figure: operations per second against operations per byte, both axes logarithmic, on one thread. The black line is the roof: reading on the slope,
# arithmetic on the flat part. float32 stands on the left. The packed steps stand in one column further right, one above the other.*

# %% tags=["folded"]
# The share of the roof that each step reaches.
shares = {
    name: speed / min(peak, bandwidth * intensity)
    for name, (intensity, speed) in points.items()
}
for key, share in zip(KEYS, shares.values(), strict=False):
    record(f"packed.step.{key}.share", share, "", size=size, threads=1)
table([{"step": name, "of the roof": share} for name, share in shares.items()],
      {"of the roof": ".0%"})  # fmt: skip

# %% [markdown]
# float32 reached {{packed.step.float.share:.0%}} of its roof in the recorded run. That part of the roof is the slope: only fewer bytes can lift it. Our last kernel reached
# {{packed.step.int8.share:.0%}} of a roof that is higher. Shifts, masks and conversions take time too, and the roofline does not count them as operations. (A share above
# 100% says that summing, by which we measured the reading, is not the fastest way to read.)

# %% [markdown]
# ## Beside libraries
#
# The package's kernel (`course_utils/kernels/cpu.cpp`) is these loops with templates: 2, 3, 4 and 8 bits, tiles of 32 to 128, codebooks, several tokens. Inputs in
# int8 stay bytes there: where the processor has an instruction that multiplies 32 bytes with 32 others and adds neighbours, it takes that. We set it beside torch's own 4-bit product and that of bitsandbytes [@bitsandbytes]. All are checked first, each against the weight that it holds. torch's takes bfloat16
# inputs, and bitsandbytes' codes are NF4.

# %% tags=["folded"]
# Products of libraries with the same matrix: what each holds, its tolerance, its call.
held, x_many = {}, x[None]
by_torch = torch._convert_weight_to_int4pack_for_cpu(
    unpack(weight.codes, 4, size).int(), 1
)
shift = (8 - weight.zero) * weight.scale  # torch decodes (q - 8) scale + shift
pairs = torch.stack([weight.scale.T, shift.T], 2).bfloat16().contiguous()


def int4_of_torch(packed):
    half = x_many.bfloat16()
    return torch._weight_int4pack_mm_for_cpu(half, packed, GROUP, pairs).float()


packages = [by_torch.clone() for _ in range(len(weights))]
held["torch int4"] = W, 2e-2, [partial(int4_of_torch, p) for p in packages]
if backend(weight) == "compiled":
    for inputs, close in (("float", 1e-5), ("int8", 2e-2)):
        calls = [partial(grouped_linear, x_many, w, inputs=inputs) for w in weights]
        held[f"package, {inputs} inputs"] = W, close, calls

# %% tags=["folded"]
# bitsandbytes, where it is installed.
try:
    import bitsandbytes
except ImportError:
    print("bitsandbytes is not installed here, and is left out.")
else:
    quantized, state = bitsandbytes.functional.quantize_4bit(
        W, blocksize=GROUP, quant_type="nf4"
    )
    nf4 = bitsandbytes.functional.dequantize_4bit(quantized, state)
    calls = [
        partial(bitsandbytes.matmul_4bit, x_many, own.t(), state)
        for own in (quantized.clone() for _ in range(len(weights)))
    ]
    held["bitsandbytes NF4"] = nf4, 1e-2, calls

# %% tags=["folded"]
# Check, time in turns, and record.
for name, (stands_for, close, calls) in held.items():
    off = error(calls[0]().double(), x_many.double() @ stands_for.double().T)
    assert off < close, f"{name} is off by {off:.1e}"
calls = {"float32 F.linear": ways["float32 F.linear"]}
calls |= {name: of_library for name, (_, _, of_library) in held.items()}
of_libraries = in_turns(calls, rounds=rounds, calls=3)
rows = []
for name, of_way in of_libraries.items():
    ratio, low, high = times_as_fast(of_libraries["float32 F.linear"], of_way)
    rows.append({"product": name, "ms": statistics.median(of_way), "x float32": ratio})
    rows[-1] |= {"quartiles": f"{low:.2f} to {high:.2f}"}
    key = "-".join("".join(c if c.isalnum() else " " for c in name).split())
    record(
        f"packed.library.{key}.ratio", ratio, "", size=size, rounds=rounds, threads=1
    )
table(rows, {"ms": ".2f", "x float32": ".2f"})

# %% [markdown]
# In the recorded run, on one thread, the package's kernel was {{packed.library.package-float-inputs.ratio:.1f}} times as fast as float32 with float inputs and
# {{packed.library.package-int8-inputs.ratio:.1f}} times with int8 inputs. torch's int4 product came to {{packed.library.torch-int4.ratio:.1f}}, and bitsandbytes'
# to {{packed.library.bitsandbytes-NF4.ratio:.2f}}. A library's ratio holds for this processor: some choose another path where there are wider vector units.

# %% [markdown]
# ## Nothing to multiply: look it up
#
# Where a weight is -1, 0 or 1 a product is a sum of inputs, some with the sign changed. Few different sums exist. Two inputs and two trits make nine:

# %% tags=["nbval-check-output"]
two = torch.tensor([3, -2])  # inputs in int8
trits = torch.tensor([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)])  # [9, 2]
sums = (trits * two).sum(1)
table([{"first trit": a, "second trit": b, "sum": s.item()}
       for (a, b), s in zip(trits.tolist(), sums, strict=True)])  # fmt: skip

# %% [markdown]
# So make these sums once for each pair of inputs, and let every row of the matrix look its own up: that is T-MAC's idea [@wei2024tmac], and that of the kernels TL1 (two
# trits) and TL2 (three) in bitnet.cpp [@wang2025bitnetcpp]. The package does it with five trits, which fill a byte: a table has 243 sums, made by additions, and one look-up
# stands for five products. `bitnet_demo` shows how five trits fill a byte.

# %%
ternary = torch.randint(-1, 2, (size, size), generator=generator).char()
five = pack_trits(ternary, "base3")  # [out, in / 5], 1.6 bits a weight
codes, _ = quantize_tokens(x_many)  # whole numbers from -127 to 127
exact_sums = int8_matmul(codes.char(), ternary)
assert torch.equal(base3_product(codes.char(), five), exact_sums)

# %% [markdown]
# The sums are the same integers. And the time? The rival holds the same trits in 2 bits, and multiplies bytes.

# %%
ones = torch.ones(size, 1)
four = GroupedCodes(pack_trits(ternary, "2bit"), ones, ones, None, 2, size)
assert torch.equal(grouped_linear(codes, four, inputs="codes"), exact_sums.float())
fives = [five.clone() for _ in weights]
fours = [replace(four, codes=four.codes.clone()) for _ in weights]

# %%
calls = {
    "float32 F.linear": ways["float32 F.linear"],
    "1.6 bits, looked up": [partial(base3_product, codes.char(), t) for t in fives],
    "2 bits, multiplied": [
        partial(grouped_linear, codes, t, inputs="codes") for t in fours
    ],
}
looked_up, rows = in_turns(calls, rounds=rounds, calls=3), []
for name, of_way in looked_up.items():
    ratio, low, high = times_as_fast(looked_up["float32 F.linear"], of_way)
    rows.append({"product": name, "ms": statistics.median(of_way), "x float32": ratio})
    rows[-1] |= {"quartiles": f"{low:.2f} to {high:.2f}"}
table(rows, {"ms": ".2f", "x float32": ".2f"})

# %% tags=["folded"]
# Records both ratios.
by = {"size": size, "rounds": rounds, "threads": 1}
for key, row in zip(("look_up", "two_bits"), rows[1:], strict=True):
    record(f"packed.ternary.{key}.ratio", row["x float32"], "", **by)

# %% [markdown]
# In the recorded run looking up was {{packed.ternary.look_up.ratio:.1f}} times as fast as float32, and multiplying bytes
# {{packed.ternary.two_bits.ratio:.1f}} times. A look-up fetches one number at a time, while a vector unit multiplies 32 bytes at once. T-MAC and
# bitnet.cpp keep tables of 16 entries in registers, where one instruction looks up 16 or 32 at once.

# %%
del floats, weights, ways, held, calls, packages, fives, fours  # hundreds of MB
torch.set_num_threads(given_threads)  # for the quality; back to one thread after it

# %% [markdown]
# ## What do int8 inputs cost?
#
# The fastest kernel rounds the inputs. What does the model lose by that? We quantize to 4 bits once, and change only the inputs: float, int8
# with a scale for each **tile** of a token's inputs, and, as a control, int8 with one scale for the **whole token**. A group holds 128 columns where
# that divides all layers of a model, else 64.


# %%
@dataclass(frozen=True)
class Int8Inputs(Affine):
    """4-bit codes, and inputs of 8 bits with a scale for each tile or each token."""

    shared_by: str = "tile"

    def linear(self, x, weight, bias):
        codes = weight.grouped()
        if self.shared_by == "tile":
            y = grouped_linear(x, codes, inputs="int8")
        else:
            y = grouped_linear(rounded_inputs(x, codes.columns), codes)
        return y if bias is None else y + bias


# %%
groups = {}
for name, (model, _) in models.items():
    fits = all(layer.weight.shape[1] % 128 == 0 for layer in linear_layers(model))
    groups[name] = {"n_bits": 4, "group_size": 128 if fits else 64}

# %%
quantized = {name: {} for name in models}
for name, (model, _) in models.items():
    for way, method in {
        "float inputs": Affine(**groups[name]),
        "int8, a tile": Int8Inputs(**groups[name]),
        "int8, a token": Int8Inputs(**groups[name], shared_by="token"),
    }.items():
        quantized[name][way] = copy.deepcopy(model)
        quantize_model(quantized[name][way], method)

# %%
compared, protocols = {}, {}
for name, (model, tokenizer) in models.items():
    protocol = profile.protocol(model)
    if name != "course-lm":
        protocol = replace(protocol, tokens=min(protocol.tokens, 2048))
    protocols[name] = protocol
    compared[name] = compare_all(quantized[name], model, protocol.text(tokenizer))

# %%
rows = []
for name, found in compared.items():
    for way, of_way in found.items():
        more = difference(of_way, found["float inputs"])
        rows.append({"model": name, "4-bit weights, inputs": way})
        rows[-1]["nats lost"] = format_difference(of_way.loss)
        same = way == "float inputs"
        rows[-1]["more than float inputs"] = "" if same else format_difference(more)
table(rows)

# %% tags=["folded"]
# Records the losses, and what int8 inputs add to them.
for name, found in compared.items():
    by = {"model": name} | protocols[name].fields | groups[name]
    lost = found["float inputs"].loss
    record(f"packed.{name}.w4.loss", lost.value, "nats", 0.01, **by)
    record(f"packed.{name}.w4.loss_error", lost.error, "nats", 0.01, **by)
    for way in ("tile", "token"):
        more = difference(found[f"int8, a {way}"], found["float inputs"])
        loose = 0.003 if way == "tile" else 0.05
        record(f"packed.{name}.int8.{way}.more", more.value, "nats", loose, **by)
        record(f"packed.{name}.int8.{way}.more_error", more.error, "nats", loose, **by)

# %% [markdown]
# course-lm lost {{packed.course-lm.w4.loss:.4f}} ± {{packed.course-lm.w4.loss_error:.4f}} nats by its 4-bit weights in the recorded run. Int8 inputs added
# {{packed.course-lm.int8.tile.more:+.4f}} ± {{packed.course-lm.int8.tile.more_error:.4f}} with a scale for each tile, and {{packed.course-lm.int8.token.more:+.4f}} ±
# {{packed.course-lm.int8.token.more_error:.4f}} with one for each token. On SmolLM2, which was made from a 4-bit file and has massive activations (`llm_int8_demo`), they added
# {{packed.smollm2-135m-q4_1.int8.tile.more:+.3f}} ± {{packed.smollm2-135m-q4_1.int8.tile.more_error:.3f}} and {{packed.smollm2-135m-q4_1.int8.token.more:+.3f}} ±
# {{packed.smollm2-135m-q4_1.int8.token.more_error:.3f}}. The first of these is not distinguished from 0; the second is. A massive value ruins the step of its own tile only, instead of the
# whole token's. The scales of the tiles cost no memory traffic worth naming, because they belong to the inputs.
#
# ## Many tokens: another kernel
#
# A prompt is read many tokens at a time (**prefill**). Then each weight is used once for every token. The bytes stay the same and the operations
# grow, so the product moves to the right on the roofline, and soon arithmetic is the bound. A vector loop over codes cuts out each code
# again for every few tokens. BLAS, the library behind `F.linear`, multiplies floats at the machine's peak. So the package decodes some rows at a time to float, gives them to BLAS, and
# forgets them. We force either way, and look for the crossover.

# %%
torch.set_num_threads(1)
side = profile.pick(quick=1024, cpu=2048)
W = torch.randn(side, side, generator=generator) / side**0.5
weight = get_method("affine", n_bits=4, group_size=GROUP).quantize(W).grouped()

# %%
has_kernel = backend(weight) == "compiled"
tokens = [1, 2, 4, 8, 16, 32, 64, 128]


def forced(prefill, x):
    """The package's product, which goes over to decoded rows above `prefill` tokens."""
    grouped.PREFILL = prefill
    return grouped_linear(x, weight)


# %%
ways = {"float32 F.linear": lambda x: F.linear(x, W)}
ways["decode all in torch"] = lambda x: F.linear(x, weight.dequantize())
if has_kernel:
    ways["read the codes"] = partial(forced, 10**9)
    ways["decode rows, then BLAS"] = partial(forced, 0)

# %%
per_token = {name: [] for name in ways}  # ms
for m in tokens:
    x = torch.randn(m, side, generator=generator)
    for name, way in ways.items():
        assert (
            error(way(x), F.linear(x, weight.dequantize())) < 1e-5 or "float32" in name
        )
    calls = {name: [partial(way, x)] for name, way in ways.items()}
    for name, of_way in in_turns(
        calls, rounds=profile.pick(quick=5, cpu=9), calls=2
    ).items():
        per_token[name].append(statistics.median(of_way) / m)

# %%
grouped.PREFILL = PREFILL  # as it was
rows = [{"product": name} | dict(zip(map(str, tokens), times, strict=True))
        for name, times in per_token.items()]  # fmt: skip
print("milliseconds per token, by the number of tokens")
table(rows, dict.fromkeys(map(str, tokens), ".3f"))

# %%
figure, axis = new_figure(height=3.4)
styles = series_styles(per_token, "marker")
for name, times in per_token.items():
    axis.plot(tokens, times, label=name, **styles[name])
axis.axvline(PREFILL, color="grey", linestyle=":", linewidth=1)
axis.set(xscale="log", yscale="log", xlabel="tokens at once", ylabel="ms per token")
axis.set_xticks(tokens, map(str, tokens))
axis.legend(fontsize=8, loc="upper right")
plt.show()

# %% tags=["folded"]
# Records times at one and at 128 tokens, and where decoding rows overtakes.
NAMES = ("float", "decode", "codes", "rows")
for key, times in zip(NAMES, per_token.values(), strict=False):
    for m in (1, 16, 128):
        record(f"packed.prefill.{key}.m{m}", times[tokens.index(m)], "ms", size=side)
if has_kernel:
    both = zip(tokens, per_token["read the codes"], per_token["decode rows, then BLAS"],
               strict=True)  # fmt: skip
    overtakes = [m for m, codes_ms, rows_ms in both if rows_ms < codes_ms]
    crossover = overtakes[0] if overtakes else 0
    record("packed.prefill.crossover", crossover, "tokens", size=side)
    print(f"decoding rows is faster from {crossover} tokens on")

# %% [markdown]
# *Figure: milliseconds per token against the number of tokens at once, both axes logarithmic, on one thread. One line for each product. The dotted line is where
# the package goes over from one to the other.*
#
# Of the numbers of tokens that we tried, decoding rows first overtook the kernel at {{packed.prefill.crossover:.0f}} in the recorded run. With one
# token the kernel that reads codes took {{packed.prefill.codes.m1:.3f}} ms and float {{packed.prefill.float.m1:.3f}}. With 128 tokens decoded rows took
# {{packed.prefill.rows.m128:.3f}} ms a token and float {{packed.prefill.float.m128:.3f}}. (This one matrix may stay in the cache from call to call, as those of a large model do not.) With many tokens packed
# weights save memory, but no time: the arithmetic is the same, and the decoding comes on top.
#
# ## Why int8 with outliers can be slower than float
#
# LLM.int8() [@dettmers2022llmint8] stores a byte for each weight, a quarter of float32. Yet its authors report cases that are slower than float
# [@belkada2022gentle]. Its product does more than multiply: it looks for the outliers, scales and rounds the inputs, gathers the outliers' columns, decodes
# them, multiplies them in float, rescales, and adds. On a small layer these passes are the time. We measure one layer of each size, with 1 and with 128 tokens.

# %%
plain, mixed = get_method("llm_int8", threshold=0.0), get_method("llm_int8")


def one_layer(side, m):
    """Milliseconds of a layer [side, side] with m tokens, by the way it multiplies."""
    W = torch.randn(side, side, generator=generator) / side**0.5
    x = torch.randn(m, side, generator=generator)
    x[:, ::200] = 20.0  # outlier features
    ways = {"int8": plain, "with outliers": mixed}
    calls = {"float32": [partial(F.linear, x, W)]}
    codes = plain.quantize(W)
    calls |= {way: [partial(of.linear, x, codes, None)] for way, of in ways.items()}
    taken = in_turns(calls, rounds=9, calls=10)
    return {f"{way}, ms": statistics.median(ms) for way, ms in taken.items()}


# %%
rows = []
for side, m in ((64, 1), (1024, 1), (1024, 128)):
    rows.append({"layer": f"{side} x {side}", "tokens": m} | one_layer(side, m))
columns = [column for column in rows[0] if "ms" in column]
table(rows, dict.fromkeys(columns, ".4f"))

# %% tags=["folded"]
# Records the times.
for row, case in zip(rows, ("tiny", "one", "many"), strict=True):
    for column, key in zip(columns, ("float", "int8", "outliers"), strict=True):
        record(f"packed.outliers.{case}.{key}", row[column], "ms", threads=1)

# %% [markdown]
# The tiny layer has hardly any arithmetic, so its row is the fixed price of a call. In the recorded run that was {{packed.outliers.tiny.float:.3f}} ms for float,
# {{packed.outliers.tiny.int8:.3f}} for int8 and {{packed.outliers.tiny.outliers:.3f}} with outliers. At 1024 x 1024 with one token the three took
# {{packed.outliers.one.float:.3f}}, {{packed.outliers.one.int8:.3f}} and {{packed.outliers.one.outliers:.3f}} ms; with 128 tokens {{packed.outliers.many.float:.2f}},
# {{packed.outliers.many.int8:.2f}} and {{packed.outliers.many.outliers:.2f}} ms. The saved bytes have to pay for the passes first. In layers of a small
# model they may not; a kernel that fuses the passes moves that limit.
#
# ## A whole model
#
# Now all linear layers at once, generating one token at a time: float, 4 bits decoded by torch, 4 bits by the compiled kernel, with float and with int8
# inputs. `COURSE_KERNELS` chooses. The ways take turns here as well. The bound is the bytes that a token reads, over the bandwidth of this thread.

# %%
ways = {"4 bits, torch": ("float inputs", "torch")}
if has_kernel:
    ways["4 bits, compiled"] = "float inputs", "compiled"
    ways["4 bits, compiled, int8 inputs"] = "int8, a tile", "compiled"


# %%
def timed(model, prompt, choice, new_tokens):
    with patch.dict(os.environ, COURSE_KERNELS=choice):
        return time_per_token(
            model, prompt, new_tokens=new_tokens, warmup=2
        ).milliseconds


# %%
n_rounds, n_tokens = profile.pick(quick=(2, 8), cpu=(3, 8))
cases, taken = {}, {}  # by model and way; a median for each round
for name, (model, tokenizer) in models.items():
    prompt = protocols[name].text(tokenizer).tokens[:32]
    cases[name] = {"float32": (model, "auto")}
    for way, (of, choice) in ways.items():
        cases[name][way] = quantized[name][of], choice
    for _ in range(n_rounds):
        for way, (variant, choice) in cases[name].items():
            ms = statistics.median(timed(variant, prompt, choice, n_tokens))
            taken.setdefault((name, way), []).append(ms)

# %%
rows = []
for (name, way), of_way in taken.items():
    bits = 32 if way == "float32" else 4 + 64 / groups[name]["group_size"]
    bound = bytes_per_token(models[name].model, bits) / bandwidth * 1e3
    faster, *_ = times_as_fast(taken[name, "float32"], of_way)
    ms, held = statistics.median(of_way), tensor_bytes(cases[name][way][0]) / 1e6
    rows.append({"model": name, "way": way, "ms per token": ms, "x float32": faster})
    rows[-1] |= {"bound, ms": bound, "model's tensors, MB": held}
numbers = ("ms per token", "x float32", "bound, ms", "model's tensors, MB")
table(rows, dict.fromkeys(numbers, ".2f"))

# %% tags=["folded"]
# Records the times, ratios and bytes of whole models.
SHORT = {"float32": "float", "4 bits, torch": "torch", "4 bits, compiled": "compiled"}
for row in rows:
    key = f"packed.{row['model']}.{SHORT.get(row['way'], 'int8')}"
    by = {"model": row["model"], "threads": 1}
    record(f"{key}.ms_per_token", row["ms per token"], "ms", **by)
    record(f"{key}.times_float", row["x float32"], "", **by)
    record(f"{key}.bound", row["bound, ms"], "ms", **by)
    record(f"{key}.tensors", row["model's tensors, MB"], "MB", 0.001, **by)

# %% [markdown]
# In the recorded run a token of course-lm took {{packed.course-lm.float.ms_per_token:.1f}} ms in float, {{packed.course-lm.torch.ms_per_token:.1f}} with 4 bits decoded by torch, and
# {{packed.course-lm.compiled.ms_per_token:.1f}} with the compiled kernel. The bound of the last is only {{packed.course-lm.compiled.bound:.1f}} ms: its layers are so small that the calls around them take
# the time. SmolLM2 took {{packed.smollm2-135m-q4_1.float.ms_per_token:.0f}}, {{packed.smollm2-135m-q4_1.torch.ms_per_token:.0f}} and
# {{packed.smollm2-135m-q4_1.compiled.ms_per_token:.0f}} ms, and {{packed.smollm2-135m-q4_1.int8.ms_per_token:.0f}} with int8 inputs. The compiled kernel with float inputs had
# {{packed.smollm2-135m-q4_1.compiled.times_float:.2f}} times the speed of float, with int8 inputs {{packed.smollm2-135m-q4_1.int8.times_float:.2f}}; the bytes alone
# would allow {{packed.smollm2-135m-q4_1.fewer_bytes:.1f}}. Its tensors fell from
# {{packed.smollm2-135m-q4_1.float.tensors:.0f}} to {{packed.smollm2-135m-q4_1.compiled.tensors:.0f}} MB. The kernel also keeps scales and zero points as float32, which it makes at the first
# call: 64 bits for every group, on top of these bytes.
#
# ### Where the time goes
#
# The bytes allow more than we got. So we take a token apart: time in the linear layers, in the float head, and in all the rest. Hooks before and
# after each module take the times; the fastest of three tries counts.


# %%
def parts_of_token(model, names, token, choice, n=12):
    """Milliseconds of one token in the layers `names`, in the head, and in the rest."""
    spent, started = {"layers": 0.0, "head": 0.0}, {}
    modules, hooks = [("layers", model.get_submodule(name)) for name in names], []

    def start(module, *_):
        started[module] = time.perf_counter()

    def stop(part, module, *_):
        spent[part] += (time.perf_counter() - started[module]) / n * 1e3

    for part, module in [*modules, ("head", model.get_output_embeddings())]:
        hooks.append(module.register_forward_pre_hook(start))
        hooks.append(module.register_forward_hook(partial(stop, part)))
    with patch.dict(os.environ, COURSE_KERNELS=choice), torch.no_grad():
        model(input_ids=token)  # warm-up
        spent |= dict.fromkeys(spent, 0.0)
        begun = time.perf_counter()
        for _ in range(n):
            model(input_ids=token)
        whole = (time.perf_counter() - begun) / n * 1e3
    for hook in hooks:
        hook.remove()
    return spent | {"rest": whole - sum(spent.values())}


# %%
parts = []
for name, (model, tokenizer) in models.items():
    layers = [layer.name for layer in linear_layers(model)]
    token = protocols[name].text(tokenizer).tokens[None, :1]  # [1, 1]
    for way, (variant, choice) in cases[name].items():
        if choice != "torch":
            tries = [parts_of_token(variant, layers, token, choice) for _ in range(3)]
            fastest = min(tries, key=lambda found: sum(found.values()))
            parts.append({"model": name, "way": way} | fastest)
table(parts, dict.fromkeys(("layers", "head", "rest"), ".2f"))

# %% tags=["folded"]
# Records the parts of a token.
for row in parts:
    key = f"packed.{row['model']}.{SHORT.get(row['way'], 'int8')}"
    for part in ("layers", "head", "rest"):
        record(f"{key}.{part}_ms", row[part], "ms", model=row["model"], threads=1)

# %% [markdown]
# In the recorded run the layers of SmolLM2 took {{packed.smollm2-135m-q4_1.float.layers_ms:.1f}} ms of a token in float, and
# {{packed.smollm2-135m-q4_1.compiled.layers_ms:.1f}} with the compiled kernel, or {{packed.smollm2-135m-q4_1.int8.layers_ms:.1f}} with int8 inputs. The head took
# {{packed.smollm2-135m-q4_1.float.head_ms:.1f}} and {{packed.smollm2-135m-q4_1.compiled.head_ms:.1f}}, and the rest
# {{packed.smollm2-135m-q4_1.float.rest_ms:.1f}} and {{packed.smollm2-135m-q4_1.compiled.rest_ms:.1f}}. The rest is attention,
# norms, and Python around hundreds of small calls. A kernel for the layers does not touch it: the faster the layers get, the more the rest is what one waits for.
#
# ### The model speaks
#
# Does the fast model write the same? One prompt, continued with the likeliest token each time.

# %%
name = list(models)[-1]
speaking = {"float32": models[name].model}
speaking["4 bits, float inputs"] = quantized[name]["float inputs"]
speaking["4 bits, int8 inputs"] = quantized[name]["int8, a tile"]
speaking["one scale a token"] = quantized[name]["int8, a token"]
print(continuations(speaking, models[name].tokenizer, prompt_of(name), new_tokens=24))

# %% [markdown]
# SmolLM2 writes the same with a scale for each tile as with float inputs, and another line with one scale for the whole token. (course-lm, which speaks
# in the profile `quick`, leaves the line of float inputs after some tokens with either.) The float model's line differs from all of them:
# that is the price of the 4-bit weights, not of the kernel.
#
# ## The same idea on a GPU
#
# A GPU reads memory in the same way, only faster, and the argument is the same. Triton [@tillet2019triton] is a language for such kernels: a Python function
# says what one **program** does with blocks of numbers, and many programs run side by side. Here a program takes 16 rows and one token.

# %% tags=["nbval-check-output"]
source = Path(triton_grouped.__file__).read_text("utf-8")
start = source.index("    @triton.jit")
print(textwrap.dedent(source[start : source.index("def triton_linear")]).rstrip())

# %% [markdown]
# You know every line of it: the words of a tile, shift and mask, the sum of codes times inputs, scale and zero point outside. `tl.load` takes a
# block of addresses, so the inputs need not be re-ordered: they are read at a step of `CODES`, out of the cache. On a CPU Triton has an
# interpreter, which shows that a kernel is right, and says nothing about time.

# %%
codes = (
    get_method("affine", n_bits=4, group_size=GROUP).quantize(W[:64, :256]).grouped()
)
x = torch.randn(2, 256, generator=generator)
if triton_grouped.triton is None:
    print("Triton is not installed here: the kernel is shown, not run.")
else:
    off = error(triton_grouped.triton_linear(x, codes), x @ codes.dequantize().T)
    assert off < 1e-5
    print(f"off by {off:.1e}, relatively")

# %% [markdown]
# The tests of the course run this kernel over widths, shapes and numbers of tokens, under the interpreter. On a GPU that Triton supports `grouped_linear` takes it
# for a few tokens. No time of it is told here.
#
# ## What you saw
#
# - **Decoding waits for memory.** A float32 product with one token does half an operation per byte. In the recorded run the machine balanced at
#   {{packed.ridge:.1f}}, and float reached {{packed.step.float.share:.0%}} of its roof.
# - **One shift and one mask cut a code out of every word.** The codes come out by their place in the words. The inputs are put into that order once.
# - **Smaller is faster only with a kernel.** Decoded in torch, 4 bits ran at {{packed.step.decode.ratio:.2f}} times the speed of float. The
#   naive loop came to {{packed.step.scalar.ratio:.2f}}, whole words to {{packed.step.words.ratio:.1f}}, int8 inputs to
#   {{packed.step.int8.ratio:.1f}}, all on one thread. Every step gave the same product, to its tolerance, before it was timed.
# - **Ternary weights need no multiplication.** Looked up, 1.6 bits a weight ran at {{packed.ternary.look_up.ratio:.1f}} times float32, and 2 bits with byte
#   products at {{packed.ternary.two_bits.ratio:.1f}}.
# - **Int8 inputs are cheap with a scale for each tile.** On SmolLM2 they added {{packed.smollm2-135m-q4_1.int8.tile.more:+.3f}} ±
#   {{packed.smollm2-135m-q4_1.int8.tile.more_error:.3f}} nats; with a scale for each token {{packed.smollm2-135m-q4_1.int8.token.more:+.3f}} ±
#   {{packed.smollm2-135m-q4_1.int8.token.more_error:.3f}}.
# - **Many tokens want BLAS.** Decoding rows first overtook the kernel at {{packed.prefill.crossover:.0f}} tokens, and then packed weights save memory only.
# - **Passes cost.** On a tiny layer int8 with outliers took {{packed.outliers.tiny.outliers:.3f}} ms where float took {{packed.outliers.tiny.float:.3f}}.
#
# ## Limits
#
# - All times are one machine's at one moment, and it did other things too. Ratios move with the processor: its vector width, its cache, its memory.
# - The ladder's matrix is larger than any layer of our models. In a small model much of a token is not in its layers, and a kernel does not help there.
# - The kernels have no prefetching and no blocking over rows, and those of our ladder multiply 16 bits, not bytes. Faster ones exist.
# - The head stays in float. With 4-bit layers it is the largest part of what a token reads.
# - The cost of int8 inputs is measured on two small models, with round-to-nearest weights. SmolLM2 comes from a 4-bit file.
#
# ## Exercises

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 1: unpack a word
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Return all codes of a 32-bit word, the lowest bits first.


# %% tags=["exercise"]
def codes_of(word, n_bits):
    """The 32 // n_bits codes of `word`, a Python int of 32 bits, as a list.

    Approach: for each place shift the word to the right, then mask.
    Example: codes_of(0x00000021, 4) begins with 1, 2, and goes on with zeros.
    Hint: the mask has n_bits ones: 2**n_bits - 1. `n_bits` is 2, 4 or 8.
    """
    ### BEGIN SOLUTION
    mask = 2**n_bits - 1
    return [(word >> n_bits * c) & mask for c in range(32 // n_bits)]
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = codes_of(0x00000021, 4)
assert len(found) == 8, f"a word of 32 bits has 8 codes of 4 bits, not {len(found)}"
assert found != [0, 0, 0, 0, 0, 0, 2, 1], "the lowest bits come first"
assert list(found) != [1] + [0] * 7, "shift first, then mask"
assert list(found[:2]) != [33, 2], "mask after the shift, or higher codes stay in"
assert list(found) == [1, 2, 0, 0, 0, 0, 0, 0], "1 is lowest, then 2"
found = list(codes_of(0xFEDCBA98, 4))
assert found[0] != 0xFEDCBA98, "mask after the shift, or higher codes stay in"
assert found == list(range(8, 16)), "8 to 15, the lowest first"
assert list(codes_of(0x04030201, 8)) == [1, 2, 3, 4], (
    "the width is n_bits, not always 4"
)
print(codes_of(0b11_10_01_00, 2))
### BEGIN HIDDEN TESTS
assert list(codes_of(0b11_10_01_00, 2)) == [0, 1, 2, 3] + [0] * 12, "2 bits a code"
assert list(codes_of(0xFFFFFFFF, 2)) == [3] * 16, "the mask has n_bits ones"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 2: how many tokens per second can there be?
# *Difficulty 2/5 · 10 minutes · 2 points · no GPU*
#
# Bound the speed of generation by what memory can deliver. The linear layers are packed, the head is float32.


# %% tags=["exercise"]
def tokens_per_second(layer_weights, n_bits, group_size, head_weights, bandwidth):
    """The bound for `bandwidth` in bytes per second.

    Each of `layer_weights` weights takes n_bits bits, and every group of `group_size`
    has a float16 scale besides. The head's weights are float32, and read once.
    Approach: bytes of a token first, then bandwidth over bytes.
    Example: 8e9 weights of 4 bits in groups of 64, no head, 17e9 bytes/s: 4.0.
    Hint: 4 + 16 / 64 = 4.25 bits per weight; a byte has 8 bits.
    """
    ### BEGIN SOLUTION
    bits = layer_weights * (n_bits + 16 / group_size)
    return bandwidth / (bits / 8 + 4 * head_weights)
    ### END SOLUTION


# %% tags=["exercise-tests"]
def near(a, b):
    return abs(a - b) < 1e-6 * abs(b)


found = tokens_per_second(8e9, 4, 64, 0, 17e9)
assert not near(found, 0.5), "bits are not bytes: divide by 8"
assert not near(found, 0.25), "tokens per second, not seconds per token"
assert not near(found, 4.25), "count the scales: 16 bits for every group"
assert near(found, 4.0), f"4.25 bits per weight are 4.25e9 bytes, got {found}"
found = tokens_per_second(0, 4, 64, 1e9, 8e9)
assert not near(found, 8.0), "the head's weights have four bytes each"
assert near(found, 2.0), "the head has 4e9 bytes, and is read once"
print(f"{tokens_per_second(106e6, 4, 64, 28e6, 16e9):.0f} tokens per second at most")
### BEGIN HIDDEN TESTS
found = tokens_per_second(1e9, 3, 32, 1e8, 1e9)
assert near(found, 1e9 / (3.5e9 / 8 + 4e8)), "bits are n_bits + 16 / group_size"
### END HIDDEN TESTS

# %% [markdown] tags=["exercise-statement"]
# ### Exercise 3: the order of the codes
# *Difficulty 3/5 · 15 minutes · 3 points · no GPU*
#
# In which order do the codes of a row come out? Return their numbers, tile by tile.


# %% tags=["exercise"]
def order_of_codes(columns, tile, codes_of_word):
    """Numbers 0 to columns - 1 as a list, in the order in which codes are cut out.

    A row of `columns` codes is read in tiles of `tile` codes, and a tile in words of
    `codes_of_word` codes. One step takes the code at place c of all words of the tile.
    Approach: for each tile, for each place, for each word.
    Example: order_of_codes(8, 8, 4) is [0, 4, 1, 5, 2, 6, 3, 7].
    Hint: code w * codes_of_word + c of a tile is at place c of word w.
    """
    ### BEGIN SOLUTION
    return [
        first + w * codes_of_word + c
        for first in range(0, columns, tile)
        for c in range(codes_of_word)
        for w in range(tile // codes_of_word)
    ]
    ### END SOLUTION


# %% tags=["exercise-tests"]
found = [int(i) for i in order_of_codes(8, 8, 4)]
assert found != list(range(8)), "codes of one word do not come out one after the other"
assert found != [0, 2, 4, 6, 1, 3, 5, 7], "two words of four codes, not four of two"
assert found == [0, 4, 1, 5, 2, 6, 3, 7], "first place 0 of both words, then place 1"
found = [int(i) for i in order_of_codes(16, 8, 4)]
assert found[:2] != [0, 8] and len(found) == 16, "each tile has an order of its own"
assert found[8:] != found[:8], "the second tile begins at code 8: add its start"
assert found[8:] == [8, 12, 9, 13, 10, 14, 11, 15], (
    "finish a tile before the next begins"
)
### BEGIN HIDDEN TESTS
found = torch.tensor([int(i) for i in order_of_codes(128, 64, 8)])
assert torch.equal(found, torch.arange(128).view(2, 8, 8).mT.flatten())
found = torch.tensor([int(i) for i in order_of_codes(96, 32, 4)])
assert torch.equal(found, torch.arange(96).view(3, 8, 4).mT.flatten())
### END HIDDEN TESTS

# %% [markdown]
# At 3 bits no word of 16 or 32 bits is filled. Eight codes take 24 bits, and the package reads them as words of three bytes.
#
# ## References
#
# - S. Williams, A. Waterman, D. Patterson, *Roofline: An Insightful Visual Performance Model for Multicore Architectures*, Communications of the ACM
#   52(4), 2009 [@williams2009roofline].
# - B. Jacob and others, *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*, CVPR 2018, arXiv 1712.05877
#   [@jacob2017integer]: zero points outside the sum.
# - T. Dettmers, M. Lewis, Y. Belkada, L. Zettlemoyer, *LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale*, NeurIPS 2022,
#   arXiv 2208.07339 [@dettmers2022llmint8].
# - Y. Belkada, T. Dettmers, *A Gentle Introduction to 8-bit Matrix Multiplication for transformers at scale*, Hugging Face blog, 2022
#   [@belkada2022gentle].
# - P. Tillet, H. T. Kung, D. Cox, *Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations*, MAPL 2019
#   [@tillet2019triton].
# - J. Wei and others, *T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge*, arXiv 2407.00088, 2024 [@wei2024tmac].
# - J. Wang and others, *Bitnet.cpp: Efficient Edge Inference for Ternary LLMs*, arXiv 2502.11880, 2025 [@wang2025bitnetcpp].
# - The library bitsandbytes [@bitsandbytes]; the models course-lm (trained by this project, see its model card) and SmolLM2 [@allal2025smollm2].
#
# ## Next
#
# `llm_int8_demo`: what to do with inputs that are too large for 8 bits.
