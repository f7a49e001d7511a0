"""What visiontok must know about a model family: where its parts are and how pictures become tokens.

Most of it is the same everywhere, so a family says only what differs. Families live in one file each; other packages
add theirs through the entry-point group ``visiontok.adapters`` (a name → an :class:`Adapter` subclass).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from visiontok.errors import ConfigError, UnsupportedError

from .encoder import Encoder
from .parts import Layers, Part, by_count

# model_type → module that defines its adapter
_FAMILIES = {
    "llava": "llava",
    "vipllava": "llava",
    "llava_next": "llava_next",
    "llava_onevision": "llava_next",
    "internvl": "internvl",
    "idefics3": "idefics3",
    "smolvlm": "idefics3",
    "mistral3": "mistral3",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
    "qwen3_vl_moe": "qwen_vl",
    "qwen3_5": "qwen_vl",
    "qwen3_5_moe": "qwen_vl",
    "glm4v": "qwen_vl",
    "gemma3": "gemma3",
    "paligemma": "paligemma",
    "mllama": "mllama",
    "cohere_compass": "qwen_vl",
    "cosmos3_omni": "qwen_vl",
    "ernie4_5_vl_moe": "ernie",
    "emu3": "idefics3",
    "fuyu": "fuyu",
    "gemma3n": "gemma3",
    "gemma4": "gemma3",
    "gemma4_unified": "gemma3",
    "granite_docling": "idefics3",
    "idefics2": "idefics3",
    "molmo2": "molmo",
    "glm4v_moe": "qwen_vl",
    "glm46v": "qwen_vl",
    "glmga": "qwen_vl",
    "glm_ocr": "qwen_vl",
    "qwen2_5_omni_thinker": "qwen_vl",
    "exaone4_5": "qwen_vl",
    "qwen3_omni_moe_thinker": "qwen_vl",
    "shieldgemma2": "gemma3",
}


PER_TOKEN = {"full_attention", "sliding_attention"}
"""Kinds of decoder layers that keep keys and values per token."""
RECURRENT = {"linear_attention", "conv"}
"""Kinds that carry one state along the sequence and skip padding; they can be given fewer tokens, but lose none."""


CLIP_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_STATISTICS = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


Shape = tuple[int, int, int]
"""(t, rows, columns) of the language-model tokens of an image or video."""


class Record(Protocol):
    """One run of the vision tower, as the engine recorded it."""

    modality: Any
    inputs: dict[str, Any]
    output: Any


class Adapter:
    """The contract between a model family and the engine; every default is the common case.

    Attributes:
        model_types: values of ``config.model_type`` this adapter serves.
        text: attribute of the base model that holds the language model.
        tower: attribute of the base model that holds the vision tower.
        projector: dotted path from the base model to the module that maps tower features to language-model tokens.
        own_mask: the base model builds non-causal masks itself and hands them to the language model.
        deepstack: keywords of the language model for (visual mask, per-level features), or None.
        token_inputs: further keywords of the language model, and of its layers, with one entry per token (B, N, ...).
        cls_token: the tower's first token of every crop is a CLS token.
        thumbnail: a picture comes as a thumbnail, t = 0 in its grid, and re-tiled from crops, t = 1.
        join_adjacent: items whose placeholders touch are tiles of one image.
        cross_attention: visual tokens are no part of the prompt, decoder layers of their own attend to them; then the
            vision tower runs inside the base model's forward, and :meth:`columns` is needed.
        fixed_pictures: why its vision tower cannot be given smaller pictures; empty where it can, and then
            :meth:`shapes` and :meth:`smaller` must fit it.
        inseparable: why its vision tower cannot be given the pictures of a call one by one; empty where it can, and
            then :meth:`alone` must fit it.
        fixed_units: why its vision tower cannot be given some units of a picture; empty where it can, and then
            :meth:`shapes`, :meth:`units` and :meth:`parts` must fit it.
        fixed_layers: why no unit can leave its vision tower on the way; empty where it can, and then :meth:`shapes` and
            :meth:`layers` must fit it.
        no_rebuild: why such units cannot be reconstructed behind the tower; empty where they can.
        unmergeable: why tokens cannot be merged in its vision tower; where they can, :meth:`encoder` says where.
        notes: what a user should know about budgets on this family.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    text: ClassVar[str] = "language_model"
    tower: ClassVar[str] = "vision_tower"
    projector: ClassVar[str | None] = "multi_modal_projector"
    own_mask: ClassVar[bool] = False
    deepstack: ClassVar[tuple[str, str] | None] = None
    token_inputs: ClassVar[tuple[str, ...]] = ()
    cls_token: ClassVar[bool] = False
    thumbnail: ClassVar[bool] = False
    join_adjacent: ClassVar[bool] = False
    cross_attention: ClassVar[bool] = False
    fixed_pictures: ClassVar[str] = "no way to give its vision tower smaller pictures is known"
    inseparable: ClassVar[str] = "no way to give its vision tower the pictures of a call one by one is known"
    fixed_units: ClassVar[str] = "no way to give its vision tower some units of a picture is known"
    fixed_layers: ClassVar[str] = "no way to drop units inside its vision tower is known"
    no_rebuild: ClassVar[str] = "its projector does not read what a tower layer makes as it is"
    unmergeable: ClassVar[str] = "its tokens are not known to be one patch each of a CLIP or SigLIP tower"
    notes: ClassVar[str] = ""

    def __init__(self, base: nn.Module) -> None:
        self.base: Any = base

    @property
    def prompt_only(self) -> str:
        """Why all decoder layers must hold the same tokens; empty where they may differ."""
        text = self.base.config.get_text_config()
        return "its decoder layers share keys and values" if getattr(text, "num_kv_shared_layers", 0) else ""

    @property
    def feature_layer(self) -> int:
        """Tower layer whose output becomes the visual features, the first of several; negative counts from the end."""
        layer = getattr(self.base.config, "vision_feature_layer", None)
        if isinstance(layer, list | tuple):
            layer = layer[0]
        if layer is None:
            return -1
        # hidden state v is the output of layer v - 1, and hidden state 0 the input of layer 0
        return layer if layer < 0 else max(layer - 1, 0)

    def full_attention(self, depth: int) -> tuple[int, ...]:
        """Tower layers, of ``depth``, in which a patch sees its whole image."""
        return tuple(range(depth))

    def placeholders(self) -> dict[str, int]:
        """Modality → the token id whose places its features take."""
        return placeholder_ids(self.base.config)

    def grids(self, record: Record) -> list[torch.Tensor]:
        """Per encoded item a (n, 3) long tensor: (t, row, col) of each of its language-model tokens, -1 for none."""
        pooled = record.output.pooler_output
        return [torch.full((len(item), 3), -1) for item in pooled]

    def shapes(self, record: Record) -> list[Shape]:
        """Tokens of each item, in raster order, before the tower runs: ``record`` has no output yet."""
        patch, pictures = self.base.config.vision_config.patch_size, record.inputs["pixel_values"]
        return [(1, pictures.shape[-2] // patch, pictures.shape[-1] // patch)] * len(pictures)

    def smaller(self, record: Record, shapes: Sequence[Shape]) -> dict[str, Any]:
        """The keyword arguments of the tower's run that change when its items become smaller pictures.

        Args:
            record: a run that is to come.
            shapes: the tokens that each item is to have; frames stay as many as they are.

        Returns:
            them by name; sizes on the host.
        """
        patch, pictures = self.base.config.vision_config.patch_size, record.inputs["pixel_values"]
        [(_, rows, columns)] = set(shapes)  # pictures of one size and one budget
        [(_, height, width)] = set(self.shapes(record))
        seen = pictures[..., : height * patch, : width * patch]  # patches are whole, what is left over was never seen
        return {
            "pixel_values": downsampled(seen, rows * patch, columns * patch),
            "interpolate_pos_encoding": True,
        }

    def alone(self, record: Record) -> list[dict[str, Any]]:
        """The keyword arguments of the tower's run that each picture, or crop, of a run would have by itself.

        Args:
            record: a run over pictures that is to come, with the arguments as the model was given them.

        Returns:
            them by name, in order. Put one behind the other, what the runs make is what the whole run makes, and no
            argument depends on the other pictures, so that padding to a common size is gone.
        """
        inputs = record.inputs
        return [
            {name: x[i : i + 1] if torch.is_tensor(x) else x for name, x in inputs.items()}
            for i in range(len(inputs["pixel_values"]))
        ]

    def units(self, record: Record) -> list[torch.Tensor]:
        """The normalised pixels of each unit before the tower runs: ``record`` has no output yet.

        Returns:
            per item (t, rows, columns, 3, m, P), of :meth:`shapes`: the P pixels of the m patches of a unit. Frames
            that the tower merges are one behind the other in P; an image, which repeats its own, has one.
        """
        patch, pictures = self.base.config.vision_config.patch_size, record.inputs["pixel_values"]
        patches = torch.nn.functional.unfold(pictures, patch, stride=patch).mT.unflatten(2, (3, 1, -1))
        return [x.unflatten(0, shape) for x, shape in zip(patches, self.shapes(record), strict=True)]

    def parts(self, record: Record, kept: Sequence[torch.Tensor]) -> list[Part]:
        """How the tower is made to encode some units of each item.

        Args:
            record: a run that is to come.
            kept: per item (units,) bool on the host; at least one each.

        Returns:
            one or more runs, which cover all items.
        """
        tower = getattr(self.base, self.tower)
        embeddings = next(module for name, module in tower.named_modules() if name.split(".")[-1] == "embeddings")
        depth = self.base.config.vision_config.num_hidden_layers
        pixels = record.inputs["pixel_values"]
        return by_count(embeddings, "pixel_values", pixels, kept, int(self.cls_token), depth)

    def layers(self, record: Record) -> Layers:
        """The tower's layers, and what reads what they make, for a run that is to come."""
        tower = getattr(self.base, self.tower)
        blocks = next(module for name, module in tower.named_modules() if name.split(".")[-1] == "layers")
        sizes = [t * h * w for t, h, w in self.shapes(record)]
        projector = self.base.get_submodule(self.projector or "")
        return Layers(blocks, [projector], ("layer_norm2", "mlp"), 1, int(self.cls_token), sizes, lambda _: None)

    def encoder(self) -> Encoder:
        """The blocks of the vision tower, for merging tokens between them.

        Raises:
            UnsupportedError: if tokens cannot be merged there.
        """
        raise UnsupportedError(
            f"{self.base.config.model_type}: tokens cannot be merged in its vision tower, because {self.unmergeable}; "
            "use a method that merges or drops them behind it, such as 'aim_merge'"
        )

    def tiles(self, record: Record) -> list[tuple[int, int]]:
        """Of each item, its language-model tokens and the pictures that the tower makes them of; before it runs."""
        return [(t * rows * columns, 1) for t, rows, columns in self.shapes(record)]

    def special_ids(self) -> set[int]:
        """Token ids that the config names, which are no words: begin, end, padding, images."""
        found: set[int] = set()
        for config in (self.base.config, self.base.config.get_text_config()):
            for name, value in vars(config).items():
                if name.endswith(("_token_id", "_token_ids", "_token_index")):
                    found |= {i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int)}
        return found

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel by which the family's stock processor normalises pixels."""
        vision = self.base.config.vision_config.model_type
        return HALF_STATISTICS if "siglip" in vision or "idefics" in vision else CLIP_STATISTICS

    def crops(self, record: Record) -> list[torch.Tensor]:
        """The pictures that went into the tower, each (k, 3, H, W) normalised pixels of equal size, in its order."""
        return [record.inputs["pixel_values"].flatten(0, -4)]

    def pixels(self, record: Record) -> list[torch.Tensor]:
        """The normalised pixels of each language-model token.

        Returns:
            one (n, 3, P) tensor per encoded item, aligned with :meth:`grids`; NaN where a token has no patch.

        Raises:
            UnsupportedError: for videos, where tokens are no whole patches or the frame is not known.
        """
        if record.modality == "video":
            raise UnsupportedError(
                f"{self.base.config.model_type}: pixels of video tokens are not known; use a method that does not read "
                "them"
            )
        size = self.base.config.vision_config.patch_size
        size = size if isinstance(size, int) else size[0]
        patches = [torch.nn.functional.unfold(x, size, stride=size).mT for x in self.crops(record)]
        return [g.unflatten(2, (3, -1)).transpose(1, 2).flatten(2) for g in self.group(record, patches)]

    def project(self, projector: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Send tokens through the projector, each for itself.

        Args:
            projector: called as the family's own projector is.
            tokens: (M, m, C), the m patches of each token as :meth:`group` brings them together.

        Returns:
            (M, D).
        """
        return projector(tokens.flatten(0, 1)[None])[0]

    def columns(self, record: Record) -> torch.Tensor:
        """(B, M, C) bool: which of the C cross-attention states of each of M image places per row show a picture.

        Places with any are the items of :meth:`grids`, in row-major order. Cross-attention families only.
        """
        raise NotImplementedError

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Bring values of tower patches to the language-model tokens they become.

        Args:
            record: the tower run the values come from.
            patches: (batch, patches, C) tensors in call order, as the tower or the projector sees them, without CLS.

        Returns:
            one (n, m, C) tensor per encoded item, aligned with :meth:`grids`: the m patches of each token; NaN where a
            token has no patch (newlines).

        Raises:
            UnsupportedError: where the family has no such mapping.
        """
        raise UnsupportedError(
            f"{self.base.config.model_type}: no mapping from vision-tower patches to language-model tokens is known; "
            "use a method that reads features only, or write an adapter (visiontok.adapters.base.Adapter)"
        )


def downsampled(pixels: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(n, C, H, W) → (n, C, rows, columns), antialiased bicubic in float32 at least.

    Normalised pixels may be given: resampling is linear and weights sum to 1, so it makes no difference.
    """
    exact = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    size = (rows, columns)
    return torch.nn.functional.interpolate(exact, size, mode="bicubic", antialias=True).to(pixels.dtype)


def unpadded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one picture (1, C, H, W) without what fills it up beyond its ``image_sizes``, if it has any."""
    if inputs.get("image_sizes") is None:
        return dict(inputs)
    [(height, width)] = torch.as_tensor(inputs["image_sizes"]).tolist()
    return {**inputs, "pixel_values": inputs["pixel_values"][..., :height, :width]}


def in_squares(tokens: torch.Tensor, side: int) -> torch.Tensor:
    """(M, m, C) patches of tokens, m = k · k → (S, (side · k)², C): laid out as square pictures of side · side tokens.

    The last picture is filled up with zeros.
    """
    count, area, width = tokens.shape
    k, pictures = round(area**0.5), -(-count // side**2)
    x = torch.cat([tokens, tokens.new_zeros(pictures * side**2 - count, area, width)])
    return x.view(pictures, side, side, k, k, width).transpose(2, 3).reshape(pictures, -1, width)


def square(n: int, t: int = 0) -> torch.Tensor:
    """(n, 3) grid of a square image of n tokens in raster order; unknown (-1) if n is no square."""
    side = round(n**0.5)
    return raster(1, side, side) + torch.tensor([t, 0, 0]) if side * side == n else torch.full((n, 3), -1)


def raster(frames: int, height: int, width: int) -> torch.Tensor:
    """(frames·height·width, 3) grid in raster order."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).view(-1, 3)


def family(model_type: str) -> str | None:
    """Which of the adapters here serves a model type; None if none of its own."""
    return _FAMILIES.get(model_type)


def is_supported(model_type: str) -> bool:
    """Whether a family has an adapter of its own, here or in another installed package."""
    return model_type in _FAMILIES or model_type in _third_party()


def find(base: nn.Module, *, inside: bool = True) -> Adapter:
    """The adapter of a base model (the module that holds tower and language model).

    Families without an adapter of their own get the default one if they pass its structural check.

    Args:
        base: the base model.
        inside: tokens are to be dropped inside the language model, not only before it; recurrent layers rule that out.

    Raises:
        UnsupportedError: if the model's structure does not fit; says what is missing.
    """
    adapter = _own(base)
    if adapter is None:
        adapter = check(Adapter(base))
    elif not adapter.cross_attention:
        missing = _odd_inputs(adapter, getattr(base, adapter.text, None))
        if missing is not None:
            raise _refusal(base, missing)
    served = PER_TOKEN if inside else PER_TOKEN | RECURRENT
    odd = sorted(layer_kinds(adapter) - served)
    if not odd:
        return adapter
    if not inside or set(odd) - RECURRENT:
        raise _refusal(base, f"plain attention layers (it has {', '.join(odd)})")
    raise UnsupportedError(
        f"{adapter.base.config.model_type}: visiontok needs plain attention layers to drop tokens inside the language "
        f"model (it has {', '.join(odd)}); use a recipe of prompt stages alone, such as 'divprune'"
    )


def _own(base: nn.Module) -> Adapter | None:
    """The adapter made for the family of ``base``, here or in another installed package."""
    model_type = getattr(base.config, "model_type", type(base).__name__)
    return adapter_class(model_type)(base) if is_supported(model_type) else None


def adapter_class(model_type: str) -> type[Adapter]:
    """The adapter of a family; those of other packages come first.

    Raises:
        ConfigError: if it has none, or if an entry point names something else.
    """
    third_party = _third_party().get(model_type)
    if third_party is not None:
        cls = third_party.load()
        if not (isinstance(cls, type) and issubclass(cls, Adapter)):
            raise ConfigError(f"entry point {third_party.name} = {third_party.value}: not an Adapter subclass")
        return cls
    if model_type in _FAMILIES:
        module = importlib.import_module(f"visiontok.adapters.{_FAMILIES[model_type]}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Adapter) and model_type in cls.model_types:
                return cls
    raise ConfigError(f"model_type={model_type!r}: no adapter is registered for it")


def check(adapter: Adapter) -> Adapter:
    """The structural self-check of the contract; cheap, no forward.

    Raises:
        UnsupportedError: naming the model, the first thing that is missing, and what to do.
    """
    base = adapter.base
    text = getattr(base, adapter.text, None)
    layers = getattr(text, "layers", None)
    missing = (
        f"a language model at .{adapter.text}"
        if text is None
        else "a list of decoder layers at .layers of its language model"
        if not isinstance(layers, nn.ModuleList)
        else "get_image_features"
        if not hasattr(type(base), "get_image_features")
        else odd
        if (odd := _odd_inputs(adapter, text)) is not None
        else "image_token_id in its config"
        if not adapter.placeholders()
        else "a causal mask built in the language model"
        if not adapter.own_mask and _builds_masks(base)
        else None
    )
    if missing is not None:
        raise _refusal(base, missing)
    return adapter


def layer_kinds(adapter: Adapter) -> set[str]:
    """Kinds of the decoder layers, as far as the config tells."""
    config = getattr(getattr(adapter.base, adapter.text, None), "config", None)
    return set(getattr(config, "layer_types", None) or ())


_INPUTS = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "output_attentions", "output_hidden_states", "return_dict", "cache_position",
}  # fmt: skip


def _odd_inputs(adapter: Adapter, text: Any) -> str | None:
    """What is missing in a language model that is fed more than the engine knows how to drop tokens from."""
    parameters = inspect.signature(text.forward).parameters.values()
    given = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    odd = sorted(given - _INPUTS - {*(adapter.deepstack or ()), *adapter.token_inputs})
    if odd:
        return f"a language model without side inputs (it takes {', '.join(odd)})"
    if not adapter.own_mask and getattr(text.config, "use_bidirectional_attention", None) is True:
        return "a causal language model (its config says use_bidirectional_attention)"
    return None


def _refusal(base: nn.Module, missing: str) -> UnsupportedError:
    model_type = getattr(base.config, "model_type", type(base).__name__)
    return UnsupportedError(
        f"{model_type}: visiontok needs {missing}; register an adapter for it (entry-point group visiontok.adapters, "
        "contract in visiontok.adapters.base.Adapter)"
    )


def placeholder_ids(config: Any) -> dict[str, int]:
    """Modality → placeholder token id, as far as the config names them."""
    found: dict[str, int] = {}
    for modality in ("image", "video"):
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value not in found.values():
                found.setdefault(modality, value)
    return found


def _builds_masks(base: nn.Module) -> bool:
    """Whether the model's own forward calls a mask builder."""
    names = inspect.unwrap(type(base).forward).__code__.co_names
    return any(name.startswith("create_") and "mask" in name for name in names)


def _third_party() -> Mapping[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group="visiontok.adapters")}
