"""The fingerprint of a run: everything that two runs must share before their answers may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import PIL
import torch
import transformers
from PIL import Image

from visiontok import __version__
from visiontok.api import vision_memory
from visiontok.named import Loaded
from visiontok.weights import fingerprint

SIDES = (97, 61)  # of the canonical image: odd, and neither square nor a multiple of any patch
TOGETHER, ALONE = "a call at a time", "a picture at a time"
"""How pictures go through the vision tower."""


def protocol(
    loaded: Loaded, *, task: Mapping[str, Any], ids: Sequence[str], block: int, seed: int, max_new_tokens: int
) -> dict[str, Any]:
    """What decides about answers, but for the method.

    Args:
        loaded: model and processor.
        task: its name, version and digest, and where its data come from.
        ids: the questions, in their order.
        block: how many are answered together.
        seed: of the method's draws.
        max_new_tokens: longest answer.
    """
    return {
        **of_model(loaded),
        "task": dict(task),
        "questions": {"number": len(ids), "ids": of_ids(ids), "block": block},
        "generation": {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1},
        "seed": seed,
    }


def of_model(loaded: Loaded) -> dict[str, Any]:
    """Model, processor and versions."""
    model, processor = loaded.model, loaded.processor
    config = model.config
    image_processor = processor.image_processor
    settings = image_processor.to_dict()
    return {
        "model": {
            "name": loaded.name,
            "type": config.model_type,
            "revision": getattr(config, "_commit_hash", None),
            "weights": fingerprint(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": _attention(model),
            "device": loaded.device.type,
            "tower": TOGETHER if vision_memory(model) is None else ALONE,
        },
        "processor": {
            "class": type(processor).__name__,
            "image_processor": type(image_processor).__name__,
            "min_pixels": settings.get("min_pixels"),
            "max_pixels": settings.get("max_pixels"),
            "size": settings.get("size"),
            "pixels": pixels(image_processor),
            "chat_template": _hash(str(getattr(processor, "chat_template", None))),
        },
        "versions": {
            "visiontok": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": PIL.__version__,
        },
    }


def of_ids(ids: Sequence[str]) -> str:
    """16 hex digits of questions in their order."""
    return _hash("\n".join(ids))


def short(protocol: Mapping[str, Any]) -> str:
    """16 hex digits of a protocol."""
    return _hash(json.dumps(protocol, sort_keys=True))


def canonical_image() -> Image.Image:
    """Ramps of three colours and a checkerboard: another resampling, crop or normalisation changes its pixels."""
    width, height = SIDES
    image = Image.new("RGB", SIDES)
    for y in range(height):
        for x in range(width):
            check = 255 * ((x // 7 + y // 5) % 2)
            image.putpixel((x, y), (255 * x // (width - 1), 255 * y // (height - 1), check))
    return image


def pixels(image_processor: Any) -> str:
    """16 hex digits of what the image processor makes of :func:`canonical_image`."""
    made = image_processor(images=[canonical_image()], return_tensors="pt")
    found = hashlib.sha256()
    for name in sorted(made):
        value = torch.as_tensor(made[name])
        found.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        found.update(value.contiguous().to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()[:16]


def _attention(model: Any) -> dict[str, str | None]:
    """Attention implementation of the model and of the parts that have their own."""
    parts = {"model": model.config}
    parts |= {name: getattr(model.config, name, None) for name in ("text_config", "vision_config")}
    return {name: str(part._attn_implementation) for name, part in parts.items() if part is not None}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
