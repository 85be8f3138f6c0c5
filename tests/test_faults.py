"""Planted faults: what is broken is refused, or made again, and the message says what and how."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from course_utils.cache import DownloadError, cache_dir, cached, fetch_wheel, sha256
from course_utils.compression import QuantizedLinear, get_method, method_names, quantize_model
from course_utils.data.tokens import evaluation_tokens
from course_utils.models import ModelUnavailable, load_model

# Weights and inputs, for every method there is

BAD_WEIGHTS = {
    "nan": (
        torch.tensor([[1.0, 2.0], [float("nan"), 4.0]]),
        r"1 of 4 weights.*nan at \[1, 0\]: repair",
    ),
    "inf": (torch.tensor([[1.0, -float("inf")]]), r"1 of 2 weights.*-inf at \[0, 1\]"),
    "half nan": (torch.full((2, 2), float("nan")).half(), r"4 of 4 weights.*nan at \[0, 0\]"),
    "float64 beyond float32": (
        torch.tensor([[1e300, 1.0]], dtype=torch.float64),
        r"not finite in float32",
    ),
    "no input": (torch.zeros(4, 0), r"no empty side, got \(4, 0\)"),
    "a stack of matrices": (torch.zeros(2, 3, 4), r"a weight is a matrix.*got \(2, 3, 4\)"),
    "a number": (torch.tensor(1.0), r"a weight is a matrix.*got \(\)"),
    "integers": (torch.ones(2, 2, dtype=torch.int64), r"is float, got torch\.int64"),
    "booleans": (torch.ones(2, 2, dtype=torch.bool), r"is float, got torch\.bool"),
    "complex": (torch.ones(2, 2, dtype=torch.complex64), r"is float, got torch\.complex64"),
}


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_every_method_refuses_bad_weights(name, fault):
    weight, message = BAD_WEIGHTS[fault]
    with pytest.raises((ValueError, TypeError), match=message):
        get_method(name).quantize(weight)


def test_a_weight_beyond_float16_is_not_kept_as_infinity():
    weight = torch.tensor([[1.0, -70_000.0]])
    with pytest.raises(ValueError, match=r"weights up to 70000 do not fit into float16 \(65504\)"):
        get_method("llm_int8", outlier_weights="original").quantize(weight)
    assert get_method("llm_int8").quantize(weight).dequantize()[0, 1] == -70_000.0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 16), r"float \[\.\.\., 8\], got torch\.float32 \(4, 16\)"),
        (torch.zeros(()), r"got torch\.float32 \(\)"),
        (torch.ones(2, 8, dtype=torch.int64), r"got torch\.int64 \(2, 8\)"),
    ],
)
def test_a_quantized_layer_refuses_inputs_of_a_wrong_shape_or_dtype(x, message):
    method = get_method("llm_int8")
    layer = QuantizedLinear(method, method.quantize(torch.ones(3, 8)), None)
    assert layer(torch.ones(2, 5, 8)).shape == (2, 5, 3)
    with pytest.raises(ValueError, match=message):
        layer(x)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(8, dtype=torch.int64), r"int64 \(8,\)"),
        (torch.zeros(1, 8), r"float32 \(1, 8\)"),
    ],
)
def test_calibration_of_a_wrong_shape_or_dtype_is_refused(calibration, message):
    with pytest.raises(ValueError, match=r"calibration is \[sequences, length\] token ids, got torch\."
                       + message):  # fmt: skip
        quantize_model(tiny_model(), get_method("llm_int8"), calibration=calibration)


@pytest.mark.parametrize("n_tokens", [0, -5])
def test_no_evaluation_tokens_are_refused(n_tokens):
    with pytest.raises(ValueError, match=f"cannot take {n_tokens} tokens: .*at least one"):
        evaluation_tokens(load_model("course-lm").tokenizer, n_tokens)


# Saved quantized models

LAYER = "transformer.h.0.mlp.c_fc"


def tiny_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=99,
        n_positions=32,
        n_embd=24,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A quantized model as `save_pretrained` writes it, which loads."""
    model = tiny_model()
    quantize_model(model, get_method("llm_int8"))
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.state_dict()[f"{LAYER}.codes"], model.state_dict()[f"{LAYER}.codes"])
    return folder


def cut(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(f"{LAYER}.{name}"))
    if changed is not None:
        tensors[f"{LAYER}.{name}"] = changed
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def one_code_more(codes: torch.Tensor) -> torch.Tensor:
    codes[3, 5] += 1
    return codes


ALTERED = rf"does not hold layer {LAYER} as it was saved: it is not whole, or was altered\. Save"
DESCRIBED = (
    r"does not describe the quantized layers as they were saved: settings or layers were altered"
)
DAMAGES = {
    "cut in the middle": (lambda f: cut(f, 9000), "file not fully covered"),
    "cut in its header": (lambda f: cut(f, 5), "header too small"),
    "empty": (lambda f: cut(f, 0), "header too small"),
    "gone": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "one code changed": (lambda f: change_tensor(f, "codes", one_code_more), ALTERED),
    "a tensor left out": (lambda f: change_tensor(f, "codes", lambda t: None), ALTERED),
    "scales in float16": (lambda f: change_tensor(f, "absmax", torch.Tensor.half), ALTERED),
    "scales NaN": (lambda f: change_tensor(f, "absmax", lambda t: t * torch.nan), ALTERED),
    "unknown method": (
        lambda f: change_config(f, lambda q: q["layers"][LAYER].update(method="int3")),
        rf"asks for method 'int3' with .* in layer {LAYER}: unknown method 'int3': choose one of .*llm_int8",
    ),
    "unknown setting": (
        lambda f: change_config(f, lambda q: q["layers"][LAYER]["settings"].update(rotate=True)),
        rf"'rotate': True.* in layer {LAYER}: .*unexpected keyword argument 'rotate'\. Load it with the",
    ),
    "a layer that the model does not have": (
        lambda f: change_config(f, lambda q: q["layers"].update({"transformer.h.7": q["layers"][LAYER]})),
        r"does not describe layer transformer\.h\.7 as this model and method have it.*Save",
    ),
    "layout of another shape": (
        lambda f: change_config(f, lambda q: q["layers"][LAYER]["tensors"].update(codes=["int8", [96, 23]])),
        rf"disagrees with itself: layer {LAYER} of this model is \(96, 24\), its codes are \(96, 23\)",
    ),
    "layout without a tensor": (
        lambda f: change_config(f, lambda q: q["layers"][LAYER]["tensors"].pop("absmax")),
        rf"does not describe layer {LAYER} .*'absmax'",
    ),
    "layout of no dtype": (
        lambda f: change_config(f, lambda q: q["layers"][LAYER]["tensors"].update(codes=["int9", [96, 24]])),
        rf"does not describe layer {LAYER} .*'int9'",
    ),
    "layout without its hash": (
        lambda f: change_config(f, lambda q: q["layers"][LAYER].pop("sha256")),
        DESCRIBED,
    ),
    "another setting": (
        lambda f: change_config(f, lambda q: q["layers"][LAYER]["settings"].update(threshold=3.0)),
        DESCRIBED,
    ),
    "a layer left out": (lambda f: change_config(f, lambda q: q["layers"].pop(LAYER)), DESCRIBED),
    "configuration of another width": (
        lambda f: (f / "config.json").write_text(
            re.sub(r'"vocab_size": \d+', '"vocab_size": 7', (f / "config.json").read_text())
        ),
        r"with safetensors of the shapes that its config\.json says",
    ),
    "configuration cut": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:200]),
        "config.json.*is not a valid JSON file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_quantized_model_is_refused_with_its_reason(saved, tmp_path, damage):
    apply, message = DAMAGES[damage]
    folder = shutil.copytree(saved, tmp_path / "model")
    apply(folder)
    with pytest.raises(ModelUnavailable, match=message) as refused:
        load_model(str(folder))
    assert str(folder) in str(refused.value)


def test_a_tensor_left_out_is_missed_though_memory_holds_its_bytes(saved, tmp_path, monkeypatch):
    """As freed memory may, in a process that had the same model before."""
    folder = shutil.copytree(saved, tmp_path / "model")
    right = load_file(folder / "model.safetensors")[f"{LAYER}.codes"]
    change_tensor(folder, "codes", lambda t: None)
    empty_like = torch.empty_like

    def reused(tensor: torch.Tensor, **kwargs) -> torch.Tensor:
        same = tensor.shape == right.shape and tensor.dtype == right.dtype
        return right.clone() if same else empty_like(tensor, **kwargs)

    monkeypatch.setattr(torch, "empty_like", reused)
    with pytest.raises(ModelUnavailable, match=ALTERED):
        load_model(str(folder))


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, in a folder whose name holds spaces."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "a cache of mine"))
    return cache_dir()


def build(target: Path) -> None:
    """A folder of 3 files, one of them in a folder of its own."""
    (target / "deep").mkdir(parents=True)
    (target / "weights.bin").write_bytes(bytes(range(256)) * 10)
    (target / "config.json").write_text("{}")
    (target / "deep" / "vocabulary.txt").write_text("a\nb\n")


def refuse(target: Path) -> None:
    raise AssertionError(f"{target} is built, though it is in the cache")


def flip(file: Path, position: int = 100) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def visible(folder: Path) -> set[str]:
    """What lies in a cache folder, without the locks."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_a_folder_is_built_once_and_read_from_a_cache_that_cannot_be_written(cache):
    folder = cached("models/tiny", build)
    assert folder == cache / "models" / "tiny" and visible(cache / "models") == {"tiny"}
    shutil.copytree(
        cache, cache.with_name("shared")
    )  # without the lock, as a teacher would share it
    shutil.rmtree(cache)
    os.rename(cache.with_name("shared"), cache)
    (cache / "models" / "tiny.lock").unlink()
    assert cached("models/tiny", refuse) == folder
    assert not (cache / "models" / "tiny.lock").exists()  # reading takes no lock: it writes nothing


DAMAGED_FOLDERS = {
    "a bit flipped": (lambda f: flip(f / "weights.bin"), "weights.bin"),
    "cut": (lambda f: (f / "weights.bin").write_bytes(b"\0"), "weights.bin"),
    "a file left out": (lambda f: (f / "deep" / "vocabulary.txt").unlink(), "deep/vocabulary.txt"),
    "a file added": (lambda f: (f / "added.json").write_text("{}"), "added.json"),
    "hashes cut": (
        lambda f: (f / "SHA256SUMS").write_bytes(b""),
        "config.json, deep/voc.*, weights.bin",
    ),
    "hashes left out": (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS"),
    "a file in its place": (lambda f: (shutil.rmtree(f), f.write_text("")), "SHA256SUMS"),
}


@pytest.mark.parametrize("damage", DAMAGED_FOLDERS)
def test_a_damaged_folder_is_made_again_after_one_line(cache, capsys, damage):
    folder = cached("models/tiny", build)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    apply, named = DAMAGED_FOLDERS[damage]
    apply(folder)
    assert cached("models/tiny", build) == folder
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"{re.escape(str(folder))} is damaged \({named}\): making it again\.", line
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole
    assert visible(cache / "models") == {"tiny"}


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(cache):
    def fail(target: Path) -> None:
        target.mkdir()
        (target / "half.bin").write_bytes(b"half")
        raise DownloadError("the registry is down")

    with pytest.raises(DownloadError, match="the registry is down"):
        cached("models/tiny", fail)
    assert visible(cache / "models") == set()
    assert visible(cached("models/tiny", build)) == {
        "weights.bin",
        "config.json",
        "deep",
        "SHA256SUMS",
    }


# Another process that builds the same: `python -c BUILD <name> <seconds>`, with COURSE_CACHE set
BUILD = """
import signal, sys, time
from course_utils.cache import cache_dir, cached

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def build(target):
    with (cache_dir() / "builds").open("a") as log:
        log.write("built\\n")
    target.mkdir()
    (target / "first.bin").write_bytes(b"first")
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    (target / "second.bin").write_bytes(b"second")

print(cached(sys.argv[1], build))
"""


def start_building(name: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, name, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_while_it_writes_leaves_nothing_that_loads(cache):
    cache.mkdir()
    killed = start_building("tiny", 600)
    assert killed.stdout.readline() == "half\n"
    killed.kill()
    killed.communicate()
    assert visible(cache) == {"builds", ".tiny.partial"}
    folder = cached("tiny", build)
    assert visible(folder) == {"weights.bin", "config.json", "deep", "SHA256SUMS"}
    assert visible(cache) == {"builds", "tiny"}  # and what was left behind is gone


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that interrupts one process")
def test_an_interrupted_process_cleans_up_behind_itself(cache):
    cache.mkdir()
    interrupted = start_building("tiny", 600)
    assert interrupted.stdout.readline() == "half\n"
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate()
    assert interrupted.returncode != 0 and visible(cache) == {"builds"}


def test_two_processes_at_once_build_once_and_both_read_it(cache):
    cache.mkdir()
    first = start_building("tiny", 2)
    assert first.stdout.readline() == "half\n"
    second = start_building("tiny", 2)
    paths = [process.communicate()[0].splitlines()[-1] for process in (second, first)]
    assert paths == [str(cache / "tiny")] * 2 and second.returncode == first.returncode == 0
    assert (cache / "builds").read_text() == "built\n"
    assert visible(cache / "tiny") == {"first.bin", "second.bin", "SHA256SUMS"}


# A cache that cannot be written

REMEDY = "Make room there, or set COURSE_CACHE to a folder that can be written."


def test_a_file_where_the_cache_should_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError) as refused:
        cached("models/tiny", build)
    assert "tiny cannot be kept in" in str(refused.value) and REMEDY in str(refused.value)
    assert str(tmp_path / "file") in str(refused.value)


@contextmanager
def an_ordinary_user():
    """Root may write everywhere: for a while, this process is somebody who may not."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="folders of Windows have no permission bits")
def test_a_cache_without_permission_to_write(monkeypatch):
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # pytest's own may be entered by their owner alone
        monkeypatch.setenv("COURSE_CACHE", folder)
        os.chmod(folder, 0o555)
        with an_ordinary_user(), pytest.raises(DownloadError) as refused:
            cached("models/tiny", build)
        os.chmod(folder, 0o755)
        assert f"tiny cannot be kept in {folder}/models: [Errno 13] Permission denied" in str(
            refused.value
        )
        assert REMEDY in str(refused.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_a_write_that_finds_the_disk_full(cache):
    def write(target: Path) -> None:
        target.mkdir()
        (target / "weights.bin").symlink_to("/dev/full")
        (target / "weights.bin").write_bytes(b"weights")

    with pytest.raises(DownloadError) as refused:
        cached("models/tiny", write)
    assert os.strerror(errno.ENOSPC) in str(refused.value) and REMEDY in str(refused.value)
    assert visible(cache / "models") == set()


# A real disk of 256 KiB: in its own mount namespace, so that nothing is left mounted.
FULL_DISK = """
import sys
import numpy as np
from safetensors.numpy import save_file
from course_utils.cache import DownloadError, cache_dir, cached, fetch_wheel

def build(target):
    target.mkdir()
    save_file({"weight": np.zeros(100_000, np.float32)}, target / "model.safetensors")

for make in (lambda: cached("tiny", build), lambda: fetch_wheel("tiny", "1.0", sys.argv[1])):
    try:
        make()
    except DownloadError as error:
        print(error)
print(sorted(path.name for path in cache_dir().rglob("*") if path.suffix != ".lock"))
"""
MOUNT = 'mkdir "$COURSE_CACHE" && mount -t tmpfs -o size=256k none "$COURSE_CACHE"'


def in_namespace(command: str, *arguments: str) -> subprocess.CompletedProcess:
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", command, "sh", *arguments]
    return subprocess.run(unshare, capture_output=True, text=True)


def test_a_disk_that_is_full(cache, wheels):
    if shutil.which("unshare") is None or in_namespace(MOUNT).returncode != 0:
        pytest.skip("this machine allows no mounts, which a disk of its own needs")
    cache.rmdir()
    wheel = make_wheel(wheels, os.urandom(500_000))
    done = in_namespace(f'{MOUNT} && "$1" -c "$2" "$3"', sys.executable, FULL_DISK, sha256(wheel))
    assert done.returncode == 0, done.stderr
    built, fetched, left = done.stdout.splitlines()
    assert built.startswith(f"tiny cannot be kept in {cache}: ") and built.endswith(REMEDY)
    assert "No space left on device" in built
    assert "No space left on device" in fetched and "the room on the disk" in fetched
    assert left == "['downloads']"


def test_no_home_folder_at_all(monkeypatch):
    pwd = pytest.importorskip("pwd")
    for name in ("COURSE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown_user(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    with pytest.raises(DownloadError) as refused:
        cached("models/tiny", build)
    assert str(refused.value) == (
        "there is no place for the cache: Could not determine home directory. "
        "Set COURSE_CACHE to a folder that can be written."
    )


def test_an_empty_course_cache_is_none(monkeypatch):
    """Path("") is the current folder: nobody asks for that by an empty variable."""
    monkeypatch.setenv("COURSE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/course_utils")


HOMELESS = """
from course_utils.profiles import resolve
from course_utils.compression import get_method, quantize_model

models = resolve("cpu").load_models()
print(list(models), quantize_model(models["course-lm"].model, get_method("llm_int8")).weights)
"""


def test_a_home_that_does_not_exist_leaves_course_lm(tmp_path):
    (tmp_path / "file").write_text("")  # nobody, not even root, can make a folder in a file
    home = tmp_path / "file" / "home"
    environment = {
        k: v for k, v in os.environ.items() if k not in ("COURSE_CACHE", "XDG_CACHE_HOME")
    }
    environment |= {"HOME": str(home), "USERPROFILE": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    without, quantized = done.stdout.splitlines()
    assert without.startswith("Using course-lm only: 'smollm2-135m-q4_1'")
    assert (
        f"cannot be kept in {home}/.cache/course_utils/models" in without
        and "COURSE_CACHE" in without
    )
    assert quantized == "['course-lm'] 3145728"


# Downloads, by the real pip from a folder instead of an index


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """The folder that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def make_wheel(folder: Path, content: bytes = b"NUMBER = 1\n") -> Path:
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", content)
        wheel.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


def test_a_download_is_fetched_once_and_again_when_damaged(cache, wheels, capsys):
    wheel = make_wheel(wheels)
    sha = sha256(wheel)
    file = fetch_wheel("tiny", "1.0", sha)
    assert file == cache / "downloads" / "tiny-1.0.whl" and file.read_bytes() == wheel.read_bytes()
    wheel.rename(wheels / "away")  # nothing more can be fetched
    assert fetch_wheel("tiny", "1.0", sha) == file
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DownloadError) as refused:
        fetch_wheel("tiny", "1.0", sha)
    assert f"pip could not download {file.name}: ERROR: No matching distribution" in str(
        refused.value
    )
    assert f"or put the file at {file} by hand." in str(refused.value)
    (wheels / "away").rename(wheel)
    assert fetch_wheel("tiny", "1.0", sha).read_bytes() == wheel.read_bytes()
    line = f"{file} is damaged (tiny-1.0.whl): making it again.\n"
    assert capsys.readouterr().out == 2 * line


def test_a_file_put_there_by_hand_is_taken_if_it_is_the_right_one(cache, wheels):
    wheel = make_wheel(wheels)
    (cache / "downloads").mkdir(parents=True)
    file = Path(wheel.rename(cache / "downloads" / "tiny-1.0.whl"))
    assert fetch_wheel("tiny", "1.0", sha256(file)) == file


def test_another_file_than_the_pinned_one_is_thrown_away(cache, wheels):
    wheel = make_wheel(wheels)
    sha = sha256(wheel)
    altered = sha256(make_wheel(wheels, b"NUMBER = 2\n"))
    with pytest.raises(DownloadError) as refused:
        fetch_wheel("tiny", "1.0", sha)
    assert (
        f"tiny-1.0.whl has SHA-256 {altered}, expected {sha}: the registry serves another"
        in str(refused.value)
    )
    assert visible(cache / "downloads") == set()


def test_a_download_cut_short_is_thrown_away(cache, wheels):
    wheel = make_wheel(wheels)
    sha = sha256(wheel)
    wheel.write_bytes(wheel.read_bytes()[:200])
    with pytest.raises(DownloadError, match=r"pip could not download tiny-1\.0\.whl: .*invalid"):
        fetch_wheel("tiny", "1.0", sha)
    assert visible(cache / "downloads") == set()
