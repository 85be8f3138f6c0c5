"""Typical wrong answers to the exercises of `chronology/llm_int8_demo`; see gptq_demo.py."""

MUTANTS = {
    1: [
        ("zero rows are forgotten", "torch.where(absmax > 0, absmax / 127, 1.0)", "absmax / 127"),
        ("scale by 128", "absmax / 127", "absmax / 128"),
        ("one absmax for all rows", "x.abs().amax(1)", "x.abs().amax().expand(len(x))"),
        ("absmax for the step", "torch.int8), step", "torch.int8), absmax"),
    ],
    2: [
        ("the largest code for the largest product", "2**24 // m**2", "2**24 // m"),
        ("no square of the quotient", "(2**24 / variance) ** 2", "2**24 / variance"),
        ("the variance of a continuous uniform", "m * (m + 1) / 3", "m**2 / 3"),
        ("127 whatever m is", "2**24 // m**2", "2**24 // 127**2"),
    ],
    3: [
        ("ranked by the mean", "x.abs().amax(0)", "x.abs().mean(0)"),
        ("W stays in float", "int8_matmul(x_q, w_q) * (x_step[:, None] * w_step)",
         "(x_q * x_step[:, None]) @ W.T"),
        ("the root of the error", "y.square().sum()).item()", "y.square().sum()).sqrt().item()"),
        ("the k features are lost", "x[:, top] @ W[:, top].T", "0"),
    ],
    4: [
        ("scales are free", "32 * scales", "0 * scales"),
        ("divided by the weights alone", "/ (weights + other_parameters)", "/ weights"),
        ("other parameters in 16 bits", "32 * other_parameters", "16 * other_parameters"),
        ("a mean over layers", "bits / (weights + other_parameters)",
         "(sum(8 + 32 / n for _, n in linear_shapes) / len(linear_shapes) if linear_shapes else 32)"),
    ],
}  # fmt: skip
