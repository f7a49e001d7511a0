"""``visiontok compare``: methods against one run, question by question; ``visiontok score``: a run marked anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from visiontok.errors import ConfigError
from visiontok.statistics import Comparison, Paired, compare, compare_groups, flips, holm

from .grading import mark, summary
from .records import PROTOCOL, Records, Row, differences
from .runner import RESULTS
from .scoring import metric

NEUTRAL = ("seed",)
"""Fields of a protocol in which compared runs may differ."""


@dataclass(frozen=True)
class Answered:
    """A finished run: its folder, what it is called, its protocol, and its answers in the order of the questions."""

    folder: Path
    name: str
    protocol: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def scores(self) -> np.ndarray:
        return np.array([row["score"] for row in self.rows])

    @property
    def tokens(self) -> float | None:
        """Visual tokens of a question, averaged over layers and questions."""
        kept = [float(np.mean(row["kept"])) if row["kept"] else row["visual_tokens"] for row in self.rows]
        return None if None in kept else float(np.mean(kept))


def read(folder: str) -> Answered:
    """A run by its folder.

    Raises:
        ConfigError: if it is no folder of a run, or the run is not finished.
    """
    place = Path(folder).expanduser()
    if not (place / PROTOCOL).is_file():
        raise ConfigError(f"{folder!r}: no run is here; give the folder of one method, such as evaluation/scenes/full")
    if not (place / RESULTS).is_file():
        raise ConfigError(f"{folder!r}: this run is not finished; give its command again")
    made = json.loads((place / PROTOCOL).read_text())
    found: dict[int, list[Row]] = {}
    for file in sorted(place.glob("answers-*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["block"], []).append(row)
    ordered = [found[number] for number in sorted(found)]
    blocks = [tuple(row["id"] for row in rows) for rows in ordered]
    return Answered(place, made["method"], made["protocol"], Records(place, blocks).rows())


def compared(reference: Answered, others: Sequence[Answered], *, anyhow: bool = False) -> list[Comparison]:
    """Every other run against the reference, with p-values adjusted for their number by Holm.

    Raises:
        ConfigError: if runs came about in different ways, which ``anyhow`` allows where they have the same questions.
    """
    asked = [row["id"] for row in reference.rows]
    for other in others:
        if [row["id"] for row in other.rows] != asked:
            raise ConfigError(f"{other.folder}: has other questions than {reference.folder}; compare runs of one task")
        found = [line for line in differences(reference.protocol, other.protocol) if line.split()[0] not in NEUTRAL]
        if found and not anyhow:
            raise ConfigError(
                f"{other.folder} and {reference.folder} came about differently: {'; '.join(found)}; ask both alike, "
                "or give --anyhow"
            )
    cluster = np.array([row["cluster"] for row in reference.rows])
    return [compare(Paired(other.scores, reference.scores, cluster)) for other in others]


def by_group(reference: Answered, other: Answered, key: str) -> dict[str, Comparison]:
    """A comparison within each group of questions.

    Raises:
        ConfigError: if the task has no such groups.
    """
    names = [row["groups"].get(key) for row in reference.rows]
    if None in names:
        known = sorted({name for row in reference.rows for name in row["groups"]})
        raise ConfigError(f"--by {key!r}: questions have no such group; they have {', '.join(known) or 'none'}")
    cluster = np.array([row["cluster"] for row in reference.rows])
    return compare_groups(Paired(other.scores, reference.scores, cluster), [str(name) for name in names])


def plain(reference: Answered, others: Sequence[Answered], found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons as plain data."""
    adjusted = holm([one.difference.p for one in found])
    answers, cluster = [row["answer"] for row in reference.rows], np.array([row["cluster"] for row in reference.rows])
    return [
        {
            "method": other.name,
            "against": reference.name,
            "tokens": other.tokens,
            **asdict(one),
            "p_holm": float(p),
            "not_worse": one.noninferiority.shown,
            "flips": asdict(
                flips(other.scores, reference.scores, [row["answer"] for row in other.rows], answers, cluster)
            ),
        }
        for other, one, p in zip(others, found, adjusted, strict=True)
    ]


def print_comparisons(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """As a table."""
    if not rows:
        return
    table = Table("method", "tokens", "score", "difference", "p (Holm)", "same answers", "not worse by 1 point")
    for row in rows:
        change, p = row["difference"], row["p_holm"]
        table.add_row(
            row["method"],
            "-" if row["tokens"] is None else f"{row['tokens']:.1f}",
            f"{100 * row['score']['value']:.1f}",
            f"{100 * change['value']:+.1f} [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]",
            "< 0.001" if p < 0.001 else f"{p:.3f}",
            f"{100 * row['flips']['agreement']['value']:.1f} %",
            "yes" if row["not_worse"] else "not shown",
        )
    console.print(table)
    first = rows[0]
    console.print(
        f"{first['questions']} questions in {first['clusters']} clusters, against {first['against']}; intervals of "
        f"95 % over clusters; differences below {100 * first['detectable']:.1f} points are seldom found with so many"
    )


def score(folder: str, name: str | None, dialect: str | None) -> dict[str, Any]:
    """Marks of a run's answers in another metric or dialect; nothing is written, and no model is needed.

    Raises:
        ConfigError: if there is no such metric or dialect, or the task lacks what it needs.
    """
    run = read(folder)
    task = run.protocol["task"]
    name, dialect = name or task["metric"], dialect or task["dialect"]
    rows = []
    for row in run.rows:
        found = mark(name, dialect, row["answer"], row["id"], row["target"], row["groups"])
        rows.append(row | {"score": 0.0 if row["error"] else found.score, "parsed": found.parsed})
    return {"run": str(run.folder), "metric": name, "dialect": dialect, "headline": metric(name, dialect).headline} | {
        "scores": summary(name, dialect, rows)
    }
