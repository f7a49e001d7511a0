"""What a call costs: FLOPs of vision tower, projector and language model, key-value bytes, and the cap on a speed-up.

Everything is a Python integer computed from a Hugging Face configuration and from token counts; no model runs. A FLOP
is one multiplication or one addition of a matrix product (two per multiply-accumulate), and the attention products are
counted full, `n_queries * n_keys`, because that is what `torch.utils.flop_counter` counts; the tests compare the two
for every family named here, layer by layer. Norms, activations, softmax, rotary tables, embeddings looked up by index
and interpolation are not matrix products and count nothing.

Two things differ from one attention kernel to another. Pixtral packs all images of a call into one sequence: eager and
SDPA compute the full packed product, which is counted; flash attention skips what the block mask hides. And no kernel's
skipping of the causal upper triangle or of what lies outside a sliding window is counted.

A family that is not listed is never guessed: `UnsupportedError` names it, and `account` turns that into a line of
`Account.not_counted`.

The literature uses four other definitions, all called "FLOPs": `visiontok.conventions` has them. Only the numbers of
this module are FLOPs that were executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from visiontok.errors import ConfigError, UnsupportedError

# Families by the shape of their layers. Being here means: compared with the flop counter in tests/test_cost.py.
_GATED_MLP = frozenset(
    {
        "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3",
        "granite", "olmo2", "cohere", "cohere2", "smollm3", "glm4",
        "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "glm4v_text",
    }
)  # fmt: skip
_PLAIN_MLP = frozenset({"starcoder2", "phi"})
_EXPERTS = frozenset({"qwen3_moe", "qwen3_vl_moe_text"})

_TOWERS = frozenset(
    {
        "clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision", "internvl_vision", "pixtral",
        "qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision", "qwen3_5_vision",
        "glm4v_vision",
    }
)  # fmt: skip
_GATED_TOWERS = frozenset({"pixtral", "qwen2_5_vl_vision", "glm4v_vision"})

_LLAVA_LIKE = frozenset({"llava", "llava_next", "llava_onevision", "vipllava", "mistral3", "internvl"})
_ANY_RESOLUTION = frozenset({"llava_next", "llava_onevision"})
_PIXEL_SHUFFLE = frozenset({"idefics3", "smolvlm"})
_QWEN_MERGERS = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"})
_PROJECTORS = _LLAVA_LIKE | _PIXEL_SHUFFLE | _QWEN_MERGERS | {"glm4v", "gemma3", "paligemma"}

# Cross-attention: some decoder layers hold visual tokens only, and text attends to them. Compared in
# tests/test_mllama.py.
_CROSS_ATTENTION = frozenset({"mllama_text_model"})
_CROSS_TOWERS = frozenset({"mllama_vision_model"})
_CROSS_PROJECTORS = frozenset({"mllama"})


def _linear(tokens: int, *widths: int) -> int:
    """FLOPs of a chain of linear maps: `2 * tokens * sum(w[i] * w[i + 1])`."""
    return 2 * tokens * sum(a * b for a, b in pairwise(widths))


class Load(NamedTuple):
    """Tokens in the parts of one decoder layer.

    Attributes:
        keys: those with keys and values.
        queries: those that attend.
        out: those that reach the output projection and the MLP.
    """

    keys: int
    queries: int
    out: int

    @classmethod
    def all(cls, tokens: int) -> Load:
        """Every token takes part in everything."""
        return cls(tokens, tokens, tokens)

    @classmethod
    def frozen(cls, tokens: int, computed: int) -> Load:
        """All but ``computed`` ones of the tokens have keys and values only."""
        return cls(tokens, computed, computed)


@dataclass(frozen=True)
class _Block:
    """One transformer layer: its widths, and the FLOPs its feed-forward part spends on one token."""

    width: int
    query_width: int
    kv_width: int
    mlp: int

    def flops(self, tokens: int, pairs: int) -> int:
        """FLOPs for `tokens` tokens between which `pairs` (query, key) products are formed."""
        projections = 2 * self.width * (2 * self.query_width + 2 * self.kv_width)
        return tokens * (projections + self.mlp) + 4 * self.query_width * pairs

    def split_flops(self, load: Load) -> int:
        """The same where not every token takes part in everything."""
        queries, keys, out = load.queries, load.keys, load.out
        projections = 2 * self.width * (self.query_width * (queries + out) + 2 * self.kv_width * keys)
        return projections + out * self.mlp + 4 * self.query_width * queries * keys

    def merge_flops(self, tokens: int, pairs: int, behind: int) -> int:
        """The same for ``tokens`` of which ``behind`` are left between attention and feed-forward part."""
        return self.flops(tokens, pairs) - (tokens - behind) * self.mlp

    def cross_flops(self, text: int, new: int, keys: int) -> int:
        """FLOPs for `text` tokens that attend to `keys` visual ones, `new` of them not cached; without any: skipped."""
        if not keys:
            return 0
        projections = 4 * self.width * (text * self.query_width + new * self.kv_width)
        return projections + text * self.mlp + 4 * self.query_width * text * keys


# ------------------------------------------------------------------------------------------------- language model


def _text(config: Any) -> Any:
    return getattr(config, "text_config", config)


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _decoder_blocks(config: Any) -> list[_Block]:
    text = _text(config)
    family = text.model_type
    if family not in _GATED_MLP | _PLAIN_MLP | _EXPERTS | _CROSS_ATTENTION:
        raise UnsupportedError(
            f"the decoder layers of model_type={family!r} are not in visiontok's cost model; measure them with "
            "torch.utils.flop_counter.FlopCounterMode"
        )
    width, head = text.hidden_size, _head_width(text)
    matrices = 2 if family in _PLAIN_MLP else 3
    dense = 2 * matrices * width * text.intermediate_size
    routed = dense
    if family in _EXPERTS:
        experts = 2 * 3 * width * text.moe_intermediate_size * text.num_experts_per_tok
        routed = experts + 2 * width * text.num_experts
    blocks = []
    for layer in range(text.num_hidden_layers):
        mlp = routed if family in _EXPERTS and _is_sparse(text, layer) else dense
        blocks.append(_Block(width, text.num_attention_heads * head, _kv_heads(text) * head, mlp))
    return blocks


class Widths(NamedTuple):
    """What the formulas of published tables are made of.

    Attributes:
        layers: decoder layers.
        d: width of the language model.
        m: inner width of its MLP; of experts, that of their top-k together.
        kv: width of the keys.
        heads: query heads.
    """

    layers: int
    d: int
    m: int
    kv: int
    heads: int

    @classmethod
    def of(cls, config: Any) -> Widths:
        """Read off a configuration.

        Raises:
            UnsupportedError: if it describes no decoder.
        """
        text = _text(config)
        try:
            experts = text.model_type in _EXPERTS
            m = text.moe_intermediate_size * text.num_experts_per_tok if experts else text.intermediate_size
            kv = _kv_heads(text) * _head_width(text)
            return cls(text.num_hidden_layers, text.hidden_size, m, kv, text.num_attention_heads)
        except AttributeError as error:
            raise UnsupportedError(
                f"model_type={config.model_type!r}: its config describes no decoder ({error})"
            ) from error


def _cross_layers(config: Any) -> frozenset[int]:
    """Decoder layers whose keys and values are visual tokens."""
    text = _text(config)
    return frozenset(text.cross_attention_layers if text.model_type in _CROSS_ATTENTION else ())


def _is_sparse(text: Any, layer: int) -> bool:
    dense_layers = getattr(text, "mlp_only_layers", None) or ()
    return layer not in dense_layers and text.num_experts > 0 and (layer + 1) % text.decoder_sparse_step == 0


def _per_layer(name: str, counts: Sequence[int], layers: int) -> list[int]:
    counts = list(counts)
    if len(counts) != layers:
        raise ConfigError(f"{name} has {len(counts)} entries for {layers} layers; give one token count per layer")
    for layer, count in enumerate(counts):
        if count < 0 or count != int(count):
            raise ConfigError(f"{name}[{layer}]={count!r} is not a token count; give an integer >= 0")
    return [int(count) for count in counts]


def decoder_flops(
    config: Any, tokens: Sequence[int], *, keys: Sequence[int] | None = None, batch: int = 1
) -> list[int]:
    """FLOPs of every decoder layer, without the language-model head.

    Layer l with n queries, m keys, width d, query width q, key-value width k and a gated MLP of width f costs
    `2 n d (2 q + 2 k) + 4 q n m + 6 n d f` per row. Experts cost their top-k and the router. In a cross-attention layer
    n, the text of the other layers, is the queries, and the v visual tokens cost `4 v d k`.

    Args:
        config: The model's configuration, or its `text_config`.
        tokens: Tokens that enter each layer, per row of the batch, padding included: it is computed too. For a
            cross-attention layer the visual tokens, v.
        keys: Tokens each layer's queries attend to, where it differs from `tokens` (decoding with a cache).
        batch: Rows.

    Returns:
        One integer per layer.

    Raises:
        UnsupportedError: The text family is not in the cost model.
        ConfigError: A list does not have one count per layer.
    """
    blocks = _decoder_blocks(config)
    queries = _per_layer("tokens", tokens, len(blocks))
    attended = queries if keys is None else _per_layer("keys", keys, len(blocks))
    cross = _cross_layers(config)
    text = max((n for layer, n in enumerate(queries) if layer not in cross), default=0)
    return [
        batch * (block.cross_flops(text, n, m) if layer in cross else block.flops(n, n * m))
        for layer, (block, n, m) in enumerate(zip(blocks, queries, attended, strict=True))
    ]


def load_flops(config: Any, loads: Sequence[Load]) -> list[int]:
    """FLOPs of every decoder layer where tokens enter only parts of it: drops behind the attention, frozen tokens.

    Args:
        config: The model's configuration, or its `text_config`.
        loads: One per layer.

    Returns:
        One integer per layer.

    Raises:
        UnsupportedError: The text family is not in the cost model, or has cross-attention.
        ConfigError: `loads` does not have one entry per layer.
    """
    blocks = _decoder_blocks(config)
    if _cross_layers(config):
        raise UnsupportedError(
            f"model_type={_text(config).model_type!r}: its visual tokens are in no decoder layer; use decoder_flops"
        )
    if len(loads) != len(blocks):
        raise ConfigError(f"loads has {len(loads)} entries for {len(blocks)} layers; give one per layer")
    return [block.split_flops(load) for block, load in zip(blocks, loads, strict=True)]


def narrow_flops(config: Any, narrow: Mapping[int, tuple[int, int]]) -> list[int]:
    """FLOPs that every decoder layer is spared where some tokens use the first channels of its MLP only.

    Each channel that a token does not use is `6 d` FLOPs in a gated MLP, `4 d` in a plain one.

    Args:
        config: The model's configuration, or its `text_config`.
        narrow: By layer, the tokens of all rows, and the channels that they use.

    Returns:
        One integer per layer.

    Raises:
        UnsupportedError: The text family is not in the cost model.
    """
    inner, spared = _text(config).intermediate_size, []
    for layer, block in enumerate(_decoder_blocks(config)):
        tokens, channels = narrow.get(layer, (0, inner))
        spared.append(tokens * (inner - channels) * (block.mlp // inner))
    return spared


def lm_head_flops(config: Any, tokens: int = 1) -> int:
    """FLOPs of the language-model head, `2 n d V`; `generate()` computes it for the last token of each row only."""
    text = _text(config)
    return _linear(tokens, text.hidden_size, text.vocab_size)


def kv_bytes(config: Any, tokens: Sequence[int], *, dtype_bytes: int = 2, batch: int = 1) -> int:
    """Bytes of keys and values after a prefill with `tokens[l]` tokens in layer l, as `DynamicCache` holds them.

    A layer holds `2 * batch * kv_heads * head_dim * dtype_bytes` bytes per token; a sliding-window layer never holds
    more than `sliding_window - 1` tokens.

    Args:
        config: The model's configuration, or its `text_config`.
        tokens: Tokens per layer and row, padding included.
        dtype_bytes: Bytes per element: 2 for bfloat16, 4 for float32.
        batch: Rows.

    Raises:
        UnsupportedError: The text family is not in the cost model.
        ConfigError: `tokens` does not have one count per layer.
    """
    return sum(_kv_bytes(config, tokens, dtype_bytes, batch))


def _kv_bytes(config: Any, tokens: Sequence[int], dtype_bytes: int, batch: int) -> list[int]:
    """Of each layer."""
    text = _text(config)
    blocks = _decoder_blocks(text)
    counts = _per_layer("tokens", tokens, len(blocks))
    window = getattr(text, "sliding_window", None)
    if window is not None:
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * len(blocks)
        counts = [
            min(n, window - 1) if kind == "sliding_attention" else n for n, kind in zip(counts, kinds, strict=True)
        ]
    return [2 * batch * n * block.kv_width * dtype_bytes for n, block in zip(counts, blocks, strict=True)]


def _kv_peak(whole: Sequence[int], left: Sequence[int]) -> int:
    """The most bytes held at once, if every layer is stored whole and copied to what is left of it before the next."""
    copied = [0 if a == b else b for a, b in zip(whole, left, strict=True)]
    return max(sum(left[:i]) + whole[i] + copied[i] for i in range(len(whole)))


# ---------------------------------------------------------------------------------------------------- vision tower


@dataclass(frozen=True)
class VisionInputs:
    """What enters the vision tower in one call.

    Args:
        grids: One `(t, h, w)` per image, crop or video: frames (after temporal patching) or Mllama's tiles, patch rows,
            patch columns.
        embedded: Patches the patch embedding computes; more than the grids hold where images of different sizes are
            padded to one (Pixtral). Defaults to the patches of `grids`.
        lengths: Per tower layer the lengths of its attention sequences, class tokens included, where these are not
            those of whole pictures; defaults to what `grids` make.
        mlp: Per tower layer the tokens its MLP computes, where these are fewer than those that attend.
        projected: Lengths of the sequences the projector gets, where these are not those of the last layer.
    """

    grids: tuple[tuple[int, int, int], ...]
    embedded: int | None = None
    lengths: tuple[tuple[int, ...], ...] | None = None
    mlp: tuple[int, ...] | None = None
    projected: tuple[int, ...] | None = None

    @property
    def patches(self) -> int:
        """Patches in all grids."""
        return sum(t * h * w for t, h, w in self.grids)

    @property
    def computed(self) -> int:
        """Patches that are embedded."""
        return self.patches if self.embedded is None else self.embedded

    @property
    def entered(self) -> int:
        """Patches that enter the tower's layers; where these see whole pictures, all that are embedded."""
        return self.computed if self.lengths is None else self.patches

    @classmethod
    def from_call(cls, config: Any, call: Mapping[str, Any]) -> VisionInputs:
        """Read the grids off the keyword arguments of `forward()` or `generate()`.

        Shapes are read, and the small integer tensors `image_grid_thw`, `video_grid_thw`, `image_sizes` and
        `batch_num_images`. Only Idefics3 and SmolVLM look at pixels, to leave out the all-zero images that the model
        leaves out.

        Args:
            config: The model's configuration.
            call: The keyword arguments; entries that are absent or None are skipped.

        Returns:
            The grids; none at all for a call without images.
        """
        grids: list[tuple[int, int, int]] = []
        for key in ("image_grid_thw", "video_grid_thw"):
            if call.get(key) is not None:
                grids += [(int(t), int(h), int(w)) for t, h, w in call[key].tolist()]
        if grids:
            return cls(tuple(grids))
        patch_h, patch_w = _pair(config.vision_config.patch_size)
        embedded = 0
        for key in ("pixel_values", "pixel_values_videos"):
            pixels = call.get(key)
            if pixels is None:
                continue
            rows, columns = pixels.shape[-2] // patch_h, pixels.shape[-1] // patch_w
            if config.vision_config.model_type == "pixtral" and call.get("image_sizes") is not None:
                sizes = [(int(h), int(w)) for h, w in _listed(call["image_sizes"])]
                grids += [(1, h // patch_h, w // patch_w) for h, w in sizes]
                embedded += len(sizes) * rows * columns
            elif config.model_type in _CROSS_PROJECTORS:  # places for images and tiles that stay empty run as well
                images, tiles = int(pixels.shape[0] * pixels.shape[1]), int(pixels.shape[2])
                grids += [(tiles, rows, columns)] * images
                embedded += images * tiles * rows * columns
            else:
                crops = _crops(config, call, key)
                grids += [(1, rows, columns)] * crops
                embedded += crops * rows * columns
        return cls(tuple(grids), embedded)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _listed(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _crops(config: Any, call: Mapping[str, Any], key: str) -> int:
    """How many crops of `call[key]` enter the tower: without the padding crops and images that are dropped first."""
    pixels = call[key]
    if pixels.ndim == 4:
        return int(pixels.shape[0])
    if key == "pixel_values" and config.model_type in _ANY_RESOLUTION:
        sizes = [(int(h), int(w)) for h, w in _listed(call["image_sizes"])]
        per_sample = call.get("batch_num_images")
        tiled = [True] * len(sizes)
        if per_sample is not None:
            tiled = [n == 1 for n in _listed(per_sample) for _ in range(n)]
        return sum(_tiles(config, size) if tile else 1 for size, tile in zip(sizes, tiled, strict=True))
    if config.model_type in _PIXEL_SHUFFLE:
        return int((pixels != 0).flatten(2).any(-1).sum())
    return int(pixels.shape[0] * pixels.shape[1])


def _tiles(config: Any, size: tuple[int, int]) -> int:
    """Crops of one image at any resolution: the tiles of the best pinpoint and the downscaled whole."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    crop = config.vision_config.image_size
    return -(-height // crop) * -(-width // crop) + 1


@dataclass(frozen=True)
class VisionFlops:
    """FLOPs between pixels and the language model.

    Args:
        embedding: Patch embedding.
        layers: One integer per tower layer.
        head: SigLIP's attention-pooling head, which vision-language models compute and throw away.
        projector: Everything between the tower's last layer and the language model, mergers and DeepStack included.
    """

    embedding: int
    layers: tuple[int, ...]
    head: int
    projector: int

    @property
    def tower(self) -> int:
        """Patch embedding, layers and pooling head."""
        return self.embedding + sum(self.layers) + self.head


def _tower_block(vision: Any) -> tuple[_Block, int]:
    """The tower's layer and how often it is repeated."""
    family = vision.model_type
    if family not in _TOWERS | _CROSS_TOWERS:
        raise UnsupportedError(
            f"the vision tower of model_type={family!r} is not in visiontok's cost model; measure it with "
            "torch.utils.flop_counter.FlopCounterMode"
        )
    if family == "qwen2_vl_vision":
        width, inner = vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)
    elif family == "glm4v_vision":
        width, inner = vision.hidden_size, vision.out_hidden_size
    else:
        width, inner = vision.hidden_size, vision.intermediate_size
    matrices = 3 if family in _GATED_TOWERS else 2
    depth = vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers
    if family in _CROSS_TOWERS:
        depth += vision.num_global_layers
    return _Block(width, width, width, 2 * matrices * width * inner), depth


def _patch_width(vision: Any) -> int:
    """Numbers in one patch: channels x frames x rows x columns."""
    channels = vision.in_channels if hasattr(vision, "in_channels") else vision.num_channels
    rows, columns = _pair(vision.patch_size)
    return channels * getattr(vision, "temporal_patch_size", 1) * rows * columns


def _windows(vision: Any, grid: tuple[int, int, int]) -> list[int]:
    """Qwen2.5-VL: tokens in each attention window of one image or video."""
    t, h, w = grid
    merge = vision.spatial_merge_size
    side = vision.window_size // merge // _pair(vision.patch_size)[0]

    def pieces(cells: int) -> list[int]:
        return [min(side, cells - start) for start in range(0, cells, side)]

    return t * [a * b * merge**2 for a in pieces(h // merge) for b in pieces(w // merge)]


def attention_lengths(config: Any, inputs: VisionInputs) -> list[list[int]]:
    """Lengths of the separate attention sequences in every layer of the stock vision tower.

    A crop is a sequence of its own (with its class token), and so is each frame of a Qwen or GLM video. Qwen2.5-VL
    attends within windows except in `fullatt_block_indexes`; Pixtral packs the call into one sequence.

    Args:
        config: The model's configuration.
        inputs: What enters the tower.

    Returns:
        One list per layer; its sum is the number of tokens in the layer.
    """
    vision = config.vision_config
    _, depth = _tower_block(vision)
    if inputs.lengths is not None:
        return [list(layer) for layer in inputs.lengths]
    if vision.model_type == "pixtral":
        return [[inputs.patches] if inputs.grids else []] * depth
    if vision.model_type in _CROSS_TOWERS:  # all tiles of an image together, each padded to a multiple of 8
        return [[t * (-(-(h * w + 1) // 8) * 8) for t, h, w in inputs.grids]] * depth
    prefix = 1 if vision.model_type in ("clip_vision_model", "internvl_vision") else 0
    whole = [h * w + prefix for t, h, w in inputs.grids for _ in range(t)]
    if vision.model_type != "qwen2_5_vl_vision":
        return [whole] * depth
    windows = [length for grid in inputs.grids for length in _windows(vision, grid)]
    return [whole if layer in vision.fullatt_block_indexes else windows for layer in range(depth)]


def knows(config: Any) -> bool:
    """Whether the vision tower and projector of a model of this config are in the cost model."""
    return config.model_type in _PROJECTORS | _CROSS_PROJECTORS


def vision_flops(
    config: Any,
    inputs: VisionInputs,
    *,
    lengths: Sequence[Sequence[int]] | None = None,
    behind: Sequence[Sequence[int]] | None = None,
) -> VisionFlops:
    """FLOPs of vision tower and projector.

    A tower layer of width d and MLP width f over sequences of n_i tokens, n in all, costs
    `8 n d^2 + 4 d sum(n_i^2) + 4 n d f` (`6 n d f` where gated). All layers are counted, as all are computed: a LLaVA
    that reads `hidden_states[-2]` runs the last layer too.

    Args:
        config: The model's configuration.
        inputs: What enters the tower.
        lengths: Sequence lengths per tower layer where an encoder-stage recipe shortens them, class tokens included;
            what leaves the last layer is what the projector gets. Defaults to `attention_lengths(config, inputs)`.
        behind: The same between attention and MLP of each layer, where tokens merge there. Defaults to `lengths`.

    Raises:
        UnsupportedError: Tower or projector is not in the cost model.
        ConfigError: `lengths` does not have one entry per tower layer.
    """
    vision = getattr(config, "vision_config", None)
    if vision is None and hasattr(config, "text_config"):
        raise UnsupportedError(
            f"model_type={config.model_type!r} has no vision tower that visiontok's cost model knows; measure it with "
            "torch.utils.flop_counter.FlopCounterMode"
        )
    if vision is None:
        raise ConfigError(
            f"config of model_type={config.model_type!r} has no vision_config; give the whole model's config"
        )
    block, depth = _tower_block(vision)
    if not knows(config):
        raise UnsupportedError(
            f"the projector of model_type={config.model_type!r} is not in visiontok's cost model; measure it with "
            "torch.utils.flop_counter.FlopCounterMode"
        )
    if lengths is None:
        lengths = attention_lengths(config, inputs)
    elif len(lengths) != depth:
        raise ConfigError(f"lengths has {len(lengths)} entries for {depth} tower layers; give one list per layer")
    left = lengths if behind is None else behind
    return VisionFlops(
        embedding=_linear(inputs.computed, _patch_width(vision), block.width),
        layers=tuple(
            block.merge_flops(sum(layer), sum(n * n for n in layer), rows)
            for layer, rows in zip(lengths, inputs.mlp or map(sum, left), strict=True)
        ),
        head=_pooling_head(vision, block, left[-1]),
        projector=_projector(config, block.width, inputs.projected or left[-1], inputs),
    )


def _pooling_head(vision: Any, block: _Block, lengths: Sequence[int]) -> int:
    """SigLIP: one learned query per image attends to all its tokens, then an MLP."""
    if vision.model_type != "siglip_vision_model" or not getattr(vision, "vision_use_head", True):
        return 0
    d, images, tokens = block.width, len(lengths), sum(lengths)
    return (
        _linear(images, d, d) + _linear(tokens, d, 2 * d) + 4 * d * tokens + _linear(images, d, d) + images * block.mlp
    )


def _projector(config: Any, width: int, lengths: Sequence[int], inputs: VisionInputs) -> int:
    """FLOPs from the tower's output, in sequences of `lengths` tokens, to the language model's input."""
    family, vision, out = config.model_type, config.vision_config, config.text_config.hidden_size
    tokens = sum(lengths)
    if family in _CROSS_PROJECTORS:
        return _linear(sum(t * (h * w + 1) for t, h, w in inputs.grids), vision.vision_output_dim, out)
    if family == "gemma3":  # average-pooled to a fixed number before the projection
        return _linear(len(lengths) * config.mm_tokens_per_image, width, out)
    if family == "paligemma":
        return _linear(tokens, width, config.projection_dim)
    if family in _PIXEL_SHUFFLE:
        unit = config.scale_factor**2
        return _linear(tokens // unit, width * unit, out)
    if family in _QWEN_MERGERS:
        unit = vision.spatial_merge_size**2
        inner = width * unit
        target = vision.hidden_size if family == "qwen2_vl" else vision.out_hidden_size
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        return mergers * _linear(tokens // unit, inner, inner, target)
    if family == "glm4v":
        merged = tokens // vision.spatial_merge_size**2
        target = vision.out_hidden_size
        convolution = _linear(merged, width * vision.spatial_merge_size**2, target)
        return convolution + _linear(merged, target, target) + 3 * _linear(merged, target, vision.intermediate_size)
    name = "vision_feature_layer" if hasattr(config, "vision_feature_layer") else "vision_feature_layers"
    layers: int | Sequence[int] = getattr(config, name)  # VipLlava has the plural in transformers 5.17
    stacked = width * (1 if isinstance(layers, int) else len(layers))
    if family == "vipllava" or getattr(config, "vision_feature_select_strategy", "full") == "default":
        tokens -= len(lengths)  # the class token is not projected
    if family == "internvl":
        unit = int(1 / config.downsample_ratio) ** 2
        return _linear(tokens // unit, width * unit, out, out)
    if family == "mistral3":
        side = config.spatial_merge_size
        merged = sum(t * (h // side) * (w // side) for t, h, w in inputs.grids)
        return _linear(merged, width * side**2, width) + _linear(merged, stacked, out, out)
    return _linear(tokens, stacked, out, out)


def encoder_flops(costs: tuple[int, int, int], tokens: Sequence[int], pictures: int = 1) -> list[int]:
    """FLOPs of the blocks of an encoder in which tokens merge between attention and MLP.

    Args:
        costs: Of one block: per token in the attention, per pair of tokens, and per token in the MLP.
        tokens: Per picture, on the input of each block and behind the last.
        pictures: Of one run.

    Returns:
        One integer per block.
    """
    projected, pair, inner = costs
    return [pictures * (projected * n + pair * n * n + inner * m) for n, m in pairwise(tokens)]


# -------------------------------------------------------------------------------------- time to first token, account


@dataclass(frozen=True)
class SpeedUp:
    """A speed-up with the number it must be read beside.

    Args:
        time_to_first_token: Whole time to first token, stock / compressed.
        language_model: The language model's prefill alone, stock / compressed, selection included.
        cap: What removing every visual token after the tower, for free, would reach on time to first token.
    """

    time_to_first_token: float
    language_model: float
    cap: float

    def to_dict(self) -> dict[str, float]:
        """The three ratios by name."""
        return asdict(self)


def time_to_first_token_cap(*, preprocess: float = 0.0, vision: float, prefill: float, prefill_text: float) -> float:
    """The largest speed-up of the time to first token that dropping visual tokens after the tower can give.

    Args:
        preprocess: Everything before the tower.
        vision: Tower and projector of the stock model.
        prefill: The language model's prefill, stock.
        prefill_text: Its prefill of the text alone. All four in one unit, seconds or FLOPs.

    Returns:
        `(preprocess + vision + prefill) / (preprocess + vision + prefill_text)`.

    Raises:
        ConfigError: A part is negative, or nothing is left to divide by.
    """
    parts = {"preprocess": preprocess, "vision": vision, "prefill": prefill, "prefill_text": prefill_text}
    _check_parts(parts)
    rest = preprocess + vision + prefill_text
    if rest == 0:
        raise ConfigError("preprocess, vision and prefill_text are all 0; give at least one that was measured")
    return (preprocess + vision + prefill) / rest


def speed_up(
    *,
    preprocess: float = 0.0,
    vision_stock: float,
    vision: float,
    selection: float = 0.0,
    prefill_stock: float,
    prefill: float,
    prefill_text: float,
) -> SpeedUp:
    """State a speed-up on the whole time to first token, beside the language model's part and the cap.

    Args:
        preprocess: Everything before the tower, the same in both runs.
        vision_stock: Tower and projector of the stock model.
        vision: Tower and projector as run; smaller only under pixel- and encoder-stage recipes.
        selection: Scoring, selecting and merging.
        prefill_stock: The language model's prefill, stock.
        prefill: Its prefill as run.
        prefill_text: Its prefill of the text alone. All in one unit, seconds or FLOPs.

    Raises:
        ConfigError: A part is negative, or the compressed run took nothing.
    """
    _check_parts({"vision_stock": vision_stock, "vision": vision, "selection": selection, "prefill": prefill})
    if selection + prefill == 0:
        raise ConfigError("prefill=0 and selection=0; give the compressed run's prefill, which is never free")
    return SpeedUp(
        time_to_first_token=(preprocess + vision_stock + prefill_stock) / (preprocess + vision + selection + prefill),
        language_model=prefill_stock / (selection + prefill),
        cap=time_to_first_token_cap(
            preprocess=preprocess, vision=vision_stock, prefill=prefill_stock, prefill_text=prefill_text
        ),
    )


def _check_parts(parts: Mapping[str, float]) -> None:
    for name, value in parts.items():
        if not value >= 0:
            raise ConfigError(f"{name}={value!r} is not a duration or FLOP count; give a number >= 0")


@dataclass(frozen=True)
class Account:
    """FLOPs and key-value bytes of one prefill, stock and compressed. None where the family is not in the cost model.

    Args:
        vision_stock: Tower and projector of the stock model.
        vision: Tower and projector as run.
        patches_stock: Patches that enter the tower of the stock model.
        patches: Patches that enter it as run.
        decoder_stock: Decoder layers, stock, one integer per layer.
        decoder: Decoder layers as run.
        decoder_text: Decoder layers if only text had entered; behind the cap.
        lm_head: Language-model head, for one token per row; the same in all runs.
        kv_stock: Bytes of keys and values after the stock prefill.
        kv: Bytes of keys and values after the compressed prefill.
        kv_peak: The most of them at any time of it; more than `kv` where a cache stage frees a part.
        not_counted: Why, for each None.
    """

    vision_stock: VisionFlops | None
    vision: VisionFlops | None
    patches_stock: int
    patches: int
    decoder_stock: tuple[int, ...] | None
    decoder: tuple[int, ...] | None
    decoder_text: tuple[int, ...] | None
    lm_head: int
    kv_stock: int | None
    kv: int | None
    kv_peak: int | None
    not_counted: tuple[str, ...] = ()

    def speed_up(self) -> SpeedUp | None:
        """The ratios in FLOPs, an idealised machine's speed-up; None where a part is not counted."""
        if self.vision_stock is None or self.vision is None:
            return None
        if self.decoder_stock is None or self.decoder is None or self.decoder_text is None:
            return None
        return speed_up(
            vision_stock=self.vision_stock.tower + self.vision_stock.projector,
            vision=self.vision.tower + self.vision.projector,
            prefill_stock=sum(self.decoder_stock) + self.lm_head,
            prefill=sum(self.decoder) + self.lm_head,
            prefill_text=sum(self.decoder_text) + self.lm_head,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the speed-up in FLOPs included."""
        ratios = self.speed_up()
        return {**asdict(self), "speed_up_flops": None if ratios is None else ratios.to_dict()}


def _looked_ahead(config: Any, tokens: Sequence[int], stop: int, batch: int) -> list[int]:
    """FLOPs per layer of a run that ends at the attention of layer `stop`."""
    block, whole = _decoder_blocks(config)[stop], decoder_flops(config, tokens, batch=batch)
    projected = 2 * batch * tokens[stop] * block.width * (block.query_width + 2 * block.kv_width)
    return [*whole[:stop], projected, *[0] * (len(whole) - stop - 1)]


def account(
    config: Any,
    inputs: VisionInputs,
    *,
    stock: Sequence[int],
    kept: Sequence[int],
    text: int,
    cached: Sequence[int] | None = None,
    batch: int = 1,
    dtype_bytes: int = 2,
    ran: VisionInputs | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    behind: Sequence[Sequence[int]] | None = None,
    ahead: Sequence[int] = (),
    computed: Sequence[int] | None = None,
    narrow: Mapping[int, tuple[int, int]] | None = None,
) -> Account:
    """The cost of one prefill, before and after compression.

    Args:
        config: The model's configuration.
        inputs: What enters the stock vision tower, all rows together (`VisionInputs.from_call`).
        stock: Tokens per decoder layer and row in the stock model, text and padding included.
        kept: The same as run.
        text: Tokens per row if every visual token were gone; a cross-attention layer would have none.
        cached: Tokens per decoder layer and row that stay in the cache; those that ran by default.
        batch: Rows.
        dtype_bytes: Bytes per element of the cache.
        ran: What entered the tower as run, if a pixel-stage recipe made it less.
        lengths: Sequence lengths per tower layer as run, if an encoder-stage recipe shortens them.
        behind: The same between attention and MLP of each layer, if tokens merge there.
        ahead: Decoder layers, up to the queries, keys and values of which the stock tokens ran before.
        computed: Of `kept`, the tokens that are not frozen: these have keys and values, and nothing else. All by
            default.
        narrow: By layer, the visual tokens of all rows of which the MLP computes fewer channels, and how many.

    Raises:
        ConfigError: A list does not have one entry per layer.
    """
    reasons: list[str] = []
    vision_stock = vision = None
    try:
        vision_stock = vision_flops(config, inputs)
        vision = vision_flops(config, ran or inputs, lengths=lengths, behind=behind)
    except UnsupportedError as error:
        reasons.append(str(error))
    layers: list[tuple[int, ...] | None] = [None, None, None]
    caches: list[int | None] = [None, None, None]
    try:
        cross = _cross_layers(config)
        text_only = [0 if layer in cross else text for layer in range(len(stock))]
        layers = [tuple(decoder_flops(config, counts, batch=batch)) for counts in (stock, kept, text_only)]
        if computed is not None and list(computed) != list(kept):
            loads = [Load.frozen(n, m) for n, m in zip(kept, computed, strict=True)]
            layers[1] = tuple(batch * flops for flops in load_flops(config, loads))
        if narrow:
            layers[1] = tuple(a - b for a, b in zip(layers[1] or (), narrow_flops(config, narrow), strict=True))
        for stop in ahead:
            looked = _looked_ahead(config, stock, stop, batch)
            layers[1] = tuple(a + b for a, b in zip(layers[1] or (), looked, strict=True))
        held, whole, left = (_kv_bytes(config, n, dtype_bytes, batch) for n in (stock, kept, cached or kept))
        caches = [sum(held), sum(left), _kv_peak(whole, left)]
    except UnsupportedError as error:
        reasons.append(str(error))
    return Account(
        vision_stock=vision_stock,
        vision=vision,
        patches_stock=inputs.entered,
        patches=(ran or inputs).entered,
        decoder_stock=layers[0],
        decoder=layers[1],
        decoder_text=layers[2],
        lm_head=lm_head_flops(config, batch),
        kv_stock=caches[0],
        kv=caches[1],
        kv_peak=caches[2],
        not_counted=tuple(reasons),
    )
