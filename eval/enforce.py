"""Whether a model and its processor are what a published table was measured with, and making the processor so.

Compared is what comes out: the rendered prompt of a made-up question, the size in which pictures enter the tower. Where
that does not tell settings apart, such as a crop from a pad, the settings themselves are compared.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import PIL.Image
import transformers

from visiontok.errors import ConfigError
from visiontok.named import Loaded

from .published import PROMPT, Column, Protocol
from .records import differences
from .task import Task

_LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def departures(protocol: Protocol, loaded: Loaded, tasks: Mapping[str, tuple[Column, Task]]) -> list[str]:
    """Fields in which a model departs from a table's protocol: "name was … and is …", "was" being the table's.

    Args:
        protocol: of the table.
        loaded: model and processor.
        tasks: by column, what is asked there.
    """
    family, processor = loaded.model.config.model_type, loaded.processor.image_processor
    wanted: dict[str, Any] = {"image_processor": dict(protocol.image_processor)}
    found: dict[str, Any] = {"image_processor": _settings(processor, protocol.image_processor)}
    if protocol.dtype is not None:
        wanted["dtype"], found["dtype"] = protocol.dtype, str(loaded.model.dtype).removeprefix("torch.")
    for name, edge in _LIMITS.items():
        if (limit := getattr(protocol, name)) is not None:
            wanted[name], found[name] = limit, _limit(processor, name, edge)
    for size, entered in protocol.sizes.items():
        name = f"size of a {size} picture"
        wanted[name], found[name] = entered, entered_size(processor, size)
    wanted["conversation"], found["conversation"] = protocol.conversation, rendered(loaded, PROMPT)
    for name, (column, task) in tasks.items():
        asked = task.sample_prompt(family)
        wanted[f"{name} asks"], found[f"{name} asks"] = column.asks, asked
        if column.asks == asked and found["conversation"] == protocol.conversation:  # what templates do to the text
            whole = f"{name} prompt"
            wanted[whole] = protocol.conversation.replace(PROMPT, asked)
            found[whole] = rendered(loaded, asked)
    return differences(wanted, found)


def adapted(protocol: Protocol, loaded: Loaded) -> Loaded:
    """The same model with a processor that has the protocol's chat template, image processor and pixel limits.

    Raises:
        ConfigError: if the model's tower takes pictures of one size, and the protocol's are of another; or if this
            release of transformers has no such image processor.
    """
    side = getattr(getattr(loaded.model.config, "vision_config", None), "image_size", None)
    cropped = protocol.image_processor.get("crop_size", {}).get("width")
    if isinstance(side, int) and cropped not in (None, side):
        raise ConfigError(
            f"{loaded.name}: its tower takes pictures of {side} pixels, the table's have {cropped}; --adapt suits "
            "models of the table's kind only"
        )
    processor = copy.copy(loaded.processor)
    if protocol.chat_template is not None:
        processor.chat_template = protocol.chat_template
    settings = dict(protocol.image_processor)
    if protocol.min_pixels is not None or protocol.max_pixels is not None:
        limits = {edge: getattr(protocol, name) for name, edge in _LIMITS.items()}
        before = processor.image_processor.size
        settings["size"] = {edge: before[edge] if limit is None else limit for edge, limit in limits.items()}
    if settings:
        made = processor.image_processor
        name = str(settings.pop("image_processor_type", _type(made)))
        kind = type(made) if name == _type(made) else getattr(transformers, name, None)
        if kind is None:
            raise ConfigError(
                f"image_processor_type={name!r}: transformers {transformers.__version__} has none of this name; "
                "install a tested release (`visiontok doctor`)"
            )
        kept = {key: value for key, value in made.to_dict().items() if key != "image_processor_type"}
        processor.image_processor = kind.from_dict(kept | settings)
    return dataclasses.replace(loaded, processor=processor)


def rendered(loaded: Loaded, question: str) -> str:
    """What a processor makes of a question about one picture, before the picture's token is repeated."""
    processor = loaded.processor
    if getattr(processor, "chat_template", None) is None:
        return f"{getattr(processor, 'image_token', '')}{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text


def entered_size(image_processor: Any, size: str) -> str:
    """The size in which a picture of "WxH" enters the tower; "N of WxH" where it is cut into tiles."""
    width, height = map(int, size.split("x"))
    made = image_processor(images=[PIL.Image.new("RGB", (width, height))], return_tensors="pt")
    if "image_grid_thw" in made:
        _, rows, columns = made["image_grid_thw"][0].tolist()
        return f"{columns * image_processor.patch_size}x{rows * image_processor.patch_size}"
    *_, rows, columns = made["pixel_values"].shape
    tiles = made["pixel_values"].shape[1] if made["pixel_values"].ndim == 5 else 1
    return f"{columns}x{rows}" if tiles == 1 else f"{tiles} of {columns}x{rows}"


def _settings(image_processor: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    found = image_processor.to_dict() | {"image_processor_type": _type(image_processor)}
    return {name: _plain(found.get(name)) for name in wanted}


def _type(image_processor: Any) -> str:
    """The name of an image processor, whatever it computes with."""
    return type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")


def _limit(image_processor: Any, name: str, edge: str) -> int | None:
    limit: int | None = getattr(image_processor, name, None)
    size: Any = getattr(image_processor, "size", None)
    return size.get(edge) if limit is None and hasattr(size, "get") else limit


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
