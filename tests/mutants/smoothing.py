"""Typical wrong answers to the exercises of `foundations/smoothing`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("a norm without the one", "(1 + w) / s - 1", "w / s"),
        ("the one is not taken off again", "(1 + w) / s - 1", "(1 + w) / s"),
        ("rows instead of columns", "[W * s for W in weights]",
         "[W * s.flip(0) for W in weights]"),
        ("only the first layer", "[W * s for W in weights]", "[weights[0] * s, *weights[1:]]"),
    ],
    2: [
        ("heads taken in turns", "s.reshape(kv_heads, 1, d).expand(kv_heads, shared, d)",
         "s.reshape(1, kv_heads, d).expand(shared, kv_heads, d)"),
        ("multiplied where it should be divided", "W_v / s[:, None], W_o * of_columns",
         "W_v * s[:, None], W_o / of_columns"),
        ("the output projection stays", "W_o * of_columns", "W_o"),
    ],
    3: [
        ("x is multiplied by s", "x / s, W * s", "x * s, W / s"),
        ("one scale for all of W", "W_s.abs().amax(1, keepdim=True) / 127", "W_s.abs().max() / 127"),
        ("half codes", "x_s.abs().max() / 127, W_s", "x_s.abs().max() / 127.5, W_s"),
        ("the first alpha", "alphas[found.index(least)]", "alphas[0]"),
        ("not relative", " / y.square().sum()", ""),
    ],
}  # fmt: skip
