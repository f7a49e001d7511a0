"""Models, recipes and devices by the names that a command line gives them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.utils
import jinja2
import torch
import transformers

from .adapters.base import find as find_adapter
from .api import as_recipe, base_model
from .budget import Budget
from .errors import ConfigError, UnsupportedError
from .options import typed_options
from .recipes import find as find_method
from .recipes import names as method_names

if TYPE_CHECKING:
    from PIL.Image import Image

    from .recipe import Recipe

TINY = {"tiny": "llava", "tiny-qwen": "qwen3_vl"}  # what the embedded models are called here, and in visiontok.demo
DEFAULT_KEEP = Budget.ratio(0.25)

Prompt = str | Sequence[Mapping[str, Any]]
"""A question, before which its pictures are shown; or a conversation as chat templates have it, whose parts of type
"image" stand for the pictures in their order."""


def named_recipe(method: str, keep: str | float | int | None, options: Mapping[str, str], seed: int) -> Recipe:
    if method in method_names():
        recipe = as_recipe(method, **typed_options(find_method(method), options))
    else:
        recipe = as_recipe(method)
        for name, text in options.items():
            raise ConfigError(f"--option {name}={text}: options go with a method's name; set it in {method} itself")
    if keep is not None:
        recipe = recipe.with_keep(Budget.parse(keep))
    elif _lacks_budget(recipe):
        recipe = recipe.with_keep(DEFAULT_KEEP)
    return replace(recipe, seed=seed) if seed else recipe


def _lacks_budget(recipe: Recipe) -> bool:
    """Whether the recipe takes a budget and none is set anywhere in it."""
    takes = any(stage.method is not None and stage.method.card.budget for stage in recipe.stages)
    return takes and recipe.average is None and all(stage.keep is None for stage in recipe.stages)


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r}: unknown; use auto, cpu, cuda, cuda:1, mps or xpu") from error
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ConfigError(f"--device {name!r}: cannot run models; use auto, cpu, cuda, cuda:1, mps or xpu")
    module = torch.get_device_module(device)
    if not module.is_available():
        raise ConfigError(
            f"--device {name!r}: not available on this machine (`visiontok doctor` tells what is); use --device auto"
        )
    if device.index is not None and device.index >= module.device_count():
        raise ConfigError(f"--device {name!r}: this machine has {module.device_count()} of these; count from 0")
    return device


@dataclass(frozen=True)
class Loaded:
    """A model, its processor and where they run."""

    name: str
    model: Any
    processor: Any
    device: torch.device

    @functools.cached_property
    def base(self) -> Any:
        base: Any = base_model(self.model)
        if not hasattr(type(base), "get_image_features"):
            raise UnsupportedError(
                f"{self.name}: a model of type {base.config.model_type} encodes pictures inside its forward, where "
                "this comparison cannot time it; use visiontok.compress() in Python, whose report has the times"
            )
        return base

    @functools.cached_property
    def text(self) -> Any:
        """The language model."""
        return getattr(self.base, find_adapter(self.base).text)

    def inputs(self, *asked: tuple[Sequence[Image], Prompt]) -> Any:
        """What ``generate()`` takes.

        Args:
            asked: pictures and prompt of each row; rows are padded on the left.

        Raises:
            ConfigError: if the processor or its chat template refuses one of them.
        """
        try:
            return self.processed(*asked).to(self.device, dtype=self.model.dtype)
        except (ValueError, jinja2.TemplateError) as error:
            raise ConfigError(f"the processor of {self.name} refuses this picture or question: {error}") from error

    def processed(self, *asked: tuple[Sequence[Image], Prompt]) -> Any:
        """The same as the processor returns it: in float32 and on the host."""
        processor = self.processor
        padded: dict[str, Any] = {"padding": True, "padding_side": "left"} if len(asked) > 1 else {}
        if getattr(processor, "chat_template", None) is None:  # a base model: the bare prompt
            if not all(isinstance(prompt, str) for _, prompt in asked):
                raise ValueError("it has no chat template; ask one question, with its pictures before it")
            token = getattr(processor, "image_token", "")
            images = [list(pictures) for pictures, _ in asked]
            prompts = [f"{token * len(pictures)}{prompt}" for pictures, prompt in asked]
            return processor(images=images if any(images) else None, text=prompts, return_tensors="pt", **padded)
        return processor.apply_chat_template(
            [_chat(*one) for one in asked],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **padded,
        )

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _chat(pictures: Sequence[Image], prompt: Prompt) -> list[dict[str, Any]]:
    """The conversation with its pictures in it."""
    if isinstance(prompt, str):
        places = [{"type": "image"} for _ in pictures]
        prompt = [{"role": "user", "content": [*places, {"type": "text", "text": prompt}]}]
    left = iter(pictures)
    return [
        {
            "role": turn["role"],
            "content": [{**part, "image": next(left)} if part["type"] == "image" else part for part in turn["content"]],
        }
        for turn in prompt
    ]


def model_type(name: str) -> str:
    """The type of a model: of an embedded one, of a config in a folder or on the hub, or the name itself if it is one.

    Raises:
        ConfigError: if there is no such model.
    """
    if name in TINY:
        return TINY[name]
    if name in transformers.CONFIG_MAPPING:
        return name
    try:
        found: str = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--model {name!r}: no model type, folder or hub id that can be read ({reason}); give a model type, "
            "such as qwen2_5_vl, or a folder with a config.json"
        ) from error
    return found


def load_model(name: str, device: torch.device) -> Loaded:
    if name in TINY:
        from visiontok.demo import load

        try:
            embedded: tuple[Any, Any] = load(TINY[name])
        except FileNotFoundError as error:
            raise ConfigError(f"--model {name}: the embedded model is not installed: {error}") from error
        return Loaded(name, embedded[0].to(device), embedded[1], device)
    path = Path(name).expanduser()
    source = str(path) if path.exists() else name
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name):
        raise ConfigError(
            f"--model {name!r}: there is no such folder; give an existing one, a Hub id, or one of {', '.join(TINY)}"
        )
    try:
        # Not None, which would ask at the terminal: code from a model repository is never run.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ConfigError(
                f"--model {name!r}: a {config.model_type} is no vision-language model; choose one that "
                "AutoModelForImageTextToText loads"
            )
        processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=False)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            source, dtype=torch.float32 if device.type == "cpu" else "auto", trust_remote_code=False
        )
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "cannot be loaded from this folder" if path.exists() else "no folder here, nor loadable by this id"
        raise ConfigError(
            f"--model {name!r}: {where} ({reason}); check the name and the network, or download the model and give "
            "its folder"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ConfigError(f"--model {name!r}: has no processor for pictures and text; add its processor files")
    return Loaded(name, model.to(device).eval(), processor, device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep standard error for this command's own messages: no advice, and no bar for every loading."""
    loggers = (transformers.utils.logging, huggingface_hub.utils.logging)
    levels, bar = [logging.get_verbosity() for logging in loggers], loggers[0].is_progress_bar_enabled()
    for logging in loggers:
        logging.set_verbosity_error()
    loggers[0].disable_progress_bar()
    try:
        yield
    finally:
        for logging, level in zip(loggers, levels, strict=True):
            logging.set_verbosity(level)
        if bar:
            loggers[0].enable_progress_bar()
