"""The demo in a browser: a question about a picture, asked with two settings side by side.

Only the wiring is here. What is computed is in ``session`` and ``fate``, what is shown in ``page``, ``pareto`` and
:mod:`visiontok.overlay`.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import pandas as pd
from PIL import Image

from visiontok import recipes
from visiontok.errors import ConfigError, VisiontokError
from visiontok.images import load_image
from visiontok.named import TINY, Loaded, find_device, load_model, quiet
from visiontok.overlay import Drawing, draw_heat, draw_kept

from . import examples, page, pareto, scene
from .fate import PROMPT, Facts, Token
from .session import NONE, Answer, Setting, ask, read_picture, takes_layer, takes_stage

OWN = "default"
"""The choice of stage that leaves a method where its authors have put it."""
KEPT, HEAT = "Kept patches", "Importance"
SCENES = (0, 3, 7)
"""Scenes of the embedded models among the examples."""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


@dataclass(repr=False)
class View:
    """What one browser looks at.

    Attributes:
        picture: as it was asked about.
        answers: of both sides, None until there.
        picked: the token that was clicked.
        stop: ends the generation in progress.
    """

    picture: Image.Image | None = None
    answers: list[Answer | None] = field(default_factory=lambda: [None, None])
    picked: Token | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def drawing(self, side: int, layer: int, *, heat: bool) -> Drawing | None:
        """The overlay of a side; None without an answer or without known places."""
        answer = self.answers[side]
        if answer is None or self.picture is None or not answer.crops:
            return None
        picked: list[Token] = []
        if self.picked is not None:
            heir = answer.fate.facts(self.picked, layer).heir
            picked = [self.picked] + ([] if heir is None else [heir])
        if heat:
            scores = answer.fate.scores()
            nothing = answer.fate.valid.float().fill_(float("nan"))
            return draw_heat(self.picture, answer.crops, nothing if scores is None else scores, picked)
        return draw_kept(self.picture, answer.crops, answer.fate.alive(layer), picked, answer.fate.merged)


class Demo:
    """A loaded model behind a page.

    Args:
        loaded: the model.
        results: points for the tab of curves, beside those that the package ships.
        longest: longest answer, in tokens.
    """

    def __init__(self, loaded: Loaded, results: Sequence[pareto.Point] = (), longest: int = 64) -> None:
        self.loaded, self.longest = loaded, longest
        self.depth = len(loaded.text.layers)
        self.points = [*results, *pareto.shipped()]
        self.sessions: dict[str, threading.Event] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="visiontok-demo-")  # of drawn examples, as long as this lives

    # ------------------------------------------------------------------------------------------------------ answering

    def ask(
        self, path: str | None, question: str, *controls: Any, request: gr.Request | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Both answers as they grow; ``controls`` are method, stage and keep of each side, then mode and layer."""
        settings = [self._setting(*controls[:3]), self._setting(*controls[3:6])]
        mode, layer = controls[6:8]
        view = View()
        texts: list[str | None] = [None, None]
        key = None if request is None else str(request.session_hash)
        if key is not None:
            self.sessions[key] = view.stop
        try:
            yield self._shown(view, settings, texts, "Reading the picture …", KEPT, layer)  # takes the last view away
            view.picture, note = read_picture(path)
            for side, setting in enumerate(settings):
                title = f"Answering {page.SIDES[side]} …"
                yield self._shown(view, settings, texts, title)
                for item in ask(self.loaded, view.picture, question, setting, stop=view.stop, longest=self.longest):
                    if isinstance(item, Answer):
                        view.answers[side] = item
                        texts[side] = item.text
                    else:
                        texts[side] = item
                        yield self._shown(view, settings, texts, title)
            if view.stop.is_set() and None in view.answers:
                yield self._shown(view, settings, texts, "Stopped.")
                return
            notes = list(dict.fromkeys(note for a in view.answers if a is not None for note in a.notes))
            yield self._shown(view, settings, texts, "; ".join(filter(None, [note, *notes])), mode, layer)
        except VisiontokError as error:
            yield self._shown(view, settings, texts, str(error), error=True)
        except RuntimeError as error:  # out of memory, for one
            yield self._shown(view, settings, texts, f"{type(error).__name__}: {error}", error=True)
        finally:
            view.stop.set()
            if key is not None and self.sessions.get(key) is view.stop:
                del self.sessions[key]

    @staticmethod
    def _setting(method: str, stage: str, keep: float) -> Setting:
        layer = int(stage.rsplit(" ", 1)[1]) if stage.startswith("decoder layer") else None
        return Setting(method, float(keep) / 100, layer)

    def leave(self, request: gr.Request) -> None:
        """The browser is gone: nobody waits for its answer."""
        stop = self.sessions.pop(str(request.session_hash), None)
        if stop is not None:
            stop.set()

    # -------------------------------------------------------------------------------------------------------- showing

    def _shown(
        self,
        view: View,
        settings: Sequence[Setting],
        texts: Sequence[str | None],
        status: str,
        mode: str | None = None,
        layer: int = PROMPT,
        error: bool = False,
    ) -> tuple[Any, ...]:
        """Values of all outputs of :meth:`ask`."""
        finished = [a for a in view.answers if a is not None]
        same = (
            ""
            if len(finished) < 2
            else "same answer as A"
            if finished[0].text == finished[1].text
            else "other answer than A"
        )
        titles = [
            _title(setting) if answer is None else answer.label
            for setting, answer in zip(settings, view.answers, strict=True)
        ]
        answers = [page.answer(i, titles[i], texts[i], same if i else "") for i in (0, 1)]
        if mode is None:
            return (view, page.status(status, error=error), *answers, *(gr.skip(),) * 7)
        return (
            view,
            page.status(status, error=error),
            *answers,
            page.bars(view.answers),
            *self.redraw(view, mode, layer),
            gr.skip(),
        )

    def redraw(self, view: View | None, mode: str, layer: int) -> tuple[Any, ...]:
        """Both overlays, the lines under them, and what is known of the picked patch."""
        view, layer, heat = view or View(), int(layer), mode == HEAT
        images: list[Any] = []
        lines = []
        for side, answer in enumerate(view.answers):
            drawing = view.drawing(side, layer, heat=heat)
            images.append(None if drawing is None else drawing.image)
            drawn = None
            if drawing is not None and answer is not None:
                drawn = int(answer.fate.alive(layer)[tuple(drawing.tokens.T)].sum())
            lines.append(page.under(answer, layer, heat=heat, drawn=drawn))
        found: list[tuple[Answer, Facts] | None] = [
            None if answer is None or view.picked is None else (answer, answer.fate.facts(view.picked, layer))
            for answer in view.answers
        ]
        return (*images, *lines, page.facts(found, layer))

    def pick(self, side: int, view: View, mode: str, layer: int, event: gr.SelectData) -> tuple[Any, ...]:
        """A patch was clicked."""
        drawing = view.drawing(side, int(layer), heat=mode == HEAT)
        view.picked = None if drawing is None else drawing.token_at(*map(int, event.index))
        return (view, *self.redraw(view, mode, layer))

    def reproduce(self, question: str, *controls: Any) -> str:
        """The lines that answer as both sides do."""
        texts = []
        for side, at in zip(page.SIDES, (0, 3), strict=True):
            setting = self._setting(*controls[at : at + 3])
            try:
                shell = setting.in_shell(self.loaded.name, question)
                python = setting.in_python(self.loaded.name, question)
            except VisiontokError as error:
                texts.append(f"**{side}** {error}")
                continue
            texts.append(
                f"**{side}** · shell\n\n```bash\n{shell}\n```\n\n**{side}** · Python\n\n```python\n{python}\n```"
            )
        return "\n\n".join(texts)

    def controls_of(self, method: str) -> tuple[Any, Any]:
        """What a method can be told: its stage and its budget."""
        if method == NONE:
            return gr.update(choices=[OWN], value=OWN, interactive=False), gr.update(interactive=False)
        card = recipes.find(method).card
        movable = takes_layer(method) or takes_stage(method)
        choices = [OWN] + [f"decoder layer {layer}" for layer in range(1, self.depth)] if movable else [OWN]
        return (
            gr.update(choices=choices, value=OWN, interactive=movable),
            gr.update(interactive=bool(card.budget)),
        )

    def curve(self, source: str, methods: Sequence[str]) -> pd.DataFrame:
        """The points of a source that are to be drawn, and the front over all of its methods."""
        here = [p for p in self.points if p.source == source]
        rows = [(pareto.FRONT, 100 * p.kept, p.score) for p in pareto.front(here)]
        rows += [(p.method, 100 * p.kept, p.score) for p in here if p.method in methods]
        return pd.DataFrame(rows, columns=["method", "visual tokens kept, %", "score, %"])

    def choices(self, source: str) -> tuple[list[str], list[str]]:
        """The methods of a source, and those that are drawn at first."""
        known = list(dict.fromkeys(p.method for p in self.points if p.source == source))
        usual = [m for m in known if m.split("[")[0] in pareto.USUAL]
        return known, usual or known[:5]

    # --------------------------------------------------------------------------------------------------------- layout

    def blocks(self) -> gr.Blocks:
        """The page."""
        config = self.loaded.model.config
        model = f"{self.loaded.name} · {config.model_type} · {self.depth} decoder layers · {self.loaded.device}"
        model += " · a test bench, predicts nothing about large models" if self.loaded.name in TINY else ""
        queue: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "compute"}
        quick: dict[str, Any] = {"concurrency_limit": 4, "show_progress": "hidden", "api_visibility": "private"}
        with gr.Blocks(
            title="visiontok", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
        ) as blocks:
            gr.HTML(page.head(model), padding=False)
            view = gr.State(None, time_to_live=3600)
            with gr.Tab("Ask"), gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=290):
                    picture = gr.Image(
                        label="Picture",
                        height=176,
                        format="png",
                        sources=["upload", "clipboard"],
                        elem_id="picture",
                        buttons=[],
                    )
                    # As it is: load_image knows what to say of broken files, and gradio does not.
                    vars(picture)["preprocess"] = lambda payload: None if payload is None else payload.path
                    examples_here = gr.Row()
                    question = gr.Textbox(
                        label="Question", placeholder="What is in this picture?", elem_id="question", max_lines=2
                    )
                    with gr.Row():
                        button = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
                        stop = gr.Button("Stop", elem_id="stop", min_width=80)
                    status = gr.HTML(page.status(), padding=False, elem_id="status")
                    bars = gr.HTML("", padding=False, elem_id="bars")
                    with examples_here:
                        self._examples(picture, question)
                with gr.Column(scale=8, min_width=320):
                    controls: list[Any] = []
                    answers: list[Any] = []
                    with gr.Row():
                        for side, default in enumerate((NONE, "visiontok")):
                            with gr.Column(min_width=300):
                                mine, answer = self._side(side, default)
                                controls += mine
                                answers.append(answer)
                    with gr.Row():
                        mode = gr.Radio([KEPT, HEAT], value=KEPT, label="Show", elem_id="mode", min_width=200)
                        layer = gr.Slider(
                            PROMPT, self.depth - 1, value=PROMPT, step=1, elem_id="layer", min_width=240, scale=2,
                            label=f"Decoder layer ({PROMPT}: behind the prompt stage)", buttons=[],
                        )  # fmt: skip
                    overlays, lines = [], []
                    with gr.Row():
                        for name in page.SIDES:
                            with gr.Column(min_width=300):
                                overlays.append(
                                    gr.Image(
                                        show_label=False, interactive=False, height=372, buttons=[], format="png",
                                        elem_id=f"overlay-{name}", elem_classes="vt-picture",
                                        placeholder="The patches that are kept appear here.",
                                        alt_text=f"Picture with the patches that side {name} keeps",
                                    )
                                )  # fmt: skip
                                lines.append(gr.HTML(page.under(None, PROMPT, heat=False, drawn=None), padding=False))
                                lines[-1].elem_id = f"kept-{name}"
                    facts = gr.HTML(page.facts([None, None], PROMPT), padding=False, elem_id="facts")
                    with gr.Accordion("Reproduce", open=False, elem_id="reproduce-panel"):
                        reproduce = gr.Button("Show the lines that reproduce this", size="sm", elem_id="reproduce")
                        code = gr.Markdown(elem_id="code")
            with gr.Tab("Curves"):
                self._curves()
            drawn = [*overlays, *lines, facts]
            outputs = [view, status, *answers, bars, *drawn, code]
            inputs = [picture, question, *controls, mode, layer]
            asking = gr.on(
                [button.click, question.submit],
                self.ask,
                inputs,
                outputs,
                api_name="ask",
                show_progress="hidden",
                **queue,
            )
            stop.click(lambda: page.status("Stopped."), None, status, cancels=[asking], queue=False, **_private())
            for trigger in (mode.change, layer.change):
                trigger(self.redraw, [view, mode, layer], drawn, **quick)
            for number, overlay in enumerate(overlays):
                overlay.select(self._picker(number), [view, mode, layer], [view, *drawn], **quick)
            reproduce.click(self.reproduce, [question, *controls], code, **quick)
            blocks.unload(self.leave)
        blocks.queue(max_size=32)
        return blocks

    def _picker(self, side: int) -> Any:
        def picker(view: View, mode: str, layer: int, event: gr.SelectData) -> tuple[Any, ...]:
            return self.pick(side, view, mode, layer, event)

        return picker

    def _side(self, side: int, default: str) -> tuple[list[Any], Any]:
        """Controls and answer of a side."""
        name = page.SIDES[side]
        stage, keep = self.controls_of(default)
        with gr.Row():
            chosen = gr.Dropdown(
                [NONE, *recipes.names()], value=default, label=f"{name} · method", elem_id=f"method-{name}",
                min_width=120, scale=4,
            )  # fmt: skip
            stages = gr.Dropdown(
                stage["choices"], value=OWN, interactive=stage["interactive"], label="Stage", elem_id=f"stage-{name}",
                min_width=120, scale=4,
            )  # fmt: skip
            kept = gr.Slider(
                1, 100, value=25, step=1, interactive=keep["interactive"], label="Keep %", elem_id=f"keep-{name}",
                min_width=150, scale=5, buttons=[],
            )  # fmt: skip
        answer = gr.HTML(page.answer(side, _title(Setting(default)), None), padding=False, elem_id=f"answer-{name}")
        chosen.change(self.controls_of, chosen, [stages, kept], show_progress="hidden", **_private())
        return [chosen, stages, kept], answer

    def _examples(self, picture: Any, question: Any) -> None:
        rows = [(path, pairs[0][0]) for path, pairs in examples().items()]
        for number in SCENES if self.loaded.name in TINY else ():
            drawn, asked = scene(number)
            path = Path(self.folder.name) / f"scene-{number}.png"
            drawn.save(path)
            rows.append((path, asked[0].text))
        rows.reverse()
        shown = gr.Dataset(
            components=[picture], samples=[[str(path)] for path, _ in rows], type="index", label="Examples",
            elem_id="examples",
        )  # fmt: skip
        shown.click(
            lambda number: (load_image(rows[number][0]), rows[number][1]), shown, [picture, question],
            show_progress="hidden", **_private(),
        )  # fmt: skip

    def _curves(self) -> None:
        sources = list(dict.fromkeys(point.source for point in self.points))
        known, drawn = self.choices(sources[0])
        with gr.Row():
            source = gr.Dropdown(sources, value=sources[0], label="Results", elem_id="source", scale=1)
            methods = gr.Dropdown(known, value=drawn, multiselect=True, label="Methods", elem_id="methods", scale=3)
        plot = gr.LinePlot(
            self.curve(sources[0], drawn), x="visual tokens kept, %", y="score, %", color="method", height=430,
            elem_id="curves", buttons=[], x_lim=[0, 102], color_map={pareto.FRONT: "#98a2b3"},
        )  # fmt: skip
        gr.Markdown(
            "Saved results, not of the question in the other tab. The front is over all methods of the source. Curves "
            "of the embedded models are of 144 or 81 visual tokens and predict nothing about a large model; "
            "`visiontok demo --results FOLDER` adds your own runs of `visiontok eval`."
        )

        def changed(source: str) -> tuple[Any, Any]:
            known, drawn = self.choices(source)
            return gr.update(choices=known, value=drawn), self.curve(source, drawn)

        source.change(changed, source, [methods, plot], **_private())
        methods.change(self.curve, [source, methods], plot, **_private())


def _private() -> dict[str, Any]:
    return {"api_visibility": "private"}


def _title(setting: Setting) -> str:
    return "stock model" if setting.method == NONE else setting.method


def theme() -> gr.themes.Base:
    """Plain, with the fonts of the system: nothing is fetched from anywhere."""
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="gray", font=FONT, font_mono=MONO, spacing_size="sm", text_size="md"
    )


def demo_job(
    *,
    model: str = "tiny",
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int | None = None,
    results: Sequence[str] = (),
    wait: bool = True,
) -> gr.Blocks:
    """Load a model and serve the page until interrupted.

    Args:
        model: as for ``visiontok run``.
        device: ``auto``, ``cpu``, ``cuda``, ….
        host: interface to listen on.
        port: None for the first free one from 7860.
        results: folders of ``visiontok eval``.
        wait: False to return while it is served.

    Raises:
        ConfigError: for a wrong argument, a folder without results, or a port that is taken.
    """
    place = find_device(device)
    points = [point for folder in results for point in pareto.of_eval(folder)]
    with quiet():
        loaded = load_model(model, place)
    blocks = Demo(loaded, points).blocks()
    try:
        blocks.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, show_error=True,
            share=False, ssr_mode=False, footer_links=[], theme=theme(), css=page.CSS, max_file_size="64mb",
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot listen there ({error}); give another port, or none") from error
    if wait:
        print(f"{model} answers at {blocks.local_url}; Ctrl+C ends it", flush=True)
        blocks.block_thread()
    return blocks
