# Each target is one `python -m course_utils ...` line, which works on Windows as well (there the
# interpreter is .venv\Scripts\python). The rules for .venv install what pyproject.toml asks for,
# and again only when it or constraints.txt changes.
PYTHON ?= python3
COURSE = .venv/bin/python -m course_utils

.PHONY: course test test-colab test-gpu oracles assignments release-assignments lab leaderboard build check lint clean

course: .venv/course.stamp  ## run every notebook in the quick profile
	$(COURSE) run --profile quick

test: .venv/test.stamp  ## everything that is tested
	$(COURSE) test

test-colab: .venv/course.stamp  ## every notebook on the packages of Colab's runtimes
	$(COURSE) test-colab

assignments: .venv/classroom.stamp  ## teachers' and students' versions, into classroom/
	$(COURSE) assignments

release-assignments: .venv/course.stamp  ## student versions, into assignments/
	$(COURSE) release-assignments

test-gpu: .venv/test.stamp  ## what needs a GPU; skipped without one
	$(COURSE) test-gpu

oracles: .venv/course.stamp  ## golden vectors of production libraries, made anew
	$(COURSE) oracles

lab: .venv/course.stamp  ## JupyterLab on the course
	$(COURSE) lab

leaderboard: .venv/course.stamp  ## every method on course-lm under one protocol: minutes
	$(COURSE) leaderboard

build: .venv/course.stamp  ## rebuild the notebooks whose script or package changed
	$(COURSE) build

check: .venv/course.stamp  ## whether scripts, notebooks and package agree
	$(COURSE) check

lint: .venv/test.stamp  ## ruff, on the package, the tests and the notebooks' scripts
	$(COURSE) lint

clean:  ## remove the environment and the caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build course_utils.egg-info

.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing what pyproject.toml names into .venv: some minutes the first time."
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
