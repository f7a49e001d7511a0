"""Results of a sweep as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .runner import FULL


def print_results(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table for every task, and below it what a reader must know."""
    for task in dict.fromkeys(result["task"] for result in results):
        of_task = [result for result in results if result["task"] == task]
        full = next((_headline(result) for result in of_task if result["cell"] == FULL), None)
        name = of_task[0]["headline"]
        table = Table("method", name, "of full", "tokens", "answer tokens", "errors", title=_title(of_task[0]))
        for result in of_task:
            score, tokens = _headline(result), result["layer_average"] or result["visual_tokens"]
            table.add_row(
                result["cell"],
                f"{result['points'] * score:.1f}",
                "-" if not full else f"{100 * score / full:.1f} %",
                "-" if tokens is None else f"{tokens:.1f}",
                f"{result['answer_tokens']:.1f}",
                str(result["errors"]),
            )
        console.print(table)
        for result in of_task:
            for text, count in result["warnings"].items():
                console.print(f"{result['cell']}: {text} ({count} of {result['questions']} questions)")


def _headline(result: Mapping[str, Any]) -> float:
    score: float = result["scores"][result["headline"]]
    return score


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['task']}, {result['questions']} questions"
