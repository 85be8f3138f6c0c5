"""Which files of the package a notebook depends on: those that its script reaches by imports.

Imports are followed file by file, those inside functions too. A name that a package's `__init__` hands
on leads to the file that defines it; an `__init__` that does nothing else is not counted. Three more
things count in the script and in each file reached, because a module can be asked for by a string:
a string that is a method's name counts the method's module, as `get_method("gptq")` imports it; a
string that names a module counts it; a program in a string counts its imports, as it is run in a
process of its own. Of the assets those count whose folder is named in a string; so does a file of source
in another language that stands beside the module which names it.

This is a reading, no proof: `trace` finds the functions that a run executes beyond these files.
`tools` is never among them: no notebook may import it (a test holds that), and what it shapes in
a built notebook besides the outputs, `course check` compares with the script.
"""

import ast
import functools
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from course_utils.tools import CourseError

ROOT = "course_utils"
METHODS = "quantizers"  # the folder in which a method's module is named as the method
DOTTED = re.compile(rf"{ROOT}(\.\w+)+")
OTHER_SOURCE = re.compile(r"\w+\.cpp")


class Reading(NamedTuple):
    """What one Python file says."""

    imports: frozenset[tuple[str, str]]  # the name that is bound, and the full dotted one
    strings: frozenset[str]
    hands_on: bool  # it consists of imports and `__all__`, as many an `__init__` does


def sources_used(script: Path, package: Path) -> list[Path]:
    """The package's files that a script depends on, with the assets, ordered by their names.

    Raises `CourseError` for an import that cannot be followed by its name: `*`, or a relative one.
    """
    found, waiting, strings = set(), [script], set()
    while waiting:
        file = waiting.pop()
        strings |= read(file).strings
        beside = (
            file.with_name(name) for name in read(file).strings if OTHER_SOURCE.fullmatch(name)
        )
        found |= {other for other in beside if other.is_file()}
        for name in names_used(file, package):
            files = defining(name, package) - found
            found |= files
            waiting += files
    named = {part for string in strings for part in string.split("/")}
    assets = package / "assets"
    for file in assets.rglob("*"):
        if file.is_file() and file.suffix != ".md" and file.relative_to(assets).parts[0] in named:
            found.add(file)
    return sorted(found, key=lambda file: file.relative_to(package).as_posix())


def names_used(file: Path, package: Path) -> set[str]:
    """The dotted names of `course_utils` that a file imports, or names by a string."""
    names = course_imports(file)
    methods = {module.name for module in pkgutil.iter_modules([str(package / METHODS)])}
    for string in read(file).strings:
        if string in methods:
            names.add(f"{ROOT}.{METHODS}.{string}")
        elif DOTTED.fullmatch(string):
            names.add(string)
        elif ROOT in string:
            names |= _imports_of_a_program(string)
    return names


def defining(name: str, package: Path) -> set[Path]:
    """The files that stand behind a dotted name: its module, and each `__init__` on the way to it.

    A package as a whole stands for all that its `__init__` hands on.
    """
    _, *rest = name.split(".")
    found, folder = set(), package
    while rest:
        init = read(folder / "__init__.py")
        if not init.hands_on:
            found.add(folder / "__init__.py")
        part, *rest = rest
        handed = {full for bound, full in init.imports if bound == part and full != name}
        if handed and not rest:
            return found.union(*(defining(full, package) for full in handed))
        if (folder / f"{part}.py").is_file():
            return found | {folder / f"{part}.py"}
        if not (folder / part).is_dir():
            return found  # what `__init__` defines, or nothing, which Python refuses to import
        folder = folder / part
    init = read(folder / "__init__.py")
    if not init.hands_on:
        return found | {folder / "__init__.py"}
    return found.union(*(defining(full, package) for _, full in init.imports))


def parts_imported(source: Path) -> set[str]:
    """First names below `course_utils` that a Python file imports, anywhere in it."""
    return {name.split(".")[1] for name in course_imports(source) if "." in name}


def course_imports(source: Path) -> set[str]:
    """Full dotted names from `course_utils` that a Python file imports, anywhere in it."""
    return {full for _, full in read(source).imports}


def read(source: Path) -> Reading:
    """What a Python file says."""
    try:
        return _read(source.read_text(encoding="utf-8"))
    except CourseError as error:
        raise CourseError(f"{source}: {error}") from error


@functools.cache
def _read(text: str) -> Reading:
    tree = ast.parse(text)
    strings = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    hands_on = all(map(_only_hands_on, tree.body))
    return Reading(frozenset(_imports(tree)), frozenset(strings), hands_on)


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name bound, full dotted name) of each import from `course_utils` in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == ROOT:
                    yield alias.asname or alias.name, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise CourseError(f"line {node.lineno}: import from {ROOT} by its full name.")
            if (node.module or "").split(".")[0] == ROOT:
                for alias in node.names:
                    if alias.name == "*":
                        raise CourseError(f"line {node.lineno}: import names, not *.")
                    yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _only_hands_on(statement: ast.stmt) -> bool:
    match statement:
        case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant(str())):
            return True
        case ast.Assign(targets=[ast.Name("__all__")]):
            return True
    return False


def _imports_of_a_program(string: str) -> set[str]:
    """What a string imports from `course_utils` if it is a program; else it says nothing."""
    try:
        return {name for _, name in _imports(ast.parse(string))}
    except SyntaxError:
        return set()
