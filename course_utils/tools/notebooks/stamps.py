"""Stamps: what a notebook was built from, so that only what changed is built again.

A notebook can print something else when its script changes, or one of the package's files that it uses:
`sources` finds those. Of them only the code counts, so that a comment or a docstring asks for no
rebuild. Of the script everything counts, since its text is the notebook's. A stamp is the same on
every Python and every system.
"""

import hashlib
import io
import platform
import re
import tokenize
from importlib.metadata import version

import course_utils
from course_utils.tools.notebooks.pairs import Notebook
from course_utils.tools.notebooks.sources import sources_used

PLAIN_STRING = re.compile(r"(?i)[rub]*[\"']")  # not an f-string, which computes something
LAYOUT = (tokenize.ENCODING, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def stamp(notebook: Notebook) -> dict[str, str]:
    """Hashes of the script and of the package's files that it uses, as they are now."""
    script = hashlib.sha256(_newlines(notebook.script.read_bytes()))
    package = hashlib.sha256()
    for file in sources_used(notebook.script, notebook.root / "course_utils"):
        content = file.read_bytes()
        if file.suffix in (".py", ".cpp"):
            content = _newlines(content)
        if file.suffix == ".py":
            content = code(content.decode("utf-8")).encode("utf-8")
        name = file.relative_to(notebook.root).as_posix()
        package.update(f"{name} {len(content)}\n".encode())
        package.update(content)
    return {"script": script.hexdigest(), "package": package.hexdigest()}


def code(text: str) -> str:
    """A module's text without comments, blank lines, and statements that are nothing but a string.

    The rest stays as it is written: what Python makes of it (`ast.dump`, the tokens of an f-string)
    differs from one version to the next.
    """
    lines = dict(enumerate(text.split("\n"), 1))
    statement = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row] = lines[row][:column].rstrip()
        elif token.type == tokenize.NL:
            if not lines.get(row, "").strip():  # blank, or a comment alone; never inside a string
                lines.pop(row, None)
        elif token.type == tokenize.NEWLINE:
            if statement and all(map(_is_plain_string, statement)):
                for inside in range(statement[0].start[0], row + 1):
                    del lines[inside]
            statement = []
        elif token.type not in LAYOUT:
            statement.append(token)
    return "\n".join(lines.values()).rstrip("\n") + "\n"


def versions() -> dict[str, str]:
    """Versions that the outputs were made with; told to the reader, not compared."""
    libraries = {name: version(name) for name in ("torch", "numpy", "transformers")}
    course = {"course_utils": course_utils.__version__}
    return {"python": platform.python_version(), **libraries, **course}


def _is_plain_string(token: tokenize.TokenInfo) -> bool:
    return token.type == tokenize.STRING and PLAIN_STRING.match(token.string) is not None


def _newlines(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")
