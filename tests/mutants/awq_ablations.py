"""Typical wrong answers to the exercises of `chronology/awq_ablations`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("the error of the weights", "(x @ change)", "change"),
        (
            "compared with the clamped weights",
            "w - round_to_grid",
            "w.clamp(-limit, limit) - round_to_grid",
        ),
        ("one side only", "w.clamp(-limit, limit)", "w.clamp(max=limit)"),
        (
            "errors do not add up",
            "(x @ change).square().sum()",
            "(x.square() @ change.square()).sum()",
        ),
    ],
    2: [
        (
            "the range does not hold 0",
            "min(w.min().item(), 0.0), max(w.max().item(), 0.0)",
            "w.min().item(), w.max().item()",
        ),
        ("16 steps", "/ top\n", "/ (top + 1)\n"),
        ("zeros divide by 0", "if low == high:", "if False:"),
    ],
}
