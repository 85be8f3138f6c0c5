"""Typical wrong answers to the exercises of `chronology/gptq_ablations`.

Of each exercise: (the mistake, what the solution says, what the wrong answer says).
"""

MUTANTS = {
    1: [
        (
            "a multiple of the identity",
            "torch.diag(torch.arange(1.0, n + 1).double())",
            "2.0 * torch.eye(n).double()",
        ),
        (
            "features go together in both",
            "torch.diag(torch.arange(1.0, n + 1).double())",
            "torch.full((n, n), 0.5).double() + torch.diag(torch.arange(1.0, n + 1).double())",
        ),
        (
            "a diagonal for the useful one",
            "torch.full((n, n), 0.9).double() + 0.1 * torch.eye(n)",
            "torch.diag(torch.arange(2.0, n + 2).double())",
        ),
        (
            "no Hessian: a negative eigenvalue",
            "torch.full((n, n), 0.9).double() + 0.1 * torch.eye(n)",
            "torch.full((n, n), 0.9).double() - 0.1 * torch.eye(n)",
        ),
    ],
    2: [
        (
            "groups of neighbours",
            "place // group_size",
            "torch.arange(len(diagonal)) // group_size",
        ),
        ("smallest first", "descending=True, ", ""),
        ("by place, not by column", "place // group_size", "order // group_size"),
    ],
    3: [
        (
            "with repetition",
            "itertools.combinations(losses, k)",
            "itertools.product(losses, repeat=k)",
        ),
        ("the largest", "min(chosen)", "max(chosen)"),
        ("the mean of the chosen", "min(chosen)", "sum(chosen) / len(chosen)"),
    ],
}
