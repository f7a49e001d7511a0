"""ERNIE 4.5 VL: M-RoPE, and experts of their own for visual tokens, which its layers tell by an extra input."""

from __future__ import annotations

from .base import Adapter


class ErnieAdapter(Adapter):
    """ERNIE 4.5 VL MoE."""

    model_types = ("ernie4_5_vl_moe",)
    tower = "vision_tower"
    projector = "resampler_model"
    token_inputs = ("moe_mm_token_type_ids",)
