"""Benchmarks: `course bench`."""

import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Benchmarks, never run as tests.")


@app.callback()
def bench() -> None:
    """Benchmarks, never run as tests: their seconds are this machine's, at this moment."""


@app.command("quantize")
def bench_quantize(
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="With settings, as `gptq:n_bits=4,group_size=64`. Default: that."),
    ] = None,
    model: Annotated[str, typer.Option(help="As `load_model` knows it.")] = "course-lm",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turns.")] = 3,
    sequences: Annotated[int, typer.Option(help="Of the calibration.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, and window.")] = 256,
    evaluated: Annotated[int, typer.Option(help="Tokens of the perplexity; 0: none.")] = 8192,
    threads: Annotated[int | None, typer.Option(help="Default: as torch chooses.")] = None,
) -> None:
    """Quantize a whole model with methods by name, beside the libraries of `course oracles`.

    Time, memory, bits and perplexity, in one table; `course results accept --profile bench` takes them over.
    Examples: `course bench quantize`;
    `course bench quantize affine gptq:group_size=64 --model smollm2-135m-dithered --length 512`.
    """
    import torch
    from rich.console import Console

    from course_utils.tools.bench.quantize import Protocol, bench
    from course_utils.tools.notebooks.pairs import course_root

    threads = threads or torch.get_num_threads()
    protocol = Protocol(sequences, length, evaluated, repeats, threads)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file has no width of its own
    for line in bench(course_root(), methods or ["gptq:n_bits=4,group_size=64"], model, protocol):
        if isinstance(line, str):
            typer.echo(line)
        else:
            console.print(line)


@app.command("layer")
def bench_layer(
    method: Annotated[str, typer.Argument(help="Whose library is installed: hqq or nf4.")] = "hqq",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turns.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Default: as torch chooses.")] = None,
) -> None:
    """Quantize one weight of 768 x 3072 by a method and by its library: the same codes, in which time?

    `course results accept --profile bench` takes the values over. Example: `course bench layer hqq`.
    """
    import torch

    from course_utils.tools.bench.layer import bench_layer as run
    from course_utils.tools.notebooks.pairs import course_root

    for line in run(course_root(), method, repeats, threads or torch.get_num_threads()):
        typer.echo(line)


@app.command("kernels")
def bench_kernels(
    sizes: Annotated[
        list[int] | None, typer.Argument(help="Of square matrices. Default: 4096.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Inputs at a time. Default: 1.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Blocks of five calls, in turns.")] = 15,
    threads: Annotated[int | None, typer.Option(help="Default: as torch chooses.")] = None,
) -> None:
    """Multiply with packed weights, beside float ones and other libraries': how many times as fast?

    `course results accept --profile bench` takes the values over.
    Examples: `course bench kernels`; `course bench kernels 1024 4096 --tokens 1 --tokens 16`.
    """
    import torch
    from rich.console import Console

    from course_utils.tools.bench.kernels import bench_kernels as run
    from course_utils.tools.notebooks.pairs import course_root

    threads = threads or torch.get_num_threads()
    console = Console(width=None if sys.stdout.isatty() else 120)
    for line in run(course_root(), sizes or [4096], tokens or [1], rounds, threads):
        console.print(line)


@app.command("generate")
def bench_generate(
    methods: Annotated[
        list[str] | None,
        typer.Argument(help="With settings. Default: affine, nf4, hqq and llm_int8."),
    ] = None,
    model: Annotated[str, typer.Option(help="As `load_model` knows it.")] = "course-lm",
    tokens: Annotated[int, typer.Option(min=4, help="Generated in each run.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turns.")] = 3,
    head: Annotated[bool, typer.Option(help="Embeddings and head in int8.")] = True,
    threads: Annotated[int | None, typer.Option(help="Default: as torch chooses.")] = None,
) -> None:
    """Generate with the float model and with packed ones: milliseconds a token, and memory.

    `course results accept --profile bench` takes the values over.
    Examples: `course bench generate`; `course bench generate nf4 --model smollm2-135m-dithered`.
    """
    import torch
    from rich.console import Console

    from course_utils.tools.bench.generate import bench_generate as run
    from course_utils.tools.notebooks.pairs import course_root

    specs = methods or ["affine:n_bits=4,group_size=64", "nf4", "hqq", "llm_int8"]
    console = Console(width=None if sys.stdout.isatty() else 120)
    for line in run(
        course_root(),
        specs,
        model,
        tokens=tokens,
        rounds=rounds,
        threads=threads or torch.get_num_threads(),
        head=head,
    ):
        console.print(line)
