"""Typical wrong answers to the exercises of `chronology/awq_demo`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("signs cancel", "x.abs().mean(0)", "x.mean(0).abs()"),
        ("the maximum", "x.abs().mean(0)", "x.abs().amax(0)"),
        ("not normalised", "s = s / (s[seen].max() * s[seen].min()).sqrt()", "pass"),
        ("no root", "(s[seen].max() * s[seen].min()).sqrt()", "(s[seen].max() * s[seen].min())"),
        ("silent channels divide by 0", "seen = mean > 0", "seen = mean > -1"),
    ],
    2: [
        ("multiplied, not divided", "V / s[:, None]", "V * s[:, None]"),
        ("the columns of V", "V / s[:, None]", "V / s.mean()"),
        ("the bias is forgotten", "b / s", "b"),
        (
            "heads in turns",
            "repeat_interleave(heads // kv_heads, 0)",
            "repeat(heads // kv_heads, 1)",
        ),
    ],
}
