"""A bitshift trellis: codes of a few bits that depend on their neighbours, found by Viterbi's algorithm.

A sequence of numbers is stored as one stream of bits. Number t is the value of a state, the L bits of the
stream from K t on: with each number the window moves by K bits, and shares L - K bits with the one before.
So K bits a number are stored, and there are 2^L values. The value of a state is computed from it, as if at
random, and no table is stored (Tseng et al. 2024, "QTIP: Quantization with Trellises and Incoherence
Processing", arXiv 2406.11235; the code "1MAD" of the authors' `lib/codebook/bitshift.py`). Of all streams the
best one is found exactly: the cheapest way to each state goes through one of 2^K states before it.

Left out: tail-biting. Here a stream holds its first state, L - K bits more. The authors' L is 16, and their
constants make the values those of a normal distribution; for a smaller L the 2^L values are brought to mean
0 and variance 1 by themselves. Built step by step in `chronology/tpoti_two_bit_ladder`.
"""

from functools import cache

import torch
from torch import Tensor

PART = 512  # sequences searched at a time: the ways to all states have to be kept


@cache
def state_values(state_bits: int) -> Tensor:
    """The values of all states, float32 `[2^state_bits]`: 1MAD, brought to mean 0 and variance 1.

    The four bytes of 34038481 s + 76625530 modulo 2^32 are added. Raises ValueError for other than 2 to 16
    bits.
    """
    if type(state_bits) is not int or not 2 <= state_bits <= 16:
        raise ValueError(f"state_bits {state_bits!r}: choose 2 to 16")
    # "cpu" by name: a packed model is loaded with "meta" as the default
    word = torch.arange(2**state_bits, device="cpu") * 34038481 + 76625530 & 0xFFFFFFFF
    total = sum(word >> shift & 255 for shift in (0, 8, 16, 24)).double()
    return ((total - total.mean()) / total.std(correction=0)).float()


def best_states(x: Tensor, values: Tensor, n_bits: int) -> Tensor:
    """The states (int64 `[n, T]`) of least squared error for sequences `x` `[n, T]`: Viterbi's algorithm.

    `values` `[2^L]` are those of the states, and `n_bits`, K < L, come with each number: state s' can follow
    s if its first L - K bits are the last L - K of s.
    """
    return torch.cat([_best_states(part.float(), values, n_bits) for part in x.split(PART)])


def stream_of(states: Tensor, state_bits: int, n_bits: int) -> Tensor:
    """The bits (uint8 `[n, L + (T - 1) K]`, each 0 or 1) of states `[n, T]`; the first bit is the highest."""
    first = _bits(states[:, :1], state_bits)
    return torch.cat([first, _bits(states[:, 1:], n_bits)], 1)


def states_of(stream: Tensor, state_bits: int, n_bits: int) -> Tensor:
    """The states (int64 `[..., T]`) of a stream of bits `[..., L + (T - 1) K]`: a window that moves."""
    windows = stream.unfold(-1, state_bits, n_bits)  # [..., T, L]
    powers = 2 ** torch.arange(state_bits - 1, -1, -1, device=stream.device)
    return (windows * powers).sum(-1)


def _bits(numbers: Tensor, width: int) -> Tensor:
    """The lowest `width` bits of `numbers` `[n, m]`, highest first: uint8 `[n, m * width]`."""
    places = torch.arange(width - 1, -1, -1, device=numbers.device)
    return (numbers[..., None] >> places & 1).to(torch.uint8).flatten(1)


def _best_states(x: Tensor, values: Tensor, n_bits: int) -> Tensor:
    n, length = x.shape
    fan = 2**n_bits  # states before each, and after each
    shared = len(values) // fan  # what two neighbours share: 2^(L - K) prefixes
    cost = (x[:, :1] - values).square()  # [n, states]: of the cheapest way to each
    came = torch.empty(length, n, shared, dtype=torch.uint8, device=x.device)
    for t in range(1, length):
        # Before the states that begin with p come the states j * shared + p, for j below fan.
        least, came[t] = _least(cost.view(n, fan, shared))
        cost = (x[:, t : t + 1] - values).square_()
        cost.view(n, shared, fan).add_(least[..., None])
    states = torch.empty(n, length, dtype=torch.long, device=x.device)
    states[:, -1] = cost.argmin(1)
    for t in range(length - 1, 0, -1):
        prefix = states[:, t] // fan
        before = came[t].gather(1, prefix[:, None])[:, 0]
        states[:, t - 1] = before.long() * shared + prefix
    return states


def _least(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum over the second of `[n, fan, shared]`, and where it is (uint8), the first of equals.

    By comparisons of whole slices: `Tensor.min` with places is several times as slow on a CPU.
    """
    least, place = cost[:, 0], torch.zeros_like(cost[:, 0], dtype=torch.uint8)
    for j in range(1, cost.shape[1]):
        less = cost[:, j] < least
        place.masked_fill_(less, j)
        least = torch.minimum(least, cost[:, j])
    return least, place
