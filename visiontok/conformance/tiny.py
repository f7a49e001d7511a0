"""Shrink the default config of any image-text-to-text class until a random model of it fits in a test.

Sizes go by the name of the field (:data:`SIZES`), depth becomes :data:`DEPTH` layers among which every kind of layer of
the original is kept, and token ids move below a small vocabulary. What no rule can know stands in :data:`SPECIAL`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import transformers

DEPTH = 4
WIDTH = 64
HEADS = 4
FIRST_ID = 128  # special tokens that had a larger id get ids from here on; text is drawn from TEXT_IDS
TEXT_IDS = (64, 120)
VOCAB = 256
IMAGE_SIZE, PATCH = 32, 4
TOLERANCE = 1e-5  # of logits, relative: generate() returns them in float32

_DEPTHS = {
    "num_hidden_layers", "depth", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
    "layers", "conf_num_hidden_layers", "num_global_layers",
}  # fmt: skip
_WIDTHS = {
    "hidden_size", "d_model", "out_hidden_size", "projection_dim", "text_hidden_size", "encoder_hidden_size",
    "projector_hidden_size", "vision_hidden_size", "decoder_hidden_size", "projection_hidden_dim",
    "word_embed_proj_dim", "output_dim", "image_text_hidden_size", "projection_hidden_size", "patch_embed_hidden_size",
    "projector_input_dim", "projector_output_dim", "vision_output_dim", "adapter_in_dim", "adapter_out_dim",
    "output_channels", "downsample_hidden_size", "adapter_input_size", "post_conv_in_channels", "image_token_embed_dim",
}  # fmt: skip
_INNER = {
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "moe_hidden_size", "ffn_dim",
    "dense_intermediate_size", "shared_intermediate_size", "share_expert_dim", "intermediate_size_mlp", "d_ff",
    "alignment_intermediate_size", "projection_intermediate_size", "moe_shared_expert_intermediate_size", "mlp_dim",
    "encoder_ffn_dim", "decoder_ffn_dim", "shared_experts_intermediate_size",
}  # fmt: skip
_HEADS = {
    "num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads", "decoder_attention_heads",
    "resampler_n_heads", "conf_num_attention_heads", "swa_num_attention_heads", "num_sliding_attention_heads",
    "linear_num_value_heads", "linear_num_heads",
}  # fmt: skip
_HEAD_DIMS = {
    "head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "swa_head_dim", "global_head_dim",
    "resampler_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "rotary_dim",
    "attention_head_dim", "index_head_dim",
}  # fmt: skip
_EXPERTS = {"num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"}

SIZES: dict[str, int] = {
    **dict.fromkeys(_DEPTHS, DEPTH),
    **dict.fromkeys(_WIDTHS, WIDTH),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_HEADS, HEADS),
    **dict.fromkeys(_HEAD_DIMS, WIDTH // HEADS),
    **dict.fromkeys(_EXPERTS, 4),
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "n_kv_heads": 2,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "qk_head_dim": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "first_k_dense_replace": 1,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 1024,  # longer than any test prompt: the dense oracle holds only then
    "sliding_window_size": 1024,
    "attention_chunk_size": 1024,
    "window_size": 16,
    "num_position_embeddings": 64,
    "num_image_tokens": 16,
    "image_seq_length": 16,
    "vision_soft_tokens_per_image": 16,
    "mm_tokens_per_image": 4,
    "num_query_tokens": 4,
    "laurel_rank": 8,
    "index_n_heads": 2,
}

_HYBRID = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_OMNI = {"vision_start_token_id": FIRST_ID + 30, "vision_end_token_id": FIRST_ID + 31}  # the default names none
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": WIDTH // HEADS,
    "patch_size": PATCH,
    "position_embedding_size": 64,
}
_MUSE = {"out_hidden_size": 4 * WIDTH}  # 2 × 2 patches side by side

# What no rule by name can know, and what the defaults leave out though every checkpoint has it.
# model_type → dotted path in the shrunk config → value
SPECIAL: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {"64": 16}, "max_value_projector_patch_to_query_dict": 16},
    "chameleon": {
        "vocabulary_map": {"<image>": FIRST_ID, **{f"IMGIMG{c}Z": FIRST_ID + 1 + i for i, c in enumerate("ABCDEFGH")}},
        "vq_config.base_channels": 32,
        "vq_config.num_embeddings": 8,
    },
    "cohere_compass": {
        "text_config.layer_types": _HYBRID,
        "text_config.rope_parameters": dict.fromkeys(_HYBRID, _ROPE | {"mrope_section": [4, 2, 2]}),
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", *["sparse"] * 3],
        "text_config.num_experts_per_tok": 2,
        "vision_config.sam_config.downsample_channels": [32, WIDTH],
    },
    "deepseek_vl_hybrid": {"high_res_vision_config.image_size": 2 * IMAGE_SIZE},
    "diffusion_gemma": {
        "vision_config": _GEMMA4_VISION,
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
    },
    "dots3_note": {"text_config.per_layer_config": {}, "text_config.head_dim": 2 * WIDTH // HEADS},
    "emu3": {
        "image_token_id": FIRST_ID,
        "vocabulary_map": {
            "<image>": FIRST_ID,
            "<|extra_200|>": FIRST_ID + 1,
            **{f"<|visual token {i:06}|>": FIRST_ID + 2 + i for i in range(16)},
        },
        "vq_config.base_channels": 32,
        "vq_config.codebook_size": 16,
        "vq_config.hidden_size": 128,
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "fast_vlm": {"vision_config.architecture": "fastvit_t8", "vision_config.hidden_size": 768},
    "florence2": {
        "vision_config.embed_dim": [16, 32, 48, WIDTH],
        "vision_config.num_heads": [2] * 4,
        "vision_config.num_groups": [2] * 4,
        "vision_config.projection_dim": WIDTH,
    },
    "gemma3n": {
        "text_config.layer_types": _HYBRID,
        "text_config.num_kv_shared_layers": 2,
        "vision_config.hidden_size": 2048,  # of any width of this tower
        "vision_config.model_args": {"channel_multiplier": 0.05, "msfa_output_resolution": 4},
    },
    "gemma4": {
        "text_config.layer_types": _HYBRID,
        "text_config.num_kv_shared_layers": 2,
        "vision_config": _GEMMA4_VISION,
    },
    "gemma4_unified": {
        "text_config.use_bidirectional_attention": "vision",
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": PATCH,
            "pooling_kernel_size": 2,
            "mm_embed_dim": WIDTH,
            "mm_posemb_size": 64,
            "output_proj_dims": WIDTH,
        },
    },
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 1], [-1, 2]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 1, 2, 3],
    },
    "hunyuan_vl": {"text_config.head_dim": WIDTH // HEADS},
    "janus": {"vq_config.base_channels": 32},
    "kosmos-2": {"text_config.embed_dim": WIDTH},
    "kosmos-2.5": {"text_config.embed_dim": WIDTH},
    "lfm2_vl": {"text_config.layer_types": ["conv", "full_attention"] * 2},
    "minimax_m3_vl": {"text_config.layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 1]},
    "muse_glimmer": _MUSE,
    "muse_spark": _MUSE | {"audio_config.hidden_sizes": [16, 32, 48, WIDTH]},
    "perception_lm": {
        "vision_config.architecture": "vit_pe_core_tiny_patch16_384",
        "vision_config.model_args": {
            "embed_dim": WIDTH,
            "depth": 2,
            "num_heads": HEADS,
            "img_size": [IMAGE_SIZE] * 2,
            "patch_size": PATCH,
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
            "ref_feat_shape": [IMAGE_SIZE // PATCH] * 2,
        },
    },
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_vl": {"vision_config.embed_dim": WIDTH},
    "qwen3_omni_moe_thinker": _OMNI,
    "qwen4_exp": {
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 4,
        "text_config.indexer_head_dim": WIDTH // HEADS,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_n_heads": 2,
    },
    "step3p7": {"text_config.layer_types": _HYBRID, "text_config.sliding_window": 1024},
    "vipllava": {"vision_feature_layers": [-2, -1]},
}


def config(model_type: str) -> Any:
    """The tiny config of a model type, made from its default one."""
    return shrink(transformers.CONFIG_MAPPING[model_type]())


def shrink(config: Any) -> Any:
    """A tiny config of the same class.

    Args:
        config: a config, as its class makes it by default.
    """
    ids: dict[int, int] = {}
    small = _shrunk(config.to_dict(), ids)
    for path, value in SPECIAL.get(config.model_type, {}).items():
        *parents, name = path.split(".")
        at = small
        for parent in parents:
            at = at[parent]
        at[name] = value
    if _has_mrope(config) and "mrope_section" not in str(SPECIAL.get(config.model_type)):
        text = small["text_config"]
        rope = text["rope_parameters"]
        half = int((text.get("head_dim") or WIDTH // HEADS) * rope.get("partial_rotary_factor", 1.0)) // 2
        if "rope_type" in rope:
            rope["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4] if half > 2 else [1, 1, 0]
    return type(config).from_dict(small)


def _has_mrope(config: Any) -> bool:
    """Whether the model numbers positions along several axes; configs of real checkpoints then name their shares."""
    text = getattr(config, "text_config", None) or config
    name = type(text).__module__.replace(".configuration_", ".modeling_")
    if importlib.util.find_spec(name) is None:  # an alias of another family
        return False
    return "mrope_section" in inspect.getsource(importlib.import_module(name)) and "text_config" in config.to_dict()


def _shrunk(config: Mapping[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    depth = next((config[name] for name in _DEPTHS if isinstance(config.get(name), int)), 0)
    chosen = _layers(config, depth) if depth > DEPTH else None
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("id2label", "label2id", "label_names"):
            continue
        if name == "rope_parameters" and value is not None:
            out[name] = copy.deepcopy(value)
        elif name == "per_layer_config":
            old = {int(layer): _shrunk(changes, ids) for layer, changes in (value or {}).items()}
            out[name] = {str(i): old[layer] for i, layer in enumerate(chosen or range(depth)) if layer in old}
        elif isinstance(value, Mapping):
            out[name] = _shrunk(value, ids) if name.endswith(("config", "encoder", "decoder")) else dict(value)
        elif name == "image_grid_pinpoints":
            out[name] = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE] * 2]
        elif _is_id(name):
            out[name] = _small_id(value, ids)
        elif chosen is not None and isinstance(value, list) and len(value) == depth:
            out[name] = [_small_size(name, value[i]) for i in chosen]
        elif name in SIZES:
            out[name] = [_small_size(name, v) for v in value] if isinstance(value, list) else _small_size(name, value)
        elif chosen is not None and _holds_indices(name) and isinstance(value, list) and value:
            out[name] = _small_indices(value, depth, chosen)
        else:
            out[name] = value
    if config.get("num_key_value_heads") == config.get("num_attention_heads") is not None:
        out["num_key_value_heads"] = out["num_attention_heads"]  # latent attention insists on it
    return out


def _is_id(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index", "_token_ids", "_id")) and not name.startswith("problem")


def _small_id(value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, list):
        return [_small_id(v, ids) for v in value]
    if type(value) is not int or value < TEXT_IDS[0]:
        return value
    return ids.setdefault(value, FIRST_ID + len(ids))


def _small_size(name: str, value: Any) -> Any:
    return SIZES[name] if type(value) is int and value > SIZES.get(name, value) else value


def _holds_indices(name: str) -> bool:
    return name.endswith(("indexes", "indices", "idxs", "_layers"))


def _layers(config: Mapping[str, Any], depth: int) -> list[int]:
    """Which layers stay: the first of every kind, then the first others; kinds are told by the per-layer lists."""
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == depth]
    kinds = [tuple(str(v[i]) for v in lists) for i in range(depth)]
    first = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))[:DEPTH]
    return sorted([*first, *[i for i in range(depth) if i not in first][: DEPTH - len(first)]])


def _small_indices(indices: list[int], depth: int, chosen: list[int]) -> list[int]:
    """Layer numbers of a shallow model from those of a deep one."""
    if max(indices) >= depth or min(indices) < -depth:
        return indices
    if len(indices) >= DEPTH:
        return [i for i, old in enumerate(chosen) if old in indices] or [DEPTH - 1]
    return list(range(DEPTH - len(indices), DEPTH)) if min(indices) >= 0 else indices
