"""Typical wrong answers to the exercises of `chronology/llm_int8_demo`; see gptq_demo.py."""

MUTANTS = {
    1: [
        ("scale by 128", "127 / absmax", "128 / absmax"),
        ("the wrong axis", "x.abs().amax(1)", "x.abs().amax(0)"),
        ("one absmax for all rows", "x.abs().amax(1)", "x.abs().amax().expand(len(x))"),
    ],
    2: [
        ("the largest code for the largest product", "2**24 // 127**2", "2**24 // 127"),
        ("no square of the quotient", "(2**24 / variance) ** 2", "2**24 / variance"),
        ("codes to -128", "2**24 // 127**2", "2**24 // 128**2"),
    ],
    3: [
        ("the k features stay in the rest", "rest[:, top] = 0", "pass"),
        ("the k features are lost", "x[:, top] @ W[:, top].T", "0"),
        ("the smallest features", "x.abs().amax(0)", "-x.abs().amax(0)"),
    ],
    4: [
        ("scales are free", "32 * scales", "0 * scales"),
        ("divided by the weights alone", "/ (weights + other_parameters)", "/ weights"),
        ("other parameters in 16 bits", "32 * other_parameters", "16 * other_parameters"),
    ],
}
