"""A report as one HTML page that needs nothing else, and as Markdown: the same parts in the same order."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from .examples import Example
from .plots import Plot, inline
from .sheets import Sheet

_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1a1a19; --soft: #5d5c57; --line: #deddd8; --band: #f6f5f2;
  --warn: #8a4b00; --warned: #fdf3e3; --right: #00694b; --wrong: #a33a00; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --ink: #ecebe6; --soft: #a3a29b; --line: #3a3937;
  --band: #201f1e; --warn: #f2c078; --warned: #33291a; --right: #5fcfa8; --wrong: #f0936a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; margin: .5rem 0; }
.facts, figure > p, nav { color: var(--soft); font-size: .875rem; }
nav a { margin-right: 1rem; }
a { color: inherit; text-underline-offset: .15em; }
.warning { border-left: 3px solid var(--warn); background: var(--warned); padding: .5rem .8rem; max-width: 46rem; }
figure { margin: 1rem 0 1.5rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem; }
.plots { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.plots figure { margin: 0; }
.plots figure:first-child:nth-last-child(odd) { grid-column: 1 / -1; max-width: 46rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
th[scope=row], .named1 thead th:first-child, .named2 thead th:nth-child(-n+2) { text-align: left; }
th[scope=row] { font-weight: 500; }
.named1 th:first-child, .named2 th:first-child { position: sticky; left: 0; background: var(--page); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.card { background: var(--band); border-radius: .4rem; overflow: hidden; font-size: .85rem; overflow-wrap: anywhere; }
.card img { width: 100%; display: block; }
.card div { padding: .6rem .8rem .8rem; }
.card p { margin: .2rem 0; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin: .4rem 0 0; }
.card dt { color: var(--soft); }
.card dd { margin: 0; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
"""


@dataclass(frozen=True)
class Drawn:
    """A plot and its files."""

    plot: Plot
    svg: str


@dataclass(frozen=True)
class Section:
    """A task, or all of them.

    Attributes:
        name: of the section, for links.
        title: above it.
        text: paragraphs.
        plots: side by side.
        sheets: tables.
        examples: each with the file of its picture, by method.
    """

    name: str
    title: str
    text: Sequence[str] = ()
    plots: Sequence[Drawn] = ()
    sheets: Sequence[Sheet] = ()
    examples: Sequence[tuple[Example, str | None]] = ()

    @property
    def methods(self) -> list[str]:
        """Those with examples."""
        return list(dict.fromkeys(example.method for example, _ in self.examples))

    def anchor(self, method: str = "") -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in f"{self.name}-{method}").strip("-")


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: of the page.
        facts: what was run on what.
        warnings: what a reader must know first.
        sections: in order.
    """

    title: str
    facts: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section]

    def html(self) -> str:
        """One file: plots inline, pictures as data, no script, no request."""
        links = "".join(f'<a href="#{one.anchor()}">{html.escape(one.title)}</a>' for one in self.sections)
        facts = "".join(f"<p class=facts>{html.escape(fact)}</p>" for fact in self.facts)
        warnings = "".join(f"<p class=warning>{html.escape(warning)}</p>" for warning in self.warnings)
        body = "".join(map(_section, self.sections))
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{_CSS}</style></head>\n"
            f"<body><header><h1>{html.escape(self.title)}</h1>{facts}<nav>{links}</nav></header>\n"
            f"{warnings}\n{body}</body></html>\n"
        )

    def markdown(self) -> str:
        """Plots and pictures lie beside it."""
        parts = [f"# {self.title}", *self.facts, *(f"> **Note.** {warning}" for warning in self.warnings)]
        for one in self.sections:
            parts += [f"## {one.title}", *one.text]
            parts += [f"![{drawn.plot.title}](plots/{drawn.plot.name}.png)" for drawn in one.plots]
            parts += [sheet.markdown().rstrip("\n") for sheet in one.sheets]
            for method in one.methods:
                parts.append(f"### {one.title}: questions that {method} gets wrong")
                parts += [_markdown(example, file) for example, file in one.examples if example.method == method]
        return "\n\n".join(parts) + "\n"


def _section(one: Section) -> str:
    text = "".join(f"<p>{html.escape(part)}</p>" for part in one.text)
    plots = "".join(f"<figure>{inline(drawn.svg, drawn.plot.name)}</figure>" for drawn in one.plots)
    links = ", ".join(f'<a href="#{one.anchor(method)}">{html.escape(method)}</a>' for method in one.methods)
    failing = f"<p>Questions that the reference gets right and a method gets wrong: {links}.</p>" if links else ""
    cards = "".join(
        f'<h3 id="{one.anchor(method)}">Wrong with {html.escape(method)}</h3><div class=cards>'
        + "".join(_card(example) for example, _ in one.examples if example.method == method)
        + "</div>"
        for method in one.methods
    )
    return (
        f'<section><h2 id="{one.anchor()}">{html.escape(one.title)}</h2>{text}<div class=plots>{plots}</div>\n'
        f"{''.join(sheet.html() for sheet in one.sheets)}{failing}{cards}</section>\n"
    )


def _card(example: Example) -> str:
    picture = ""
    if example.picture is not None:
        data = base64.b64encode(example.picture).decode()
        alt = html.escape(f"patches kept by {example.method}", quote=True)
        picture = f'<img alt="{alt}" src="data:image/jpeg;base64,{data}">'
    note = f"<p class=facts>{html.escape(example.note)}</p>" if example.note else ""
    question = html.escape(example.question).replace("\n", "<br>")
    return (
        f"<article class=card>{picture}<div><p>{question}</p><dl>"
        f"<dt>right</dt><dd>{html.escape(example.right)}</dd>"
        f"<dt>reference</dt><dd class=right>{html.escape(example.reference)}</dd>"
        f"<dt>method</dt><dd class=wrong>{html.escape(example.answer)}</dd></dl>{note}"
        f"<p class=facts>{html.escape(example.id)}</p></div></article>"
    )


def _markdown(example: Example, file: str | None) -> str:
    picture = "" if file is None else f"![kept patches](examples/{file}) "
    question = " ".join(example.question.split())
    note = f" {example.note}" if example.note else ""
    return (
        f"- {picture}`{example.id}` {question} Right: {example.right}; reference: {example.reference}; method: "
        f"{example.answer}.{note}"
    )
