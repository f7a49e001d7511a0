"""What a sample without, or with few, bad cases says about all of them."""

from __future__ import annotations

import math


def share_at_most(found: int, n: int, level: float = 0.95) -> float:
    """Upper end of the exact one-sided interval of a binomial share.

    Args:
        found: cases in the sample.
        n: size of the sample, drawn at random; without putting back, the bound is on the safe side.
        level: confidence.

    Returns:
        the largest share with which at most ``found`` cases in ``n`` come with probability ``1 - level``.

    Raises:
        ValueError: unless 0 <= found <= n, n >= 1 and 0 < level < 1.

    Reference:
        Clopper & Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
        Biometrika 1934.
    """
    if not (0 <= found <= n and n >= 1 and 0 < level < 1):
        raise ValueError(f"found={found}, n={n}, level={level}: there are no such samples")
    if found == n:
        return 1.0
    low, high = found / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(found, n, middle) > 1 - level else (low, middle)
    return high


def _at_most(found: int, n: int, share: float) -> float:
    """Probability of at most so many cases."""
    if share in (0.0, 1.0):
        return float(share == 0.0 or found == n)
    logs = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(found + 1))
    return math.fsum(math.exp(log + k * math.log(share) + (n - k) * math.log1p(-share)) for k, log in enumerate(logs))
