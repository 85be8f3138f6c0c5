"""`course bench layer`: a method on one large weight beside the library it comes from, at the same result.

Both run in this process, in turns, so that a machine that gets slower slows down both. What is told is the
ratio of the medians: seconds are this machine's. Equality comes first; a faster run with other codes would
be no faster one.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from course_utils.quantizers.hqq import HQQ
from course_utils.quantizers.nf4 import NF4
from course_utils.results import record, set_context
from course_utils.tools import CourseError

SHAPE = (768, 3072)
Rivals = tuple[Callable[[], object], Callable[[], object], Callable[[object, object], int]]


def bench_layer(root: Path, name: str, repeats: int, threads: int) -> Iterator[str]:
    """Time the method `name` on normal weights of 768 x 3072, 4 bits, groups of 64, on `threads` threads.

    Yields what was measured, line by line, and records it. Raises `CourseError` for an unknown method, a
    library that is not installed, and codes that differ.
    """
    if name not in LAYERS:
        raise CourseError(f"{name}: there is a layer's benchmark of {', '.join(LAYERS)}.")
    if repeats < 1:
        raise CourseError(f"repeats {repeats}: choose 1 or more.")
    torch.set_num_threads(threads)
    weight = 0.02 * torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0))
    ours, theirs, differing = LAYERS[name](weight)
    if count := differing(ours(), theirs()):  # this is the warm-up as well
        raise CourseError(f"{count} of {weight.numel()} codes differ: there is nothing to compare.")
    yield f"{name}: {weight.numel():,} codes, all equal; {threads} threads"
    seconds = {"course": [], "library": []}
    for repeat in range(repeats):
        turns = [("course", ours), ("library", theirs)]
        for who, run in turns[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            run()
            seconds[who].append(time.perf_counter() - start)
    medians = {who: statistics.median(of_who) for who, of_who in seconds.items()}
    set_context(profile="bench", device="cpu")
    protocol = {"repeats": repeats, "threads": threads, "n_bits": 4, "group_size": 64}
    library = LIBRARIES[name]
    known = {
        "model": "normal-768x3072",
        "versions": {library: metadata.version(library), "torch": torch.__version__},
        "runs": root / "runs" / "bench",
        **protocol,
    }
    for who, of_who in seconds.items():
        yield f"{who}: {medians[who]:.3f} s ({min(of_who):.3f} to {max(of_who):.3f})"
        record(f"bench.layer.{name}.{who}.seconds", medians[who], "s", **known)
    ratio = medians["library"] / medians["course"]
    record(f"bench.layer.{name}.times_as_fast", ratio, "", **known)
    yield f"the course is {ratio:.2f} times as fast"


def _hqq(weight: Tensor) -> Rivals:
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise CourseError("hqq is not installed: `pip install hqq` does it.") from error
    method = HQQ(n_bits=4, group_size=64, scale_dtype="float32")
    settings = {"nbits": 4, "group_size": 64, "axis": 1, "round_zero": True, "device": "cpu"}

    def differing(ours, theirs) -> int:
        packed, _ = theirs
        codes = Quantizer.unpack["4bit_u8"](packed)
        return int((ours.integer_codes() != codes).sum())

    return (
        lambda: method.quantize(weight),
        lambda: Quantizer.quantize(weight, **settings),
        differing,
    )


def _nf4(weight: Tensor) -> Rivals:
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise CourseError(
            "bitsandbytes is not installed: `pip install bitsandbytes` does it."
        ) from error
    method = NF4(block_size=64)
    settings = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}

    def differing(ours, theirs) -> int:
        packed, _ = theirs
        return int((ours.codes != packed.flatten()).sum())  # bytes of two codes

    # Compiling takes a minute, and is not what is timed.
    torch.compiler.set_stance("force_eager")
    return lambda: method.quantize(weight), lambda: bnb.quantize_4bit(weight, **settings), differing


LAYERS: dict[str, Callable[[Tensor], Rivals]] = {"hqq": _hqq, "nf4": _nf4}
LIBRARIES = {"hqq": "hqq", "nf4": "bitsandbytes"}
