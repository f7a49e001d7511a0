"""Tiny random models of every supported architecture, and batches for them; nothing is downloaded."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers

T: Any = transformers  # its config classes take more keywords than their signatures name

IMAGE, VIDEO = 100, 101
BANNED = (IMAGE, VIDEO)
TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
CLIP = {"model_type": "clip_vision_model", **VIT, "projection_dim": 32}
SIGLIP = {"model_type": "siglip_vision_model", **VIT}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
IMAGE_IDS: dict[str, Any] = {"image_token_id": IMAGE, "image_token_index": IMAGE}
QWEN_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
}
QWEN3_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "intermediate_size": 48,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")
HYBRIDS = ("qwen3_5", "qwen3_5_moe")
"""Language models with layers of linear attention; only shorter inputs serve them."""
GRIDS = (*QWEN, *HYBRIDS)
ANYRES = ("llava_next", "llava_onevision")
TILED = ("idefics3", "smolvlm")
ARCHITECTURES = (
    "llava", "vipllava", *ANYRES, "internvl", *TILED, "mistral3", *QWEN, "gemma3", "paligemma",
)  # fmt: skip


def config(name: str) -> Any:
    """A tiny config."""
    llama = {"model_type": "llama", **TEXT}
    qwen2 = {"model_type": "qwen2", **TEXT}
    match name:
        case "llava":
            return T.LlavaConfig(text_config=llama, vision_config=CLIP, vision_feature_layer=-2, **IMAGE_IDS)
        case "vipllava":
            return T.VipLlavaConfig(text_config=llama, vision_config=CLIP, vision_feature_layers=[-2, -1], **IMAGE_IDS)
        case "llava_next":
            return T.LlavaNextConfig(text_config=llama, vision_config=CLIP, image_grid_pinpoints=PINPOINTS, **IMAGE_IDS)
        case "llava_onevision":
            return T.LlavaOnevisionConfig(
                text_config=qwen2,
                vision_config=SIGLIP,
                video_token_id=VIDEO,
                video_token_index=VIDEO,
                image_grid_pinpoints=PINPOINTS,
                **IMAGE_IDS,
            )
        case "internvl":
            vision = {**VIT, "num_hidden_layers": 2, "image_size": [32, 32], "patch_size": [4, 4]}
            return T.InternVLConfig(text_config=qwen2, vision_config=vision, image_token_id=IMAGE)
        case "idefics3" | "smolvlm":
            vision = {**VIT, "num_hidden_layers": 2, "patch_size": 4}
            cls = T.Idefics3Config if name == "idefics3" else T.SmolVLMConfig
            return cls(text_config=llama, vision_config=vision, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
        case "mistral3":
            vision = {"model_type": "pixtral", **VIT, "num_hidden_layers": 2, "patch_size": 4}
            return T.Mistral3Config(
                text_config={"model_type": "mistral", **TEXT}, vision_config=vision, spatial_merge_size=2, **IMAGE_IDS
            )
        case "qwen2_vl":
            return T.Qwen2VLConfig(
                text_config={**TEXT, "rope_scaling": None, "rope_parameters": dict(MROPE)},
                vision_config={
                    "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2,
                },
                **QWEN_IDS,
            )  # fmt: skip
        case "qwen2_5_vl":
            return T.Qwen2_5_VLConfig(
                text_config={**TEXT, "rope_parameters": dict(MROPE)},
                vision_config={
                    "depth": 3, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "patch_size": 4,
                    "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [2],
                },
                **QWEN_IDS,
            )  # fmt: skip
        case "qwen3_vl":
            text = {**TEXT, "head_dim": 8, "rope_parameters": dict(MROPE)}
            return T.Qwen3VLConfig(text_config=text, vision_config=QWEN3_VISION, **QWEN_IDS)
        case "qwen3_vl_moe":
            text = {**TEXT, "head_dim": 8, "rope_parameters": dict(MROPE)}
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            return T.Qwen3VLMoeConfig(text_config=text | experts, vision_config=QWEN3_VISION, **QWEN_IDS)
        case "qwen3_5" | "qwen3_5_moe":
            text = {
                **TEXT, "head_dim": 8, "rope_parameters": dict(MROPE, partial_rotary_factor=1.0),
                "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
                "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            }  # fmt: skip
            vision = {k: v for k, v in QWEN3_VISION.items() if k != "deepstack_visual_indexes"}
            if name == "qwen3_5":
                return T.Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_IDS)
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            experts["shared_expert_intermediate_size"] = 16
            return T.Qwen3_5MoeConfig(text_config=text | experts, vision_config=vision, **QWEN_IDS)
        case "glm4v":
            return T.Glm4vConfig(
                text_config={**TEXT, "rope_parameters": dict(MROPE, partial_rotary_factor=1.0)},
                vision_config={
                    "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "patch_size": 4,
                    "image_size": 32, "intermediate_size": 48,
                },
                image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=104, image_end_token_id=105,
                video_start_token_id=106, video_end_token_id=107,
            )  # fmt: skip
        case "gemma3":
            text = {
                **TEXT, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 256,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            }  # fmt: skip
            return T.Gemma3Config(
                text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, boi_token_index=104,
                eoi_token_index=105, **IMAGE_IDS,
            )  # fmt: skip
        case "paligemma":
            text = {**TEXT, "model_type": "gemma", "head_dim": 8}
            return T.PaliGemmaConfig(
                text_config=text, vision_config={**SIGLIP, "projection_dim": 32}, projection_dim=32, **IMAGE_IDS
            )
    raise KeyError(name)


@functools.cache
def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """A random model in eval mode; weights are large enough that greedy paths differ."""
    torch.manual_seed(0)
    model = T.AutoModelForImageTextToText.from_config(config(name), attn_implementation=attention)
    if "moe" in name:
        model.set_experts_implementation("eager")
    return prepare(model, dtype)


def prepare(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Evaluation mode, weights large enough that greedy paths differ, no end of sequence."""
    model = model.eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
            if not parameter.any() and parameter.ndim == 2:  # Gemma 3's projection starts at zero
                parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _image(
    name: str, model: Any, k: int, dtype: torch.dtype, *, margins: bool = False
) -> tuple[int, dict[str, torch.Tensor]]:
    """Visual tokens and inputs of image number ``k``; sizes differ where the architecture allows."""
    g = torch.Generator().manual_seed(100 + k)
    if name in GRIDS:
        h, w = [(8, 8), (4, 12), (8, 4)][k % 3]
        patches = torch.randn(h * w, 96, generator=g).to(dtype)
        patches[: 2 * w * margins] = 0.0
        return h * w // 4, {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, h, w]])}
    if name in ANYRES:
        size = torch.tensor([[(64, 64), (40, 64)][k % 2]]).view(1, 2)
        crops = torch.randn(1, 5, 3, 32, 32, generator=g).to(dtype)
        with torch.no_grad():
            items = model.get_image_features(crops, image_sizes=size, return_dict=True).pooler_output
        return sum(len(item) for item in items), {"pixel_values": crops, "image_sizes": size}
    if name in TILED:
        return 16, {"pixel_values": torch.randn(1, 1, 3, 32, 32, generator=g).to(dtype)}
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32, generator=g).to(dtype)}
    pixels["pixel_values"][..., : 8 * margins, :] = 0.0
    if name == "mistral3":
        pixels["image_sizes"] = torch.tensor([[32, 32]])
    return 4 if name == "gemma3" else 16, pixels


def batch(
    name: str,
    model: Any,
    *,
    rows: int = 2,
    pad: int = 3,
    images: int | list[int] = 2,
    text: int = 5,
    seed: int = 0,
    only: int | None = None,
    margins: bool = False,
) -> dict[str, Any]:
    """A left-padded batch of prompts with images between text; rows differ in length.

    Args:
        name: architecture.
        model: its model; features are probed where token counts depend on them.
        rows: prompts.
        pad: padding beyond the longest row.
        images: images per row, one number for all or one per row.
        text: text tokens behind the last image of row 0; row b has 2b more.
        seed: of the text.
        only: one of the rows, which is then alone; all by default.
        margins: the first row of units of each picture is of one colour, where a tower can be spared them.
    """
    g = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    per_row = [images] * rows if isinstance(images, int) else images
    start, end = (
        ([102], [103]) if name in GRIDS and name != "glm4v" else ([104], [105]) if name == "glm4v" else ([], [])
    )
    prompts: list[list[int]] = []
    pictures: list[list[dict[str, torch.Tensor]]] = []
    for b, number in enumerate(per_row):
        prompt: list[int] = [1]
        mine: list[dict[str, torch.Tensor]] = []
        for _ in range(number):
            n, inputs = _image(name, model, sum(map(len, pictures)) + len(mine), dtype, margins=margins)
            prompt += torch.randint(5, 90, (3,), generator=g).tolist() + start + [IMAGE] * n + end
            mine.append(inputs)
        prompts.append(prompt + torch.randint(5, 90, (text + 2 * b,), generator=g).tolist())
        pictures.append(mine)
    if only is not None:
        prompts, pictures = [prompts[only]], [pictures[only]]
    rows, per_row = len(prompts), [len(mine) for mine in pictures]
    parts = [part for mine in pictures for part in mine]
    length = max(map(len, prompts)) + pad
    ids = torch.zeros(rows, length, dtype=torch.long)
    mask = torch.zeros(rows, length, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, length - len(prompt) :] = torch.tensor(prompt)
        mask[b, length - len(prompt) :] = 1
    out: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    for key in parts[0] if parts else ():
        out[key] = torch.cat([p[key] for p in parts])
    if name in TILED and parts:
        pixels, at = out["pixel_values"].new_zeros(rows, max(per_row), 3, 32, 32), 0
        for b, number in enumerate(per_row):
            pixels[b, :number] = out["pixel_values"][at : at + number, 0]
            at += number
        out["pixel_values"] = pixels
    if name in GRIDS:
        out["mm_token_type_ids"] = (ids == IMAGE).int()
    if name == "gemma3":
        out["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma":
        out["token_type_ids"] = torch.zeros_like(ids)
    return out


def visual(inputs: dict[str, Any]) -> torch.Tensor:
    """(B, N) bool: visual positions."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
