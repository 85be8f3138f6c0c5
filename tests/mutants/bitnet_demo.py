"""Typical wrong answers to the exercises of `chronology/bitnet_demo`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("1 / gamma", "return gamma * (W", "return 1 / gamma * (W"),
        ("not clamped", ".clamp(-1, 1)", ""),
        ("a gamma a row", "W.abs().mean()", "W.abs().mean(1, keepdim=True)"),
        ("the mean of W", "W.abs().mean()", "W.mean()"),
        ("zeros divide by 0", ".clamp(min=epsilon)", ""),
    ],
    2: [
        ("trits for digits", "+ trit + 1", "+ trit"),
        ("the first is worth 1", "for trit in trits:", "for trit in reversed(trits):"),
        ("not scaled", "-(-v * 256 // 243)", "v"),
        ("rounded down", "-(-v * 256 // 243)", "v * 256 // 243"),
    ],
    3: [
        ("the sum of all stays on", " - x.sum()", ""),
        ("the high bit counts 1", "2 * (high", "(high"),
        ("int8", "(high * x).sum(1)", "(high.char() * x.char()).sum(1, dtype=torch.int8)"),
        ("the high bit counts 4", "codes >> 1", "codes & 2"),
    ],
}
