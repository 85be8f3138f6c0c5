"""Typical wrong answers to the exercises of `chronology/tpoti_two_bit_ladder`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("codes alone", "(codes + books + 16 * out)", "codes"),
        ("no codebook", "codes + books + 16 * out", "codes + 16 * out"),
        ("no scales", "codes + books + 16 * out", "codes + books"),
        ("one codebook stored", "books = codebooks * 2**n_bits", "books = 2**n_bits"),
        ("one code a vector", "* n_bits * codebooks\n", "* n_bits\n"),
    ],
    2: [
        ("windows do not overlap", "+ 1, n_bits)", "+ 1, state_bits)"),
        (
            "the first bit is the lowest",
            '"".join(map(str, window))',
            '"".join(map(str, window[::-1]))',
        ),
        ("the last window is missing", "len(bits) - state_bits + 1", "len(bits) - state_bits"),
        ("by one bit", "+ 1, n_bits)", "+ 1)"),
    ],
    3: [
        ("the sum may be odd", "== 1", "== 5"),
        ("away from the number", "1 if error[worst] > 0 else -1", "-1 if error[worst] > 0 else 1"),
        ("the smallest error", "error.abs().argmax()", "error.abs().argmin()"),
        ("whole numbers", "(x - 0.5).round() + 0.5", "x.round()"),
    ],
    4: [
        ("a plain mean", "(w[own] * x[own]).sum(0) / w[own].sum(0)", "x[own].mean(0)"),
        ("weights do not choose", "w[:, None] * (x", "(x"),
        ("empty entries become 0", "book.clone()", "torch.zeros_like(book)"),
        ("entries stay", "new[entry] =", "_ ="),
    ],
}
