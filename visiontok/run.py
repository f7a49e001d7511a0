"""``visiontok run``: one question about one picture, answered by the stock model and by the compressed one.

Speed-ups are ratios of the whole time to first token, from the picture to the first generated token, vision tower
included; the language model's part stands beside it, and so does the cap, which is what removing every visual token
behind the tower could reach.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from visiontok.adapters.base import find as find_adapter
from visiontok.api import Compression, compress
from visiontok.cost import SpeedUp, time_to_first_token_cap
from visiontok.errors import ConfigError
from visiontok.images import load_image
from visiontok.method import Mass
from visiontok.named import TINY, Loaded, find_device, load_model, named_recipe, quiet
from visiontok.overlay import overlay as draw_overlay
from visiontok.stopwatch import Seconds, timed

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from transformers.generation.streamers import BaseStreamer

    from visiontok.recipe import Recipe
    from visiontok.report import Report


@dataclass(frozen=True)
class Side:
    """One of the two answers.

    Attributes:
        answer: the text.
        generated: its tokens, the end token included.
        seconds: median times.
    """

    answer: str
    generated: int
    seconds: Seconds

    @property
    def per_token(self) -> float:
        """Seconds of decoding for each token after the first; 0 if there is none."""
        return self.seconds.decode / (self.generated - 1) if self.generated > 1 else 0.0


@dataclass(frozen=True)
class Drawn:
    """The overlay that was written.

    Attributes:
        path: of the PNG.
        caption: what it shows.
        layer: decoder layer whose tokens it shows.
        kept: patches drawn as kept.
    """

    path: str
    caption: str
    layer: int
    kept: int


@dataclass(frozen=True)
class Result:
    """Both answers and what they cost.

    Attributes:
        model: as it was asked for.
        device: where it ran.
        dtype: of its weights.
        image: path of the picture, or which scene it is.
        question: what was asked.
        expected: the true answer, where it is known.
        stock: the model as it is.
        compressed: the same model with the recipe.
        report: tokens, key-value bytes and FLOPs of the compressed run.
        speed_up: measured, stock / compressed.
        repeats: runs behind each median.
        overlay: the drawing, if one was wanted.
        notes: what a reader must know before trusting the numbers.
    """

    model: str
    device: str
    dtype: str
    image: str
    question: str
    expected: str | None
    stock: Side
    compressed: Side
    report: Report
    speed_up: SpeedUp
    repeats: int
    overlay: Drawn | None
    notes: tuple[str, ...]

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the stock model, all images."""
        return sum(image.tokens for image in self.report.images)

    @property
    def kept(self) -> list[int]:
        """Visual tokens alive in each decoder layer, all images."""
        return [sum(layer) for layer in zip(*(image.kept for image in self.report.images), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; times in seconds."""
        costs = self.report.account
        depth = len(self.report.layer_tokens)
        flops = costs.speed_up()

        def side(
            part: Side, kept: list[int], kv: int | None, patches: int, vision: Any, decoder: Any
        ) -> dict[str, Any]:
            return {
                "answer": part.answer,
                "generated_tokens": part.generated,
                "tower_patches": None if vision is None else patches,
                "visual_tokens": kept,
                "layer_average": sum(kept) / depth,
                "kv_bytes": kv,
                "flops": {
                    "vision": None if vision is None else vision.tower + vision.projector,
                    "language_model": None if decoder is None else sum(decoder) + costs.lm_head,
                },
                "seconds": asdict(part.seconds),
            }

        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "image": self.image,
            "question": self.question,
            "expected": self.expected,
            "method": self.report.recipe,
            "recipe_hash": self.report.recipe_hash,
            "requested": self.report.requested,
            "tokens_in": self.visual_tokens,
            "tokens_kept": self.kept[-1],
            "stock": side(
                self.stock,
                [self.visual_tokens] * depth,
                costs.kv_stock,
                costs.patches_stock,
                costs.vision_stock,
                costs.decoder_stock,
            ),
            "compressed": side(self.compressed, self.kept, costs.kv, costs.patches, costs.vision, costs.decoder),
            "speed_up": {
                "measured": self.speed_up.to_dict(),
                "flops": None if flops is None else flops.to_dict(),
            },
            "repeats": self.repeats,
            "overlay": None if self.overlay is None else asdict(self.overlay),
            "notes": list(self.notes),
        }

    def render(self, console: Console) -> None:
        """Print the two side by side."""
        from rich.markup import escape
        from rich.table import Table

        data = self.to_dict()
        stock, compressed = data["stock"], data["compressed"]
        console.print(f"[bold]model[/]     {escape(self.model)}, {self.dtype} on {self.device}")
        console.print(f"[bold]image[/]     {escape(self.image)}")
        console.print(f"[bold]question[/]  {escape(self.question)}")
        if self.expected is not None:
            console.print(f"[bold]truth[/]     {escape(self.expected)}")
        console.print()
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column("", style="bold", no_wrap=True)
        table.add_column("stock", overflow="fold")
        table.add_column(escape(f"{self.report.recipe} ({self.report.requested})"), overflow="fold")
        table.add_row("answer", escape(stock["answer"]), escape(compressed["answer"]))
        table.add_row("patches in the vision tower", *(_count(side["tower_patches"]) for side in (stock, compressed)))
        table.add_row("visual tokens in", str(self.visual_tokens), str(self.visual_tokens))
        table.add_row("  kept to the last layer", str(self.visual_tokens), _share(self.kept[-1], self.visual_tokens))
        table.add_row("  average over layers", *(f"{side['layer_average']:.1f}" for side in (stock, compressed)))
        table.add_row("  tokens × layers", *(_runs(side["visual_tokens"]) for side in (stock, compressed)))
        table.add_row("key-value cache", *(_bytes(side["kv_bytes"]) for side in (stock, compressed)))
        for name, key in (("FLOPs, vision", "vision"), ("FLOPs, language model", "language_model")):
            table.add_row(name, *(_flops(side["flops"][key]) for side in (stock, compressed)))
        table.add_section()
        for name, key in _TIMES.items():
            table.add_row(name, *(_milliseconds(side["seconds"][key]) for side in (stock, compressed)))
        table.add_row(
            "decode, per further token", *(_milliseconds(side.per_token) for side in (self.stock, self.compressed))
        )
        console.print(table)
        console.print()
        console.print(f"[bold]speed-up, measured[/]  {_ratios(self.speed_up)}")
        flops = self.report.account.speed_up()
        if flops is not None:
            console.print(f"[bold]speed-up, in FLOPs[/]  {_ratios(flops)}")
        console.print(
            f"(medians of {self.repeats}; cap: what removing every visual token behind the tower could reach)"
        )
        if self.overlay is not None:
            console.print(f"[bold]overlay[/]   {escape(self.overlay.path)}: {escape(self.overlay.caption)}")
        for note in self.notes:
            console.print(f"[bold]note[/]      {escape(note)}")


_TIMES = {
    "preprocess": "preprocess",
    "vision tower": "vision",
    "selection": "selection",
    "prefill": "prefill",
    "rest": "rest",
    "time to first token": "first_token",
}


def run_job(
    *,
    image: str | None = None,
    ask: str | None = None,
    method: str = "visiontok",
    keep: str | float | int | None = None,
    mass: bool = False,
    model: str = "tiny",
    device: str = "auto",
    overlay: str | None = None,
    max_new_tokens: int = 32,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    repeats: int = 5,
) -> Result:
    """Answer a question about a picture with and without compression.

    Everything that can be checked without the model is checked before it is loaded.

    Args:
        image: path; None draws a scene of the embedded model.
        ask: question; needed with an image. About a scene, None asks one of its own questions; the embedded model
            gets the first that it answers rightly when stock.
        method: name of a method, or a recipe file as :func:`visiontok.compress` takes it.
        keep: budget; None is 25 % where the method takes a budget and none is set.
        mass: mass attention at every selection; without it, as the recipe says.
        model: ``tiny`` or ``tiny-qwen``, the embedded models, or a Hugging Face id or folder.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, …
        overlay: path of a PNG to write.
        max_new_tokens: longest answer.
        seed: of stochastic methods, and number of the scene.
        options: of the method, as text.
        repeats: timed runs of each variant.

    Raises:
        ConfigError: for any argument that is wrong; names it, its value and the remedy.
        UnsupportedError: if the model cannot do what the method needs.
    """
    recipe = named_recipe(method, keep, options or {}, seed)
    if mass:
        recipe = recipe.with_mass(Mass())
    if repeats < 1:
        raise ConfigError(f"repeats={repeats}: give at least 1")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: give at least 1")
    if overlay is not None:
        _check_png(overlay)
    place = find_device(device)
    subject = _scene_or_file(image, ask, seed)
    with quiet():
        try:
            loaded = load_model(model, place)
            return _compare(loaded, recipe, subject, overlay, max_new_tokens, repeats)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"--device {str(place)!r}: {model} and this picture do not fit into its memory; take a smaller model "
                "or picture, or --device cpu"
            ) from error


# ---------------------------------------------------------------------------------------------- checks before the model


def _check_png(path: str) -> None:
    target = Path(path).expanduser()
    if target.suffix.lower() != ".png":
        raise ConfigError(f"--overlay {path!r}: the overlay is a PNG; give a name that ends in .png")
    if not target.parent.is_dir():
        raise ConfigError(f"--overlay {path!r}: there is no folder {str(target.parent)!r}; create it first")
    if target.is_dir():
        raise ConfigError(f"--overlay {path!r}: this is a folder; give the name of a file")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"--overlay {path!r}: not writable; choose another place")


@dataclass(frozen=True)
class _Subject:
    """What is asked about.

    Attributes:
        picture: RGB.
        name: of the picture.
        questions: one, or several to choose from, each with its true answer if that is known.
    """

    picture: Image
    name: str
    questions: tuple[tuple[str, str | None], ...]


def _scene_or_file(image: str | None, ask: str | None, seed: int) -> _Subject:
    if ask is not None and not ask.strip():
        raise ConfigError("--ask '': the question is empty; ask something")
    if image is not None:
        if ask is None:
            raise ConfigError("--ask is missing; with --image, say what to ask: --ask 'What is in this picture?'")
        return _Subject(load_image(image), image, ((ask, None),))
    from visiontok.demo import scene

    try:
        picture, questions = scene(seed)
    except ValueError as error:
        raise ConfigError(f"--seed {seed}: there is no such scene ({error})") from error
    answers = {question.text: question.answer for question in questions}
    asked = tuple(answers.items()) if ask is None else ((ask, answers.get(ask)),)
    return _Subject(picture, f"scene {seed} of the embedded model (visiontok.demo.scene)", asked)


# ------------------------------------------------------------------------------------------------------------ measuring


def timed_answer(
    loaded: Loaded,
    picture: Image,
    question: str,
    longest: int,
    compression: Compression | None,
    *,
    streamer: BaseStreamer | None = None,
    stop: Callable[[], bool] | None = None,
) -> Side:
    """One answer from picture to last token, greedily.

    Args:
        loaded: the model.
        picture: what is asked about.
        question: what is asked.
        longest: longest answer, in tokens.
        compression: what is attached to the model; None for the stock model.
        streamer: gets the prompt, then every token, as ``generate()`` streams them.
        stop: asked behind every token whether to end there.
    """
    found = timed(
        loaded, [([picture], question)], compression=compression, stop=stop, max_new_tokens=longest, streamer=streamer
    )
    new = found.output[0, found.inputs["input_ids"].shape[1] :]
    answer = loaded.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    return Side(answer, len(new), found.seconds)


def _text_prefill(loaded: Loaded, ids: torch.Tensor) -> float:
    """Seconds of the stock language model's prefill over (1, T) text tokens alone."""
    embeds = loaded.base.get_input_embeddings()(ids)
    loaded.synchronize()
    start = time.perf_counter()
    loaded.text(inputs_embeds=embeds, use_cache=True)
    loaded.synchronize()
    return time.perf_counter() - start


def _choose(loaded: Loaded, subject: _Subject) -> tuple[str, str | None]:
    """The first question that the embedded model answers rightly as it is: only what works can be seen to break."""
    if loaded.name in TINY and len(subject.questions) > 1:
        for question, expected in subject.questions:
            if timed_answer(loaded, subject.picture, question, 4, None).answer == expected:
                return question, expected
    return subject.questions[0]


@torch.inference_mode()
def _compare(
    loaded: Loaded,
    recipe: Recipe,
    subject: _Subject,
    overlay: str | None,
    longest: int,
    repeats: int,
) -> Result:
    picture = subject.picture
    question, expected = _choose(loaded, subject)
    inputs = loaded.inputs(([picture], question))
    # A warm-up of each, short; what can go wrong with the recipe or the drawing goes wrong here, before the long part.
    timed_answer(loaded, picture, question, 2, None)
    with compress(loaded.model, recipe) as compression:
        timed_answer(loaded, picture, question, 2, compression)
        drawn = None
        if overlay is not None:
            drawn = _draw(loaded, picture, question, compression, overlay)
        text_ids = inputs["input_ids"][~compression.ledger.visual][None]
    _text_prefill(loaded, text_ids)
    stock, compressed, text_only = [], [], []
    for _ in range(repeats):  # interleaved, so that a drift of the clock rate hits both alike
        stock.append(timed_answer(loaded, picture, question, longest, None))
        with compress(loaded.model, recipe) as compression:
            compressed.append(timed_answer(loaded, picture, question, longest, compression))
            report = compression.report
        text_only.append(_text_prefill(loaded, text_ids))
    sides = [replace(runs[0], seconds=Seconds.median([run.seconds for run in runs])) for runs in (stock, compressed)]
    before, after = (side.seconds for side in sides)
    speed_up = SpeedUp(
        time_to_first_token=before.first_token / after.first_token,
        language_model=before.prefill / (after.prefill + after.selection),
        cap=time_to_first_token_cap(
            preprocess=before.preprocess + before.rest,
            vision=before.vision,
            prefill=before.prefill,
            prefill_text=min(statistics.median(text_only), before.prefill),
        ),
    )
    return Result(
        model=loaded.name,
        device=str(loaded.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        image=subject.name,
        question=question,
        expected=expected,
        stock=sides[0],
        compressed=sides[1],
        report=report,
        speed_up=speed_up,
        repeats=repeats,
        overlay=drawn,
        notes=_notes(loaded, recipe, report, speed_up, text_ids, len(subject.questions)),
    )


def _draw(loaded: Loaded, picture: Image, question: str, compression: Compression, path: str) -> Drawn:
    report = compression.report
    title = f"{report.recipe} ({report.requested})"
    made = draw_overlay(
        [picture],
        compression.ledger,
        find_adapter(loaded.base, inside=False),
        lambda like: loaded.processed((like, question)),
        title,
    )
    made.save(str(Path(path).expanduser()))
    return Drawn(path, made.caption, made.layer, made.kept)


def _notes(
    loaded: Loaded, recipe: Recipe, report: Report, speed_up: SpeedUp, text_ids: torch.Tensor, questions: int
) -> tuple[str, ...]:
    notes = [*report.warnings, *report.account.not_counted]
    if any(stage.kind == "cut" for stage in recipe.stages):
        notes.append("selection inside the language model is counted as prefill")
    if any(stage.kind == "cache" for stage in recipe.stages):
        notes.append("tokens that leave the cache behind the prefill are not counted as dropped, and save none of it")
    pixel = next((stage.method for stage in recipe.stages if stage.kind == "pixel"), None)
    if pixel is not None:
        gets = "smaller pictures" if pixel.card.gives == "smaller" else "some units of the picture"
        notes.append(f"the vision tower gets {gets}, which saves more than the cap knows of")
    elif any(stage.kind == "encoder" for stage in recipe.stages):
        notes.append("units leave the vision tower, which saves more than the cap knows of")
    elif any(stage.kind == "merge" for stage in recipe.stages):
        notes.append("tokens merge inside the vision tower, which saves more than the cap knows of")
    elif speed_up.time_to_first_token > speed_up.cap:
        notes.append("the measured speed-up lies above its cap: the difference is noise of the measurement")
    if bool((text_ids == loaded.processor.tokenizer.unk_token_id).any()):
        notes.append("the question has words that this model's vocabulary lacks; it saw its unknown-word token instead")
    if loaded.name in TINY:
        if questions > 1:
            notes.append("of the scene's questions, this is the first that the stock model answers rightly, if any")
        notes.append(
            "the embedded model is a test bench: at its size fixed costs outweigh what pruning saves, and its answers "
            "and times predict nothing about a large model"
        )
    return tuple(notes)


# -------------------------------------------------------------------------------------------------------------- numbers


def _runs(counts: list[int]) -> str:
    """``[144, 144, 36, 36]`` → ``144×2 36×2``."""
    return " ".join(f"{value}×{len(list(group))}" for value, group in itertools.groupby(counts))


def _share(kept: int, tokens: int) -> str:
    return f"{kept} ({kept / tokens:.1%})" if tokens else str(kept)


def _count(number: int | None) -> str:
    return "not counted" if number is None else str(number)


def _bytes(number: int | None) -> str:
    if number is None:
        return "not counted"
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value >= 1024:
            value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def _flops(number: int | None) -> str:
    if number is None:
        return "not counted"
    value, prefix = float(number), ""
    for larger in ("k", "M", "G", "T", "P"):
        if value >= 1000:
            value, prefix = value / 1000, larger
    return f"{value:.4g} {prefix}FLOPs"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds else "-"


def _ratios(ratios: SpeedUp) -> str:
    return (
        f"time to first token ×{ratios.time_to_first_token:.2f}, vision tower included (cap ×{ratios.cap:.2f}); "
        f"language model ×{ratios.language_model:.2f}"
    )
