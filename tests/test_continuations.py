"""What models write after a prompt: greedy, up to the end of the text."""

import pytest
import torch
from tiny_models import tiny_gpt2

from course_utils.evaluation import Continuations, continuations, prompt_of
from course_utils.models import load_model


@pytest.fixture(scope="module")
def course_lm():
    return load_model("course-lm")


def test_continuations_are_those_of_transformers_greedy_search(course_lm):
    model, tokenizer = course_lm
    prompt = prompt_of("course-lm")
    ours = continuations({"float": model}, tokenizer, prompt, new_tokens=20)
    inputs = tokenizer(prompt, return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    assert prompt + ours.texts["float"] == tokenizer.decode(theirs)
    assert continuations({"float": model}, tokenizer, prompt, new_tokens=20) == ours


class Scripted(torch.nn.Module):
    """Writes the tokens of a script, one a call, whatever it reads."""

    def __init__(self, script: list[int], vocabulary: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script, self.vocabulary, self.read = script, vocabulary, []
        self.eval()

    def forward(self, input_ids, past_key_values, use_cache):
        said = self.script[len(self.read)]
        self.read.append(input_ids.tolist())

        class Output:
            logits = torch.nn.functional.one_hot(
                torch.full(input_ids.shape, said), self.vocabulary
            ).float()
            past_key_values = "a cache"

        return Output


def test_a_model_stops_at_the_end_of_the_text(course_lm):
    tokenizer = course_lm.tokenizer
    words = tokenizer(" the sea").input_ids
    model = Scripted([*words, tokenizer.eos_token_id, 5, 5], len(tokenizer))
    found = continuations({"m": model}, tokenizer, "Near", new_tokens=9)
    assert found.texts == {"m": " the sea"}
    assert model.read[1:] == [[[word]] for word in words]  # only the new token, with a cache


def test_a_model_stops_after_new_tokens(course_lm):
    model = Scripted([7] * 9, len(course_lm.tokenizer))
    continuations({"m": model}, course_lm.tokenizer, "Near", new_tokens=4)
    assert len(model.read) == 4


def test_each_model_has_a_line_under_the_prompt():
    found = Continuations("Once", {"float": " upon\n\na time", "2 bits": " the the"})
    assert str(found) == "Once ...\nfloat   upon a time\n2 bits  the the"


def test_long_continuations_are_wrapped_under_their_own_start():
    lines = str(Continuations("Once", {"float": " word" * 60})).splitlines()
    assert len(lines) > 3 and all(len(line) <= 100 for line in lines)
    assert all(line.startswith(" " * 7 + "word") for line in lines[2:])


def test_every_model_has_a_prompt():
    assert prompt_of("course-lm") != prompt_of("smollm2-135m-dithered") == prompt_of("gpt2")


def test_bad_prompts_and_models_are_refused(course_lm):
    with pytest.raises(ValueError, match="the prompt '' holds no token"):
        continuations({"m": course_lm.model}, course_lm.tokenizer, "")
    with pytest.raises(ValueError, match="model 'm' is in training mode"):
        continuations({"m": tiny_gpt2().train()}, course_lm.tokenizer, "Near")
