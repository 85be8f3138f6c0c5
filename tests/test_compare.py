"""Models against a reference, estimates with their errors: values that a hand can compute."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import some_tokens, tiny_gpt2

from course_utils.evaluation import (
    Estimate,
    Text,
    compare,
    compare_all,
    difference,
    format_difference,
    over_cuts,
    perplexity,
)
from course_utils.evaluation.estimate import over_units


class Bigrams(torch.nn.Module):
    """A model whose logits for what follows are a row of a table `[vocabulary, vocabulary]`."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(logits)
        self.calls = 0
        self.eval()

    def forward(self, input_ids):
        self.calls += 1

        class Output:
            logits = self.table[input_ids]

        return Output


def of_probabilities(*rows: list[float]) -> Bigrams:
    return Bigrams(torch.tensor(rows).log())


def random_bigrams(seed: int, vocabulary: int = 7) -> Bigrams:
    generator = torch.Generator().manual_seed(seed)
    return Bigrams(torch.randn(vocabulary, vocabulary, generator=generator))


REFERENCE = of_probabilities([0.5, 0.5], [0.25, 0.75])
OTHER = of_probabilities([0.9, 0.1], [0.5, 0.5])
# Two windows of 3; predicted: 0 -> 0, 0 -> 1; 1 -> 1, 1 -> 0
TOKENS = torch.tensor([0, 0, 1, 1, 1, 0])


def test_losses_divergence_and_agreement_by_hand():
    found = compare(OTHER, REFERENCE, Text(TOKENS, 3))
    before = [-math.log(p) for p in (0.5, 0.5, 0.75, 0.25)]
    after = [-math.log(p) for p in (0.9, 0.1, 0.5, 0.5)]
    lost = [b - a for a, b in zip(before, after, strict=True)]
    assert found.nats.tolist() == pytest.approx(after, abs=1e-6)
    assert found.loss.value == pytest.approx(statistics.fmean(lost), abs=1e-6)
    by_window = [statistics.fmean(lost[:2]), statistics.fmean(lost[2:])]
    error = statistics.stdev(by_window) / math.sqrt(2)
    assert found.loss.error == pytest.approx(error, abs=1e-6)
    assert (found.loss.count, found.loss.units) == (2, "windows")
    of_0 = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    of_1 = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.divergence.value == pytest.approx((of_0 + of_1) / 2, abs=1e-6)
    assert found.divergence.error == pytest.approx(abs(of_0 - of_1) / 2, abs=1e-6)
    assert found.reference.nats == pytest.approx(statistics.fmean(before), abs=1e-6)
    assert found.perplexity.nats == pytest.approx(statistics.fmean(after), abs=1e-6)


def test_top_1_agreement_by_hand():
    """After token 0 both say 1, after token 1 the reference says 1 and the other 0."""
    reference = of_probabilities([0.4, 0.6], [0.25, 0.75])
    other = of_probabilities([0.1, 0.9], [0.8, 0.2])
    found = compare(other, reference, Text(torch.tensor([0, 0, 0, 1, 0, 1, 1, 1]), 4))
    # predicted from 0, 0, 0 in the first window, and from 0, 1, 1 in the second
    assert found.agreement.value == pytest.approx(4 / 6)
    assert found.agreement.error == pytest.approx((1 - 1 / 3) / 2)


def test_errors_are_over_documents_where_they_are_known():
    """Documents do not end where windows do, and differ in size; the first token of a window is none."""
    reference, other = random_bigrams(0), random_bigrams(1)
    tokens = torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([0] * 5 + [3] * 20 + [4] * 15)
    found = compare(other, reference, Text(tokens, 8, documents))
    assert (found.loss.count, found.loss.units) == (3, "documents")
    predicted = [i for i in range(40) if i % 8]
    lost = dict(
        zip(
            predicted, found.nats - compare(reference, reference, Text(tokens, 8)).nats, strict=True
        )
    )
    mean = statistics.fmean(map(float, lost.values()))
    residuals = [
        sum(float(lost[i]) - mean for i in predicted if documents[i] == d) for d in (0, 3, 4)
    ]
    error = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / len(predicted)
    assert found.loss.error == pytest.approx(error, rel=1e-6)


def test_a_model_against_itself_loses_nothing():
    model = tiny_gpt2()
    found = compare(model, model, Text(some_tokens(1, 64)[0], 16))
    assert found.loss == Estimate(0, 0, 4, "windows") and not found.loss.distinguished
    assert found.divergence.value == 0 and found.agreement.value == 1


@pytest.mark.parametrize("n", [64, 65, 75])
def test_perplexities_are_those_of_perplexity(n):
    """On the whole stream, with a last window that is shorter, or of one token."""
    model, reference = tiny_gpt2(1), tiny_gpt2(0)
    tokens = some_tokens(1, n)[0]
    found = compare(model, reference, Text(tokens, 16))
    for ours, of in ((found.perplexity, model), (found.reference, reference)):
        theirs = perplexity(of, tokens, window=16)
        assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-5)
        assert (ours.predicted, str(ours)[-35:]) == (theirs.predicted, str(theirs)[-35:])


def test_several_models_in_one_pass_run_the_reference_once():
    reference = random_bigrams(0)
    models = {str(seed): random_bigrams(seed) for seed in (1, 2, 3)}
    text = Text(torch.arange(28) % 7, 7)
    together = compare_all(models, reference, text)
    assert reference.calls == 4
    for name, model in models.items():
        alone = compare(model, reference, text)
        assert together[name].loss == alone.loss and together[name].agreement == alone.agreement


def test_pairing_finds_a_difference_that_hides_in_the_losses_themselves():
    """Documents differ by whole nats; the model loses 0.01 in each, which only the pairs show."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.arange(20).repeat_interleave(50)
    hard = 2 * torch.randn(20, generator=generator)[documents].double()
    noise = 0.01 * torch.randn(1000, generator=generator)
    paired = over_units(0.01 + noise, documents, "documents")
    unpaired = [over_units(loss, documents, "documents") for loss in (hard, hard + 0.01 + noise)]
    unpaired_error = math.hypot(*(estimate.error for estimate in unpaired))
    assert paired.distinguished and paired.value < unpaired_error / 10


def test_tokens_of_one_document_are_no_independent_trials():
    """The same 10 values, each 100 times: as 1,000 trials the error would be 10 times too small."""
    values = torch.randn(10, generator=torch.Generator().manual_seed(0))
    documents = torch.arange(10).repeat_interleave(100)
    by_document = over_units(values[documents], documents, "documents")
    assert by_document.error == pytest.approx(values.std().item() / math.sqrt(10), rel=1e-5)
    by_token = over_units(values[documents], torch.arange(1000), "tokens")
    assert by_document.error > 9 * by_token.error


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 99))
def test_units_of_one_size_give_the_textbook_error_in_any_order(units, size, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(units, size, generator=generator, dtype=torch.float64)
    unit = torch.arange(units).repeat_interleave(size)
    order = torch.randperm(units * size, generator=generator)
    found = over_units(values.flatten()[order], unit[order], "documents")
    assert found.value == pytest.approx(values.mean().item())
    assert found.error == pytest.approx(values.mean(1).std().item() / math.sqrt(units))


def test_two_models_are_compared_through_their_reference():
    reference, a, b = (random_bigrams(seed) for seed in range(3))
    text = Text(torch.arange(42) % 7, 7)
    of = compare_all({"a": a, "b": b}, reference, text)
    direct = compare(a, b, text).loss
    through = difference(of["a"], of["b"])
    assert through.value == pytest.approx(direct.value, abs=1e-6)
    assert through.error == pytest.approx(direct.error, abs=1e-6)
    with pytest.raises(ValueError, match="of different texts"):
        difference(of["a"], compare(b, reference, Text(text.tokens, 6)))


def test_cuts_give_mean_error_and_number():
    found = over_cuts([0.1, 0.2, 0.3, 0.4])
    assert found.value == pytest.approx(0.25)
    assert found.error == pytest.approx(math.sqrt(0.05 / 3) / 2)
    assert (found.count, found.units) == (4, "calibration cuts")
    with pytest.raises(ValueError, match="over 1 calibration cuts: at least 2"):
        over_cuts([0.1])


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (0.1234, 0.0042, "+0.123 ± 0.004 nats"),
        (0.1234, 0.0142, "+0.123 ± 0.014 nats"),
        (-0.5, 0.2, "-0.5 ± 0.2 nats"),
        (0.0067, 0.0042, "+0.007 ± 0.004 nats, not distinguished from 0"),
        (-0.0084, 0.0042, "-0.008 ± 0.004 nats"),
        (0.0, 0.0, "+0 ± 0 nats, not distinguished from 0"),
        (123.4, 31.0, "+123 ± 31 nats"),
    ],
)
def test_a_difference_is_said_with_its_error(value, error, said):
    assert format_difference(Estimate(value, error, 15, "documents")) == said


def test_an_estimate_says_what_its_error_is_over():
    assert str(Estimate(0.912, 0.0042, 15, "documents")) == "0.912 ± 0.004 (15 documents)"


def test_a_comparison_says_all_in_a_line():
    said = str(compare(OTHER, REFERENCE, Text(TOKENS, 3)))
    assert said == (
        "+0.2 ± 0.3 nats, not distinguished from 0; KL divergence 0.32 ± 0.19 nats; same top token "
        "50 ± 50 %; perplexity 2.15 -> 2.58 (errors over 2 windows)"
    )


def test_logits_that_are_nan_name_their_window():
    broken = random_bigrams(1)
    broken.table.data[5, 2] = torch.nan
    # The first 5 ends the second window, and is not read.
    text = Text(torch.tensor([0, 1, 2, 3, 4, 5, 5, 0, 1]), 3)
    with pytest.raises(ValueError, match=r"model 'x' gives NaN .* window of tokens 6 to 8"):
        compare_all({"x": broken}, random_bigrams(0), text)
    with pytest.raises(ValueError, match="the reference gives NaN"):
        compare(random_bigrams(0), broken, Text(torch.tensor([5, 5, 5, 5]), 2))


def test_models_in_training_mode_are_refused():
    training = random_bigrams(1).train()
    text = Text(torch.arange(7), 3)
    with pytest.raises(ValueError, match="model 'model' is in training mode"):
        compare(training, random_bigrams(0), text)
    with pytest.raises(ValueError, match="the reference is in training mode"):
        compare(random_bigrams(0), training, text)


def test_vocabularies_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="has 9 tokens in its vocabulary, and the reference 7"):
        compare(random_bigrams(1, 9), random_bigrams(0), Text(torch.arange(7), 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Text(torch.arange(5), 6), "no stream .* of at least one window of 6"),
        (Text(torch.arange(6)[None], 3), r"tokens \(1, 6\) are no stream"),
        (Text(torch.arange(6), 6), "an error over 1 windows: at least 2"),
        (Text(torch.arange(6), 3, torch.zeros(6)), "an error over 1 documents: at least 2"),
        (Text(torch.arange(6), 3, torch.zeros(5)), r"documents \(5,\) must number"),
        (Text(torch.arange(6), 1), "window 1 and stride 1 do not fit"),
    ],
)
def test_texts_that_give_no_comparison_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        compare(random_bigrams(1), random_bigrams(0), text)
