"""The support table: architecture × mode × stage, from what the tests found.

A test marked ``support`` speaks for cells of the table. Its ``architecture``, ``stage`` (one or several) and ``mode``
are those its markers name; what they do not, its parameters ``name``, ``schedule`` (each of whose stages is one) and
``mode`` say. A test that shows a refusal hands its sentence over with ``record_property("refused", sentence)``.

``pytest --support FILE`` writes down what the marked tests found, ``python tests/support.py FILE...`` prints the table
of such runs. This module is the pytest plugin, too.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

STAGES = {"prompt": "P", "cut": "C", "inject": "I", "exit": "E", "skip": "S", "freeze": "F", "mass": "M"}
Cell = tuple[str, str, str]  # mode, architecture, stage


# ---- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", type=Path, metavar="FILE", help="write there what the tests marked `support` found")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.support and not hasattr(config, "workerinput"):  # xdist's workers report to the main process
        config.pluginmanager.register(Results(config.option.support))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if markers := list(item.iter_markers("support")):
            named = dict(named for marker in reversed(markers) for named in marker.kwargs.items())
            given = item.callspec.params if hasattr(item, "callspec") else {}
            item.user_properties.append(("support", cells(named, given)))


def cells(named: dict[str, Any], given: dict[str, Any]) -> list[Cell]:
    """The cells that a test speaks for, by what its markers name and its parameters are."""
    from visiontok.conformance.schedules import SCHEDULES

    mode, architecture = named.get("mode") or given["mode"], named.get("architecture") or given["name"]
    stages = named.get("stage") or [stage.kind for stage in SCHEDULES[given["schedule"]]]
    stages = [stages] if isinstance(stages, str) else stages
    return [(mode, architecture, stage) for stage in STAGES if stage in stages]


class Results:
    """Writes down what the marked tests found.

    Args:
        file: a JSON object of ``transformers``, its version, and ``results``: [test, cells, outcome, reason].
    """

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "support" not in properties or (report.passed and report.when != "call"):
            return
        outcome, reason = report.outcome, ""
        if hasattr(report, "wasxfail"):
            reason = report.wasxfail.removeprefix("reason: ")
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.passed and "refused" in properties:
            outcome, reason = "refused", properties["refused"]
        self.found.append([report.nodeid, properties["support"], outcome, reason])

    def pytest_sessionfinish(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        run = {"transformers": importlib.metadata.version("transformers"), "results": self.found}
        self.file.write_text(json.dumps(run), encoding="utf-8")


# ---- the table

TITLE = """\
# What is supported

Made by `python tests/support.py` from the results of the tests marked `support`, run on tiny random models with
transformers {versions}. Each compares with the dense masked oracle, or with what its name says.

Letters are stages that passed in this mode on this architecture: {legend}.
A recipe of several stages counts for each of them. In brackets: it does not work, for the reason of that number; a
number behind letters without brackets: it works, except as said there. Empty: no test tries it.
"""


def versions_of(runs: Iterable[dict[str, Any]]) -> list[str]:
    """Their releases of transformers, the oldest first."""
    return sorted({run["transformers"] for run in runs}, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])


def merged(runs: list[dict[str, Any]]) -> dict[Cell, dict[str, set[str]]]:
    """Per cell, each reason why it did not work ("": it did) with the releases where it was given.

    Raises:
        SystemExit: if a test failed.
    """
    found: dict[Cell, dict[str, set[str]]] = {}
    for run in runs:
        for test, places, outcome, reason in run["results"]:
            if outcome == "failed":
                raise SystemExit(f"transformers {run['transformers']}: {test} failed; there is no table of failures")
            for place in places:
                found.setdefault(tuple(place), {}).setdefault(reason, set()).add(run["transformers"])
    return found


def short(reason: str) -> str:
    """Without the model's name in front and the way out behind, on one line of a table."""
    return " ".join(re.sub(r"^\w+: ", "", reason).split("; ")[0].split()).replace("|", "\\|")


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: modes × architectures, then the reasons."""
    found, versions = merged(runs), versions_of(runs)
    notes: dict[str, int] = {}

    def note(cell: Cell) -> str:
        tried = set().union(*found[cell].values())
        numbers = []
        for reason, where in sorted(found[cell].items()):
            if reason:
                some = "" if where == tried else f"transformers {', '.join(v for v in versions if v in where)}: "
                numbers.append(notes.setdefault(some + short(reason), len(notes) + 1))
        return ", ".join(map(str, sorted(set(numbers))))

    def text(mode: str, architecture: str) -> str:
        groups: dict[tuple[bool, str], str] = {}
        for stage, letter in STAGES.items():
            if (cell := (mode, architecture, stage)) in found:
                key = "" in found[cell], note(cell)
                groups[key] = groups.get(key, "") + letter
        return " ".join(
            (letters if works else f"({letters})") + (f"<sup>{numbers}</sup>" if numbers else "")
            for (works, numbers), letters in groups.items()
        )

    tried = Counter(architecture for _, architecture in {cell[:2] for cell in found})
    architectures = sorted(tried, key=lambda name: (-tried[name], name))
    modes = sorted({mode for mode, _, _ in found})
    legend = ", ".join(f"{letter} {stage}" for stage, letter in STAGES.items())
    return "\n".join(
        [
            TITLE.format(versions=", ".join(versions), legend=legend),
            f"| | {' | '.join(architectures)} |",
            f"|---|{'---|' * len(architectures)}",
            *(f"| {mode} | {' | '.join(text(mode, name) for name in architectures)} |" for mode in modes),
            "",
            *(f"{number}. {reason}" for reason, number in notes.items()),
            "",
        ]
    )


def read(text: str) -> Iterator[Cell]:
    """The cells of a table."""
    stage_of = {letter: stage for stage, letter in STAGES.items()}
    head, _, *rows = ([c.strip() for c in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|"))
    for mode, *columns in rows:
        for architecture, column in zip(head[1:], columns, strict=True):
            for letter in re.sub("<sup>.*?</sup>|[() ]", "", column):
                yield mode, architecture, stage_of[letter]


if __name__ == "__main__":
    print(table([json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]), end="")
