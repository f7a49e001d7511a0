"""Run the checks on a target and tell what came out: check × architecture, and one sentence per failure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..budget import Budget
from ..errors import UnsupportedError
from .adapter_checks import ADAPTER_CHECKS, AdapterCase
from .checks import CHECKS, Case, Failed, NotApplicable
from .target import adapter_cases, method_cases, resolve

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3")
"""Architectures that differ in all that matters: CLS token, tiles, M-RoPE, DeepStack, masks of their own."""
KEEP = Budget.ratio(0.4)


@dataclass(frozen=True)
class Result:
    """What one check found on one architecture.

    Attributes:
        check: its name.
        architecture: the tiny model.
        outcome: ``n/a`` where the target makes no such claim.
        sentence: why it failed or does not apply; empty if it passed.
        seconds: how long it took.
    """

    check: str
    architecture: str
    outcome: Literal["pass", "fail", "n/a"]
    sentence: str
    seconds: float


@dataclass(frozen=True)
class Matrix:
    """All results of one target."""

    target: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and the target was not refused everywhere: somewhere its generation was compared."""
        compared = (r.outcome == "pass" and r.check in ("oracle", "schedules") for r in self.results)
        return not self.failures and any(compared)

    @property
    def failures(self) -> list[Result]:
        """The failed results."""
        return [result for result in self.results if result.outcome == "fail"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"target": self.target, "ok": self.ok, "results": [asdict(result) for result in self.results]}

    def render(self, console: Console) -> None:
        """Print the matrix, the failures and what did not apply."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("check", no_wrap=True, style="bold")
        columns = list(dict.fromkeys(result.architecture for result in self.results))
        for name in columns:
            table.add_column(name, no_wrap=True)
        found = {(result.check, result.architecture): result.outcome for result in self.results}
        words = {"pass": "[green]pass[/]", "fail": "[bold red]FAIL[/]", "n/a": "[dim]-[/]"}
        for check in dict.fromkeys(result.check for result in self.results):
            table.add_row(check, *(words[found[check, name]] for name in columns))
        console.print(f"[bold]{escape(self.target)}[/]", soft_wrap=True)
        console.print(table)
        for outcome, word in (("fail", "FAIL"), ("n/a", "-")):
            for sentence, where in self._sentences(outcome).items():
                console.print(f"{word}  {escape(where)}: {escape(sentence)}", soft_wrap=True)
        seconds = sum(result.seconds for result in self.results)
        verdict = "passed" if self.ok else "failed" if self.failures else "nothing could be checked"
        console.print(f"{verdict} in {seconds:.0f} s")

    def _sentences(self, outcome: str) -> dict[str, str]:
        """Sentence → the checks and architectures it was found in."""
        places: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
        for result in self.results:
            if result.outcome == outcome:
                checks, architectures = places.setdefault(result.sentence, ({}, {}))
                checks[result.check] = architectures[result.architecture] = None
        return {s: f"{', '.join(checks)} ({', '.join(archs)})" for s, (checks, archs) in places.items()}


def check(
    target: Any,
    architectures: Sequence[str] = DEFAULT,
    *,
    keep: Budget = KEEP,
    options: Mapping[str, Any] | None = None,
) -> Matrix:
    """Certify a method, a recipe or an adapter.

    Args:
        target: anything :func:`visiontok.compress` takes as a recipe, or an adapter: its class, ``file.py:Class``, or a
            model type that has one.
        architectures: tiny models to try a method on. An adapter is tried on those of its own families.
        keep: the budget wherever any would do, for recipes that take one and have none.
        options: of the method, if ``target`` is the name of one.

    Raises:
        ConfigError: if there is no such target, architecture or option, or an adapter has no tiny model.
    """
    subject = resolve(target, dict(options or {}))
    if isinstance(subject, type):
        label = subject.__name__ if isinstance(target, type) else str(target)
        return run(label, adapter_cases(subject, target))
    label = str(target) if isinstance(target, str) else subject.label
    return run(label, method_cases(subject, architectures, keep))


def run(label: str, cases: Mapping[str, Case | AdapterCase]) -> Matrix:
    """All checks on all cases, by the name of their architecture."""
    results = []
    for architecture, case in cases.items():
        checks: Mapping[str, Any] = CHECKS if isinstance(case, Case) else ADAPTER_CHECKS
        results += [try_check(name, architecture, checks[name], case) for name in checks]
    return Matrix(label, tuple(results))


def try_check(name: str, architecture: str, function: Any, case: Case | AdapterCase) -> Result:
    """The result of one check; what it raises becomes a sentence."""
    start = time.perf_counter()
    outcome: Literal["pass", "fail", "n/a"] = "fail"
    try:
        function(case)
        outcome, sentence = "pass", ""
    except NotApplicable as reason:
        outcome, sentence = "n/a", str(reason)
    except Failed as failure:
        sentence = str(failure)
    except UnsupportedError as refusal:
        # A method may refuse a kind of model, in words. An adapter is there to make its models work.
        outcome, sentence = "n/a" if isinstance(case, Case) else "fail", str(refusal)
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        sentence = f"it raises {type(error).__name__}: {text}"
    return Result(name, architecture, outcome, sentence, time.perf_counter() - start)
