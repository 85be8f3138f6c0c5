"""Notebooks: found, built, run, checked, and cut down to student versions.

A notebook is a pair: the percent script `<folder>/<name>.py`, its source, and the executed
`<folder>/<name>.ipynb` built from it. Pairs are found by looking into the folders, so a new notebook
needs no entry in any list. `course run`, `build`, `check`, `student`, `assignments` and `grade` are these
modules.
"""
