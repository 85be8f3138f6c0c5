"""Numbers in a notebook's text: `{{key:.2f}}` stands for what the run recorded under that key.

The script holds the braces, and the built notebook the numbers, so that a sentence says what its own run
measured. After the key may stand a model, where a key was recorded for several, and a format as Python
writes it: `{{llm_int8.gain@course-lm:+.3f}}`. Without a format a number has four digits.
"""

import difflib
import re
from collections.abc import Iterator

from nbformat import NotebookNode

from course_utils.results.entries import KEY
from course_utils.tools.notebooks.pairs import tags

FILLING = re.compile(r"\{\{(?P<key>.*?)(@(?P<model>.*?))?(:(?P<format>.*?))?\}\}", re.S)
WORDS = "in the recorded run"
NOT_RECORDED = "(not recorded in this run)"


def filling_problems(nb: NotebookNode) -> list[str]:
    """What is wrong with a script's fillings whatever a run records, one sentence each."""
    problems = []
    for number, cell, found in _fillings(nb):
        if not KEY.fullmatch(found["key"]):
            problems.append(
                f"cell {number}: {found[0]} names no key: write {{{{key}}}} or {{{{key:.2f}}}}, and braces "
                "of a formula with a space between them"
            )
        elif "exercise-statement" in tags(cell):
            problems.append(
                f"cell {number}: {found[0]} in an exercise, whose student version records nothing: "
                "move the number out of the statement"
            )
        elif WORDS not in " ".join(cell.source.lower().split()):
            problems.append(
                f"cell {number}: {found[0]} in a text that does not say `{WORDS}`: another run "
                "prints other numbers above it"
            )
    return problems


def unfilled(nb: NotebookNode, recorded: list[dict]) -> list[str]:
    """One sentence for each filling for which `recorded`, entries of one run, has no one value."""
    problems = []
    for number, _, found in _fillings(nb):
        try:
            _number(found, recorded)
        except LookupError as error:
            problems.append(f"cell {number}: {found[0]}: {error.args[0]}")
    return problems


def fill(text: str, recorded: list[dict]) -> str:
    """`text` with its fillings replaced by the values of `recorded`, or by words where there is none."""

    def new(found: re.Match) -> str:
        try:
            return _number(found, recorded)
        except LookupError:
            return NOT_RECORDED

    return FILLING.sub(new, text)


def _fillings(nb: NotebookNode) -> Iterator[tuple[int, NotebookNode, re.Match]]:
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "markdown":
            yield from ((number, cell, found) for found in FILLING.finditer(cell.source))


def _number(found: re.Match, recorded: list[dict]) -> str:
    """What stands for a filling; `LookupError` tells why nothing does."""
    key, model = found["key"], found["model"]
    values = {e["model"]: e["value"] for e in recorded if e["key"] == key}
    if not values:
        near = difflib.get_close_matches(key, sorted({e["key"] for e in recorded}), n=3)
        hint = f"near to it are {', '.join(near)}" if near else "no key is near to it"
        raise LookupError(f"the run recorded nothing as {key}; {hint}")
    if model is None and len(values) > 1:
        raise LookupError(f"recorded for several models: write {key}@MODEL, one of {_list(values)}")
    if model is not None and model not in values:
        raise LookupError(f"not recorded for {model}, only for {_list(values)}")
    value = next(iter(values.values())) if model is None else values[model]
    try:
        return format(value, found["format"] or ".4g")
    except ValueError as error:
        raise LookupError(f"{value} cannot be written so: {error}") from error


def _list(models: dict) -> str:
    return ", ".join(sorted(map(str, models)))
