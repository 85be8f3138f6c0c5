"""Typical wrong answers to the exercises of `chronology/gptq_demo`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("the inverse of the diagonal", "H.inverse().diagonal()", "(1 / H.diagonal())"),
        ("floor for round", "w.round()", "w.floor()"),
        ("no square", "(w - w.round()) ** 2", "(w - w.round()).abs()"),
    ],
    2: [
        ("errors stay in their block", "W[:, stop:] -= errors @ U[start:stop, stop:]", "pass"),
        ("W is written over", "W, codes = W.clone(), ", "codes = "),
        ("errors behind have the wrong sign", "W[:, stop:] -=", "W[:, stop:] +="),
        ("not divided by the pivot", "/ U[k, k]", ""),
    ],
    3: [
        ("no minus one", "(z - 1)", "z"),
        ("not cut to 32 bits", "word & 0xFFFFFFFF", "word"),
        ("the first in the highest bits", "(4 * i)", "(4 * (7 - i))"),
    ],
}
