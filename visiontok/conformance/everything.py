"""Every image-text-to-text class of the installed transformers: does visiontok prune it right, or say why not?

For each class a tiny random model is built, pruned before the language model and inside it, and its greedy generation is
compared with the dense masked oracle. ``python -m visiontok.conformance.everything --write docs/models.md`` makes the table.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from visiontok import Recipe, compress
from visiontok.api import base_model
from visiontok.errors import UnsupportedError

from . import tiny
from .oracle import DenseMasked
from .schedules import cut, prompt
from .zoo import prepare

STAGES = {"prompt": (prompt(),), "cut": (cut(2),)}
STEPS = 4


@dataclass(frozen=True)
class Outcome:
    """What was found for one model type.

    Attributes:
        model_type: key of the mapping of transformers.
        status: ``pass``, ``refused`` (with visiontok's own reason), or what failed: ``build``, ``inputs``, ``wrong``.
        detail: the reason, or the error.
    """

    model_type: str
    status: str
    detail: str = ""


class CannotRunError(Exception):
    """The stock model could not be built or run; the message says where and why."""


def build(model_type: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    """A tiny random model of the class registered for ``model_type``."""
    config = tiny.shrink(transformers.CONFIG_MAPPING[model_type]())
    cls = getattr(transformers, CLASSES[model_type])
    torch.manual_seed(0)
    model = cls._from_config(config)
    if not hasattr(model, "generation_config"):
        return model
    model = prepare(model, dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # some projections and gates start at zero
            if not parameter.any() and parameter.ndim >= 1:
                parameter.normal_(0, 0.1)
    if hasattr(model, "set_experts_implementation"):
        try:
            model.set_experts_implementation("eager")
        except (ValueError, AttributeError):
            pass
    return model


def image_id(config: Any) -> int:
    for name in ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id", "im_patch_id"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise CannotRunError("the config names no image placeholder")


def _pictures(base: Any, k: int) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of image number ``k``, in the shapes that image encoders take; which one fits is found by trying."""
    names = set(inspect.signature(base.get_image_features).parameters)
    vision = getattr(base.config, "vision_config", None) or getattr(base.config, "vq_config", None) or base.config
    g = torch.Generator().manual_seed(100 + k)
    dtype = next(base.parameters()).dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    def size(name: str, default: int) -> int:
        value = getattr(vision, name, None)
        value = value[0] if isinstance(value, list | tuple) else value
        return value if isinstance(value, int) else default

    patch, image = size("patch_size", tiny.PATCH), size("image_size", tiny.IMAGE_SIZE)
    h, w = [(8, 8), (4, 12), (8, 4)][k % 3]
    flat = 3 * patch * patch
    for grid in ("image_grid_thw", "image_grid_hw", "target_sizes"):
        if grid in names:
            for frames in (size("temporal_patch_size", size("patch_temporal", 1)), 1, 2):
                thw = torch.tensor([[1, h, w]]) if grid.endswith("thw") else torch.tensor([[h, w]])
                extra = {"image_merge_sizes": torch.tensor([2])} if "image_merge_sizes" in names else {}
                yield {"pixel_values": noise(h * w, flat * frames), grid: thw, **extra}
                yield {"pixel_values": noise(1, h * w, flat * frames), grid: thw, **extra}
                yield {"pixel_values": noise(h * w, 3, patch, patch), grid: thw, **extra}
                yield {"pixel_values": noise(1, 3, patch, h * w * patch), grid: thw, **extra}
                yield {"pixel_values": noise(h * w, 3, frames, patch, patch), grid: thw, **extra}
    if "spatial_shapes" in names:
        yield {
            "pixel_values": noise(1, 64, flat), "spatial_shapes": torch.tensor([[8, 8]]),
            "pixel_attention_mask": torch.ones(1, 64, dtype=torch.long),
        }  # fmt: skip
    if "image_position_ids" in names:
        side, unit = 12, getattr(vision, "model_patch_size", patch)
        where = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)[None]
        yield {"pixel_values": noise(1, side * side, 3 * unit * unit), "image_position_ids": where}
    if "image_token_pooling" in names:
        table = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
        yield {
            "pixel_values": noise(1, 64, flat), "image_token_pooling": table,
            "image_grids": torch.tensor([[4, 4, 0, 0]]),
        }  # fmt: skip
    if "pixel_attention_mask" in names:
        yield {"pixel_values": noise(1, 1, 3, image, image), "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    if "image_sizes" in names:
        if getattr(base.config, "image_grid_pinpoints", None):
            base.config.image_grid_pinpoints = [[32, 64], [64, 32], [64, 64]]
            yield {"pixel_values": noise(1, 5, 3, 32, 32), "image_sizes": torch.tensor([[(64, 64), (40, 64)][k % 2]])}
        yield {"pixel_values": noise(1, 3, image, image), "image_sizes": torch.tensor([[image, image]])}
    if "high_res_pixel_values" in names:
        yield {"pixel_values": noise(1, 3, image, image), "high_res_pixel_values": noise(1, 3, 64, 64)}
    yield {"pixel_values": noise(1, 3, image, image)}
    yield {"pixel_values": noise(1, 1, 3, image, image)}
    yield {"pixel_values": noise(1, 3, 256, 256)}
    yield {"pixel_values": noise(1, 64, flat)}


def _count(pooled: Any) -> int:
    items = pooled if isinstance(pooled, list | tuple) else [pooled]
    return sum(int(item.shape[:-1].numel()) for item in items)


def _image(base: Any, k: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Visual tokens and inputs of one image."""
    errors: dict[str, None] = {}
    for picture in _pictures(base, k):
        try:
            with torch.no_grad():
                output = base.get_image_features(**picture, return_dict=True)
            pooled = output.last_hidden_state if output.pooler_output is None else output.pooler_output
            if _count(pooled) < 4:
                raise ValueError(f"only {_count(pooled)} tokens")
            return _count(pooled), picture
        except Exception as error:  # noqa: BLE001 - any failure means that the shape was not the right one
            shapes = {name: tuple(x.shape) for name, x in picture.items()}
            errors[f"{shapes}: {type(error).__name__}: {error}"] = None
    raise CannotRunError("no image that get_image_features takes; " + " | ".join(errors))


def batch(model: Any, rows: int = 2, images: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch of prompts with images between text."""
    base: Any = base_model(model)
    token = image_id(base.config)
    g = torch.Generator().manual_seed(0)
    before, after = [], []
    for start, end in (("vision_start_token_id", "vision_end_token_id"), ("image_start_token_id", "image_end_token_id")):
        if isinstance(getattr(base.config, start, None), int) and isinstance(getattr(base.config, end, None), int):
            before, after = [getattr(base.config, start)], [getattr(base.config, end)]
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
    ids = torch.zeros(rows, length, dtype=torch.long)
    mask = torch.zeros(rows, length, dtype=torch.long)
    for b, tokens in enumerate(prompts):
        ids[b, length - len(tokens) :] = torch.tensor(tokens)
        mask[b, length - len(tokens) :] = 1
    out = {"input_ids": ids, "attention_mask": mask}
    tiles = parts[0]["pixel_values"].ndim == 5 and parts[0]["pixel_values"].shape[1] == 1  # (rows, images, 3, H, W)
    for key in parts[0]:
        values = [p[key] for p in parts]
        if tiles:
            out[key] = torch.cat([torch.cat(values[b * images : (b + 1) * images], 1) for b in range(rows)])
        elif key == "image_token_pooling":  # indices into the patches of all images
            out[key] = torch.cat([v + 64 * i for i, v in enumerate(values)])
        elif key == "pixel_values" and values[0].shape[0] == 1 and "target_sizes" in parts[0]:
            out[key] = torch.cat(values, -1 if values[0].ndim == 4 else 1)
        else:
            out[key] = torch.cat(values)
    accepted = inspect.signature(type(model).forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in accepted or name in inspect.signature(type(base).forward).parameters:
            out[name] = (ids == token).to(torch.int)
    return out


def _stretch(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Without a cache, stock ``generate`` lengthens most inputs that have one entry per token, but not all."""
    ids = kwargs.get("input_ids")
    for name, value in kwargs.items():
        if name.endswith("token_type_ids") and value is not None and ids is not None and value.shape[1] < ids.shape[1]:
            kwargs[name] = torch.nn.functional.pad(value, (0, ids.shape[1] - value.shape[1]))
    return args, kwargs


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    token = image_id(base_model(model).config)
    banned = sorted({token, *range(tiny.FIRST_ID, tiny.VOCAB)})
    hook = model.register_forward_pre_hook(_stretch, with_kwargs=True)
    with hook, torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True,
            output_logits=True, suppress_tokens=banned, **options,
        )  # fmt: skip


def _differ(a: Any, b: Any) -> str:
    """What differs between two generations; empty if nothing does."""
    x, y = torch.stack(a.logits, 1), torch.stack(b.logits, 1)
    distance = float((x - y).abs().max() / y.abs().max())
    tolerance = 1e-6 if x.dtype == torch.float64 else 1e-4
    tolerance = 2e-4
    if distance < tolerance and torch.equal(a.sequences, b.sequences):
        return ""
    first = float((x[:, 0] - y[:, 0]).abs().max() / y.abs().max())
    return f"relative distance of logits {distance:.1e}, of the first step {first:.1e}"


def examine(model_type: str) -> Outcome:
    """Build, attach, run and compare one class."""
    stage = "build"
    try:
        model = build(model_type)
        try:
            for stages in STAGES.values():
                compress(model, Recipe(stages=stages)).remove()
        except UnsupportedError as error:
            return Outcome(model_type, "refused", str(error))
        stage = "inputs"
        inputs = batch(model)
        stock = generate(model, inputs)
        uncached = generate(model, inputs, use_cache=False)
        if wrong := _differ(stock, uncached):
            return Outcome(model_type, "inputs", f"stock generation depends on the cache: {wrong}")
        depth = len(base_model(model).get_decoder().layers)
        for name, stages in STAGES.items():
            stage = name
            with compress(model, Recipe(stages=stages)) as compression:
                out = generate(model, inputs)
                alive = [compression.ledger.alive(layer) for layer in range(depth)]
            visual = inputs["input_ids"] == image_id(base_model(model).config)
            if not (visual & ~alive[-1]).any() or ((inputs["attention_mask"] > 0) & ~visual & ~alive[-1]).any():
                return Outcome(model_type, "wrong", f"{name}: it dropped nothing, or text")
            with DenseMasked(model, alive):
                expected = generate(model, inputs, use_cache=False)
            if wrong := _differ(out, expected):
                return Outcome(model_type, "wrong", f"{name}: {wrong}")
            if not _differ(out, stock):
                return Outcome(model_type, "wrong", f"{name}: pruning changed nothing, so the check shows nothing")
    except UnsupportedError as error:
        return Outcome(model_type, "refused", f"{stage}: {error}")
    except Exception as error:
        if VERBOSE:
            import traceback

            traceback.print_exc()
        return Outcome(model_type, stage, f"{type(error).__name__}: {error}")
    finally:
        gc.collect()
    return Outcome(model_type, "pass")


VERBOSE = False
if __name__ == "__main__":
    import sys
    import time
    import warnings

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or list(CLASSES)
    VERBOSE = len(names) < 3
    for name in names:
        begin = time.time()
        outcome = examine(name)
        print(f"{name:24s} {outcome.status:8s} {time.time() - begin:5.1f} s  {' '.join(outcome.detail.split())[:400]}", flush=True)
