"""Typical wrong answers to the exercises of `foundations/integer_arithmetic`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("code 0", "return Z_y, high", "return 0, high"),
        ("no clamp below", "return Z_y, high", "return low, high"),
        ("always 127", "return Z_y, high", "return Z_y, 127"),
    ],
    2: [
        ("added", "bias_codes.long() - Z_x", "bias_codes.long() + Z_x"),
        ("over the outputs", ".sum(1)", ".sum(0)[: len(bias_codes)]"),
        ("too narrow", "W_codes.long().sum(1)", "W_codes.sum(1, dtype=torch.int8).long()"),
        ("the zero point is forgotten", "Z_x * ", ""),
    ],
    3: [
        ("cut off", "round(fraction", "int(fraction"),
        ("m may not fit", "if m < 2**width else (m // 2, shift - 1)", "if True else None"),
        ("the exponent is forgotten", "width - exponent", "width"),
    ],
    4: [
        ("zero points do not count", "max(127 - Z, Z + 128)", "128"),
        ("256 steps", "max(127 - Z, Z + 128)", "256"),
        ("the near end", "max(127 - Z, Z + 128)", "min(127 - Z, Z + 128)"),
        ("one distance for both", "far_x * far_W", "far_x * far_x"),
    ],
}
