"""Models from a hub that works, and from hubs with one planted fault each."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import Hub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

COMMIT, OTHER_COMMIT = "a1" * 20, "b2" * 20
NAME, OTHER = f"tiny/gpt2@{COMMIT}", f"tiny/gpt2@{OTHER_COMMIT}"
PICKLED = f"tiny/pickled@{COMMIT}"
GPT2 = ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")
PATIENCE = 300  # seconds until a reader that does not answer is ended

# A reader's Python: for each line of its input it loads a model and says what came of it.
READER = """
import contextlib, dataclasses, io, json, os, sys
from transformers import AutoModelForCausalLM
from course_utils.models import ModelUnavailable, load_model
from course_utils.profiles import resolve

def load(name, how):
    if how == "transformers":
        repo, _, commit = name.partition("@")
        return {name: [AutoModelForCausalLM.from_pretrained(repo, revision=commit), None]}
    if how == "by name":
        return {name: load_model(name)}
    profile = resolve("cpu", model=name)
    return dataclasses.replace(profile, chosen=how == "chosen").load_models()

for line in sys.stdin:
    name, how, os.environ["COURSE_CACHE"] = json.loads(line)
    answer, printed = {}, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            (loaded, (model, tokenizer)), = load(name, how).items()
        answer |= {"loaded": loaded, "mark": model.transformer.ln_f.bias[0].item()}
        answer |= {"ids": tokenizer and tokenizer("b a").input_ids}
    except ModelUnavailable as error:
        answer["error"] = str(error)
    print(json.dumps(answer | {"printed": printed.getvalue()}), flush=True)
"""

# Before everything else: names are not resolved, and nothing can be reached.
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    print("asked for", args[0] if isinstance(args[0], str) else args[1], file=sys.stderr)
    raise socket.gaierror(-3, "Temporary failure in name resolution")
socket.getaddrinfo = socket.socket.connect = refuse
"""


class Reader:
    """A Python process that loads models: the hub library reads its settings once, at import."""

    def __init__(self, home: Path, prelude: str = "", **variables: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
        home.mkdir()
        self.log = home / "stderr.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-c", prelude + READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=kept | {"HF_HOME": str(home / "hf"), "NO_PROXY": "*"} | variables,
            text=True,
        )

    def ask(self, name: str, cache: Path, how: str = "by name") -> None:
        self.process.stdin.write(json.dumps([name, how, str(cache)]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        timer = threading.Timer(PATIENCE, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, f"no answer; {self.log.read_text()}"
        return json.loads(line)

    def load(self, name: str, cache: Path, how: str = "by name") -> dict:
        self.ask(name, cache, how)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def on(hub: Hub) -> dict[str, str]:
    """Settings of a reader who uses `hub`."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "secret",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def tiny_gpt2(folder: Path, mark: float) -> dict[str, bytes]:
    """Files of a GPT-2 of a few kB; the first value of its last bias is `mark`."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4, n_positions=8, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.transformer.ln_f.bias.data[0] = mark
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("models")
    first, second = tiny_gpt2(folder / "1", 1.0), tiny_gpt2(folder / "2", 2.0)
    pickled = {name: first[name] for name in first if name != "model.safetensors"}
    unwanted = {"pytorch_model.bin": b"x", "README.md": b"x", "onnx/config.json": b"{}"}
    hub = Hub(
        {
            ("tiny/gpt2", COMMIT): first | unwanted,
            ("tiny/gpt2", OTHER_COMMIT): second,
            ("tiny/pickled", COMMIT): pickled | unwanted,
            GPT2: first,
        }
    )
    yield hub
    hub.stop()


@pytest.fixture
def hub(the_hub: Hub) -> Iterator[Hub]:
    the_hub.reset()
    yield the_hub
    the_hub.reset()


@pytest.fixture(scope="module")
def reader(the_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(tmp_path_factory.mktemp("reader") / "home", **on(the_hub))
    yield reader
    reader.kill()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    """What a cache holds of models, locks aside."""
    return [path.name for path in (cache / "models").iterdir() if path.suffix != ".lock"]


def test_the_hub_of_these_tests_serves_what_transformers_itself_asks_for(hub, reader, cache):
    answer = reader.load(NAME, cache, "transformers")
    assert answer["mark"] == 1.0
    assert any(request.startswith("HEAD") for request in hub.requests)


def test_a_model_is_the_one_of_its_commit_and_only_what_is_needed_is_fetched(hub, reader, cache):
    answer = reader.load(NAME, cache)
    assert (answer["mark"], answer["ids"]) == (1.0, [2, 1])
    assert reader.load(OTHER, cache, "chosen")["mark"] == 2.0
    asked = " ".join(hub.requests)
    assert "model.safetensors" in asked and "tokenizer.json" in asked
    assert not any(name in asked for name in ("pytorch_model.bin", "README.md", "onnx"))
    # the reader's token goes to the hub, not to the host of the large files
    assert hub.tokens and not any(path.startswith("/large") for path in hub.tokens)


def test_a_second_load_needs_no_hub(hub, reader, cache, tmp_path):
    first = reader.load(NAME, cache)
    hub.requests.clear()
    hub.stop()
    try:
        assert reader.load(NAME, cache) == first
        offline = Reader(tmp_path / "home", **on(hub), HF_HUB_OFFLINE="1")
        assert offline.load(NAME, cache) == first
        error = offline.load(OTHER, cache)["error"]
        assert OTHER in error and "offline mode is enabled" in error and "course-lm" in error
        offline.kill()
    finally:
        hub.start()
    assert hub.requests == []


REASONS = {
    "refused": "refused",
    "503": "503",
    "stall": "timed out",
    "portal": "a page where the network asks for a login",
    "stalled weights": "timed out",
    "cut weights": "closed|incomplete|broken",
    "short weights": "should be of size [0-9]+ but has size [0-9]+",
    "altered weights": "model.safetensors of tiny/gpt2 arrived with hash .*altered.*thrown away",
    "altered configuration": "json of tiny/gpt2 arrived with hash .*altered.*thrown away",
    "loop": "redirects",
}


@pytest.mark.parametrize(("fault", "reason"), REASONS.items())
def test_a_fault_is_told_and_leaves_nothing_behind(hub, reader, cache, fault, reason):
    """An error for a reader who named the model, course-lm for one who did not."""
    if fault == "refused":
        hub.stop()
    else:
        hub.fault = fault
    told = len(reader.log.read_text())
    answer = reader.load(NAME, cache, "chosen")
    print(answer["error"])
    assert answer["printed"] == ""
    start = rf"'{NAME}' could not be fetched: .*(?i:{reason}).*"
    remedy = r"[Tt]ry again.* MODEL='course-lm' needs no download\."
    assert re.fullmatch(start + remedy, answer["error"])

    answer = reader.load(NAME, cache, "auto")
    assert answer["loaded"] == "course-lm"
    assert NAME in answer["printed"] and "sing course-lm" in answer["printed"]
    assert reader.log.read_text()[told:] == ""
    assert kept(cache) == []
    assert sum(request.startswith("GET /large") for request in hub.requests) <= 2 * 31

    if fault == "refused":
        hub.start()
    hub.reset()
    answer = reader.load(NAME, cache)
    assert (answer["loaded"], answer["mark"]) == (NAME, 1.0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"tiny/gpt2@{'0' * 40}", f"has no tiny/gpt2 at commit {'0' * 40} for you. Check both"),
        (f"tiny/none@{COMMIT}", f"has no tiny/none at commit {COMMIT} for you. Check both"),
        (
            PICKLED,
            f"holds no model.safetensors at {COMMIT}, and pickled weights are not read. Choose",
        ),
        ("gpt2", f"offers other weights of {GPT2[0]} than the course was tested with"),
        ("tiny/gpt2@main", "unknown model 'tiny/gpt2@main'"),
        ("tiny/gpt2", "unknown model 'tiny/gpt2'"),
        (f"tiny//gpt2@{COMMIT}", "unknown model 'tiny//gpt2@"),
    ],
)
def test_a_model_that_the_hub_cannot_give_is_told_before_its_weights_are_fetched(
    hub, reader, cache, name, reason
):
    answer = reader.load(name, cache, "chosen")
    print(answer["error"])
    assert repr(name) in answer["error"] and reason in answer["error"]
    assert "course-lm" in answer["error"]
    answer = reader.load(name, cache, "auto")
    assert answer["loaded"] == "course-lm" and reason in answer["printed"]
    assert not any(request.startswith("GET /large") for request in hub.requests)


def test_weights_that_are_listed_without_their_hash_are_not_the_pinned_ones(hub, reader, cache):
    hub.fault = "no lfs"
    answer = reader.load("gpt2", cache, "chosen")
    assert f"offers other weights of {GPT2[0]} than the course was tested with" in answer["error"]
    assert not any(request.startswith("GET /large") for request in hub.requests)


def test_two_processes_at_once_load_it_and_fetch_it_once(hub, reader, cache, tmp_path):
    hub.fault = "stalled weights"
    second = Reader(tmp_path / "home", **on(hub) | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"})
    second.ask(NAME, cache)
    hub.until_asked("GET /large")
    reader.ask(NAME, cache)
    hub.fault = None
    hub.release()  # the stalled connection breaks, and the download goes on in a new one
    assert second.answer()["mark"] == reader.answer()["mark"] == 1.0
    assert (
        sum("resolve" in request and "model.safetensors" in request for request in hub.requests)
        == 2
    )
    assert kept(cache) == [NAME.replace("/", "--")]
    second.kill()


def test_a_process_that_is_killed_while_it_downloads_leaves_no_model(hub, reader, cache, tmp_path):
    hub.fault = "stalled weights"
    victim = Reader(tmp_path / "home", **on(hub) | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"})
    victim.ask(NAME, cache)
    hub.until_asked("GET /large")
    reader.ask(NAME, cache)  # waits for the other's download
    hub.fault = None
    victim.kill()
    assert reader.answer()["mark"] == 1.0


def test_a_copy_that_was_damaged_is_fetched_again(hub, reader, cache):
    whole = reader.load(NAME, cache)
    (weights,) = cache.glob("models/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    hub.fault = "503"
    assert "503" in reader.load(NAME, cache)["error"]
    hub.reset()
    answer = reader.load(NAME, cache)
    assert "is damaged (model.safetensors)" in answer.pop("printed")
    assert answer == {key: value for key, value in whole.items() if key != "printed"}


def test_without_a_network_nothing_is_tried_again(cache, tmp_path):
    cut_off = Reader(tmp_path / "home", prelude=NO_NETWORK)
    answer = cut_off.load("gpt2", cache, "auto")
    print(answer["printed"])
    assert answer["loaded"] == "course-lm" and "name resolution" in answer["printed"]
    looked_up = cut_off.log.read_text().splitlines()
    assert set(looked_up) == {"asked for huggingface.co"}
    assert len(looked_up) <= 2  # the library asks once more, for its statistics
    cut_off.kill()
