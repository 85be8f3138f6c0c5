"""Intervals of a share: how many of n problems were solved."""

import math


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share (`right` of `count`) that holds the truth in about 95% of the cases.

    With p = right / count its middle is (p + z^2 / 2n) / (1 + z^2 / n), and its half width
    z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2) (Wilson 1927, jstor.org/stable/2276774).
    Unlike p plus or minus two standard errors it has a width where all problems or none were solved. It takes
    problems as independent trials. Raises `ValueError` for no problems, and counts that do not fit.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(
            f"{right} of {count} is no share: give 0 <= right <= count, and count >= 1."
        )
    share = right / count
    shrink = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half if right else 0.0), (middle + half if right < count else 1.0)
