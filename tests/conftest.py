"""A small course in a temporary folder, for the tests of what builds, runs and checks notebooks."""

from pathlib import Path

import pytest
from offline import Offline

from course_utils.tools.notebooks.pairs import Notebook
from course_utils.tools.notebooks.standard_cells import SETUP, first_line

NAME = "chronology/sample"
CELLS = {
    "badge": f'# %% [markdown] tags=["badge"]\n# {first_line(NAME, exercises=True)}\n#\n# # A sample',
    "setup": f'# %% tags=["setup"]\n{SETUP}',
    "imports": "# %%\nimport os\n\nfrom course_utils import cache",
    "parameters": '# %% tags=["parameters"]\nPROFILE = "auto"\nSEED = 0',
    "opening": "# %%\nTHRESHOLD = 6.0",
    "section": "# %% [markdown]\n# ## A section\n# Vectors are scaled [@known2022].",
    "work": "# %%\nprint(PROFILE, SEED, os.environ['COURSE_PROFILE'])",
    "checked": '# %% tags=["nbval-check-output"]\n[1, 2, 3]',
    "statement": '# %% [markdown] tags=["exercise-statement"]\n# ### Exercise 1: double\n'
    "# *Difficulty 1/5 · 5 minutes · 1 point · no GPU*\n#\n# Double it.",
    "exercise": '# %% tags=["exercise"]\ndef double(x: int) -> int:\n    """Twice x."""\n'
    "    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION",
    "tests": '# %% tags=["exercise-tests"]\nassert double(2) == 4, "is it doubled?"\n'
    '### BEGIN HIDDEN TESTS\nassert double(-1) == -2, "negative ones too"\n### END HIDDEN TESTS',
}


def script(**changed: str | None) -> str:
    """The sample's script with some cells changed, added before the exercises, or left out."""
    cells = CELLS | changed
    first = [cells[name] for name in cells if name not in ("statement", "exercise", "tests")]
    last = [cells[name] for name in ("statement", "exercise", "tests")]
    return "\n\n".join(text.strip("\n") for text in [*first, *last] if text is not None) + "\n"


@pytest.fixture
def sample(tmp_path: Path) -> Notebook:
    """A notebook that was never built, in a course of its own whose path holds a space."""
    root = tmp_path / "a course"
    package = root / "course_utils"
    for file, text in {
        root / "pyproject.toml": "[project]\n",
        root / "docs" / "references.bib": "@misc{known2022,\n  title = {Known},\n}\n",
        package / "__init__.py": "",
        package / "cache.py": 'from course_utils.data import batches\nMODEL = "sample-lm"\n',
        package / "data" / "__init__.py": "",
        package / "data" / "batches.py": "",
        package / "pruning.py": "",
        package / "assets" / "sample-lm" / "model.safetensors": "0",
        package / "assets" / "other-lm" / "model.safetensors": "0",
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    notebook = Notebook(root, NAME)
    notebook.script.parent.mkdir()
    notebook.script.write_text(script(), encoding="utf-8")
    return notebook


@pytest.fixture
def offline(tmp_path: Path) -> Offline:
    return Offline(tmp_path)
