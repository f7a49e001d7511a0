"""The parts of the page that are text and bars: plain HTML made of an answer, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape

from .fate import PROMPT, Facts
from .session import Answer

PARTS = {
    "preprocess": "preprocess",
    "vision": "vision tower",
    "selection": "selection",
    "prefill": "prefill",
    "rest": "rest",
    "decode": "decode",
}
"""Parts of the time of an answer (:class:`visiontok.run.Seconds`), in order, and what they are called."""
SIDES = ("A", "B")
NO_SCORES = "this method has no scores"

CSS = """
.gradio-container { padding: 10px 20px 4px !important; }
.gradio-container .main, .gradio-container .wrap.app { padding: 0 !important; max-width: 1560px; margin: 0 auto; }
footer { display: none !important; }
.html-container { padding: 0 !important; }
#vt-head { display: flex; align-items: baseline; gap: 14px; flex-wrap: wrap; line-height: 26px; }
#vt-head h1 { font-size: 20px; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
#vt-head p { margin: 0; color: var(--body-text-color-subdued); font-size: 14px; }
#vt-head .vt-model { margin-left: auto; font-size: 12.5px; color: var(--body-text-color-subdued); }
.tabitem { padding: 8px 0 0 !important; }
#status { min-height: 0 !important; }
.vt-status { font-size: 13px; line-height: 17px; color: var(--body-text-color-subdued); }
.vt-status:empty { display: none; }
.vt-status.vt-error { color: #b42318; font-weight: 550; }
.dark .vt-status.vt-error { color: #fda29b; }
.vt-answer { border: 1px solid var(--border-color-primary); border-left: 4px solid var(--vt-side); border-radius: 6px;
  padding: 6px 13px 8px; min-height: 68px; }
.vt-answer .vt-who { font-size: 12.5px; color: var(--body-text-color-subdued); display: flex; gap: 8px; }
.vt-answer .vt-who b { color: var(--vt-side); font-weight: 700; }
.vt-answer .vt-text { font-size: 22px; line-height: 1.35; font-weight: 600; overflow-wrap: anywhere; }
.vt-answer .vt-text.vt-idle { font-weight: 400; color: var(--body-text-color-subdued); }
.vt-answer .vt-verdict { margin-left: auto; }
.vt-answer .vt-verdict.vt-other { color: var(--vt-side); font-weight: 600; }
.vt-A { --vt-side: #3f56c4; } .vt-B { --vt-side: #b45309; }
.dark .vt-A { --vt-side: #9db1ff; } .dark .vt-B { --vt-side: #fbbf24; }
.vt-under { font-size: 13px; line-height: 18px; color: var(--body-text-color-subdued); }
.vt-under b { color: var(--body-text-color); font-weight: 600; }
.vt-facts { overflow-x: auto; font-size: 13px; line-height: 17px; }
.vt-facts table, .vt-facts tr { border: 0 !important; }
.vt-facts table { border-collapse: collapse; width: 100%; }
.vt-facts th, .vt-facts td { text-align: left; padding: 2px 16px 2px 0; border: 0; font-weight: 400; }
.vt-facts tr:first-child th { color: var(--body-text-color-subdued); font-size: 12px; }
.vt-facts tr:first-child th:first-child { color: var(--body-text-color); font-weight: 600; font-size: 13px; }
.vt-facts td:first-child { color: var(--vt-side); }
.vt-bars { display: grid; gap: 8px; font-size: 12.5px; font-variant-numeric: tabular-nums; }
.vt-bars .vt-name { font-weight: 600; line-height: 17px; }
.vt-bars .vt-name small { font-weight: 400; color: var(--body-text-color-subdued); font-size: 12px; }
.vt-row { display: grid; grid-template-columns: 12px 1fr 64px; gap: 7px; align-items: center; line-height: 15px; }
.vt-row > b { color: var(--vt-side); } .vt-row > span:last-child { text-align: right; }
.vt-track { height: 9px; border-radius: 2px; background: var(--background-fill-secondary); display: flex;
  overflow: hidden; }
.vt-track i { display: block; height: 100%; background: var(--vt-side); }
.vt-legend { margin-top: 4px; width: 100%; border-collapse: collapse; font-size: 12px; line-height: 15px; }
.vt-legend, .vt-legend tr { border: 0 !important; }
.vt-legend td { border: 0; padding: 0; text-align: right; } .vt-legend td:first-child { text-align: left; }
.vt-legend td[class] { color: var(--vt-side); }
.vt-legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px; }
.vt-p0 { background: #98a2b3 !important; } .vt-p1 { background: #2e6fd8 !important; }
.vt-p2 { background: #d6409f !important; } .vt-p3 { background: #12946b !important; }
.vt-p4 { background: #cfd4dc !important; } .vt-p5 { background: #e8a33d !important; }
.vt-picture img { cursor: crosshair; }
#examples .gallery { gap: 6px !important; flex-wrap: nowrap !important; overflow: hidden; }
#examples .gallery-item, #examples .gallery-item img { width: 52px !important; height: 52px !important; min-width: 0; }
#examples { margin: -2px 0; }
@media (max-width: 700px) { .gradio-container { padding: 6px 8px !important; } #vt-head .vt-model { margin-left: 0; } }
"""


def head(model: str) -> str:
    """Title and model."""
    return (
        "<div id='vt-head'><h1>visiontok</h1><p>One question, asked with all visual tokens and with fewer.</p>"
        f"<span class='vt-model'>{escape(model)}</span></div>"
    )


def status(text: str = "", *, error: bool = False) -> str:
    """One line under the buttons."""
    kind = "vt-status vt-error" if error else "vt-status"
    return f"<div class='{kind}' role='{'alert' if error else 'status'}'>{escape(text)}</div>"


def answer(side: int, title: str, text: str | None, verdict: str = "") -> str:
    """An answer, finished or not; None before it begins."""
    shown = "<span class='vt-text vt-idle'>–</span>" if text is None else f"<span class='vt-text'>{escape(text)}</span>"
    return (
        f"<div class='vt-answer vt-{SIDES[side]}'><div class='vt-who'><b>{SIDES[side]}</b><span>{escape(title)}</span>"
        f"<span class='vt-verdict{' vt-other' if verdict.startswith('other') else ''}'>{escape(verdict)}</span></div>"
        f"{shown}</div>"
    )


def bars(answers: Sequence[Answer | None]) -> str:
    """What the answers cost, side by side."""
    there = [(i, a) for i, a in enumerate(answers) if a is not None]
    if not there:
        return ""
    parts = [
        _metric("Visual tokens", "mean over decoder layers", [(i, a.average, f"{a.average:.4g}") for i, a in there]),
        _metric(
            "FLOPs", "to the first token, tower included",
            [(i, a.operations, number(a.operations)) for i, a in there],
        ),
        _metric("Key-value cache", "behind the prompt", [(i, a.kv_bytes, size(a.kv_bytes)) for i, a in there]),
        _metric(
            "Time to first token", "",
            [(i, a.seconds.first_token, milliseconds(a.seconds.first_token)) for i, a in there],
        ),
    ]  # fmt: skip
    longest = max(sum(_parts(a).values()) for _, a in there)
    rows = []
    for i, a in there:
        seconds = _parts(a)
        segments = "".join(
            f"<i class='vt-p{k}' style='width:{100 * value / longest:.2f}%' "
            f"title='{PARTS[name]}: {milliseconds(value)}'></i>"
            for k, (name, value) in enumerate(seconds.items())
        )
        told = ", ".join(f"{PARTS[name]} {milliseconds(value)}" for name, value in seconds.items())
        rows.append(_row(i, segments, milliseconds(sum(seconds.values())), told))
    legend = "".join(
        f"<tr><td><i class='vt-p{k}'></i>{PARTS[name]}</td>"
        + "".join(f"<td class='vt-{SIDES[i]}'>{milliseconds(_parts(a)[name])}</td>" for i, a in there)
        + "</tr>"
        for k, name in enumerate(PARTS)
    )
    parts.append(
        "<div><div class='vt-name'>Time <small>of the whole answer, by part</small></div>"
        f"{''.join(rows)}<table class='vt-legend'>{legend}</table></div>"
    )
    return f"<div class='vt-bars'>{''.join(parts)}</div>"


def _parts(a: Answer) -> dict[str, float]:
    seconds = asdict(a.seconds)
    return {name: seconds[name] for name in PARTS}


def _metric(name: str, note: str, rows: Sequence[tuple[int, float | None, str]]) -> str:
    most = max((value for _, value, _ in rows if value is not None), default=0) or 1
    drawn = [
        _row(i, f"<i style='width:{100 * (value or 0) / most:.2f}%'></i>", text, f"{name}: {text}")
        for i, value, text in rows
    ]
    return f"<div><div class='vt-name'>{name} <small>{note}</small></div>{''.join(drawn)}</div>"


def _row(side: int, inside: str, text: str, told: str) -> str:
    return (
        f"<div class='vt-row vt-{SIDES[side]}'><b>{SIDES[side]}</b>"
        f"<div class='vt-track' role='img' aria-label='{escape(told)}'>{inside}</div><span>{text}</span></div>"
    )


def under(a: Answer | None, layer: int, *, heat: bool, drawn: int | None) -> str:
    """What an overlay shows, in a line; ``drawn``: patches that are bright, None where nothing was drawn."""
    if a is None:
        return "<div class='vt-under'></div>"
    if drawn is None:
        return "<div class='vt-under'>Where this model's tokens lie on the picture is not known.</div>"
    if heat:
        text = (
            f"{NO_SCORES.capitalize()}."
            if a.fate.scores() is None
            else "Importance as the method sees it, by rank: <b>bright</b> is high."
        )
        return f"<div class='vt-under'>{text}</div>"
    kept = int(a.fate.alive(layer).sum())
    hidden = f" ({drawn} of them patches)" if drawn != kept else ""
    return (
        f"<div class='vt-under' data-kept='{kept}' data-tokens='{a.tokens}'><b>{kept} of {a.tokens}</b> visual tokens "
        f"({kept / max(a.tokens, 1):.0%}) {where(layer)}{hidden}</div>"
    )


def where(layer: int) -> str:
    """The place of a view in words."""
    return "behind the prompt stage" if layer == PROMPT else f"in decoder layer {layer}"


def facts(found: Sequence[tuple[Answer, Facts] | None], layer: int) -> str:
    """What became of a patch, one column per side."""
    there = [(SIDES[i], *one) for i, one in enumerate(found) if one is not None]
    if not there:
        return "<div class='vt-under'>Click a patch to see what became of it.</div>"
    t, row, column = there[0][2].place
    title = f"Patch in row {row + 1}, column {column + 1}" + (f", tile {t + 1}" if t else "")
    columns = ("score", "rank", "dropped", "merged into", f"mass {where(layer)}")
    heading = "".join(f"<th scope='col'>{column}</th>" for column in columns)
    rows = []
    for side, a, f in there:
        rank = "–" if f.rank is None else f"{f.rank} of {f.candidates}"
        cells = (f"{side} · {a.label}", _score(f), rank, _dropped(f), _heir(a, f), f"{f.mass:.4g}")
        rows.append(f"<tr class='vt-{side}'>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<div class='vt-facts'><table><tr><th>{title}</th>{heading}</tr>{''.join(rows)}</table></div>"


def _score(f: Facts) -> str:
    return NO_SCORES if f.score is None else f"{f.score:.4g}"


def _dropped(f: Facts) -> str:
    if f.dropped is None:
        return "never"
    return "before the language model" if f.dropped in (PROMPT, 0) else f"on the input of decoder layer {f.dropped}"


def _heir(a: Answer, f: Facts) -> str:
    if f.heir is None:
        return "–" if f.dropped is None else "nobody"
    _, row, column = a.fate.grid[f.heir].tolist()
    return f"row {row + 1}, column {column + 1}"


def number(value: float | None) -> str:
    """A count of operations with its prefix."""
    if value is None:
        return "not counted"
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}".strip()
        value /= 1000
    return f"{value:.3g} P"


def size(value: float | None) -> str:
    """Bytes."""
    if value is None:
        return "not counted"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def milliseconds(seconds: float) -> str:
    """A time."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
