"""Write decoder.md, prompt stage and decoder stage side by side: `python -m visiontok.demo.decoder_card`.

Every number comes from decoder.jsonl and, for methods that choose before the language model, from curves.jsonl.
"""

from __future__ import annotations

import visiontok._torchvision  # noqa: F401  # transformers imports torchvision

# isort: split
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visiontok import recipes
from visiontok.statistics import accuracy

from .card import WEIGHTS, Curves
from .curves import STOCK, read, weights_digest
from .decoder import PROMPT, calibrated, inside, key_of
from .markdown import estimate, gain, percent, prose, table

REFERENCE = "visiontok"
_OUT_OF_REACH = "–"

_HEAD = """<!-- Written by `python -m visiontok.demo.decoder_card` from weights/decoder.jsonl; do not edit. -->
# Choosing before and inside the language model

Models and questions are those of the [model card](README.md): a test bench of four decoder layers, which predicts
nothing about large models. Measured by `python -m visiontok.demo.decoder`.

* A budget is a share of the visual tokens, averaged over all decoder layers. Before the language model it is what is
  kept; a method that cuts at layer 1 of 4 has spent 25 % before, and keeps the fewer behind the cut.
* –: the layers in front of the first cut alone cost more than the budget. Published layers are fractions of the depth;
  with four layers, cuts that meet are one.
* "at" is the average that came out where it is more than a token off: what adapts to the picture may keep fewer.
* A method without a budget stands in the column that it meets, otherwise under its own average.
* A calibration is that of `visiontok calibrate` on validation scenes; those not named recommend nothing here.
* In brackets, the difference to a random choice before the language model at the same budget; for random, to all
  tokens. Differences are paired, question by question, intervals 95 % bootstraps over scenes, p-values sign flips."""


class Stages(Curves):
    """The cells of one exam by their share, asked in one way.

    Args:
        exam: its line.
        cells: the lines that belong to it; "share" is their budget.
        artefacts: method with recommended options, by model; told in the names.
    """

    def __init__(
        self, exam: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], artefacts: Mapping[str, Sequence[str]]
    ):
        super().__init__(exam, [{**cell, "keep": cell["share"]} for cell in cells])
        self.artefacts = artefacts
        known = recipes.names()
        self.methods = sorted(self.methods, key=lambda name: (inside(name), known.index(name.split()[0])))

    def name(self, model: str, method: str) -> str:
        """A method with its options, as the tables name it."""
        if method in self.artefacts.get(model, ()):
            return f"{method.split()[0]}, calibrated"
        return method if " " in method else self.label(model, method)

    def listed(self, model: str) -> list[str]:
        """The methods of a model's tables: what other models were calibrated to is none of them."""
        others = {method for name, found in self.artefacts.items() if name != model for method in found}
        return [method for method in self.methods if method not in others - set(self.artefacts.get(model, ()))]

    def line(self, model: str, method: str, keep: float | None) -> Mapping[str, Any] | None:
        """The line of a cell without mass attention; of a random method the first."""
        wanted = (model, method, keep, False)
        return next((c for c in self.cells if (c["model"], c["method"], c["keep"], c["mass"]) == wanted), None)

    def missing(self, model: str, method: str, share: float) -> str:
        """What stands for a cell without a result: a dash if the toolkit refuses it, nothing if it was not measured."""
        refused = any((c["model"], c["method"], c["keep"]) == (model, method, share) for c in self.refused)
        return _OUT_OF_REACH if refused else ""

    def column(self, model: str, method: str) -> float | None:
        """The share that a method without budget meets."""
        line = self.line(model, method, None)
        others = [c for c in self.cells if c["model"] == model and c["keep"] is not None]
        return next((c["keep"] for c in others if line and c["tokens"] == line["tokens"]), None)

    def at(self, model: str, method: str, share: float | None, mass: bool = False) -> np.ndarray | None:
        """As `hits`; methods without budget are found under the share that they meet."""
        found = self.hits(model, method, share, mass)
        if found is None and share is not None and self.column(model, method) == share:
            found = self.hits(model, method, None, mass)
        return found


def exams(weights: Path) -> list[tuple[Stages, Stages]]:
    """The exams of decoder.jsonl: what was asked with whole prompts, and what on the cache of the question before.

    Raises:
        ValueError: a line belongs to other weights than those in the folder.
    """
    lines = read(weights / "decoder.jsonl")
    digests = {path.parent.name: weights_digest(path.parent) for path in weights.glob("*/model.safetensors")}
    for line in lines:
        if "model" in line and digests.get(line["model"]) != line["weights"]:
            raise ValueError(
                f"decoder.jsonl has results of weights {line['weights']} of {line['model']!r}, which are not in "
                f"{weights}; take those lines out and measure again with `python -m visiontok.demo.decoder`"
            )
    artefacts = {name: calibrated(weights / "calibrated" / name) for name in digests}
    measured = {line["model"] for line in lines if "model" in line}
    before = [
        {**line, "share": line["keep"], "cached": False}
        for line in read(weights / "curves.jsonl")
        if line.get("model") in measured
        and (line["method"] in PROMPT or line["method"] == STOCK)
        and line["positions"] == "original"
        and isinstance(line["mass"], bool)
        and line["keep"] != 1.0
    ]
    cells = {key_of(line): line for line in (*before, *(line for line in lines if "model" in line))}
    found = []
    for exam in (line for line in lines if "split" in line):
        own = [line for line in cells.values() if line["exam"] == exam["exam"]]
        fresh, cached = ([line for line in own if line["cached"] is on] for on in (False, True))
        found.append((Stages(exam, fresh, artefacts), Stages(exam, cached, artefacts)))
    return found


def render(weights: Path = WEIGHTS) -> str:
    """The text of decoder.md."""
    parts = [_HEAD]
    for fresh, cached in exams(weights):
        if fresh.split == "turns":
            parts += _turns(fresh, cached)
            continue
        parts += [
            f"## Equal averages, {fresh.split}",
            f"{len(fresh.kind)} questions about {fresh.scene.max()} scenes, as many of each kind.",
        ]
        for model in fresh.models:
            parts += [f"### {model}", *_side_by_side(fresh, model), *_inside_against(fresh, model)]
            parts += [*_mass(fresh, model), *_per_kind(fresh, model), *_costs(fresh, model)]
        parts += _refused(fresh)
    return "\n\n".join(parts) + "\n"


def _acts(method: str) -> str:
    return "inside" if inside(method) else "before"


def _side_by_side(measured: Stages, model: str) -> list[str]:
    stock = measured.hits(model, STOCK, None)
    rows = []
    for method in measured.listed(model):
        row = [measured.name(model, method), _acts(method)]
        for share in measured.keeps:
            hits, chance = measured.at(model, method, share), measured.hits(model, "random", share)
            compared = gain(hits, stock if method == "random" else chance, measured.scene)
            if hits is None:
                row.append(measured.missing(model, method, share))
                continue
            shown = percent(hits.mean()) + _realised(measured, model, method, share)
            row.append(shown + f" ({compared})" * bool(compared))
        own, line = measured.hits(model, method, None), measured.line(model, method, None)
        apart = own is not None and line is not None and measured.column(model, method) is None
        row.append(f"{percent(own.mean())} at {line['tokens']:g}" if apart else "")  # type: ignore[union-attr, index]
        rows.append(row)
    whole = "" if stock is None else f"All tokens: {estimate(accuracy(stock, measured.scene))}."
    return [whole, table(("method", "acts", *measured.tokens, "own, at tokens"), rows)]


def _realised(measured: Stages, model: str, method: str, share: float) -> str:
    """The average that came out, where it is not the one that was asked for."""
    line, asked = (measured.line(model, name, share) for name in (method, REFERENCE))
    return f" at {line['tokens']:g}" if line and asked and abs(line["tokens"] - asked["tokens"]) > 1 else ""


def _inside_against(measured: Stages, model: str) -> list[str]:
    """What choosing inside the language model adds to the default recipe, which chooses before it."""
    rows = []
    for method in filter(inside, measured.listed(model)):
        pairs = ((measured.at(model, method, s), measured.hits(model, REFERENCE, s)) for s in measured.keeps)
        rows.append([measured.name(model, method), *(gain(*pair, measured.scene) for pair in pairs)])
    return _table(f"The difference to {REFERENCE}, which chooses before (points):", measured, rows)


def _mass(measured: Stages, model: str) -> list[str]:
    rows = []
    for method in measured.listed(model):
        pairs = ((measured.at(model, method, s, True), measured.at(model, method, s)) for s in measured.keeps)
        rows.append([measured.name(model, method), *(gain(*pair, measured.scene) for pair in pairs)])
    return _table("What `mass=True` adds (points):", measured, rows)


def _table(head: str, measured: Stages, rows: Sequence[Sequence[str]]) -> list[str]:
    """What is there of a table by budget; nothing if that is nothing."""
    rows = [row for row in rows if any(row[1:])]
    return [head, table(("method", *measured.tokens), rows)] if rows else []


def _per_kind(measured: Stages, model: str) -> list[str]:
    """Kinds of questions at the largest budget, which most methods reach."""
    share = measured.keeps[0]
    rows = []
    for method in measured.listed(model):
        hits = measured.at(model, method, share)
        if hits is not None:
            each = (percent(hits[:, measured.asks(kind)].mean()) for kind in measured.kinds)
            rows.append([measured.name(model, method), *each])
    return [f"Per kind of question at {share:.0%}:", table(("method", *measured.kinds), rows)]


def _costs(measured: Stages, model: str) -> list[str]:
    """FLOPs of the prefill and bytes of the cache, which an average does not fix."""
    rows = []
    for method in measured.listed(model):
        row = [measured.name(model, method)]
        for share in measured.keeps:
            line = measured.line(model, method, share if measured.column(model, method) != share else None)
            row.append(f"{line['flops']:.3f} / {line['kv']:.3f}" if line and "flops" in line else "")
        rows.append(row)
    head = "The language model's FLOPs in prefill / bytes of its cache, over the stock model's, for one prompt:"
    return _table(head, measured, rows)


def _turns(fresh: Stages, cached: Stages) -> list[str]:
    """What a choice made for one question is worth for the next."""
    parts = [
        "## The second question",
        prose(
            f"{len(fresh.kind)} second questions of conversations about {fresh.scene.max()} scenes, as many of each "
            "kind: asked on the cache of the first, for which the choice was made, and with the whole conversation as "
            "a prompt, for which it is made anew. The answer to the first question is given. A method that does not "
            "look at the question keeps the same tokens both times, so that nothing may change but rounding."
        ),
    ]
    for model in cached.models:
        rows = []
        for method in fresh.listed(model):
            row = [fresh.name(model, method), _acts(method)]
            for share in fresh.keeps:
                reused, anew = cached.at(model, method, share), fresh.at(model, method, share)
                if reused is None or anew is None:
                    row += [cached.missing(model, method, share)] * 3
                else:
                    row += [percent(anew.mean()), percent(reused.mean()), gain(reused, anew, fresh.scene)]
            if any(cell not in ("", _OUT_OF_REACH) for cell in row[2:]):
                rows.append(row)
        stock = cached.hits(model, STOCK, None)
        head = [f"{name}, {what}" for name in fresh.tokens for what in ("anew", "reused", "difference")]
        whole = "" if stock is None else f"All tokens: {estimate(accuracy(stock, cached.scene))}."
        parts += [f"### {model}, second questions", whole, table(("method", "acts", *head), rows)]
    return parts


def _refused(measured: Stages) -> list[str]:
    """What the toolkit refuses, each with the reason at the largest budget."""
    shares: dict[tuple[str, str], list[str]] = defaultdict(list)
    reasons: dict[tuple[str, str], str] = {}
    for line in measured.refused:
        key = line["model"], measured.name(line["model"], line["method"])
        share = "own" if line["keep"] is None else f"{line['keep']:.0%}"
        if share not in shares[key]:
            shares[key].append(share)
        reasons.setdefault(key, line["refused"])
    alike = defaultdict(list)
    for (model, name), why in reasons.items():
        alike[model, ", ".join(shares[model, name]), why].append(name)
    lines = [f"* {model}, {at}: {', '.join(names)}: {why}" for (model, at, why), names in alike.items()]
    return ["Out of reach, or refused:", "\n".join(lines)] if lines else []


def main() -> None:
    path = WEIGHTS.parent / "decoder.md"
    path.write_text(render())
    print(path)


if __name__ == "__main__":
    main()
