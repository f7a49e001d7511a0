"""Column statistics of attention against the map itself, in float64, and against laws that hold of any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from visiontok.kernels import attention_lse, reference, sight
from visiontok.kernels.runtime import CHECK

from visiontok import functional as F
from visiontok.errors import ConfigError, UnsupportedError

B, H, G, M, N, D = 2, 6, 2, 13, 19, 8


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flags(*shape: int, seed: int = 0, share: float = 0.6) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


Q, K = 2 * normal(B, H, M, D), normal(B, G, N, D, seed=1)
WEIGHT = normal(B, M, seed=2).abs() * flags(B, M, seed=2)

OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 4},
    "wide window": {"causal": True, "window": 40},
    "validity": {"valid": flags(B, N, seed=3)},
    "no key": {"valid": torch.zeros(B, N, dtype=torch.bool)},
    "mask": {"visible": flags(B, M, N, seed=4, share=0.2)},
    "bias": {"bias": normal(B, N, seed=5), "scale": 0.9},
    "all at once": {
        "causal": True, "window": 9, "valid": flags(B, N, seed=3), "visible": flags(B, M, N, seed=4),
        "bias": normal(B, N, seed=5), "scale": 1.4,
    },
}  # fmt: skip
COUNTED: dict[str, dict[str, Any]] = {
    "all rows": {},
    "every third row": {"rows": slice(1, None, 3)},
    "some rows": {"rows": torch.tensor([0, 3, 4, 12])},
    "weighted rows": {"weight": WEIGHT},
    "rows weighted by head": {"weight": normal(B, H, M, seed=6).abs()},
    "some of them weighted": {"weight": WEIGHT, "rows": torch.tensor([5, 2, 11])},
}


def dense(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The map (B, H, M, N) in float64, 0 in rows that see nothing, and what is seen, (B, M, N)."""
    m, n = q.shape[2], k.shape[2]
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    logits = logits * options.get("scale", q.shape[-1] ** -0.5)
    seen = torch.ones(len(q), m, n, dtype=torch.bool)
    row, key = torch.arange(m)[:, None] + n - m, torch.arange(n)
    if options.get("causal"):
        seen = seen & (key <= row) & (key > row - options.get("window", 10**6))
    if "valid" in options:
        seen = seen & options["valid"][:, None]
    if "visible" in options:
        seen = seen & options["visible"]
    if "bias" in options:
        logits = logits + options["bias"][:, None, None]
    return logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0), seen


def by_hand(found: torch.Tensor, seen: torch.Tensor, counted: dict[str, Any], heads: str, normalise: Any) -> Any:
    """Weighted sums over the rows of a map, normalised."""
    weight = counted.get("weight", torch.ones(B, M))
    weight = (weight if weight.ndim == 3 else weight[:, None].expand(-1, H, -1)).double()
    chosen = torch.zeros(M).index_fill(0, torch.arange(M)[counted.get("rows", slice(None))], 1.0)
    weight = weight * chosen
    if heads == "max":
        total = torch.einsum("bm,bmn->bn", weight[:, 0], found.amax(1))
    else:
        total = torch.einsum("bhm,bhmn->bhn", weight, found)
    by = weight.sum(-1, keepdim=True)
    if normalise == "count":
        by = torch.einsum("bm,bmn->bn", (weight > 0).any(1).double(), seen.double())[:, None]
    if heads != "each":
        by = by.mean(1)
    if heads == "mean":
        total = total.mean(1)
    return total if normalise is None else total / by.where(by > 0, 1.0)


@pytest.mark.parametrize(("tile", "known"), [(1 << 24, False), (500, True)], ids=["one tile", "tiles, lse known"])
@pytest.mark.parametrize("rows", COUNTED)
@pytest.mark.parametrize("sees", OPTIONS)
def test_columns_are_those_of_the_map(
    sees: str, rows: str, tile: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE", tile)
    monkeypatch.setenv(CHECK, "1")
    options, counted = OPTIONS[sees], COUNTED[rows]
    found, seen = dense(Q, K, options)
    lse = attention_lse(Q, K, sight(Q, K, **options)) if known else None
    for heads in ("mean", "each", "max"):
        if heads == "max" and rows == "rows weighted by head":
            continue
        for normalise in ("rows", "count", None):
            got = F.attention_columns(Q, K, **options, **counted, heads=heads, normalise=normalise, lse=lse)
            expected = by_hand(found, seen, counted, heads, normalise).float()
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)
    part = F.attention_columns(Q, K, **options, **counted, keys=slice(3, 9), lse=lse)
    assert torch.equal(part, F.attention_columns(Q, K, **options, **counted, lse=lse)[:, 3:9])


@pytest.mark.parametrize("sees", OPTIONS)
def test_shares_are_those_of_the_map(sees: str) -> None:
    found, _ = dense(Q, K, OPTIONS[sees])
    part, rows = flags(B, N, seed=7), torch.tensor([1, 12, 4])
    expected = (found * part[:, None, None]).sum(-1).mean(1).float()
    torch.testing.assert_close(F.attention_share(Q, K, part, **OPTIONS[sees]), expected, rtol=2e-5, atol=1e-6)
    some = F.attention_share(Q, K, part, **OPTIONS[sees], rows=rows)
    torch.testing.assert_close(some, expected[:, rows], rtol=2e-5, atol=1e-6)


def test_rows_count_for_keys_of_their_own_number() -> None:
    of_rows, of_keys = torch.randint(0, 3, (B, M)), torch.randint(0, 3, (B, N))
    found, _ = dense(Q, K, {})
    own = found.amax(1) * (of_rows[:, :, None] == of_keys[:, None])
    got = F.attention_columns(Q, K, weight=WEIGHT, heads="max", group=(of_rows, of_keys), normalise=None)
    torch.testing.assert_close(got, torch.einsum("bm,bmn->bn", WEIGHT.double(), own).float())


def test_packed_sequences_are_told_apart() -> None:
    """As flash attention has them: empty sequences, one token alone, other lengths of queries and keys."""
    q, k = normal(20, H, D), normal(26, G, D, seed=1)
    of_rows, of_keys = torch.tensor([0, 0, 7, 8, 20], dtype=torch.int32), torch.tensor([0, 3, 9, 10, 26])
    got = F.attention_columns(q, k, cu_seqlens=(of_rows, of_keys), normalise=None)
    each = []
    for a, b, c, d in zip(of_rows[:-1], of_rows[1:], of_keys[:-1], of_keys[1:], strict=True):
        found, _ = dense(q[a:b].transpose(0, 1)[None], k[c:d].transpose(0, 1)[None], {})
        each.append(found.sum(2).mean(1)[0])
    torch.testing.assert_close(got, torch.cat(each).float(), rtol=2e-5, atol=1e-6)
    assert not got[:3].any()  # nobody asks there
    same = F.attention_columns(q, k[:20], cu_seqlens=of_rows, normalise="count")
    torch.testing.assert_close(torch.stack([part.sum() for part in same.split([7, 1, 12])]), torch.ones(3))


def test_the_order_of_rows_and_keys_is_no_matter() -> None:
    options = OPTIONS["mask"] | OPTIONS["bias"]
    rows, keys = torch.randperm(M), torch.randperm(N)
    turned = {"visible": options["visible"][:, rows][..., keys], "bias": options["bias"][:, keys], "scale": 0.9}
    expected = F.attention_columns(Q, K, **options, weight=WEIGHT)[:, keys]
    torch.testing.assert_close(
        F.attention_columns(Q[:, :, rows], K[:, :, keys], **turned, weight=WEIGHT[:, rows]), expected
    )


def test_a_column_is_a_row_of_the_transposed_problem() -> None:
    """Σ_m exp(s_mn - lse_m) is the exponential of the lse of the keys that ask the queries, biased by -lse."""
    q, k = Q[:, :G], K
    lse = attention_lse(q, k, sight(q, k))
    turned = [attention_lse(k[:, h : h + 1], q[:, h : h + 1], sight(k, q, bias=-lse[:, h])) for h in range(G)]
    expected = torch.cat(turned, 1).exp()
    torch.testing.assert_close(F.attention_columns(q, k, heads="each", normalise=None), expected)


def test_what_keys_receive_is_what_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong lse is noticed where sums are checked, and only there."""
    wrong = attention_lse(Q, K, sight(Q, K, scale=0.1))
    F.attention_columns(Q, K, lse=wrong)
    monkeypatch.setenv(CHECK, "1")
    F.attention_columns(Q, K, lse=attention_lse(Q, K, sight(Q, K)))
    with pytest.raises(UnsupportedError, match="lse must be of the same queries, keys, scale and mask"):
        F.attention_columns(Q, K, lse=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, r"window=3.*give causal=True"),
        ({"group": (torch.zeros(M), torch.zeros(N))}, r"group with heads='mean'"),
        ({"heads": "max", "weight": torch.ones(B, H, M)}, r"weight \(2, 6, 13\) with heads='max'"),
        ({"cu_seqlens": torch.tensor([0, M])}, r"cu_seqlens with q \(2, 6, 13, 8\)"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        F.attention_columns(Q, K, **options)


def test_one_bad_token_spoils_nothing_else() -> None:
    """A key that is not finite is not seen, and a query that is not finite sees nothing."""
    q, k = Q.clone(), K.clone()
    q[0, 1, 4], k[:, 0, 7, 3] = torch.nan, torch.inf
    q[:, :3] = q[:, :3].abs()  # inf - inf would be NaN, which is the same
    bad = torch.zeros(B, H, M, N, dtype=torch.bool)
    bad[0, 1, 4], bad[:, :3, :, 7] = True, True
    a, b = q.nan_to_num(0, 0, 0).double(), k.nan_to_num(0, 0, 0).double()
    scores = (a @ b.repeat_interleave(H // G, 1).mT / D**0.5).masked_fill(bad, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0.0).sum(2).float()
    torch.testing.assert_close(F.attention_columns(q, k, heads="each", normalise=None), expected, rtol=2e-5, atol=1e-6)
