"""Write the model card: `python -m visiontok.demo.card` makes README.md, pruning.md, search.md and the training curves.

Every number comes from the files in `weights`: of each model its accuracy.json and log.jsonl, of all of them
curves.jsonl.
"""

from __future__ import annotations

import visiontok._torchvision  # noqa: F401  # transformers imports torchvision

# isort: split
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from visiontok.statistics import accuracy, difference, kendall

from . import clips
from .architectures import ARCHITECTURES
from .curves import STOCK, Cell, from_hex, read, weights_digest
from .markdown import estimate as _estimate
from .markdown import gain as _gain
from .markdown import percent as _percent
from .markdown import prose as _prose
from .markdown import table as _table
from .measure import exam
from .questions import KINDS, Question
from .scenes import COLOR_NAMES, SHAPES, SIDE, seeds

WEIGHTS = Path(__file__).parent / "weights"

_SPLITS = {
    "train": "ordinary scenes; no scene is shown twice",
    "validation": "ordinary scenes, looked at during training and never reported",
    "heldout": "ordinary scenes",
    "composition": "only questions about objects that no other split shows",
    "detail": "every object has a glyph, of the smallest size",
    "pairs": "two pictures and a question about both",
    "video": "eight frames in which one object moves, appears, disappears or changes; no model has learned them",
    "turns": "conversations of four questions about one picture; each follows the right answers to those before it",
}
_BY_POSITION = ("ground", "sign", "position", "read")  # kinds whose answers depend on where things are
_TEXT = ("read", "sign")  # kinds whose answers are written in the picture
_INK = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf #aec7e8 #000000".split()  # noqa: SIM905


@dataclass(frozen=True)
class Shipped:
    """A model in the package: its folder, and what training wrote beside its weights."""

    folder: Path
    measured: dict[str, Any]
    log: list[dict[str, float]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """What was measured on each split."""
        found: dict[str, dict[str, Any]] = self.measured["splits"]
        return found


class Curves:
    """The cells of one exam.

    Args:
        exam: its line.
        cells: the lines that belong to it.
    """

    def __init__(self, exam: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]):
        self.split: str = exam["split"]
        self.kinds: list[str] = exam["kinds"]
        self.kind = np.array([int(digit, 16) for digit in exam["kind"]])
        self.scene = from_hex(exam["opens"], len(self.kind)).cumsum()
        self.refused = [cell for cell in cells if "refused" in cell]
        self.cells = [cell for cell in cells if "refused" not in cell]
        self.models = list(dict.fromkeys(cell["model"] for cell in self.cells))
        self.keeps = sorted({cell["keep"] for cell in self.cells} - {None, 1.0}, reverse=True)
        self.methods = list(dict.fromkeys(c["method"] for c in self.cells if c["method"] != STOCK))

    @property
    def tokens(self) -> list[str]:
        """The budgets as heads of columns."""
        return [f"{keep:.0%}" for keep in self.keeps]

    @cached_property
    def _bits(self) -> dict[tuple[Any, ...], np.ndarray]:
        grouped = defaultdict(list)
        for cell in self.cells:
            key = tuple(cell[field] for field in ("model", "method", "keep", "mass", "positions"))
            grouped[key].append(from_hex(cell["bits"], len(self.kind)))
        return {key: np.stack(bits) for key, bits in grouped.items()}

    def hits(
        self, model: str, method: str, keep: float | None, mass: bool | str = False, positions: str = "original"
    ) -> np.ndarray | None:
        """bool (R, Q), Q questions and R seeds; None if it was not measured."""
        return self._bits.get((model, method, keep, mass, positions))

    def label(self, model: str, method: str) -> str:
        """A method as reports name it on this model."""
        named = (c["label"] for c in self.cells if (c["model"], c["method"], c["mass"]) == (model, method, False))
        return next(named, method)

    def asks(self, *kinds: str) -> np.ndarray:
        """bool (Q,): the questions of these kinds."""
        return np.isin(self.kind, [self.kinds.index(kind) for kind in kinds if kind in self.kinds])


def shipped(weights: Path) -> list[Shipped]:
    """The models in a folder, by name."""
    return [
        Shipped(file.parent, json.loads(file.read_text()), read(file.parent / "log.jsonl"))
        for file in sorted(weights.glob("*/accuracy.json"))
    ]


def curves(weights: Path, models: Sequence[Shipped]) -> list[Curves]:
    """The exams in curves.jsonl.

    Raises:
        ValueError: a cell belongs to other weights than those in the folder.
    """
    lines = read(weights / "curves.jsonl")
    digests = {model.name: weights_digest(model.folder) for model in models}
    for line in lines:
        if "model" in line and digests.get(line["model"]) != line["weights"]:
            raise ValueError(
                f"curves.jsonl has results of weights {line['weights']} of {line['model']!r}, which are not in "
                f"{weights}; take those lines out and measure again with `python -m visiontok.demo.curves`"
            )
    exams = [line for line in lines if "split" in line]
    return [Curves(line, [c for c in lines if "model" in c and c["exam"] == line["exam"]]) for line in exams]


def render(weights: Path = WEIGHTS) -> dict[Path, str]:
    """Every file that this script writes, and its text."""
    models = shipped(weights)
    files = {model.folder / "curve.svg": curve_svg(model.log, model.name) for model in models}
    parts, tables, search = [_HEAD, *_data(), *_models(models)], [_PRUNED], [_SEARCHED]
    for measured in curves(weights, models):
        if measured.split == "validation":
            search += _search(measured)
            continue
        tables += _pruning(measured)
        parts += _rankings(measured)
        parts += _seeds(measured, models)
    parts.append(_LIMITS)
    texts = {"README.md": parts, "pruning.md": tables, "search.md": search}
    return {weights.parent / name: "\n\n".join(text) + "\n" for name, text in texts.items()} | files


# --------------------------------------------------------------------------------------------------------------- data

_HEAD = """<!-- Written by `python -m visiontok.demo.card` from the files in weights/; do not edit. -->
# The embedded models

Small vision-language models in stock Hugging Face architectures, trained from random weights on rendered scenes, so
that pruning visual tokens has something to break on any machine. They are a test bench and predict nothing about large
models."""

_PRUNED = """<!-- Written by `python -m visiontok.demo.card` from weights/curves.jsonl; do not edit. -->
# Pruning the embedded models

What every method keeps of the answers, measured by `python -m visiontok.demo.curves`. Models and questions are those of
the [model card](README.md): a test bench, which predicts nothing about large models."""

_SEARCHED = """<!-- Written by `python -m visiontok.demo.card` from weights/curves.jsonl; do not edit. -->
# The search for the recipe `visiontok`

Compositions of the operators, compared on validation scenes, which no other table reports. The best went into
[visiontok.py](../visiontok/recipes/visiontok.py); what it does on held-out scenes, on other training seeds and on the
second architecture is in [pruning.md](pruning.md). What is best here need not be best for a large model."""

_LIMITS = """## Limits

A test bench; predicts nothing about large models.

* The pictures are flat renderings without noise, of seven shapes in eight colours; the vocabulary has about a hundred
  words. Nothing else is understood.
* In training every patch was told what it shows, so that the tokens of an object say more of the whole object than
  those of a model trained on photographs. A few tokens go further here.
* All training pictures have 144 × 144 pixels: larger ones, which the Qwen3-VL model takes as they are, show it objects
  of sizes it has never seen.
* At this size the fixed costs of a forward pass outweigh what dropping tokens saves: times mean nothing.
* "composition" withholds one shape of each colour and one colour of each shape, so its questions about colour and shape
  have one answer to each wording: a model that knew which pairs are withheld could guess them.
* The held-out scenes come from the generator of the training scenes, with other seeds; only "composition" and "detail"
  leave its distribution, and not far.
* Whether a model learns to look a thing up by its colour or shape hangs on the settings: with answers that name a
  withheld pair left out of the loss, and comparisons counted four times, from the start (commit 641da5c), the same
  `--seed=2` learned glyphs, signs and counting but ended at 61.5 % of the held-out questions, colours and shapes at 54
  and 56 %. With comparisons counted more in the second half only it was no better at step 5,700. Neither is shipped;
  training counts all answers again.
* p-values are those of single comparisons, not corrected for their number."""


def _data() -> list[str]:
    splits = [[name, what] for name, what in _SPLITS.items()]
    pairs = ", ".join(f"{color} {shape}" for color, shape in zip(COLOR_NAMES, SHAPES, strict=False))
    rows = [[kind, one.text, one.answer] for kind, one in _examples().items()]
    return [
        "## Data",
        _prose(
            f"Scenes of {SIDE} × {SIDE} pixels: objects on a patterned background, some with a "
            "digit or a letter beside or on them, some with a sign of three glyphs. Splits share no seed, and a seed "
            "gives the same pixels and questions on every machine."
        ),
        _table(("split", "what it asks about"), splits).replace("---:", "---"),
        _prose(f"Withheld from all splits but composition: {pairs}; and every glyph from one cell of a 3 × 3 grid."),
        _table(("kind", "example", "answer"), rows).replace("---:", "---"),
    ]


def _examples() -> dict[str, Question]:
    """The first question of every kind."""
    found: dict[str, Question] = {}
    for split in ("heldout", "pairs"):
        for sheet in exam(split, 16):
            for row in sheet.questions.rows():
                for question in row:
                    found.setdefault(question.kind, question)
    for row in clips.ask(clips.film(seeds("video", range(16)))).rows():
        for question in row:
            found.setdefault(question.kind, question)
    return {kind: found[kind] for kind in KINDS}


# ------------------------------------------------------------------------------------------------------------- models


def _models(models: Sequence[Shipped]) -> list[str]:
    parts = ["## Models"]
    if not models:
        return [*parts, "None is here yet."]
    rows = []
    for model in models:
        plan = model.measured
        size = (model.folder / "model.safetensors").stat().st_size / 1e6
        rows.append(
            (
                f"[{model.name}](weights/{model.name})",
                plan["architecture"],
                f"{(SIDE // ARCHITECTURES[plan['architecture']].cell) ** 2}",
                str(plan["seed"]),
                f"{plan['parameters'] / 1e6:.2f} M",
                f"{size:.1f} MB",
                f"{plan['steps_done']}",
                f"{plan['minutes']:.0f}",
                plan["processor"],
                plan["commit"],
                _interval(model.splits["heldout"], "all"),
            )
        )
    head = (
        "model",
        "architecture",
        "visual tokens",
        "seed",
        "parameters",
        "file",
        "steps",
        "minutes",
        "trained on",
        "commit",
        "heldout",
    )
    commands = "\n".join(model.measured["command"] for model in models)
    parts += [_table(head, rows), f"```\n{commands}\n```"]
    for model in models:
        parts += _accuracy(model)
    return parts


def _interval(split: Mapping[str, Any], kind: str) -> str:
    low, high = split["interval"][kind]
    return f"{split['full'][kind]:.1f} [{low:.1f}, {high:.1f}]"


def _accuracy(model: Shipped) -> list[str]:
    splits = model.splits
    kinds = [kind for kind in (*KINDS, "all") if any(kind in split["full"] for split in splits.values())]
    rows = [
        (kind, *(_interval(split, kind) if kind in split["full"] else "" for split in splits.values()))
        for kind in kinds
    ]
    asked = ("questions", *(str(split["questions"]["all"]) for split in splits.values()))
    controls = ("questions", "full", "prior", "blind", "swapped")
    own = [("heldout", kind) for kind in splits["heldout"]["full"] if kind != "all"]
    whole = [(name, "all") for name in splits]
    control_rows = [
        (f"{name} {kind}", *(str(splits[name][column][kind]) for column in controls)) for name, kind in own + whole
    ]
    note = model.measured.get("note")
    return [
        f"### {model.name}",
        *([_prose(note)] if note else []),
        f"![Accuracy during training](weights/{model.name}/curve.svg)",
        "Accuracy in percent with 95 % intervals (bootstrap over scenes):",
        _table(("kind", *splits), [*rows, asked]),
        _prose(
            "What the picture is worth: the most frequent answer to the form of the question (prior), no picture in "
            "the prompt (blind), the picture of another question (swapped)."
        ),
        _table(("split and kind", *controls), control_rows),
    ]


# ------------------------------------------------------------------------------------------------------------ pruning


def _pruning(measured: Curves) -> list[str]:
    seconds = np.median([cell["seconds"] for cell in measured.cells])
    shared = sum(cell["answers"] is None for cell in measured.cells)
    cells = len(measured.cells)
    together = f" In {shared} of the {cells} cells the questions about a picture shared one forward." if shared else ""
    parts = [
        f"## Pruning, {measured.split}",
        _prose(
            f"{len(measured.kind)} questions about {measured.scene.max()} scenes, as many of each kind, through "
            "`generate` inside `visiontok.compress`, exact match of the decoded answer. Methods that choose before the "
            "language model, without training; random is the mean of its seeds. Intervals are 95 % bootstraps over "
            "scenes, p-values of sign flips over scenes; differences are paired, question by question. The best of "
            f"each column is bold. Half of the cells took at most {seconds:.0f} s of processor time.{together}"
        ),
    ]
    for model in measured.models:
        parts.append(f"### {model}, pruned ({measured.split})")
        parts += _curve(measured, model)
        parts += _against(measured, model, "resize")
        parts += _no_better(measured, model)
        parts += [part for keep in measured.keeps for part in _per_kind(measured, model, keep)]
        parts += _mass(measured, model)
        parts += _merger_in(measured, model)
        parts += _positions(measured, model)
    if measured.refused:
        parts.append("Not measured, because the toolkit refuses it:")
        named = (
            (line, Cell(**{field: line[field] for field in Cell.__dataclass_fields__})) for line in measured.refused
        )
        parts.append("\n".join(f"* {line['model']}, {cell}: {line['refused']}" for line, cell in named))
    return parts


def _bold_best(columns: Sequence[Sequence[float | None]], texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows of texts, where the largest value of every column is bold."""
    rows = [list(row) for row in texts]
    for column in range(len(columns[0]) if columns else 0):
        values = [row[column] for row in columns]
        best = max((value for value in values if value is not None), default=None)
        for row, value in zip(rows, values, strict=True):
            if value is not None and value == best:
                row[column] = f"**{row[column]}**"
    return rows


def _curve(measured: Curves, model: str) -> list[str]:
    """Method by budget, with differences to random, and those of random to all tokens."""
    stock = measured.hits(model, STOCK, None)
    values: list[list[float | None]] = []
    texts: list[list[str]] = []
    for method in measured.methods:
        values.append([])
        texts.append([])
        for keep in measured.keeps:
            hits = measured.hits(model, method, keep)
            reference = stock if method == "random" else measured.hits(model, "random", keep)
            values[-1].append(None if hits is None else float(hits.mean()))
            text = "" if hits is None else _percent(hits.mean())
            if gain := _gain(hits, reference, measured.scene):
                text += f" ({gain})"
            texts[-1].append(text)
    rows = [
        [measured.label(model, method), *row]
        for method, row in zip(measured.methods, _bold_best(values, texts), strict=True)
    ]
    whole = "" if stock is None else f"All tokens: {_estimate(accuracy(stock, measured.scene))}. "
    return [
        f"{whole}In brackets, the difference to random; for random itself, to all tokens.",
        _table(("method", *measured.tokens), rows),
    ]


def _against(measured: Curves, model: str, reference: str) -> list[str]:
    """Differences to one method."""
    rows = []
    for method in (name for name in measured.methods if name != reference):
        pairs = ((measured.hits(model, method, keep), measured.hits(model, reference, keep)) for keep in measured.keeps)
        rows.append([measured.label(model, method), *(_gain(*pair, measured.scene) for pair in pairs)])
    if not any(any(row[1:]) for row in rows):
        return []
    return [f"The difference to {reference}:", _table(("method", *measured.tokens), rows)]


def _no_better(measured: Curves, model: str) -> list[str]:
    """The methods that are not shown to beat a random choice."""
    lines = []
    for keep in measured.keeps:
        chance = measured.hits(model, "random", keep)
        found = {method: measured.hits(model, method, keep) for method in measured.methods if method != "random"}
        if chance is None:
            continue
        names = [
            measured.label(model, method)
            for method, hits in found.items()
            if hits is not None and difference(hits, chance, measured.scene).low <= 0
        ]
        lines.append(f"* {keep:.0%}: {', '.join(names) or 'none'}")
    return ["Not better than random (the interval of the difference reaches 0):", "\n".join(lines)] if lines else []


def _per_kind(measured: Curves, model: str, keep: float) -> list[str]:
    rows: list[tuple[str, np.ndarray]] = []
    stock = measured.hits(model, STOCK, None)
    if stock is not None:
        rows.append(("all tokens", stock))
    for method in measured.methods:
        hits = measured.hits(model, method, keep)
        if hits is not None:
            rows.append((measured.label(model, method), hits))
    values = [[float(hits[:, measured.asks(kind)].mean()) for kind in measured.kinds] for _, hits in rows]
    texts = [[_percent(value) for value in row] for row in values]
    compared: list[list[float | None]] = [
        [None if name == "all tokens" else value for value in row] for (name, _), row in zip(rows, values, strict=True)
    ]
    body = [[name, *row] for (name, _), row in zip(rows, _bold_best(compared, texts), strict=True)]
    return [f"Per kind of question at {keep:.0%}:", _table(("method", *measured.kinds), body)]


def _mass(measured: Curves, model: str) -> list[str]:
    rows = []
    for method in measured.methods:
        row = []
        for keep in measured.keeps:
            without, given = (measured.hits(model, method, keep, mass=mass) for mass in (False, True))
            row.append(_gain(given, without, measured.scene))
        if any(row):
            rows.append([measured.label(model, method), *row])
    return ["What `mass=True` adds (points):", _table(("method", *measured.tokens), rows)] if rows else []


def _merger_in(measured: Curves, model: str) -> list[str]:
    """What choosing by the projector's inputs does, to text and to everything."""
    everything, text = (measured.asks(*kinds) for kinds in (measured.kinds, _TEXT))
    rows = []
    for method in measured.methods:
        after = method.removesuffix(" features=merger_in")
        for name, asked in ((", ".join(_TEXT), text), ("all", everything)) if after != method else ():
            row = []
            for keep in measured.keeps:
                found = [measured.hits(model, which, keep) for which in (method, after)]
                one, other = (None if hits is None else hits[:, asked] for hits in found)
                row.append(_gain(one, other, measured.scene[asked]))
            if any(row):
                rows.append([measured.label(model, after), name, *row])
    head = "What `features='merger_in'` adds, on questions about text and on all (points):"
    return [head, _table(("method", "kinds", *measured.tokens), rows)] if rows else []


def _positions(measured: Curves, model: str) -> list[str]:
    """What compacting positions does to the kinds of questions where positions decide, pooled and method by method."""
    kinds = [kind for kind in _BY_POSITION if kind in measured.kinds]
    columns = [*(measured.asks(kind) for kind in kinds), measured.asks(*measured.kinds)]
    deciding = measured.asks(*kinds)
    pooled, single = [], []
    for keep in measured.keeps:
        pairs = {}
        for method in measured.methods:
            original, compact = (measured.hits(model, method, keep, positions=p) for p in ("original", "compact"))
            if original is not None and compact is not None:
                pairs[method] = compact, original
        if not pairs or not kinds:
            continue
        # Every method counts once, however many seeds it has.
        many = math.lcm(*(len(hits) for pair in pairs.values() for hits in pair))
        compact, original = (
            np.concatenate([hits.repeat(many // len(hits), 0) for hits in side])
            for side in zip(*pairs.values(), strict=True)
        )
        pooled.append([f"{keep:.0%}", *(_gain(compact[:, c], original[:, c], measured.scene[c]) for c in columns)])
        on = measured.scene[deciding]
        single.append({m: _gain(c[:, deciding], o[:, deciding], on) for m, (c, o) in pairs.items()})
    if not pooled:
        return []
    compared = (method for method in measured.methods if any(method in row for row in single))
    rows = [[measured.label(model, method), *(row.get(method, "") for row in single)] for method in compared]
    return [
        "What compacting positions does (points against original positions), mean over methods:",
        _table(("tokens", *kinds, "all kinds"), pooled),
        f"The same for each method, over {', '.join(kinds)}:",
        _table(("method", *(row[0] for row in pooled)), rows),
    ]


def _search(measured: Curves) -> list[str]:
    """All compositions by their mean accuracy over the budgets, best first."""
    parts = []
    for model in measured.models:
        rows = []
        for method, mass in product(measured.methods, dict.fromkeys(cell["mass"] for cell in measured.cells)):
            found = [measured.hits(model, method, keep, mass) for keep in measured.keeps]
            shares = [float(hits.mean()) for hits in found if hits is not None]
            if len(shares) == len(found):
                mean = sum(shares) / len(shares)
                weighed = {False: "", True: "yes"}.get(mass, mass)
                rows.append((mean, [f"`{method}`", weighed, *map(_percent, (*shares, mean))]))
        rows.sort(key=lambda row: -row[0])
        parts += [
            f"## {model}",
            f"{len(measured.kind)} questions about {measured.scene.max()} scenes, accuracy in percent:",
            _table(("method and options", "mass", *measured.tokens, "mean"), [row for _, row in rows]),
        ]
    return parts


# ----------------------------------------------------------------------------------------------------------- rankings


def _scores(measured: Curves, model: str, keep: float) -> dict[str, float]:
    """Accuracy of every method that was measured."""
    found = {method: measured.hits(model, method, keep) for method in measured.methods}
    return {method: float(hits.mean()) for method, hits in found.items() if hits is not None}


def _rankings(measured: Curves) -> list[str]:
    parts = [
        f"## Rankings, {measured.split}",
        "All accuracies under pruning, their differences and kinds of questions: [pruning.md](pruning.md).",
        "Choosing inside the language model, at equal averages over its layers: [decoder.md](decoder.md).",
    ]
    rows = []
    for model in measured.models:
        for keep in measured.keeps:
            scores = _scores(measured, model, keep)
            tiers: dict[float, list[str]] = defaultdict(list)
            for method, score in sorted(scores.items(), key=lambda item: -item[1]):
                tiers[score].append(method)
            rows.append([model, f"{keep:.0%}", " > ".join(" = ".join(tier) for tier in tiers.values())])
    parts.append(_table(("model", "tokens", "methods, best first"), rows).replace("---:", "---"))
    taus = []
    for one, other in combinations(measured.models, 2):
        row = []
        for keep in measured.keeps:
            first, second = (_scores(measured, model, keep) for model in (one, other))
            both = [method for method in first if method in second]
            row.append(kendall([first[m] for m in both], [second[m] for m in both]) if len(both) > 1 else float("nan"))
        row.append(sum(row) / len(row))
        taus.append([f"{one}, {other}", *("-" if math.isnan(tau) else f"{tau:+.2f}" for tau in row)])
    if taus:
        parts.append("Kendall's tau-b of the ranking of methods between two models:")
        parts.append(_table(("models", *measured.tokens, "mean"), taus))
    return parts


def _seeds(measured: Curves, models: Sequence[Shipped]) -> list[str]:
    """The spread of the curves over training seeds."""
    parts = []
    for architecture in dict.fromkeys(model.measured["architecture"] for model in models):
        same = [m.name for m in models if m.measured["architecture"] == architecture and m.name in measured.models]
        if len(same) < 2:
            continue
        rows = []
        for method in measured.methods:
            row = []
            for keep in measured.keeps:
                scores = [_scores(measured, model, keep).get(method) for model in same]
                found = [score for score in scores if score is not None]
                text = (
                    f"{_percent(sum(found) / len(found))} ({_percent(min(found))} to {_percent(max(found))})"
                    if found
                    else ""
                )
                row.append(text)
            rows.append([method, *row])
        parts.append(f"Spread over training seeds of {architecture} ({', '.join(same)}): mean, lowest to highest.")
        parts.append(_table(("method", *measured.tokens), rows))
    return parts


# --------------------------------------------------------------------------------------------------------------- curve


def curve_svg(log: Sequence[Mapping[str, float]], title: str) -> str:
    """A drawing of the accuracy per kind of question over the steps of a training, from its log."""
    lines = [line for line in log if "all" in line]  # the others are notes on the training batches
    kinds = [kind for kind in (*KINDS, "all") if any(kind in line for line in lines)]
    width, height, left, top = 560, 280, 40, 30
    most = max((line["step"] for line in lines), default=1)
    text = 'font-family="sans-serif" font-size="11"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 110} {top + height + 40}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18" {text}>{escape(title)}: accuracy on validation scenes, percent</text>',
    ]
    for percent in range(0, 101, 20):
        y = top + height * (1 - percent / 100)
        out.append(f'<path d="M{left} {y:g}h{width}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{y + 4:g}" text-anchor="end" {text}>{percent}</text>')
    for quarter in range(5):
        x, step = left + width * quarter / 4, most * quarter / 4
        out.append(f'<text x="{x:g}" y="{top + height + 16}" text-anchor="middle" {text}>{step:.0f}</text>')
    out.append(f'<text x="{left + width / 2:g}" y="{top + height + 32}" text-anchor="middle" {text}>step</text>')
    for row, kind in enumerate(kinds):
        ink = _INK[-1] if kind == "all" else _INK[KINDS.index(kind) % (len(_INK) - 1)]
        points = " ".join(
            f"{left + width * line['step'] / most:.1f},{top + height * (1 - line[kind] / 100):.1f}"
            for line in lines
            if kind in line
        )
        out.append(f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="{2 + (kind == "all")}"/>')
        out.append(f'<text x="{left + width + 10}" y="{top + 14 + 18 * row}" fill="{ink}" {text}>{kind}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    for path, text in render().items():
        path.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
