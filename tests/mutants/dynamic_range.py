"""Typical wrong answers to the exercises of `foundations/dynamic_range`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("zero is not counted", "(high - low + 1)", "(high - low)"),
        ("no clamp", "min(max(round(v / step), -top), top - 1)", "round(v / step)"),
        ("cut off instead of rounded", "round(v / step)", "int(v / step)"),
        ("always 8 bits", "return 2**n_bits -", "return 256 -"),
    ],
    2: [
        ("the first batch does not count", "batches, weight = 1, 1.0", "batches, weight = 0, 1.0"),
        ("equal to the share is enough", "weight >= share", "weight > share"),
        ("the weight of the newest batch", "weight * (1 - constant)", "weight * constant"),
    ],
    3: [
        ("grows once", "while x.max()", "if x.max()"),
        ("the edge belongs to the last bin", ">= len(counts) * width", "> len(counts) * width"),
        ("merges halves, not neighbours", "counts.reshape(-1, 2).sum(1)",
         "counts.reshape(2, -1).sum(0)"),
        ("the width stays", "width *= 2", "width *= 1.9999"),
    ],
    4: [
        ("2^n steps", "(2**n_bits - 1) ** 2", "(2**n_bits) ** 2"),
        ("the factor 3 is missing", "t / (3 * (", "t / (1 * ("),
        ("one tail only", "torch.tensor(-t).exp() >", "torch.tensor(-t).exp() / 2 >"),
        ("always 4 bits", "2**n_bits", "2**4"),
    ],
}  # fmt: skip
