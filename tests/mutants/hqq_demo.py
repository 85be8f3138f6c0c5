"""Typical wrong answers to the exercises of `chronology/hqq_demo`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("p left out", "-1 / (2 - p)", "-1"),
        ("the exponent is positive", "-1 / (2 - p)", "1 / (2 - p)"),
        ("1 - p", "(2 - p)", "(1 - p)"),
    ],
    2: [
        (
            "rounded",
            "(q - W / S).mean(1, keepdim=True)",
            "(q - W / S).mean(1, keepdim=True).round()",
        ),
        ("not clamped", ".clamp(0, top)", ""),
        ("one mean for all", ".mean(1, keepdim=True)", ".mean().expand(len(W), 1)"),
        ("the old Z is forgotten", "(W / S + Z)", "(W / S)"),
        ("times the step", "W / S", "W * S"),
    ],
    3: [
        ("neighbours in a word", "padded[i * k : (i + 1) * k]", "padded[i::10]"),
        ("the first in the lowest bits", "(27 - 3 * i)", "(3 * i)"),
        ("bytes", ", dtype=torch.int32)\n    padded[", ", dtype=torch.uint8)\n    padded["),
        ("one word too few", "-(-len(codes) // 10)", "max(1, len(codes) // 10)"),
    ],
}
