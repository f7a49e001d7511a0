"""The selecting methods as plain loops, written from their published rules in Python and NumPy; nothing is shared with
the library."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

Array = np.ndarray


def cos(x: Array, y: Array) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def greedy(n: int, k: int, gain: Callable[[int, list[int]], float]) -> list[int]:
    """The largest gain(i, chosen), lowest index first, k times."""
    chosen: list[int] = []
    for _ in range(k):
        gains = {i: gain(i, chosen) for i in range(n) if i not in chosen}
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    return chosen


def split(weights: list[float], total: int, caps: list[int]) -> list[int]:
    """Largest remainders; what does not fit under a cap goes to the others in proportion."""
    full: set[int] = set()
    everyone = range(len(weights))
    while True:
        free = sum(Fraction(weights[g]) for g in everyone if g not in full)
        left = total - sum(caps[g] for g in full)
        exact = [Fraction(caps[g]) if g in full else left * Fraction(weights[g]) / free for g in everyone]
        over = {g for g in everyone if exact[g] > caps[g]}
        if not over:
            break
        full |= over
    share = [math.floor(x) for x in exact]
    spare = [g for g in everyone if share[g] < caps[g]]
    for g in sorted(spare, key=lambda g: -(exact[g] % 1))[: total - sum(share)]:
        share[g] += 1
    return share


def divprune_naive(z: Array, k: int) -> list[int]:
    others = range(len(z))
    return greedy(len(z), k, lambda i, chosen: 1 - max(cos(z[i], z[j]) for j in chosen or others if j != i))


def idpruner_naive(z: Array, s: Array, k: int) -> list[int]:
    s = (s - s.min()) / (s.max() - s.min() + 1e-6)
    return greedy(len(z), k, lambda i, chosen: s[i] - max((cos(z[i], z[j]) for j in chosen), default=-s[i]))


def todre_naive(z: Array, a: Array, k: int, objective: str = "maxsum") -> list[int]:
    fold = sum if objective == "maxsum" else max
    return greedy(len(z), k, lambda i, chosen: -fold(cos(z[i], z[j]) for j in chosen) if chosen else a[i])


def zoo_prune_naive(z: Array, s: Array, k: int) -> list[int]:
    s = (s - s.min()) / (s.max() - s.min() + 1e-6)
    return greedy(len(z), k, lambda i, chosen: s[i] * (1 - max((cos(z[i], z[j]) for j in chosen), default=0.0)))


def scope_naive(z: Array, a: Array, k: int, alpha: float = 1.0, combine: str = "multiply") -> list[int]:
    n = len(z)

    def gain(i: int, chosen: list[int]) -> float:
        covers = sum(max(0.0, cos(z[i], z[j]) - max([0.0] + [cos(z[c], z[j]) for c in chosen])) for j in range(n))
        return covers * a[i] ** alpha if combine == "multiply" else covers + a[i] ** alpha

    return greedy(n, k, gain)


def cover_table_naive(t: Array, z: Array, e: Array, temperature: float) -> Array:
    """Patches whose encoder features are 0 have none: they are not covered and cover no patch."""
    n, there = len(z), [i for i in range(len(z)) if e[i].any()]
    words = [softmax(np.array([cos(w, v) for v in z]) / temperature) / len(t) for w in t]
    patches = np.zeros((n, n))
    for i in there:
        patches[i, there] = 0.5 * softmax(np.array([cos(e[i], e[j]) for j in there]) / 0.2) / len(there)
    return np.array([*words, *patches])


def mmtok_naive(t: Array, z: Array, e: Array, k: int, temperature: float) -> list[int]:
    table = cover_table_naive(t, z, e, temperature)

    def gain(i: int, chosen: list[int]) -> float:
        return sum(max(0.0, row[i] - max([0.0] + [row[c] for c in chosen])) for row in table)

    return greedy(len(z), k, gain)


def eadp_naive(
    z: Array, t: Array, height: int, k: int, *, telling: float, spread: float, mix: float, power: float
) -> tuple[Array, list[int]]:
    """Importance, and the greedy picks, on a full grid, where smoothing is a convolution with reflected borders."""
    single = np.array([[-cos(w, v) for v in z] for w in t])
    entropies = []
    for row in single:
        p = softmax(100 * row)
        entropies.append(-sum(q * math.log(q) for q in p if q > 0))
    words = sorted(range(len(t)), key=lambda i: entropies[i])[: max(1, int(telling * len(t)))]
    weights = softmax(-np.array([entropies[i] for i in words]) / spread)
    local = sum(w * single[i] for w, i in zip(weights, words, strict=True))
    whole = np.array([-cos(t.mean(0), v) for v in z])
    fused = mix * whole + (1 - mix) * local
    scores = (fused - fused.min() + 1e-6) / (fused.max() - fused.min() + 1e-6)
    width = len(z) // height
    padded, taps = np.pad(scores.reshape(height, width), 1, mode="reflect"), np.exp(-np.array([1, 0, 1]) / 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    smooth = [(padded[r : r + 3, c : c + 3] * kernel).sum() for r in range(height) for c in range(width)]
    weight = np.array(smooth) ** power

    def gain(i: int, chosen: list[int]) -> float:
        best = [max([0.0] + [(1 + cos(z[c], v)) / 2 for c in chosen]) for v in z]
        return sum(w * max(0.0, (1 + cos(z[i], v)) / 2 - b) for w, v, b in zip(weight, z, best, strict=True))

    return weight, greedy(len(z), k, gain)


def dart_naive(z: Array, scores: Array, t: Array, loud: Array, k: int, of_image: int, of_text: int) -> list[int]:
    def best(s: Array, number: int) -> list[int]:
        return sorted(range(len(s)), key=lambda i: (-s[i], i))[:number]

    kept = best(scores, min(of_image, k))
    pivots = [z[i] for i in kept] + [t[i] for i in best(loud, of_text)]
    rest = k - len(kept)
    for p, pivot in enumerate(pivots):
        share = rest // len(pivots) + (p < rest % len(pivots))
        free = sorted((i for i in range(len(z)) if i not in kept), key=lambda i: (cos(z[i], pivot), i))
        kept = kept + free[:share]
    return sorted(kept)


def holov_naive(z: Array, attention: Array, k: int, number: int, *, official: bool) -> list[int]:
    n = len(z)
    sizes = [n // number + (p < n % number) for p in range(number)]
    chunks, start = [], 0
    for size in sizes:
        chunks.append(list(range(start, start + size)))
        start += size
    chunks = [c for c in chunks if c]
    scores = []
    for chunk in chunks:
        a = np.array([1e3 * attention[i] for i in chunk])
        if len(chunk) == 1:
            scores.append(float(a[0]) / (1e3 if official else 1))
            continue
        s = np.array([[0.0 if i == j else cos(z[i], z[j]) for j in chunk] for i in chunk])
        mean = s.sum(1) / (len(chunk) - 1)
        var = ((s - mean[:, None]) ** 2).sum(1) / (len(chunk) - 1)
        scores.append(float((a + 0.09 * var * np.abs(a).mean() / (np.abs(var).mean() + 1e-6)).mean()))
    if official:
        share = [math.floor(s / (sum(scores) + 1e-6) * k) for s in scores]
        for p in sorted(range(len(chunks)), key=lambda p: -scores[p])[: k - sum(share)]:
            share[p] += 1
    else:
        share = split(scores, k, [len(chunk) for chunk in chunks])
    kept = []
    for chunk, count in zip(chunks, share, strict=True):
        kept += sorted(chunk, key=lambda i: (-attention[i], i))[:count]
    return sorted(kept)


def prunesid_naive(x: Array, attention: Array, k: int, factor: float, *, official: bool) -> list[int]:
    n = len(x)
    a = 1 / (1 + np.exp(-x))
    v = np.linalg.svd((a - a.mean(1, keepdims=True)).T, full_matrices=False)[2].T
    group = np.abs(v[:, : max(1, k // 4)]).argmax(1)
    c = np.array([[cos(x[i], x[j]) for j in range(n)] for i in range(n)])
    mean = np.mean([c[i, j] for i in range(n) for j in range(i + 1, n)])
    picked: dict[int, list[int]] = {}
    fallen: dict[int, list[int]] = {}
    for g in sorted(set(group)):
        for i in sorted((i for i in range(n) if group[i] == g), key=lambda i: -attention[i]):
            near = any(c[i, j] > factor * mean for j in picked.get(g, []))
            (fallen if near else picked).setdefault(g, []).append(i)
    groups = sorted(picked)
    size = {g: len(picked[g]) + len(fallen.get(g, [])) for g in groups}
    cap = {g: min(5 * math.ceil(k / 64), len(picked[g]), size[g]) for g in groups}
    while sum(cap.values()) < k:
        cap = {g: min(cap[g] + 1, size[g]) for g in groups}
    rest = max(k - len(groups) - official, 0)
    total = sum(len(picked[g]) for g in groups)
    if official:
        share, at, before = {}, 0, 0
        for g in groups:
            at += len(picked[g])
            end = round(at / total * rest)
            share[g] = min(1 + end - before, cap[g])
            before = end
        for g in sorted(groups, key=lambda g: -len(picked[g])):
            share[g] += min(cap[g] - share[g], rest + len(groups) - sum(share.values()))
    else:
        parts = split([len(picked[g]) for g in groups], rest, [cap[g] - 1 for g in groups])
        share = {g: 1 + part for g, part in zip(groups, parts, strict=True)}
    return sorted(i for g in groups for i in (picked[g] + fallen.get(g, []))[: share[g]])


def agile_naive(
    x: Array, a: Array, k: int, *, rate: float = 0.01, typical: float = 92.0, most: float = 0.5
) -> list[int]:
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    share = values[values > 0] / values.sum()
    step = rate * math.exp(-float((share * np.log(share)).sum())) / typical
    order = sorted(range(len(x)), key=lambda i: (-a[i], i))
    kept: list[int] = []
    while len(kept) < k:
        rest = [i for i in order if i not in kept]
        clear = [i for i in rest if all(1 - cos(x[i], x[j]) >= min(most, t * step) for t, j in enumerate(kept, 1))]
        kept.append((clear or rest)[0])
    return kept


def sieve_naive(v: Array, t: Array, a: Array, k: int) -> list[int]:
    v, t = v - t.mean(0), t - t.mean(0)
    gram = t @ t.T
    values = sorted(np.linalg.eigvalsh(gram), reverse=True)
    rank = next(r for r in range(1, len(t) + 1) if sum(values[:r]) >= 0.75 * sum(values))
    left = v - v @ t.T @ np.linalg.inv(gram + values[rank - 1] * np.eye(len(t))) @ t
    score = (np.linalg.norm(left, axis=1) / np.linalg.norm(v, axis=1) * a) ** 2
    order: list[int] = []
    for _ in range(k):
        order.append(int(np.argmax([-1 if i in order else s for i, s in enumerate(score)])))
        score = score * np.array([1 - cos(r, left[order[-1]]) ** 2 for r in left])
    return order


def raters_naive(v: Array, t: Array) -> list[int]:
    shares = np.array([softmax(t @ x) for x in v]).mean(0)
    return [i for i, share in enumerate(shares) if share > shares.mean()] or list(range(len(t)))


def peaks_naive(x: Array, k: int) -> dict[int, list[int]]:
    """Members of each of ``k`` density peaks, by the place of the peak."""
    n, near = len(x), max(k, 3)
    far = [[float(np.linalg.norm(a - b)) / math.sqrt(x.shape[1]) for b in x] for a in x]
    dense = [math.exp(-sum(f * f for f in sorted(row)[:near]) / near) for row in far]
    lead = [min([far[i][j] for j in range(n) if dense[j] > dense[i]], default=max(map(max, far))) for i in range(n)]
    peaks = sorted(range(n), key=lambda i: (-dense[i] * lead[i], i))[:k]
    groups: dict[int, list[int]] = {peak: [peak] for peak in peaks}
    for i in set(range(n)) - set(peaks):
        groups[min(peaks, key=lambda peak: far[i][peak])].append(i)
    return {peak: sorted(members) for peak, members in groups.items()}


def sparsevlm_naive(x: Array, s: Array, k: int) -> tuple[list[int], dict[int, list[int]]]:
    """Kept tokens, and what is merged into which others: as many kept ones as leave room for their merged tokens."""
    n, ranked = len(x), sorted(range(len(s)), key=lambda i: (-s[i], i))
    for kept in range(k, 0, -1):
        again = int(0.3 * (n - kept)) + 1
        if kept + again // 10 + 1 <= k:
            break
    chosen = ranked[kept : kept + again]  # the best first: of equal peaks it counts
    groups = peaks_naive(x[chosen], k - kept)
    return sorted(ranked[:kept]), {chosen[p]: [chosen[i] for i in members] for p, members in groups.items()}


def sparsevlm_plus_naive(attention: Array, raters: list[int], pull: Array, share: float) -> Array:
    """``attention`` (H, Q, N), ``pull`` (Q, N)."""
    told = sorted(range(len(attention)), key=lambda h: -attention[h][raters].sum())
    heads = told[: max(1, round(share * len(attention)))]
    n = attention.shape[2]
    return np.array(
        [np.mean([attention[h][t][i] / max(pull[t][i], 0.05) for h in heads for t in raters]) for i in range(n)]
    )


def feather_naive(s: Array, places: list[tuple[int, int]], k: int, stride: int = 3) -> list[int]:
    step = max(stride, math.ceil(math.sqrt(2 * len(s) / k)))
    grid = [i for i, (row, column) in enumerate(places) if row % step == 0 and column % step == 0]
    rest = sorted(set(range(len(s))) - set(grid), key=lambda i: (-s[i], i))
    return sorted(grid + rest[: k - len(grid)])


def tome_naive(x: Array, r: int, prefix: int, size: Array) -> list[int]:
    """The group of each token, in the published order: the prefix, even tokens that stay, odd tokens; in rounds."""
    n, tokens, size = len(x), x.copy(), size.astype(float)
    whole, left = list(range(n)), min(r, n - prefix - 1)
    while left > 0:
        places = range(prefix, len(tokens))
        odd = [j for j in places if j % 2]
        best = {i: max(odd, key=lambda j: (round(cos(tokens[i], tokens[j]), 12), -j)) for i in places if not i % 2}
        ranked = sorted(best, key=lambda i: (-cos(tokens[i], tokens[best[i]]), i))
        gone = ranked[: min(left, (len(tokens) - prefix) // 2)]
        stay = [i for i in best if i not in gone] if prefix else ranked[len(gone) :]
        order = [*range(prefix), *stay, *odd]
        group = [order.index(best[i] if i in gone else i) for i in range(len(tokens))]
        members = [[i for i in range(len(tokens)) if group[i] == g] for g in range(len(order))]
        tokens = np.array([np.average(tokens[m], axis=0, weights=size[m]) for m in members])
        size = np.array([size[m].sum() for m in members])
        whole, left = [group[g] for g in whole], left - len(gone)
    return whole
