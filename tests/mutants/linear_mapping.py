"""Typical wrong answers to the exercises of `foundations/linear_mapping`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        ("2^n steps", "2**n_bits - 1", "2**n_bits"),
        ("cut off", "torch.round(x / S)", "torch.floor(x / S)"),
        ("int8", ".int(), S", ".to(torch.int8), S"),
        ("zeros divide by 0", "S = torch.where(S > 0, S, 1.0)", "pass"),
    ],
    2: [
        ("bytes shift out", "packed.view(-1, 3).int()", "packed.view(-1, 3)"),
        ("highest first", "3 * torch.arange(8)", "3 * torch.arange(7, -1, -1)"),
        (
            "byte 0 is the highest",
            "triples[:, 0] | triples[:, 1] << 8 | triples[:, 2] << 16",
            "triples[:, 2] | triples[:, 1] << 8 | triples[:, 0] << 16",
        ),
        ("the first triple alone", "packed.view(-1, 3)", "packed[:3].view(-1, 3)"),
    ],
    3: [
        ("levels for steps", "(levels - 1)", "levels"),
        ("`most` is left out", "range(1, most + 1)", "range(1, most)"),
        ("2^n steps", "(2**n - 1)", "2**n"),
        ("any grid that is finer", "(2**n - 1) % (levels - 1) == 0", "2**n >= levels"),
    ],
    4: [
        ("half the range", "2 * peak", "peak"),
        ("2^n steps", "(2**n_bits - 1)", "2**n_bits"),
        ("amplitudes", "10 * math.log10", "20 * math.log10"),
        ("noise of S squared", "12 / S**2", "1 / S**2"),
    ],
}
