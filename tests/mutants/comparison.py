"""Typical wrong answers to the exercises of `chronology/comparison`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("the mean of the documents' means", "sums.sum() / sizes.sum()", "(sums / sizes).mean()"),
        ("per document", "mean = sums.sum() / sizes.sum()", "mean = sums.mean()"),
        ("no C / (C - 1)", " * count / (count - 1)", ""),
        ("the spread of one model alone", " - torch.tensor(second).double()", ""),
    ],
    2: [
        ("the best alone", "n <= nats and (b < bits or n < nats)", "n <= nats"),
        ("not sorted", "sorted(kept, key=lambda name: points[name][0])", "kept"),
        ("one is enough", "b <= bits and n <= nats and (b < bits or n < nats)", "b < bits or n < nats"),
    ],
    3: [
        ("pairs in the same order alone", "(product > 0) - (product < 0)", "product > 0"),
        ("ties count as the same", "(product > 0) - (product < 0)", "(product >= 0) - (product < 0)"),
        ("sizes for signs", "score += (product > 0) - (product < 0)", "score += product"),
        ("all ordered pairs", "(n * (n - 1) / 2)", "(n * n / 2)"),
    ],
}  # fmt: skip
