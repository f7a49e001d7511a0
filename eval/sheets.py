"""Tables for readers, as plain text, Markdown, LaTeX and HTML, and comparisons as CSV and JSON for programs."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from visiontok.statistics import Estimate

from .compare import ALL, Across, Compared, Line

FORMATS = ("text", "markdown", "latex", "csv", "json")
NONE = "–"

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "−": "$-$", "–": "--", "×": r"$\times$", "…": r"\ldots{}",
}  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """A table: text in the first columns, numbers in the others.

    Attributes:
        title: above it.
        head: names of the columns.
        rows: cells, as many as the head has.
        notes: below it.
        named: how many columns hold text.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    named: int = 1

    def print(self, console: Console) -> None:
        table = Table(title=escape(self.title), title_justify="left")
        for at, name in enumerate(self.head):
            table.add_column(escape(name), justify="left" if at < self.named else "right")
        for row in self.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in self.notes:
            console.print(escape(note))

    def markdown(self) -> str:
        """GitHub's table."""
        lines = [self.head, ["---" if at < self.named else "---:" for at in range(len(self.head))], *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n\n".join([f"**{self.title}**", table, *self.notes]) + "\n"

    def latex(self) -> str:
        """A ``table`` that needs the package booktabs."""
        columns = "l" * self.named + "r" * (len(self.head) - self.named)
        rows = [" & ".join(map(latex, row)) + r" \\" for row in (self.head, *self.rows)]
        return (
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{latex(' '.join([f'{self.title}.', *self.notes]))}}}",
                    rf"\begin{{tabular}}{{{columns}}}",
                    r"\toprule",
                    rows[0],
                    r"\midrule",
                    *rows[1:],
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
            + "\n"
        )

    def html(self) -> str:
        """A ``figure`` with a ``table`` that scrolls by itself where the page is narrow."""
        cells = ["".join(f"<th>{html.escape(name)}</th>" for name in self.head)]
        cells += [
            "".join(
                f"<th scope=row>{html.escape(cell)}</th>" if at < self.named else f"<td>{html.escape(cell)}</td>"
                for at, cell in enumerate(row)
            )
            for row in self.rows
        ]
        body = "\n".join(f"<tr>{row}</tr>" for row in cells[1:])
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<figure><figcaption>{html.escape(self.title)}</figcaption>"
            f"<div class=scroll><table class=named{self.named}><thead><tr>{cells[0]}</tr></thead>\n"
            f"<tbody>\n{body}\n</tbody></table></div>{notes}</figure>\n"
        )


def latex(text: str) -> str:
    """Text as LaTeX would print it."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


# -------------------------------------------------------------------------------------------------------------- numbers


def number(value: float, points: float = 1.0, sign: str = "") -> str:
    """With one digit behind the point, and a minus that is one."""
    return format(round(points * value, 1) + 0.0, f"{sign}.1f").replace("-", "−")  # + 0.0: no minus before a zero


def estimate(found: Estimate | None, points: float = 1.0, sign: str = "") -> str:
    """With its interval."""
    if found is None:
        return NONE
    return " ".join(
        (number(found.value, points, sign), f"[{number(found.low, points, sign)}, {number(found.high, points, sign)}]")
    )


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def mcnemar(line: Line) -> str:
    """Gained and lost questions, and the exact p-value."""
    found = line.comparison.mcnemar
    return NONE if found is None else f"+{found.gained} −{found.lost}, {probability(found.p)}"


# ---------------------------------------------------------------------------------------------------------- comparisons

Cell = Callable[[Line], str]
COLUMNS: Mapping[str, Cell] = {
    "method": lambda line: line.method,
    "tokens": lambda line: NONE if line.tokens is None else number(line.tokens),
    "score": lambda line: estimate(line.comparison.score, line.points),
    "relative, %": lambda line: estimate(line.comparison.relative, 100),
    "difference": lambda line: estimate(line.comparison.difference, line.points, "+"),
    "p (Holm)": lambda line: probability(line.p_holm),
    "McNemar": mcnemar,
    "no worse": lambda line: "yes" if line.comparison.noninferiority.shown else "not shown",
    "same answers, %": lambda line: number(line.flips.agreement.value, 100),
    "answer tokens": lambda line: estimate(line.length, 1, "+"),
    "errors": lambda line: str(line.errors),
}


def sheets(found: Compared) -> list[Sheet]:
    """Tables of comparisons, one for each task."""
    tables = []
    for task in dict.fromkeys(line.task for line in found.whole):
        whole = [line for line in found.whole if line.task == task]
        tables.append(whole_sheet(f"{task}: against {whole[0].against}", whole))
        if parts := [line for line in found.parts if line.task == task]:
            tables.append(part_sheet(f"{task}: against {parts[0].against}, by groups of questions", parts))
    tables += [kind_sheet(found.kinds)] if found.kinds else []
    return tables


def whole_sheet(title: str, whole: Sequence[Line], more: Mapping[str, Cell] = MappingProxyType({})) -> Sheet:
    """Of one task; with ``more`` columns behind the method and its tokens."""
    columns = [*list(COLUMNS.items())[:2], *more.items(), *list(COLUMNS.items())[2:]]
    rows = [[cell(line) for _, cell in columns] for line in whole]
    return Sheet(title, [name for name, _ in columns], rows, [legend(whole)])


def part_sheet(title: str, parts: Sequence[Line]) -> Sheet:
    """Of groups of questions."""
    columns = {"questions": lambda line: str(line.comparison.questions), **COLUMNS}
    del columns["method"], columns["errors"]
    rows = [[line.method, line.part, *(cell(line) for cell in columns.values())] for line in parts]
    note = f"p adjusted for {parts[0].family} comparisons; groups are smaller than the whole, and find less."
    return Sheet(title, ["method", "group", *columns], rows, [note], named=2)


def kind_sheet(kinds: Sequence[Across]) -> Sheet:
    """Of several tasks."""
    rows = [
        [
            one.method, one.kind, str(len(one.tasks)), number(one.score, 100), estimate(one.relative, 100),
            estimate(one.difference, 100, "+"), probability(one.p_holm),
        ]
        for one in kinds
    ]  # fmt: skip
    of = "; ".join(dict.fromkeys(f"{one.kind}: {', '.join(one.tasks)}" for one in kinds if one.kind != ALL))
    return Sheet(
        f"Means over tasks, against {kinds[0].against}",
        ["method", "kind", "tasks", "score", "relative, %", "difference", "p (Holm)"],
        rows,
        [f"Every task counts alike, in percent of its highest score. {of}."],
        named=2,
    )


def legend(whole: Sequence[Line]) -> str:
    """What a reader of a task's table must know."""
    first, points = whole[0].comparison, whole[0].points
    least, most = (find(line.comparison.detectable for line in whole) for find in (min, max))
    seen = f"from {number(least, points)}" + (f" to {number(most, points)}" if math.isfinite(most) else "")
    margin = 100 * first.noninferiority.margin
    return (
        f"{first.questions} questions in {first.clusters} clusters; {whole[0].against} has "
        f"{estimate(first.reference, points)}. Intervals of 95 % (BCa bootstrap over clusters); p of a permutation "
        f"test, adjusted for {whole[0].family} comparisons; McNemar's exact test counts questions gained and lost, and "
        f"knows of no clusters; no worse: a loss of {margin:g} % of the highest score is excluded. So many questions "
        f"find differences {seen} points four times in five, depending on how many answers change."
    )


def plain(found: Compared) -> dict[str, Any]:
    """As data for JSON; scores are shares of 1, or the headline's own numbers."""
    return asdict(found)


def flat(line: Line) -> dict[str, Any]:
    """One comparison as one row of CSV."""
    one, bound = line.comparison, line.comparison.noninferiority
    row: dict[str, Any] = {name: getattr(line, name) for name in ("task", "part", "method", "against")}
    row |= {"questions": one.questions, "clusters": one.clusters, "errors": line.errors, "tokens": line.tokens}
    for name, found in (
        ("score", one.score),
        ("reference", one.reference),
        ("difference", one.difference),
        ("relative", one.relative),
        ("agreement", line.flips.agreement),
        ("answer_tokens", line.length),
    ):
        ends = (None, None, None) if found is None else (found.value, found.low, found.high)
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    row |= {"p": one.difference.p, "p_holm": line.p_holm}
    row |= {"gained": line.flips.gained, "lost": line.flips.lost}
    row |= {
        "mcnemar_p": None if one.mcnemar is None else one.mcnemar.p,
        "mcnemar_mid_p": None if one.mcnemar is None else one.mcnemar.mid_p,
    }
    row |= {"margin": bound.margin, "noninferiority_low": bound.low, "noninferiority_p": bound.p}
    return row | {"no_worse": bound.shown, "detectable": one.detectable}


def flat_across(one: Across) -> dict[str, Any]:
    """Means over tasks in the columns of :func:`flat`."""
    relative = one.relative
    return {
        "task": " ".join(one.tasks),
        "part": one.kind,
        "method": one.method,
        "against": one.against,
        "score": one.score,
        "difference": one.difference.value,
        "difference_low": one.difference.low,
        "difference_high": one.difference.high,
        "relative": None if relative is None else relative.value,
        "relative_low": None if relative is None else relative.low,
        "relative_high": None if relative is None else relative.high,
        "p": one.difference.p,
        "p_holm": one.p_holm,
    }


def csv_text(found: Compared) -> str:
    """All comparisons, one a row, unrounded."""
    rows = [flat(line) for line in (*found.whole, *found.parts)]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, *map(flat_across, found.kinds)])
    return file.getvalue()


def written(found: Compared, form: str, width: int = 200) -> str:
    """Comparisons in one of FORMATS; ``width`` is the terminal's, for text."""
    if form == "csv":
        return csv_text(found)
    if form == "json":
        return json.dumps(plain(found), indent=2, ensure_ascii=False) + "\n"
    if form == "latex":
        return "% needs \\usepackage{booktabs}\n" + "\n".join(sheet.latex() for sheet in sheets(found))
    if form == "markdown":
        return "\n".join(sheet.markdown() for sheet in sheets(found))
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False)
    for sheet in sheets(found):
        sheet.print(console)
    return file.getvalue()
