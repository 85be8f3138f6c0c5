"""What the profiles make of the hardware; and, where there is a card, that it computes the same.

A T4 is planted, as nobody's own: in `plant_card`, the one place that answers for torch.cuda.
"""

import ast
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course_utils.compression import get_method, method_names, quantize_model
from course_utils.data.tokens import calibration_tokens
from course_utils.models import load_model
from course_utils.profiles import resolve
from course_utils.tools.notebooks.pairs import FOLDERS

ROOT = Path(__file__).parent.parent


def plant_card(monkeypatch, name: str, capability: tuple[int, int]) -> None:
    """Let torch see one card. Below 8.0 bfloat16 is emulated, and said to be supported if asked so."""
    native = capability >= (8, 0)
    for function, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: native or including_emulation,
    }.items():
        monkeypatch.setattr(torch.cuda, function, answer)


@pytest.mark.parametrize(
    ("card", "capability", "profile", "dtype"),
    [
        ("Tesla T4", (7, 5), "colab", torch.float16),
        ("Tesla T4", (7, 5), "gpu", torch.float16),
        ("NVIDIA L4", (8, 9), "colab", torch.float16),
        ("NVIDIA L4", (8, 9), "gpu", torch.bfloat16),
    ],
)
def test_the_dtype_is_one_that_the_card_has_in_hardware(
    monkeypatch, card, capability, profile, dtype
):
    plant_card(monkeypatch, card, capability)
    resolved = resolve(profile)
    assert (resolved.dtype, resolved.device.type) == (dtype, "cuda")
    assert resolved.models == ("gpt2",)
    assert str(dtype).removeprefix("torch.") + " on cuda" in str(resolved)


@pytest.mark.parametrize("profile", ["quick", "cpu"])
def test_profiles_of_the_cpu_stay_there_beside_a_card(monkeypatch, profile):
    plant_card(monkeypatch, "Tesla T4", (7, 5))
    resolved = resolve(profile)
    assert (resolved.dtype, resolved.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize(
    ("profile", "card", "size"),
    [
        ("quick", True, 1),
        ("cpu", True, 2),
        ("colab", True, 3),
        ("gpu", True, 3),
        ("colab", False, 2),
    ],
)
def test_sizes_follow_the_profile_and_colab_without_a_card_takes_those_of_cpu(
    monkeypatch, profile, card, size
):
    plant_card(monkeypatch, "Tesla T4", (7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    assert resolve(profile).pick(quick=1, cpu=2, gpu=3) == size
    assert resolve(profile).pick(quick=1, cpu=2) == min(size, 2)


# A T4 has no Triton that its makers support. In a fresh process, since torch may hold it already. The
# notebooks are run so by `course test-colab --t4`.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from course_utils.compression import get_method, method_names, quantize_model

config = GPT2Config(
    vocab_size=99, n_positions=32, n_embd=128, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
)
for name in method_names():
    model = GPT2LMHeadModel(config).eval().half()
    quantize_model(model, get_method(name), calibration=torch.arange(8)[None])
    logits = model(torch.arange(8)[None]).logits
    assert logits.dtype == torch.float16 and logits.isfinite().all()
    print(name)
"""


def test_every_method_runs_in_float16_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == method_names()


# A T4 says that it supports bfloat16: it emulates it, slowly


def careless_questions(source: str) -> list[int]:
    """Lines that ask `is_bf16_supported` without `including_emulation=False`, or pass it on."""
    tree = ast.parse(source)
    careful = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and any(
            keyword.arg == "including_emulation" and ast.unparse(keyword.value) == "False"
            for keyword in node.keywords
        )
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if "is_bf16_supported" in (getattr(node, "attr", None), getattr(node, "id", None))
        and id(node) not in careful
    ]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.cuda.is_bf16_supported(including_emulation=False)", []),
        ("torch.cuda.is_bf16_supported()", [1]),
        ("x = 1\ntorch.cuda.is_bf16_supported(including_emulation=True)", [2]),
        ("ask = torch.cuda.is_bf16_supported", [1]),
        ("is_bf16_supported()", [1]),
    ],
)
def test_careless_questions_are_found(source, lines):
    assert careless_questions(source) == lines


def test_nobody_asks_for_bfloat16_with_emulation():
    sources = [*(ROOT / "course_utils").rglob("*.py")]
    sources += [script for folder in FOLDERS for script in (ROOT / folder).glob("*.py")]
    found = {
        str(path.relative_to(ROOT)): careless_questions(path.read_text(encoding="utf-8"))
        for path in sources
    }
    assert "course_utils/profiles.py" in {path.replace("\\", "/") for path in found}
    assert {path: lines for path, lines in found.items() if lines} == {}


# On a card

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_of_llm_int8_are_the_same_on_the_card(dtype):
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = (get_method("llm_int8").quantize(w) for w in (weight, weight.cuda()))
    assert there.codes.is_cuda
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.absmax.cpu(), here.absmax)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-2), (torch.float16, 2e-2)])
@torch.no_grad()
def test_quantized_course_lm_computes_the_same_on_the_card(dtype, close):
    """Sums in another order may move an activation to the next code: close, never equal."""
    model, tokenizer = load_model("course-lm")
    tokens = calibration_tokens(tokenizer, 1, 128)
    on_card = copy.deepcopy(model).to("cuda", dtype)
    for each in (model, on_card):
        quantize_model(each, get_method("llm_int8"))
    here, there = model(tokens).logits, on_card(tokens.cuda()).logits
    assert there.is_cuda and there.dtype == dtype
    assert ((there.float().cpu() - here).norm() / here.norm()).item() < close


@pytest.mark.gpu
@needs_cuda
def test_the_gpu_profile_runs_course_lm_and_says_which_card():
    profile = resolve("gpu", "course-lm")
    (loaded,) = profile.load_models().values()
    assert next(loaded.model.parameters()).is_cuda
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert profile.dtype == (torch.bfloat16 if native else torch.float16)
