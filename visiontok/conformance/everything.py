"""Every image-text-to-text class of the installed transformers: pruned exactly, or refused with a reason.

For each class a tiny random model is built (:mod:`.tiny`), pruned in front of the language model and inside it, and its
greedy generation compared with the dense masked oracle. ``python -m visiontok.conformance.everything --write
docs/models.md`` makes the table of what was found.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from visiontok import Recipe, attached, compress
from visiontok.adapters.base import RECURRENT, find, is_supported, layer_kinds
from visiontok.api import base_model
from visiontok.errors import UnsupportedError

from . import tiny
from .oracle import DenseMasked
from .schedules import cut, prompt
from .zoo import prepare

STAGES = {"prompt": (prompt(),), "cut": (cut(2),)}
STEPS = 4
PASS = "pass"
_TESTED_BY = {"mllama": "tests/test_mllama.py"}
"""Families whose images are no part of the prompt, with the tests that hold them against an oracle of their own."""
_LEAST = 4  # visual tokens an image must have for a choice among them


@dataclass(frozen=True)
class Outcome:
    """What was found for one model type.

    Attributes:
        model_type: key of the mapping of transformers.
        status: ``pass`` (with a prompt stage at least), ``refused``, or ``failed``: built or run in vain, or wrong.
        adapter: ``own`` or ``default``; empty where none attached.
        prompt: ``pass``, or why tokens cannot be dropped in front of the language model.
        cut: ``pass``, or why they cannot be dropped inside it.
        notes: what the adapter says of budgets on the family.
    """

    model_type: str
    status: Literal["pass", "refused", "failed"]
    adapter: str = ""
    prompt: str = ""
    cut: str = ""
    notes: str = ""


class CannotRunError(Exception):
    """The stock model could not be run; the message says what was tried."""


class WrongError(Exception):
    """The pruned model does not do what the oracle does; the message says by how much."""


def build(model_type: str) -> Any:
    """A tiny random model in float64 of the class that transformers registers for ``model_type``."""
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[model_type])._from_config(tiny.config(model_type))
    if not hasattr(model, "generation_config"):  # generates no text, and will be refused
        return model
    prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # gates and scales that start at zero
                parameter.normal_(0, 0.1)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"  # the grouped kernels take no float64
    return model


def placeholder(base: Any) -> int:
    """The id of image placeholders."""
    for name in ("image_token_id", "image_token_index", "image_patch_id"):
        if isinstance(value := getattr(base.config, name, None), int):
            return value
    raise CannotRunError("the config names no image placeholder")


def batch(model: Any, rows: int = 2, images: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch of prompts with images between text; rows differ in length.

    Raises:
        CannotRunError: if no image was found that the model's encoder takes.
    """
    base: Any = base_model(model)
    token = placeholder(base)
    g = torch.Generator().manual_seed(0)
    before, after = _borders(base.config)
    prompts: list[list[int]] = []
    parts: list[dict[str, torch.Tensor]] = []
    for b in range(rows):
        ids = [1]
        for _ in range(images):
            n, picture = _image(base, len(parts))
            ids += torch.randint(*tiny.TEXT_IDS, (3,), generator=g).tolist() + before + [token] * n + after
            parts.append(picture)
        prompts.append(ids + torch.randint(*tiny.TEXT_IDS, (5 + 2 * b,), generator=g).tolist())
    length = max(map(len, prompts)) + 3
    out = {name: torch.zeros(rows, length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for b, tokens in enumerate(prompts):
        out["input_ids"][b, length - len(tokens) :] = torch.tensor(tokens)
        out["attention_mask"][b, length - len(tokens) :] = 1
    by_row = parts[0]["pixel_values"].ndim == 5 and parts[0]["pixel_values"].shape[1] == 1  # (rows, images, 3, H, W)
    for key in parts[0]:
        values = [part[key] for part in parts]
        if by_row:
            out[key] = torch.cat([torch.cat(values[b * images : (b + 1) * images], 1) for b in range(rows)])
        elif key == "image_token_pooling":  # numbers of patches, counted over all images
            out[key] = torch.cat([v + i * parts[0]["pixel_values"].shape[1] for i, v in enumerate(values)])
        else:
            out[key] = torch.cat(values)
    accepted = {*inspect.signature(type(model).forward).parameters, *inspect.signature(type(base).forward).parameters}
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if name in accepted:
            out[name] = (out["input_ids"] == token).int()
    return out


def _borders(config: Any) -> tuple[list[int], list[int]]:
    """Tokens that must stand before and behind the placeholders of an image."""
    for kind in ("vision", "image"):
        start, end = (getattr(config, f"{kind}_{side}_token_id", None) for side in ("start", "end"))
        if isinstance(start, int) and isinstance(end, int):
            return [start], [end]
    return [], []


def _image(base: Any, k: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Visual tokens and inputs of image number ``k``; what shape the model's encoder takes is found by trying."""
    errors: list[str] = []
    for picture in _pictures(base, k):
        try:
            with torch.no_grad():
                output = base.get_image_features(**picture, return_dict=True)
        except Exception as error:
            shapes = {name: tuple(x.shape) for name, x in picture.items()}
            errors.append(f"{shapes}: {type(error).__name__}: {error}")
            continue
        pooled = output.last_hidden_state if output.pooler_output is None else output.pooler_output
        items = pooled if isinstance(pooled, list | tuple) else [pooled]
        n = sum(item.shape[:-1].numel() for item in items)
        if n >= _LEAST:
            return n, picture
        errors.append(f"only {n} tokens")
    raise CannotRunError("no image that get_image_features takes: " + "; ".join(errors))


def _pictures(base: Any, k: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of image number ``k`` in the shapes that image encoders take, the most special first."""
    names = inspect.signature(base.get_image_features).parameters
    config = base.config
    vision = getattr(config, "vision_config", None) or getattr(config, "vq_config", None) or config
    g = torch.Generator().manual_seed(100 + k)
    dtype = next(base.parameters()).dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    def size(*fields: str, default: int) -> int:
        for field in fields:
            value = getattr(vision, field, None)
            value = value[0] if isinstance(value, list | tuple) else value
            if isinstance(value, int):
                return value
        return default

    patch = size("model_patch_size", "patch_size", default=tiny.PATCH)
    image = size("image_size", default=tiny.IMAGE_SIZE)
    frames = size("temporal_patch_size", "patch_temporal", default=1)
    flat, square = 3 * patch * patch, noise(1, 3, image, image)
    if "image_grid_thw" in names:  # patches of all images in one row; sizes differ
        h, w = [(8, 8), (4, 12), (8, 4)][k % 3]
        merge = {"image_merge_sizes": torch.tensor([2])} if "image_merge_sizes" in names else {}
        for shape in ((h * w, flat * frames), (h * w, flat * 2), (h * w, 3, patch, patch)):
            yield {"pixel_values": noise(*shape), "image_grid_thw": torch.tensor([[1, h, w]]), **merge}
    if "image_position_ids" in names:
        where = torch.cartesian_prod(torch.arange(12), torch.arange(12)).flip(1)[None]
        yield {"pixel_values": noise(1, 144, flat), "image_position_ids": where}
    if "image_token_pooling" in names:  # which patches each token is made of
        table = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
        grids = torch.tensor([[4, 4, 0, 0]])
        yield {"pixel_values": noise(1, 64, flat), "image_token_pooling": table, "image_grids": grids}
    if "image_sizes" in names:
        if getattr(config, "image_grid_pinpoints", None):
            sizes = torch.tensor([[(2 * image, 2 * image), (image + 8, 2 * image)][k % 2]])
            yield {"pixel_values": noise(1, 5, 3, image, image), "image_sizes": sizes}
        yield {"pixel_values": square, "image_sizes": torch.tensor([[image, image]])}
    if "high_res_pixel_values" in names:
        yield {"pixel_values": square, "high_res_pixel_values": noise(1, 3, 2 * image, 2 * image)}
    if "pixel_attention_mask" in names:
        yield {"pixel_values": square[None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    if "spatial_shapes" in names:
        ones = torch.ones(1, 64, dtype=torch.long)
        patches = {"spatial_shapes": torch.tensor([[8, 8]]), "pixel_attention_mask": ones}
        yield {"pixel_values": noise(1, 64, flat), **patches}
    yield {"pixel_values": square}
    yield {"pixel_values": square[None]}
    yield {"pixel_values": noise(1, 3, 256, 256)}  # convolutional towers
    yield {"pixel_values": noise(1, 64, flat)}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Greedy generation of a fixed number of text tokens, with logits."""
    with model.register_forward_pre_hook(_stretch, with_kwargs=True), torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=banned(model),
            **options,
        )


def banned(model: Any) -> list[int]:
    """Ids that are no text."""
    return sorted({placeholder(base_model(model)), *range(tiny.FIRST_ID, tiny.VOCAB)})


def _stretch(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Without a cache, stock ``generate`` lengthens most inputs that have one entry per token, but not all."""
    ids = kwargs.get("input_ids")
    for name, value in kwargs.items():
        if name.endswith("token_type_ids") and value is not None and ids is not None:
            kwargs[name] = torch.nn.functional.pad(value, (0, ids.shape[1] - value.shape[1]))
    return args, kwargs


def distance(a: Any, b: Any) -> float:
    """Largest difference of logits relative to the largest logit; infinite where the tokens differ."""
    x, y = torch.stack(a.logits, 1), torch.stack(b.logits, 1)
    if not torch.equal(a.sequences, b.sequences):
        return torch.inf
    return float((x - y).abs().max() / y.abs().max())


def examine(model_type: str) -> Outcome:
    """Build, attach, run and compare one class."""
    try:
        model = build(model_type)
        found = _attach(model)
        if all(found.values()):
            return Outcome(model_type, "refused", prompt=found["prompt"], cut=found["cut"])
        if model_type in _TESTED_BY:
            notes = find(base_model(model), inside=False).notes
            return Outcome(model_type, "pass", "own", f"pass (`{_TESTED_BY[model_type]}`)", found["cut"], notes)
        inputs = batch(model)
        stock = generate(model, inputs)
        if (off := distance(stock, generate(model, inputs, use_cache=False))) > tiny.TOLERANCE:
            raise CannotRunError(f"stock generation with and without a cache differ by {off:.0e}")
        for stage, refused in found.items():
            if not refused:
                _compare(model, inputs, stock, stage)
        adapter = find(base_model(model), inside=False)
        own = is_supported(adapter.base.config.model_type)
        if own:  # what it names must exist
            adapter.base.get_submodule(adapter.tower)
            adapter.base.get_submodule(adapter.projector or "")
        return Outcome(
            model_type,
            "pass",
            adapter="own" if own else "default",
            **{stage: refused or PASS for stage, refused in found.items()},
            notes=adapter.notes,
        )
    except Exception as error:  # whatever stock code raises is a finding, not an end of the survey
        return Outcome(model_type, "failed", prompt=f"{type(error).__name__}: {error}")
    finally:
        gc.collect()


def _attach(model: Any) -> dict[str, str]:
    """Stage → why it is refused, or nothing."""
    found = {}
    for stage, stages in STAGES.items():
        try:
            compress(model, Recipe(stages=stages)).remove()
            found[stage] = ""
        except UnsupportedError as error:
            found[stage] = str(error)
    return found


def _compare(model: Any, inputs: dict[str, torch.Tensor], stock: Any, stage: str) -> None:
    """One stage against the oracle.

    Raises:
        WrongError: if tokens or logits differ, nothing or something else than visual tokens was dropped, or the
            comparison would have passed without any pruning.
    """
    with compress(model, Recipe(stages=STAGES[stage])) as compression:
        pruned = generate(model, inputs)
        str(compression.report)
        alive = [compression.ledger.alive(layer) for layer in range(len(model.get_decoder().layers))]
    visual, attended = inputs["input_ids"] == placeholder(base_model(model)), inputs["attention_mask"].bool()
    if not bool((visual & ~alive[-1]).any()):
        raise WrongError(f"{stage}: nothing was dropped")
    if any(bool(((alive_here != attended) & ~visual).any()) for alive_here in alive):
        raise WrongError(f"{stage}: text was dropped")
    if layer_kinds(find(base_model(model), inside=False)) & RECURRENT:
        expected = on_kept_tokens(model, inputs, alive[0])
    else:
        with DenseMasked(model, alive):
            expected = generate(model, inputs, use_cache=False)
    if (off := distance(pruned, expected)) > tiny.TOLERANCE:
        raise WrongError(f"{stage}: tokens or logits differ from the oracle's by {off:.0e}")
    if distance(pruned, stock) < 10 * tiny.TOLERANCE:
        raise WrongError(f"{stage}: the pruned model answers as the stock model does, so the comparison shows nothing")
    if attached(model) is not None:
        raise WrongError(f"{stage}: still attached")


def on_kept_tokens(model: Any, inputs: dict[str, torch.Tensor], alive: torch.Tensor) -> Any:
    """The oracle of language models with a recurrent state: each row's kept tokens alone, at their own positions.

    Returns:
        what :func:`generate` returns, as far as :func:`distance` reads it.
    """
    text, embed, seen = model.get_decoder(), model.get_input_embeddings(), {}
    handle = text.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    numbers = model._prepare_position_ids_for_generation(inputs["input_ids"], rest)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    sequences, logits = [], []
    for b, kept in enumerate(alive):
        x, positions, steps = seen["inputs_embeds"][b : b + 1, kept], numbers[..., b : b + 1, :], []
        positions, ids = positions[..., kept], inputs["input_ids"][b].tolist()
        for _ in range(STEPS):
            with torch.no_grad():
                ones = torch.ones(x.shape[:2], dtype=torch.long)  # without it, gaps read as borders of sequences
                hidden = text(inputs_embeds=x, attention_mask=ones, position_ids=positions, use_cache=False)[0]
                steps.append(model.get_output_embeddings()(hidden[:, -1])[0])
                ids.append(int(steps[-1].index_fill(0, torch.tensor(banned(model)), -torch.inf).argmax()))
                x = torch.cat([x, embed(torch.tensor([[ids[-1]]]))], 1)
            positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        sequences.append(torch.tensor(ids))
        logits.append(torch.stack(steps))
    return SimpleNamespace(sequences=torch.stack(sequences), logits=torch.stack(logits).unbind(1))


def survey(model_types: Iterable[str] = CLASSES) -> Iterator[Outcome]:
    """:func:`examine` one after the other, with a line of progress each."""
    for model_type in model_types:
        start = time.perf_counter()
        outcome = examine(model_type)
        what = outcome.prompt if outcome.status != "pass" else f"prompt {outcome.prompt}, cut {outcome.cut}"
        print(f"{model_type:24} {outcome.status:8} {time.perf_counter() - start:5.1f} s  {what[:300]}", flush=True)
        yield outcome


_TITLE = """\
# Models

Every image-text-to-text class of transformers {version}: {passed} pass, {refused} are refused, {failed} failed.

*Pass* means: on a tiny random model of the class, with two left-padded prompts of two images each, visiontok attached,
dropped visual tokens, and greedy generation equalled the dense masked oracle in every token and every logit (float64);
where the language model has a recurrent state, the oracle is its decoder on the kept tokens alone.
*Adapter* is `own` where visiontok knows the family, `default` where the model passed the structural check; then methods
that ask where tokens lie in their image, or for attention inside the tower, say that they cannot know. Videos and audio
were not tried here. Made by `python -m visiontok.conformance.everything --write docs/models.md`.
"""


def table(outcomes: Iterable[Outcome]) -> str:
    """Markdown: what passes, and what is refused why."""
    rows = sorted(outcomes, key=lambda outcome: outcome.model_type)
    count = Counter(o.status for o in rows)
    title = _TITLE.format(
        version=transformers.__version__, passed=count["pass"], refused=count["refused"], failed=count["failed"]
    )
    lines = [
        title,
        "| model type | class | prompt stages | decoder stages | adapter | notes |",
        "|---|---|---|---|---|---|",
        *(line(o) for o in rows if o.status == "pass"),
        "",
        "| model type | class | refused, or failed, because |",
        "|---|---|---|",
        *(line(o) for o in rows if o.status != "pass"),
        "",
    ]
    return "\n".join(lines)


def line(outcome: Outcome) -> str:
    """The row of the table for one model type."""
    found = (
        (outcome.prompt, _short(outcome.cut), outcome.adapter, outcome.notes)
        if outcome.status == "pass"
        else (_short(outcome.prompt),)
    )
    return f"| {' | '.join((outcome.model_type, CLASSES[outcome.model_type], *found))} |"


def _short(reason: str) -> str:
    """A reason on one line of a table, without the model's name and the way out."""
    text = reason.split(": ", 1)[-1].split("visiontok cannot drop tokens here, because ")[-1]
    return " ".join(text.split("; register")[0].split(", so tokens can only")[0].split()).replace("|", "\\|")


def main() -> None:
    """Survey the named model types, or all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model_type", nargs="*", help="default: every class")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = list(survey(arguments.model_type or CLASSES))
    if arguments.write:
        arguments.write.write_text(table(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
