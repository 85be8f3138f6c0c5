"""`course bench kernels`: products with packed weights beside float ones and beside other libraries'.

All contenders hold the same matrix and get the same inputs, on the same number of threads. They take turns in
blocks of a few calls: call by call their waiting threads would fight, and one after the other a machine that
gets slower would slow down some of them. Each call takes another copy of its weight, so that none is found in
the cache. A contender's output is checked first. Milliseconds are medians over the blocks; ratios are of
these, and a share is of the time in which this machine reads as many bytes.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from course_utils.evaluation.turns import in_turns
from course_utils.grids.codebook import NF4
from course_utils.kernels import (
    GroupedCodes,
    backend,
    base3_product,
    grouped_linear,
    pack,
    pack_trits,
)
from course_utils.kernels.compiled import is_compiled
from course_utils.plotting import new_figure
from course_utils.quantizers.bitnet import quantize_tokens
from course_utils.results import record, set_context
from course_utils.tools import CourseError
from course_utils.tools.bench.quantize import key_part

GROUP = 64
CACHE = 2**28  # bytes that a contender's copies take at least, to be out of any cache
CALLS = 5  # in a block
READ = 2**28  # float32 values that are read to measure the bandwidth
Product = Callable[[Tensor], Tensor]


@dataclass
class Contender:
    """A way to multiply with a matrix, held in copies; `error` is how far outputs may be off, relatively."""

    name: str
    nbytes: int
    copies: list[Product]
    stands_for: Tensor
    error: float
    milliseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def bench_kernels(
    root: Path, sizes: list[int], tokens: list[int], rounds: int, threads: int
) -> Iterator[str | Table]:
    """Time all contenders on square matrices of `sizes` with each of `tokens` inputs.

    Yields what is going on, a table for each size and number of inputs, and at last the place of a picture;
    values are recorded. Raises `CourseError` for sizes that groups of 64 do not divide, and wrong outputs.
    """
    if bad := [size for size in sizes if size < 1 or size % GROUP]:
        raise CourseError(f"size {bad[0]}: choose multiples of {GROUP}.")
    if bad := [m for m in tokens if m < 1] or [n for n in (rounds, threads) if n < 1]:
        raise CourseError(f"{bad[0]}: tokens, rounds and threads are 1 or more.")
    torch.set_num_threads(threads)
    start = time.perf_counter()
    is_compiled(torch.device("cpu"))  # the first call builds the library, or finds it in the cache
    first = time.perf_counter() - start
    bandwidth = _bandwidth()
    set_context(profile="bench", device="cpu")
    yield (
        f"{threads} threads; reading float32 from memory: {bandwidth / 1e9:.1f} GB/s; "
        f"compiled kernels ready in {first:.2f} s, once"
    )
    ratios: dict[str, dict[str, float]] = {}
    for size in sizes:
        with ThreadPoolExecutor(threads) as pool:
            contenders = list(_contenders(size, threads, pool))
            for m in tokens:
                _run(contenders, size, m, rounds)
                yield _table(root, contenders, size, m, bandwidth, rounds, threads)
                of_float = contenders[0].median
                ratios[f"{size}, {m}"] = {c.name: of_float / c.median for c in contenders}
    yield f"Picture: {_picture(root / 'runs' / 'bench' / 'kernels.png', ratios)}"


def _bandwidth() -> float:
    """Bytes a second of reading much memory once, the best of five."""
    values = torch.ones(READ)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start)
    return values.nbytes / min(times)


@torch.no_grad()
def _run(contenders: list[Contender], size: int, m: int, rounds: int) -> None:
    """Fill in the milliseconds of a call, one value a block."""
    x = torch.randn(m, size, generator=torch.Generator().manual_seed(m))
    for contender in contenders:
        expected = F.linear(x, contender.stands_for)
        off = ((contender.copies[0](x) - expected).norm() / expected.norm()).item()
        if not off <= contender.error:
            raise CourseError(
                f"{contender.name}: outputs are off by {off:.1e}: nothing to compare."
            )
    calls = {
        contender.name: [partial(product, x) for product in contender.copies]
        for contender in contenders
    }
    taken = in_turns(calls, rounds=rounds, calls=CALLS)
    for contender in contenders:
        contender.milliseconds[:] = taken[contender.name]


def _contenders(size: int, threads: int, pool: ThreadPoolExecutor) -> Iterator[Contender]:
    """The float product first; all but NF4 and ternary weights stand for one matrix."""
    draw = torch.Generator().manual_seed(0)
    groups = size, size // GROUP
    codes = torch.randint(16, (size, size), generator=draw)
    scale = (torch.rand(groups, generator=draw) + 0.5) / 16
    zero = torch.full(groups, 8.0)
    four = _grouped(codes, scale, zero, None, 4)
    weight = four.dequantize()

    def contender(name, nbytes, make: Callable[[], Product], error, stands_for=weight) -> Contender:
        copies = [make() for _ in range(max(1, CACHE // nbytes))]
        return Contender(name, nbytes, copies, stands_for, error)

    def ours(name: str, grouped: GroupedCodes, inputs: str) -> Contender:
        nbytes = sum(
            t.nbytes for t in (grouped.codes, grouped.scale, grouped.zero) if t is not None
        )
        error = 1e-5 if inputs == "float" else 2e-2
        label = f"ours, {name}, {inputs} inputs"
        return contender(
            label, nbytes, lambda: _product(grouped, inputs), error, grouped.dequantize()
        )

    def floats(dtype: torch.dtype) -> Product:
        own = weight.to(dtype, copy=True)
        return lambda x: F.linear(x.to(dtype), own).float()

    def in_parts() -> Product:
        parts = [part.clone() for part in weight.chunk(threads)]
        return lambda x: torch.cat([*pool.map(lambda part: F.linear(x, part), parts)], 1)

    def torch_int4() -> Product:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        pair = torch.stack([scale.T, torch.zeros_like(scale.T)], 2).bfloat16()  # (q - 8) scale + 0
        return lambda x: torch._weight_int4pack_mm_for_cpu(
            x.bfloat16(), packed, GROUP, pair
        ).float()

    yield contender("float32 F.linear", weight.nbytes, lambda: floats(torch.float32), 1e-5)
    yield contender("float32, a part a thread", weight.nbytes, in_parts, 1e-5)
    yield contender("bfloat16 F.linear", weight.nbytes // 2, lambda: floats(torch.bfloat16), 1e-2)
    yield contender("torch int4", codes.numel() // 2 + 4 * scale.numel(), torch_int4, 1e-2)
    yield from _bitsandbytes(weight, contender)
    for inputs in ("float", "int8"):
        yield ours("4 bits", four, inputs)
    yield ours("8 bits", _grouped(codes + 120, scale, zero + 120, None, 8), "int8")
    yield ours("NF4", _grouped(codes, scale, None, NF4, 4), "float")
    row = scale[:, :1].contiguous()
    ternary = _grouped(codes % 3, row, torch.ones_like(row), None, 2)
    yield ours("ternary", ternary, "int8")
    packed = pack_trits(codes.char() % 3 - 1, "base3")
    yield contender(
        "ours, ternary looked up, int8 inputs", packed.nbytes + row.nbytes,
        lambda: _looked_up(packed.clone(), row), 2e-2, ternary.dequantize(),
    )  # fmt: skip


def _looked_up(packed: Tensor, scale: Tensor) -> Product:
    def product(x: Tensor) -> Tensor:
        codes, inverse = quantize_tokens(x)
        return base3_product(codes.char(), packed) / inverse * scale.T

    return product


def _grouped(
    codes: Tensor, scale: Tensor, zero: Tensor | None, codebook, n_bits: int
) -> GroupedCodes:
    return GroupedCodes(pack(codes, n_bits), scale, zero, codebook, n_bits, codes.shape[1])


def _product(weight: GroupedCodes, inputs: str) -> Product:
    parts = weight.codes, weight.scale, weight.zero, weight.codebook
    copies = (None if part is None else part.clone() for part in parts)
    own = GroupedCodes(*copies, weight.n_bits, weight.columns)
    if backend(own) != "compiled":
        raise CourseError("there is no compiled kernel here: see the warning above.")
    return lambda x: grouped_linear(x, own, inputs=inputs)


def _bitsandbytes(weight: Tensor, contender: Callable[..., Contender]) -> Iterator[Contender]:
    """Its NF4 product, where it is installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    nbytes = packed.nbytes + state.absmax.nbytes
    stands_for = bnb.functional.dequantize_4bit(packed, state)

    def make() -> Product:
        own = packed.clone()
        return lambda x: bnb.matmul_4bit(x, own.t(), state)

    yield contender("bitsandbytes NF4", nbytes, make, 1e-2, stands_for)


def _table(
    root: Path,
    contenders: list[Contender],
    size: int,
    m: int,
    bandwidth: float,
    rounds: int,
    threads: int,
) -> Table:
    """What was measured, recorded too."""
    table = Table(title=f"{size} x {size}, {m} inputs")
    for column in ("product", "MB", "ms", "quartiles", "x float32", "of the bandwidth"):
        table.add_column(column, justify="left" if column == "product" else "right")
    known = {
        "model": f"{size}x{size}",
        "runs": root / "runs" / "bench",
        "rounds": rounds,
        "threads": threads,
    }
    of_float = contenders[0].median
    for contender in contenders:
        median = contender.median
        low, _, high = statistics.quantiles(contender.milliseconds, n=4)
        share = contender.nbytes / bandwidth / (median / 1e3)
        table.add_row(
            contender.name,
            f"{contender.nbytes / 1e6:.1f}",
            f"{median:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{of_float / median:.2f}",
            f"{share:.0%}",
        )
        label = key_part(contender.name)
        for what, value, unit in (
            ("milliseconds", median, "ms"),
            ("ratio", of_float / median, ""),
            ("bandwidth_share", share, ""),
        ):
            record(f"bench.kernels.{size}.m{m}.{label}.{what}", value, unit, **known)
    return table


def _picture(path: Path, ratios: dict[str, dict[str, float]]) -> Path:
    """Bars of how many times as fast as float32's `F.linear` each product is, drawn into `path`."""
    figure, axis = new_figure(height=1 + 0.22 * sum(map(len, ratios.values())))
    names, values = [], []
    for case, of_case in ratios.items():
        names += [f"{name} ({case})" for name in of_case]
        values += of_case.values()
    axis.barh(names, values)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as float32 F.linear (size, inputs)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
