"""``visiontok verify``: is a receipt what a run left behind, and does the model say again what it is said to have said?

Three questions, from the cheapest on, each asked only where the last has found no fault: do the receipt, its table and
its answers fit together; are model, processor and data what the receipt says; and does a random sample of the
questions, asked anew in the blocks that they were asked in, get the same answers, byte by byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from visiontok.api import compress
from visiontok.errors import ConfigError
from visiontok.named import quiet
from visiontok.statistics import share_at_most

from . import receipt as receipts
from .compare import Answered, read
from .grading import mark
from .job import progress_bar
from .protocol import protocol
from .published import Published, find, names
from .records import PROTOCOL, Row, differences, digest
from .reproduce import Request, Setting, data_digest
from .runner import Block, answer, results

_ELSEWHERE = ("model.name", "model.device", "model.attention", "model.revision", "versions")
"""Fields of a protocol in which an honest second run may differ; answers may then differ, too."""


@dataclass(frozen=True)
class Asked:
    """A question of a receipt.

    Attributes:
        row: of the table.
        column: of the table.
        number: among the column's questions.
    """

    row: str
    column: str
    number: int


def verify(
    file: str,
    *,
    sample: int = 50,
    seed: int | None = None,
    model: str | None = None,
    data: Mapping[str, str] | None = None,
    device: str = "auto",
    console: Console,
) -> dict[str, Any]:
    """Check a receipt, and the answers beside it, against themselves and against the model.

    Args:
        file: the receipt.
        sample: questions that are asked again, drawn from all rows and columns.
        seed: of the draw; None for one that nobody could have known.
        model: where the model is here.
        data: by task, where the questions are here.
        device: where the model runs.
        console: where findings are printed.

    Returns:
        ``ok``, ``checks`` (each with a name, whether it holds, and what was found), ``elsewhere`` (what differs between
        the machines), and of the sample ``asked``, ``differ`` and ``forged_at_most``, the share of all answers that may
        be others, with 95 % confidence.

    Raises:
        ConfigError: if there is no receipt, its table is not here, or the model or the data cannot be loaded.
    """
    if sample < 1:
        raise ConfigError(f"sample={sample}: ask at least 1 question again")
    place = Path(file).expanduser()
    receipt = receipts.read(place)
    facts = receipt["facts"]
    try:
        given = Request(**facts["request"] | {name: tuple(facts["request"][name]) for name in ("rows", "tasks")})
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{place}: its request cannot be read ({error}); make it anew") from error
    table = find(given.table)
    checks = _on_paper(receipt, table, given.table)
    answered, more = _answers(place.parent, facts, table)
    checks += more
    report: dict[str, Any] = {"receipt": str(place), "elsewhere": [], "asked": 0, "differ": [], "forged_at_most": None}
    if answered and all(check["ok"] for check in checks):
        seed = secrets.randbits(32) if seed is None else seed
        report["seed"] = seed
        request = dataclasses.replace(
            given, model=model or given.model, data=dict(data) if data is not None else given.data, device=device
        )
        with quiet(), torch.inference_mode():
            setting = Setting.of(request, table, refuse=False)
            found, report["elsewhere"] = _setting(setting, facts)
            checks += found
            if all(check["ok"] for check in found):
                checks.append(_again(setting, answered, facts, sample, seed, report))
    report |= {"checks": checks, "ok": all(check["ok"] for check in checks)}
    _print(report, console)
    return report


def _check(name: str, wrong: list[str], fine: str) -> dict[str, Any]:
    return {"check": name, "ok": not wrong, "said": "; ".join(wrong) or fine}


def _on_paper(receipt: Mapping[str, Any], table: Published, source: str) -> list[dict[str, Any]]:
    """What the receipt itself tells."""
    facts = receipt["facts"]
    here = {"name": table.name, "digest": table.digest}
    there = {name: facts["table"][name] for name in here}
    own = f"is {source}, no built-in table: its numbers are as good as that file"
    which = "is the one here" if source in names() else own
    derived = json.loads(json.dumps(receipts.findings(table, facts)))
    return [
        _check("hash", [] if receipts.intact(receipt) else ["the receipt was changed after it was written"], "intact"),
        _check("table", differences(there, here), f"{table.name} {which}"),
        _check("findings", differences(receipt["findings"], derived), "follow from the facts"),
    ]


def _answers(
    folder: Path, facts: Mapping[str, Any], table: Published
) -> tuple[dict[tuple[str, str], Answered], list[dict[str, Any]]]:
    """The answers beside the receipt, and whether they are those that it sums up."""
    found: dict[tuple[str, str], Answered] = {}
    wrong: dict[str, list[str]] = {"answers": [], "scores": []}
    for cell in facts["cells"]:
        name = cell["folder"]
        try:
            run = read(str(folder / name))
        except (ConfigError, KeyError, ValueError) as error:
            wrong["answers"].append(f"{name}: {error}")
            continue
        found[cell["row"], cell["column"]] = run
        if digest(run.rows) != cell["digest"]:
            wrong["answers"].append(f"{name}: the answers are not those of the receipt")
        if differences(json.loads((folder / name / PROTOCOL).read_text())["protocol"], cell["protocol"]):
            wrong["answers"].append(f"{name}: {PROTOCOL} is not that of the receipt")
        row = table.row(cell["row"])
        recipe = None if row.method is None else row.recipe().hash()
        if cell["recipe"] != recipe or any(one["recipe"] != recipe for one in run.rows):
            wrong["answers"].append(f"{name}: the recipe is not that of the row")
        wrong["scores"] += [f"{name}: {text}" for text in _marked_anew(run, cell, table)]
    if not facts["cells"]:
        return found, []
    return found, [
        _check("answers", wrong["answers"], "those that the receipt sums up"),
        _check("scores", wrong["scores"], "those of the answers, marked anew"),
    ]


def _marked_anew(run: Answered, cell: Mapping[str, Any], table: Published) -> Iterator[str]:
    task = table.task(table.column(cell["column"]))
    for row in run.rows:
        found = mark(task.metric, task.dialect, row["answer"], row["id"], row["target"], row["groups"])
        score = 0.0 if row["error"] else found.score
        if (row["score"], row["parsed"]) != (score, found.parsed):
            yield f"{row['id']} scores {score:g}, not {row['score']:g}"
            return
    whole = json.loads(json.dumps(results(run.rows, task)))
    yield from differences({name: cell[name] for name in whole}, whole)


def _setting(setting: Setting, facts: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Whether model, processor, questions and protocol are what the receipt says, and what is merely elsewhere."""
    wrong: dict[str, list[str]] = {"protocol": [], "data": []}
    elsewhere: dict[str, None] = {}
    there, here = list(facts["differences"]), list(setting.differences)
    if there != here:
        said, is_so = ("; ".join(found) or "nothing" for found in (there, here))
        wrong["protocol"].append(f"said to depart from the table in {said}, and does in {is_so}")
    for cell in facts["cells"]:
        name, made = cell["column"], cell["protocol"]
        if name not in setting.items:
            wrong["protocol"].append(f"{name} is none of the tasks of the request")
            continue
        _, task = setting.tasks[name]
        if made["task"]["digest"] != task.digest:
            wrong["protocol"].append(f"{name}: the task is another one here")
        again = protocol(
            setting.loaded,
            task=made["task"],
            ids=[item.id for item in setting.items[name]],
            block=made["questions"]["block"],
            seed=made["seed"],
            max_new_tokens=task.max_new_tokens,
        )
        for line in differences(made, json.loads(json.dumps(again))):
            if line.startswith(_ELSEWHERE):
                elsewhere[line] = None
            else:
                wrong["protocol"].append(f"{cell['folder']}: {line}")
    for name, items in setting.items.items():
        if data_digest(items) != facts["data"].get(name):
            wrong["data"].append(f"{name}: questions, right answers or pictures are others here")
    return [
        _check("protocol", list(dict.fromkeys(wrong["protocol"])), "model, weights, processor and tasks are those"),
        _check("data", wrong["data"], "those of the receipt"),
    ], list(elsewhere)


def _again(
    setting: Setting,
    answered: Mapping[tuple[str, str], Answered],
    facts: Mapping[str, Any],
    sample: int,
    seed: int,
    report: dict[str, Any],
) -> dict[str, Any]:
    """Ask a sample again, in its blocks; fills the report."""
    every = [Asked(*key, number) for key, run in answered.items() for number in range(len(run.rows))]
    drawn = set(random.Random(seed).sample(every, min(sample, len(every))))
    todo: dict[str, dict[tuple[str, int], None]] = {}
    sizes = {(cell["row"], cell["column"]): cell["protocol"]["questions"]["block"] for cell in facts["cells"]}
    for one in sorted(drawn, key=lambda one: (one.row, one.column, one.number)):
        todo.setdefault(one.row, {})[one.column, one.number // sizes[one.row, one.column]] = None
    differ, beside, others = [], 0, 0
    with progress_bar() as progress:
        bar = progress.add_task("asked again", total=sum(map(len, todo.values())))
        for row, blocks in todo.items():
            recipe = setting.cell(setting.table.row(row)).recipe
            attach = contextlib.nullcontext() if recipe is None else compress(setting.loaded.model, recipe)
            with attach as compression:
                for column, block in blocks:
                    size, items = sizes[row, column], setting.items[column]
                    numbers = range(block * size, min((block + 1) * size, len(items)))
                    part, (_, task) = [items[number] for number in numbers], setting.tasks[column]
                    said = answer(Block(setting.loaded, part), compression, task.max_new_tokens)
                    before = answered[row, column].rows
                    for number, now in zip(numbers, said, strict=True):
                        kept = None if now.kept is None else list(now.kept)
                        same = _same(before[number], {"answer": now.text, "error": now.error, "kept": kept})
                        if Asked(row, column, number) not in drawn:
                            others, beside = others + 1, beside + (not same)
                        elif not same:
                            was = before[number]["answer"]
                            differ.append({"row": row, "id": before[number]["id"], "was": was, "is": now.text})
                    progress.advance(bar)
    report |= {"asked": len(drawn), "of": len(every), "differ": differ, "beside": others, "beside_differ": beside}
    whole = len(drawn) == len(every)
    report["forged_at_most"] = len(differ) / len(every) if whole else share_at_most(len(differ), len(drawn))
    wrong = [f"{one['row']}, {one['id']}: {one['was']!r} was written, {one['is']!r} is said" for one in differ[:5]]
    if beside:
        wrong.append(f"{beside} of {others} answers beside them in their blocks differ")
    return _check("sample", wrong, f"{len(drawn)} of {len(every)} answers are the same, byte by byte")


def _same(before: Row, now: Mapping[str, Any]) -> bool:
    return all(before[name] == value for name, value in now.items())


def _print(report: Mapping[str, Any], console: Console) -> None:
    for check in report["checks"]:
        console.print(
            f"{'ok  ' if check['ok'] else 'FAIL'} {check['check']}: {check['said']}", soft_wrap=True, markup=False
        )
    if report["elsewhere"]:
        said = "; ".join(report["elsewhere"])
        console.print(f"made elsewhere, so that answers may differ honestly: {said}", soft_wrap=True, markup=False)
    if report["asked"]:
        same = report["asked"] - len(report["differ"])
        console.print(
            f"{same} of {report['asked']} sampled answers agree (seed {report['seed']}); with 95 % confidence at most "
            f"{100 * report['forged_at_most']:.1f} % of all {report['of']} are others"
        )
    console.print("verified" if report["ok"] else "not verified")
