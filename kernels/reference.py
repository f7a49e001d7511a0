"""The loops that cost real time, in plain PyTorch: always available, and what the fast twins are tested against.

Everything here is batched, ``(B, N, …)`` with no optional dimensions, computes in float32 or better, and follows one
rule: rank by (score descending, index ascending), NaN is -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Two unit vectors whose float32 cosine comes this close to 1 count as equal: rounding must not tell duplicates apart.
SAME = 1e-6
# Elements of the largest temporary an operator may build, 64 MiB of float32.
TILE = 1 << 24
# No gain counts for less: what may not be picked is -inf, below what comes last.
LAST = torch.finfo(torch.float32).min


class Picks(NamedTuple):
    """Result of a greedy selection.

    Attributes:
        keep: (B, N) bool.
        order: (B, K) long, picks in selection order; -1 where a row has no more.
        gain: (B, K) float, gain of each pick when it was made; -inf where a row has no more.
    """

    keep: Tensor
    order: Tensor
    gain: Tensor


# ---------------------------------------------------------------------------------------------------- similarity


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1 in float32; rows that hold NaN or infinity become 0."""
    x = x.detach().float()  # similarities choose, they are not differentiated
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # of an infinite or NaN one the row is
    return (x / length.clamp_min(1e-8)).masked_fill_(~length.isfinite(), 0.0)


def finite(x: Tensor) -> Tensor:
    """(B, N) bool: rows of x (B, N, D) without NaN and infinity."""
    return x.amax(-1).isfinite() & x.amin(-1).isfinite()  # both ends are NaN if any value is


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosine of every row of x (B, M, D) with every row of y (B, N, D), or of x, as (B, M, N) float32.

    Duplicates have cosine exactly 1, and so have two zero rows: neither has anything the other lacks.
    """
    return cosines(x)[0] if y is None else _cosine(unit(x), unit(y))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """:func:`cosine` of rows that :func:`unit` has made."""
    with torch.autocast(a.device.type, enabled=False):  # 16-bit products would create thousands of ties
        similarity = a @ b.mT
    empty = [torch.linalg.vector_norm(x, dim=-1) == 0 for x in (a, b)]
    alike = (similarity > 1 - SAME).logical_or_(empty[0][..., :, None] & empty[1][..., None, :])
    return similarity.masked_fill_(alike, 1.0)


def cosines(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`cosine` of the rows of x (B, N, D) with each other, (B, N, N), and which rows are finite, (B, N) bool.

    Rows are scaled after the product, so that nothing but the product reads them; a row whose square overflows float32
    does not count as finite.
    """
    with torch.autocast(x.device.type, enabled=False):
        table = _gram(x.detach().float())
        square = table.diagonal(dim1=1, dim2=2).clone()
        known = square.isfinite()
        inverse = torch.where(known, square.sqrt().clamp_min(1e-8).reciprocal(), 0.0)
        table.mul_(-inverse[:, :, None]).mul_(inverse[:, None]).nan_to_num_(nan=0.0)
        torch.threshold_(table, SAME - 1, -1.0).neg_()  # the one pass that snaps to 1 snaps from above
        empty = (~known | (square == 0)).float()
        return table.baddbmm_(empty[..., None], empty[:, None]), known


def _gram(x: Tensor) -> Tensor:
    """x · xᵀ for x (B, N, D); on a CPU in blocks of rows on and above the diagonal, half of the work.

    Elsewhere its rows go on to a multiple of 16, behind their end: kernels load them by 16 bytes.
    """
    n = x.shape[1]
    if x.device.type != "cpu":
        return (x @ torch.nn.functional.pad(x, (0, 0, 0, -n % 16)).mT)[..., :n]
    step = max(192, min(n // 4, 512))
    if step >= n:
        return x @ x.mT
    out = x.new_empty(len(x), n, n)
    for begin in range(0, n, step):
        rows, rest = slice(begin, begin + step), slice(begin + step, n)
        part = x[:, rows] @ x[:, begin:].mT
        out[:, rows, begin:] = part
        out[:, rest, rows] = part[..., step:].mT
    return out


# -------------------------------------------------------------------------------------------------------- greedy


class State(Protocol):
    """What a greedy selection remembers of the set chosen so far."""

    def gain(self) -> Tensor:
        """(B, N) gain of adding each candidate now."""
        ...

    def add(self, pick: Tensor) -> None:
        """Add candidate ``pick`` (B,) to the set of each row."""
        ...


def row_of(table: Tensor, pick: Tensor) -> Tensor:
    """(B, N): row ``pick[b]`` of table[b], for table (B, M, N)."""
    return table[torch.arange(len(pick), device=pick.device), pick]


class RunningMax:
    """gain_i = offset_i - slope_i · max_{j in S} sim_ij, and ``start`` for the first pick.

    offset, slope = 1, 1 is max-min; λs, 1-λ is maximal marginal relevance; s, s is the product s·(1 - max).
    """

    def __init__(self, similarity: Tensor, offset: Tensor, slope: Tensor, start: Tensor) -> None:
        """similarity (B, N, N); offset, slope, start broadcastable to (B, N)."""
        self.similarity, self.offset, self.slope, self.start = similarity, offset, slope, start
        self.nearest: Tensor | None = None

    def gain(self) -> Tensor:
        return self.start if self.nearest is None else self.offset - self.slope * self.nearest

    def add(self, pick: Tensor) -> None:
        row = row_of(self.similarity, pick)
        self.nearest = row if self.nearest is None else torch.maximum(self.nearest, row)


class Rows:
    """Rows of the cosine matrix, one after the other.

    A product with one vector waits for memory, so that about N/16 of them take as long as the matrix: for more picks
    it is computed at once; and on a GPU, where one launch makes all picks from it.

    Attributes:
        whole: whether ``matrix`` is the cosine matrix; else it holds the unit vectors.
        finite: (B, N) bool, tokens whose features are.
    """

    def __init__(self, features: Tensor, most: int) -> None:
        """features (B, N, D); ``most`` rows will be asked for."""
        self.whole = features.device.type != "cpu" or 16 * most >= features.shape[1]
        if self.whole:
            self.matrix, self.finite = cosines(features)
        else:
            self.matrix, self.finite = unit(features), finite(features)

    def row(self, pick: Tensor) -> Tensor:
        """(B, N) cosines of all to candidate ``pick`` (B,)."""
        chosen = row_of(self.matrix, pick)
        if self.whole:
            return chosen
        with torch.autocast(chosen.device.type, enabled=False):
            return (self.matrix @ chosen[..., None])[..., 0]


class RunningSum:
    """gain_i = -Σ_{j in S} cos_ij."""

    def __init__(self, row: Callable[[Tensor], Tensor], start: Tensor) -> None:
        """row: from a pick (B,) to the cosines (B, N) of all to it; start (B, N), the gain of the first pick."""
        self.row, self.start = row, start
        self.sum: Tensor | None = None

    def gain(self) -> Tensor:
        return self.start if self.sum is None else -self.sum

    def add(self, pick: Tensor) -> None:
        row = self.row(pick).double()
        self.sum = row if self.sum is None else self.sum + row


class Discount:
    """gain_i = log(score_i · Π_{j in S} (1 - cos²_ij)) in float64: the product itself would run out of exponents."""

    NOTHING = -1e18  # logarithm of zero: finite, for such tokens may still be kept, and so low that they are all equal

    def __init__(self, rows: Rows, scores: Tensor) -> None:
        """scores (B, N)."""
        self.rows, self.score = rows, scores.double().log().clamp_min(self.NOTHING)

    def gain(self) -> Tensor:
        return self.score

    def add(self, pick: Tensor) -> None:
        alike = self.rows.row(pick).double().square()
        left = torch.where(alike > 1 - SAME, self.NOTHING, torch.log1p(-alike))
        self.score = (self.score + left).clamp_min(self.NOTHING)


class Widening:
    """gain_i = score_i, plus N while no pick stands too close: the t-th clears the cosine distance t·step around it."""

    def __init__(self, features: Tensor, scores: Tensor, step: Tensor, most: float) -> None:
        """features (B, N, D); scores (B, N) in 1 ... N; step (B,); most, the largest distance."""
        self.unit, self.score, self.step, self.most = unit(features), scores, step[:, None], most
        self.stands, self.picks = torch.ones_like(scores, dtype=torch.bool), 0

    def gain(self) -> Tensor:
        return self.score + self.score.shape[1] * self.stands

    def add(self, pick: Tensor) -> None:
        self.picks += 1
        with torch.autocast(self.unit.device.type, enabled=False):
            distance = 1 - (self.unit @ row_of(self.unit, pick)[..., None])[..., 0]
        radius = (self.picks * self.step).clamp_max(self.most)
        self.stands = self.stands & (torch.where(distance < SAME, 0.0, distance) >= radius)


class Coverage:
    """gain_i = scale_i · Σ_r weight_r · max(0, table_ri - best_r) + bonus_i, best_r the largest table_rj of j in S.

    best begins at ``start``. The sum is kept up to date from the rows a pick changes, which is exact but for
    float64 rounding; sums that small against their start are 0.
    """

    def __init__(
        self, table: Tensor, weight: Tensor | None, scale: Tensor | None, bonus: Tensor | None, start: float = 0.0
    ) -> None:
        """table (B, R, N) float32 and finite, how well candidate i covers row r; weight (B, R); scale, bonus (B, N)."""
        self.table, self.scale, self.bonus = table, scale, bonus
        self.best = table.new_full(table.shape[:2], start)
        self.weight = torch.ones_like(self.best).double() if weight is None else weight.double()
        # Rows taken at a time: on a CPU as many as its cache holds, into buffers, for fresh memory is slow to touch.
        self.step = 32 if table.device.type == "cpu" else max(1, table.shape[1])
        self.narrow = torch.empty_like(table[:, : self.step])
        self.wide = self.narrow.double()
        self.total = self._between(self.best, torch.full_like(self.best, torch.inf))
        self.noise = 1e-12 * self.total.amax(-1, keepdim=True)

    def _between(self, low: Tensor, high: Tensor) -> Tensor:
        """(B, N) float64: Σ_r weight_r · (clamp(table_ri, low_r, high_r) - low_r), for low and high (B, R)."""
        if low.device.type == "cpu":
            rows = (high > low).any(0).nonzero()[:, 0]
        else:  # the question which rows differ would stop the host
            rows = torch.arange(low.shape[1], device=low.device)
        with torch.autocast(low.device.type, enabled=False):
            total = -(low * self.weight).index_select(1, rows).sum(1)[:, None, None].expand(-1, 1, self.table.shape[2])
            for part in rows.split(self.step):
                inside, wide = self.narrow[:, : len(part)], self.wide[:, : len(part)]
                least, most, weight = (x.index_select(1, part) for x in (low, high, self.weight))
                torch.index_select(self.table, 1, part, out=inside)
                torch.maximum(inside, least[..., None], out=inside)
                torch.minimum(inside, most[..., None], out=inside)
                total = torch.baddbmm(total, weight[:, None], wide.copy_(inside))
        return total[:, 0]

    def gain(self) -> Tensor:
        gain = torch.where(self.total > self.noise, self.total, 0.0)
        if self.scale is not None:
            gain = gain * self.scale
        return gain if self.bonus is None else gain + self.bonus

    def add(self, pick: Tensor) -> None:
        best = torch.maximum(self.best, row_of(self.table.mT, pick))
        self.total = self.total - self._between(self.best, best)
        self.best = best


class Determinant:
    """gain_i = conditional variance of i given S under L = r_i·sim_ij·r_j, by a growing Cholesky factor.

    A candidate whose variance has fallen to rounding level adds nothing to the determinant. Such candidates come after
    all others, ranked by relevance, and leave the factor as it is.
    """

    def __init__(self, kernel: Tensor, relevance: Tensor, most: int) -> None:
        """kernel L (B, N, N) with diagonal r²; relevance r (B, N), non-negative; at most ``most`` picks."""
        self.kernel, self.variance = kernel, relevance.square()
        self.floor = 1e-5 * self.variance
        self.behind = relevance - relevance.amax(-1, keepdim=True) - 1
        self.factor = kernel.new_empty(len(relevance), most, relevance.shape[1])
        self.picks = 0  # rows of the factor that are filled

    def gain(self) -> Tensor:
        self.left = torch.where(self.variance > self.floor, self.variance, self.behind)
        return self.left

    def add(self, pick: Tensor) -> None:
        factor = self.factor[:, : self.picks]
        with torch.autocast(self.kernel.device.type, enabled=False):
            column = torch.baddbmm(
                row_of(self.kernel, pick)[:, None], row_of(factor.mT, pick)[:, None], factor, alpha=-1
            )
        left = self.left.gather(1, pick[:, None])
        column = column[:, 0] / torch.where(left > 0, left, torch.inf).sqrt()
        self.factor[:, self.picks] = column
        self.picks += 1
        self.variance = self.variance.addcmul(column, column, value=-1)


class Seeding:
    """k-means++: each pick is drawn in proportion to 1 - max_{j in S} cos_ij, the first uniformly.

    The gain is 0 from the drawn candidate on and -1 before it, so that the greedy loop takes the drawn one. Once all
    that is left duplicates what was picked, the lowest index comes next.
    """

    def __init__(self, similarity: Tensor, valid: Tensor, chance: Tensor) -> None:
        """similarity (B, N, N); valid (B, N), what may be drawn; chance (B, K) in [0, 1), one number per pick."""
        self.similarity, self.chances = similarity, iter(chance.double().unbind(1))
        self.weight = 2 * valid.double()  # the largest distance there is, of all alike

    def gain(self) -> Tensor:
        reach = self.weight.cumsum(-1)
        return (reach > next(self.chances)[:, None] * reach[:, -1:]).float() - 1

    def add(self, pick: Tensor) -> None:
        distance = (1 - row_of(self.similarity, pick)).double().clamp_min(0)
        self.weight = torch.minimum(self.weight, distance)


def bounds(valid: Tensor, usable: Tensor | None = None) -> Tensor:
    """(B, N) float, what gains count for at most: -inf for what may not be picked, little for what comes last."""
    bound = torch.where(valid, torch.inf, -torch.inf)
    return bound if usable is None else bound.masked_fill_(valid & ~usable, LAST)


@torch.no_grad()
def pick(state: State, bound: Tensor, count: Tensor, most: int, per_round: int = 1) -> tuple[Tensor, Tensor]:
    """Pick the candidate of largest gain, tell the state, repeat.

    Args:
        state: gains and how a pick changes them; used up by the call.
        bound: (B, N) from :func:`bounds`.
        count: (B,) long, picks of each row, at most the number of its candidates above -inf.
        most: steps of the loop, at least the largest ``count``.
        per_round: picks made on the same gains; 1 is the exact greedy selection.

    Returns:
        (B, most) long, picks in their order, -1 where a row has no more, and (B, most) float, their gains, -inf there.
    """
    bound = bound.clone()
    order = torch.full((len(bound), most), -1, dtype=torch.long, device=bound.device)
    gains = torch.full((len(bound), most), -torch.inf, device=bound.device)
    for step in range(most):
        if step % per_round == 0:
            gain = state.gain().nan_to_num(nan=LAST, posinf=torch.inf, neginf=LAST)
        best, chosen = torch.minimum(gain, bound).max(-1)  # of equal ones the first
        order[:, step], gains[:, step] = chosen, best
        bound.scatter_(1, chosen[:, None], -torch.inf)
        state.add(chosen)
    active = torch.arange(most, device=bound.device) < count[:, None]
    return order.masked_fill_(~active, -1), gains.masked_fill_(~active, -torch.inf)


def picks(order: Tensor, gain: Tensor, n: int) -> Picks:
    """What was picked of ``n`` candidates; the gain of those that come last is not told."""
    keep = torch.zeros(len(order), n + 1, dtype=torch.bool, device=order.device)  # the last slot takes the -1
    keep.scatter_(1, torch.where(order < 0, n, order), True)
    return Picks(keep[:, :n], order, torch.where(gain > LAST, gain, -torch.inf))


@torch.no_grad()
def thin(similarity: Tensor, order: Tensor, sizes: list[int], goals: list[int], per_round: int) -> Tensor:
    """Shorten a list of candidates by dropping, round by round, those at even places that resemble one at an odd place.

    Args:
        similarity: (B, N, N).
        order: (B, M) long, the list of each row; only its first ``sizes`` entries count.
        sizes: B lengths of the lists.
        goals: B lengths they are to get; 0 drops all at once.
        per_round: how many go in a round, most similar first; fewer in the last one.

    Returns:
        (B, N) bool, what is left.
    """
    device = order.device
    row = torch.arange(len(order), device=device)[:, None]
    lengths = [n if goal else 0 for n, goal in zip(sizes, goals, strict=True)]
    # The list holds places in a matrix of the candidates alone, made anew whenever half of them are gone; until then
    # one of a candidate's nearest is nearly always at an odd place.
    table, origin = similarity, order
    place = torch.arange(order.shape[1], device=device).expand_as(order)

    def listed() -> Tensor:
        """(B, M) bool: entries of the lists, which are shortened to the longest."""
        return torch.arange(place.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]

    while any(n > goal for n, goal in zip(lengths, goals, strict=True)):
        place = place[:, : max(lengths)]
        if table is similarity or 2 * place.shape[1] <= table.shape[1]:
            origin = origin.gather(1, place)
            table = similarity[row[..., None], origin[:, :, None], origin[:, None]]
            place = torch.arange(place.shape[1], device=device).expand_as(origin)
            near = table.topk(min(32, table.shape[1]), dim=-1)
        even, odd, there = place[:, ::2], place[:, 1::2], listed()
        at_odd = torch.zeros(table.shape[:2], dtype=torch.bool, device=device).scatter_(1, odd, there[:, 1::2])
        found = at_odd[row[..., None], near.indices[row, even]]
        likeness = torch.where(found, near.values[row, even], -torch.inf).amax(-1)
        b, e = (~found.any(-1) & there[:, ::2]).nonzero(as_tuple=True)
        if len(b):
            likeness[b, e] = torch.where(at_odd[b], table[b, even[b, e]], -torch.inf).amax(-1)
        ranked = torch.where(there[:, ::2], likeness, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        going = [min(per_round, n - goal, (n + 1) // 2) for n, goal in zip(lengths, goals, strict=True)]
        number = torch.arange(even.shape[1], device=device)
        stays = (number >= torch.tensor(going, device=device)[:, None]) & there[:, ::2].gather(1, ranked)
        left = torch.cat([stays, there[:, 1::2]], 1)
        place = torch.cat([even.gather(1, ranked), odd], 1)
        place = place.gather(1, (~left).long().sort(dim=-1, stable=True).indices)
        lengths = [n - k for n, k in zip(lengths, going, strict=True)]
    keep = torch.zeros(similarity.shape[:2], dtype=torch.bool, device=device)
    place = place[:, : max(lengths, default=0)]
    return keep.scatter_(1, origin.gather(1, place), listed())


# ----------------------------------------------------------------------------------------------------- attention


class Sight(NamedTuple):
    """What the query rows see of the keys, and how.

    Attributes:
        scale: factor on the products of queries and keys.
        causal: row i of M sees the first i + 1 + N - M of N keys.
        span: (2, B or 1, M) int32 or None, the first key that each row sees and the one behind its last.
        bias: (B or 1, N) float32 or None, what is added to the logits of each key; -inf hides it.
        mask: (B or 1, M, N) bool or None, which row sees which key.
    """

    scale: float
    causal: bool = False
    span: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None


def _tiles(q: Tensor, k: Tensor, sight: Sight) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of the logits, (B, H, R, K) float32, with the rows and the keys they are of; -inf where nothing is seen.

    Every row comes once, with all the keys that it sees.
    """
    (b, heads, m, _), (_, groups, n, _) = q.shape, k.shape
    keys = k.float().mT
    # On a CPU a tile that its cache holds is faster, and the sooner rows end, the fewer keys they need.
    step = max(1, (TILE >> 4 if q.device.type == "cpu" else TILE) // max(1, b * heads * n))
    for begin in range(0, m, step):
        rows = slice(begin, min(begin + step, m))
        first, behind = _reach(rows, m, n, sight)
        seen = slice(first, behind)
        query = (q[:, :, rows].float() * sight.scale).unflatten(1, (groups, heads // groups))
        logits = (query.flatten(2, 3) @ keys[..., seen]).view(b, heads, rows.stop - begin, behind - first)
        key = torch.arange(first, behind, device=q.device)
        if sight.bias is not None:
            logits += sight.bias[:, None, None, seen]
        if sight.causal:
            last = torch.arange(begin, rows.stop, device=q.device)[:, None] + n - m
            logits.masked_fill_(key > last, -torch.inf)
        if sight.span is not None:
            low, high = sight.span[..., rows, None]
            logits.masked_fill_(((key < low) | (key >= high))[:, None], -torch.inf)
        if sight.mask is not None:
            logits.masked_fill_(~sight.mask[:, None, rows, seen], -torch.inf)
        yield rows, seen, logits


def _reach(rows: slice, m: int, n: int, sight: Sight) -> tuple[int, int]:
    """The first key that any of the rows sees and the one behind the last, or further ones; at least one key."""
    first, behind = 0, n
    if sight.causal:
        behind = min(n, rows.stop + n - m)
    if sight.span is not None and sight.span.device.type == "cpu":  # asking a GPU would stop the host
        first, behind = max(first, int(sight.span[0, :, rows].min())), min(behind, int(sight.span[1, :, rows].max()))
    first = max(0, min(first, n - 1))
    return first, max(behind, min(first + 1, n))


def _hide(logits: Tensor) -> Tensor:
    """Logits that are not finite count as not seen."""
    return logits.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; 0 in rows that see nothing. Changes the logits."""
    weights = logits.softmax(-1)
    lost = weights[..., :1].isnan()  # then all of the row is: it sees nothing, or some logit is not finite
    if lost.device.type == "cpu" and not bool(lost.any()):
        return weights
    weights = _hide(logits).softmax(-1)
    return weights.masked_fill_(weights[..., :1].isnan(), 0.0)


@torch.no_grad()
def attention_lse(q: Tensor, k: Tensor, sight: Sight) -> Tensor:
    """Logarithm of the sum of the exponentials of the logits of each query row.

    Args:
        q: (B, H, M, d).
        k: (B, G, N, d) with H a multiple of G; queries h · H/G and on share key head h.
        sight: what the rows see. Logits that are not finite count as not seen.

    Returns:
        (B, H, M) float32; -inf where a row sees nothing.
    """
    out = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for rows, _, logits in _tiles(q, k, sight):
            lse = logits.logsumexp(-1)
            if lse.device.type != "cpu" or not bool((lse < torch.inf).all()):
                lse = _hide(logits).logsumexp(-1)
            out[:, :, rows] = lse
    return out


@torch.no_grad()
def attention_share(q: Tensor, k: Tensor, part: Tensor, sight: Sight) -> Tensor:
    """How much of the attention of each query row falls on a part of the keys.

    Args:
        q: (B, H, M, d).
        k: (B, G, N, d).
        part: (B or 1, N) bool.
        sight: as in :func:`attention_lse`.

    Returns:
        (B, H, M) float32; 0 where a row sees nothing.
    """
    out = q.new_zeros(q.shape[:3], dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys, logits in _tiles(q, k, sight):
            out[:, :, rows] = (_softmax(logits) @ part[:, None, keys, None].float())[..., 0]
    return out


@torch.no_grad()
def attention_columns(q: Tensor, k: Tensor, weight: Tensor, lse: Tensor | None, sight: Sight) -> Tensor:
    """Sum over the query rows of the attention that each key receives in each head; no H × M × N map is held.

    Args:
        q: (B, H, M, d).
        k: (B, G, N, d).
        weight: (B, H, M) float32, not negative, how much each row counts; 0 leaves it out.
        lse: (B, H, M) float32 of :func:`attention_lse`, if known.
        sight: as there.

    Returns:
        (B, H, N) float32, Σ_m weight_hm · softmax_n(logits_hm).
    """
    out = q.new_zeros(*q.shape[:2], k.shape[2], dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys, logits in _tiles(q, k, sight):
            received = _softmax(logits) if lse is None else _shares(logits, lse[:, :, rows])
            part = weight[:, :, None, rows] @ received
            if part.device.type != "cpu" or not bool(part.isfinite().all()):
                part = weight[:, :, None, rows] @ _nothing_odd(received)
            out[..., keys] += part[:, :, 0]
    return out


@torch.no_grad()
def attention_peaks(
    q: Tensor, k: Tensor, weight: Tensor, lse: Tensor | None, group: Tensor | None, sight: Sight
) -> Tensor:
    """As :func:`attention_columns`, of the largest over heads instead of each.

    Args:
        q: (B, H, M, d).
        k: (B, G, N, d).
        weight: (B, M) float32, not negative.
        lse: (B, H, M) float32, if known.
        group: (B, M + N) int32 or None; a row counts only for keys of the same number as its own.
        sight: as there.

    Returns:
        (B, N) float32, Σ_m weight_m · max_h softmax_n(logits_hm).
    """
    m, n = q.shape[2], k.shape[2]
    out = q.new_zeros(len(q), n, dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for rows, keys, logits in _tiles(q, k, sight):
            received = _softmax(logits) if lse is None else _nothing_odd(_shares(logits, lse[:, :, rows]))
            peaks = received.amax(1)
            if group is not None:
                peaks *= group[:, :m, None][:, rows] == group[:, None, m:][..., keys]
            out[:, keys] += (weight[:, None, rows] @ peaks)[:, 0]
    return out


def _shares(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse); 0 in rows whose lse is not finite, and odd where a logit is not. Changes the logits."""
    return logits.sub_(torch.where(lse.isfinite(), lse, torch.inf)[..., None]).exp_()


def _nothing_odd(shares: Tensor) -> Tensor:
    """What is not finite as 0, in place."""
    return shares.nan_to_num_(nan=0.0, posinf=0.0)


# ------------------------------------------------------------------------------------------- matching and merging


def nearest_unit(x: Tensor, y: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Twin of :func:`visiontok.kernels.ops.nearest_unit`, in tiles."""
    (b, m), n = x.shape[:2], y.shape[1]
    best, where = x.new_full((b, m), -torch.inf), torch.zeros(b, m, dtype=torch.long, device=x.device)
    index = torch.arange(n, device=x.device)
    step = max(1, TILE // max(1, b * n))
    for begin in range(0, m if n else 0, step):
        rows = slice(begin, begin + step)
        similarity = _cosine(x[:, rows], y)
        if valid is not None:
            allowed = valid if valid.shape[1] == 1 else valid[:, rows]
            similarity = torch.where(allowed, similarity, -torch.inf)
        top = similarity.amax(-1, keepdim=True)
        best[:, rows] = top[..., 0]
        where[:, rows] = torch.where(similarity == top, index, n).amin(-1)
    return best, where


def nearest_later(x: Tensor, valid: Tensor) -> Tensor:
    """Largest cosine of each row of x (B, N, D) to a valid row of higher index, (B, N) float32; -inf for none."""
    b, n = valid.shape
    index = torch.arange(n, device=x.device)
    x, best = unit(x), []
    step = max(1, TILE // max(1, b * n))
    for begin in range(0, n, step):
        rows = slice(begin, begin + step)
        later = (index[begin:] > index[rows, None]) & valid[:, None, begin:]
        best.append(torch.where(later, _cosine(x[:, rows], x[:, begin:]), -torch.inf).amax(-1))
    return torch.cat(best, 1) if best else x.new_zeros(b, 0, dtype=torch.float32)


def gather_nearest(x: Tensor, metric: Tensor, weight: Tensor, rows: Tensor, count: int, valid: Tensor) -> Tensor:
    """Σ_j weight_j · x_j over the ``count`` rows j that are nearest to row i, for some rows i.

    Args:
        x: (B, N, D).
        metric: (B, N, E), compared by cosine; of equal rows those of lowest index come first.
        weight: (B, N).
        rows: (B, M) long, the rows i, which are not their own neighbours.
        count: neighbours of a row; all others where there are fewer.
        valid: (B, N) bool, what may be a neighbour.

    Returns:
        (B, M, D) in float32 or better.
    """
    (b, n, d), m = x.shape, rows.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x, metric = torch.where(valid[..., None], x, 0.0), unit(metric)
    weight = torch.where(valid, weight, 0.0).to(x.dtype)[:, None]
    index = torch.arange(n, device=x.device)
    sums = [x.new_zeros(b, 0, d)]
    step = max(1, TILE // max(1, b * n))
    for begin in range(0, m, step):
        at = rows[:, begin : begin + step, None]
        able = valid[:, None] & (index != at)
        similarity = _cosine(metric.gather(1, at.expand(-1, -1, metric.shape[-1])), metric)
        similarity = torch.where(able, similarity, -torch.inf)
        nearest = similarity.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        chosen = torch.zeros_like(able).scatter_(2, nearest, True) & able
        with torch.autocast(x.device.type, enabled=False):
            sums.append(torch.where(chosen, weight, 0.0) @ x)
    return torch.cat(sums, 1)


def segment_mean(x: Tensor, group: Tensor, count: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`visiontok.kernels.ops.segment_mean`; reads every row once."""
    b, n, d = x.shape
    inside = group >= 0
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = torch.where(inside, weight.to(x.dtype), 0.0)
    groups = b * count  # and a spare one behind them for what is left out
    flat = torch.where(inside, group + torch.arange(b, device=x.device)[:, None] * count, groups).flatten()
    order = flat.sort(dim=0, stable=True).indices
    lengths = torch.zeros(groups + 1, dtype=torch.long, device=x.device)
    lengths.scatter_add_(0, flat, torch.ones_like(order))
    ranked = weight.flatten()[order]
    size = torch.segment_reduce(ranked, "sum", lengths=lengths, axis=0, unsafe=True)
    share = ranked / torch.where(size > 0, size, 1.0)[flat[order]]
    begin = lengths.cumsum(0) - lengths
    means = F.embedding_bag(order, x.reshape(b * n, d), begin, mode="sum", per_sample_weights=share)
    return means[:groups].view(b, count, d), size[:groups].view(b, count)


# ---------------------------------------------------------------------------------------------------- compaction


def gather_rows(tensors: Sequence[Tensor], dims: Sequence[int], slots: Tensor) -> list[Tensor]:
    """Twin of :func:`visiontok.kernels.ops.gather_rows`, differentiable."""
    batch, width = slots.shape
    gathered = []
    for x, dim in zip(tensors, dims, strict=True):
        x = x.expand(*x.shape[: dim - 1], batch, *x.shape[dim:])
        index = slots.view(*[1] * (dim - 1), batch, width, *[1] * (x.ndim - dim - 1))
        gathered.append(x.gather(dim, index.expand(*x.shape[:dim], width, *x.shape[dim + 1 :])))
    return gathered
