"""A task whose steps can be checked: chains of additions and subtractions, of which the last digit is kept.

A problem is a digit and one to six operations, `7+5-3`. It is worked from left to right, and of every
result only the last digit goes on: 7+5 gives 2, 2-3 gives 9. The steps of the problem are these digits,
begun with the first one: 7, 2, 9. All terms decide about the answer, and all ten digits are equally
likely. A model reads the problem on a form with room for six operations, and writes behind it, a token for
each symbol: `7+5-3________:729` and the line's end. For `distillation/reasoning_distillation`.
"""

import hashlib
import random
import re

from transformers import PreTrainedTokenizerFast

SYMBOLS = "\n:_.+-0123456789"  # a token each; the line's end is number 0
LONGEST = 6  # operations
TRAINED, HELD_OUT_LENGTHS = (1, 2, 3, 4), (5, 6)
ROOM = 1 + 2 * LONGEST  # symbols on the form
PROBLEM = re.compile(r"\d([+-]\d)+")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of the task's 16 symbols; a line's end begins and ends a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    numbers = {symbol: number for number, symbol in enumerate(SYMBOLS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="\n", eos_token="\n")


def random_problems(count: int, operations: int, *, split: str, seed: int) -> list[str]:
    """`count` problems of so many operations from the split "train" or "evaluation"; they may repeat.

    A hash of the problem says to which split it belongs, as for the course's documents: about every fifth
    is for evaluation. Raises `ValueError` for another split, and for operations outside 1 to 6.
    """
    if split not in ("train", "evaluation"):
        raise ValueError(f"split is 'train' or 'evaluation', got {split!r}")
    if not 1 <= operations <= LONGEST:
        raise ValueError(f"problems have 1 to {LONGEST} operations, got {operations}")
    draw = random.Random(f"{seed} {operations} {split}")
    found: list[str] = []
    while len(found) < count:
        terms = [draw.choice("+-") + draw.choice("0123456789") for _ in range(operations)]
        problem = draw.choice("0123456789") + "".join(terms)
        if split_of(problem) == split:
            found.append(problem)
    return found


def split_of(problem: str) -> str:
    """The split of a problem, "train" or "evaluation", by its hash."""
    first = hashlib.sha256(problem.encode()).digest()[0]
    return "evaluation" if first % 5 == 0 else "train"


def steps_of(problem: str) -> str:
    """The right steps: the first digit, then the last digit of every result. "7+5-3" gives "729".

    Raises `ValueError` for what is no problem.
    """
    if not PROBLEM.fullmatch(problem):
        raise ValueError(f"{problem!r} is no problem: write digits with + or - between, as 7+5-3")
    steps = problem[0]
    for operation, digit in zip(problem[1::2], problem[2::2], strict=True):
        steps += next_step(steps[-1], operation, digit)
    return steps


def next_step(value: str, operation: str, digit: str) -> str:
    """The last digit of one result: ("2", "-", "3") gives "9"."""
    left, right = int(value), int(digit)
    return str((left + right if operation == "+" else left - right) % 10)


def on_form(problem: str) -> str:
    """What a model reads: the problem, `_` for the room that it leaves, and a colon.

    Raises `ValueError` for a problem of more than six operations.
    """
    if len(problem) > ROOM:
        raise ValueError(
            f"{problem!r} has {len(problem) // 2} operations, and the form holds {LONGEST}: shorten it"
        )
    return problem.ljust(ROOM, "_") + ":"


def worked(problem: str) -> str:
    """The right solution with its steps, as a line: "7+5-3________:729" and the line's end."""
    return on_form(problem) + steps_of(problem) + "\n"


def parts(line: str) -> tuple[str, str]:
    """(problem, what was written behind it) of a line; without the line's end."""
    form, _, written = line.removesuffix("\n").partition(":")
    return form.rstrip("_"), written


def answer_only(line: str) -> str:
    """A solution without its steps: what is written is the answer alone."""
    problem, written = parts(line)
    return on_form(problem) + written[-1:] + "\n"


def dotted(line: str) -> str:
    """A solution whose steps are dots, of the same length and with the same answer: ":..9"."""
    problem, written = parts(line)
    return on_form(problem) + "." * len(written[:-1]) + written[-1:] + "\n"


def shuffled(line: str, draw: random.Random) -> str:
    """A solution with its steps in another order, drawn by `draw`; the answer stays at the end."""
    problem, written = parts(line)
    steps = "".join(draw.sample(written[:-1], len(written[:-1])))
    return on_form(problem) + steps + written[-1:] + "\n"


def answer_is_right(line: str) -> bool:
    """The verifier: whether a line ends (with a line's end) in the answer of the problem that it begins with.

    It does not look at the steps. What is no solution at all is not right, and no error.
    """
    problem, written = parts(line)
    solved = PROBLEM.fullmatch(problem) and written and line.endswith("\n")
    return bool(solved) and written[-1] == steps_of(problem)[-1]


def first_wrong_step(line: str) -> int | None:
    """The number of the first symbol written that does not follow from the one before, None if all do.

    Number 0 is the copied first digit. A step is checked against the step before it as it was written, so
    that one slip is not counted twice. A line that stops too early is wrong at the symbol that is missing,
    one that goes on (or has no line's end) at the first that is too much. Raises `ValueError` if the line
    does not begin with a problem.
    """
    problem, written = parts(line)
    operations = len(steps_of(problem)) - 1
    if written[:1] != problem[0]:
        return 0
    for number in range(1, operations + 1):
        before, step = written[number - 1], written[number : number + 1]
        expected = problem[2 * number - 1], problem[2 * number]
        if not before.isdigit() or step != next_step(before, *expected):
            return number
    ended = len(written) == operations + 1 and line.endswith("\n")
    return None if ended else operations + 1
