"""Notes which files of `course_utils` run a function, from the start of a Python process.

`trace.variables` has every Python process of a run begin with `start`: so this file imports nothing
but the standard library. Modules of the package are compiled with one call more at the beginning of
each function, which costs next to nothing; `sys.setprofile` sees every call of torch, too, and
made a notebook's run a quarter longer. A line is written the moment a file's first function runs:
no process has to end in good order.
"""

import ast
import builtins
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec
from types import FrameType

PACKAGE = "course_utils"
NOTE = "__course_trace__"  # known to all modules, as `print` is


def start(log: str, folder: str) -> None:
    """Append `<file below course_utils>` and the function, parted by a tab, to `log`.

    A file is noted once a process. `folder` is that of the `sitecustomize.py` which calls this: Python
    runs the first of that name only, so the next one is run here.
    """
    noted = set()

    def note(file: str, function: str) -> None:
        if file in noted or is_importing(sys._getframe(2)):
            return
        noted.add(file)
        with open(log, "a", encoding="utf-8") as lines:
            lines.write(f"{file}\t{function}\n")

    with open(log, "a", encoding="utf-8"):
        pass  # that it exists says that a trace was taken
    setattr(builtins, NOTE, note)
    sys.meta_path.insert(0, Finder())
    others = [entry for entry in sys.path if os.path.abspath(entry) != os.path.abspath(folder)]
    following = PathFinder.find_spec("sitecustomize", others)
    if following is not None:
        following.loader.exec_module(module_from_spec(following))


def is_importing(frame: FrameType | None) -> bool:
    """Whether a frame belongs to the import of one of the package's modules.

    What runs then belongs to that module: whoever needs it imports it.
    """
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "<module>" and name.split(".")[0] == PACKAGE:
            return True
        frame = frame.f_back
    return False


class Finder(MetaPathFinder):
    """Finds the package's modules where they would have been found, and has them compiled anew."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname.split(".")[0] != PACKAGE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(fullname, spec.origin)
        return spec


class Loader(SourceFileLoader):
    """Compiles a module with the notes in it; neither reads nor writes the cache of compiled files."""

    def get_code(self, fullname: str):
        path = self.get_filename(fullname)
        folders = (
            fullname.split(".")[1:] if self.is_package(fullname) else fullname.split(".")[1:-1]
        )
        file = "/".join([*folders, os.path.basename(path)])
        tree = Noting(file).visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class Noting(ast.NodeTransformer):
    """Adds the call to every function and lambda, but not to those that are compiled further.

    What is decorated by a `jit` of numba or Triton can call no Python; a file that has such functions
    has one that calls them.
    """

    def __init__(self, file: str):
        self.file = file

    def visit_FunctionDef(self, node):
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            return node
        self.generic_visit(node)
        first = 0 if ast.get_docstring(node, clean=False) is None else 1
        node.body.insert(first, ast.Expr(self._call(node.name)))
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node):
        self.generic_visit(node)
        node.body = ast.BoolOp(ast.Or(), [self._call("a lambda"), node.body])
        return node

    def _call(self, function: str) -> ast.Call:
        values = [ast.Constant(self.file), ast.Constant(function)]
        return ast.Call(ast.Name(NOTE, ast.Load()), values, [])
