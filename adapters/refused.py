"""Families that are refused by name, and why: what a structural check could not say in a useful way."""

from __future__ import annotations

from typing import Any

_RESAMPLED = (
    "its Q-Former turns every picture into a fixed handful of query tokens, so there is next to nothing to drop, and "
    "its OPT or T5 language model has no decoder layers of the usual form"
)
_MARKED = (
    "its pictures are resampled to a fixed number of latents that stand at positions marked by an extra input, not at "
    "placeholder tokens"
)

REASONS: dict[str, str] = {
    "blip": "its text decoder reads pictures by cross-attention, so the prompt holds no visual tokens",
    "blip-2": _RESAMPLED,
    "instructblip": _RESAMPLED,
    "instructblipvideo": _RESAMPLED,
    "chameleon": "pictures become ids of its vocabulary, embedded by the same module that holds the decoder layers; "
    "there is no separate language model to put hooks around",
    "diffusion_gemma": "it refines blocks of text by diffusion instead of decoding token by token",
    "evolla": "it reads proteins, not pictures",
    "git": "it puts visual tokens in front of the text inside its decoder, without placeholders in the prompt",
    "granite4_vision": "its pictures are added in front of several decoder layers and are zero in the prompt, so there "
    "is nothing to select by before the first of them",
    "idefics": "its decoder reads pictures by gated cross-attention, so the prompt holds no visual tokens",
    "kosmos-2": _MARKED,
    "kosmos-2.5": _MARKED,
    "llama4": "its chunked attention counts chunk borders in positions of the whole prompt, which are lost when tokens "
    "are dropped",
    "mistral4": "it is a language model without a vision tower",
    "nemotron_h_omni": "its Mamba layers carry a recurrent state in which no token has a place of its own",
    "pi0": "it predicts robot actions and generates no text",
}


def reason(config: Any) -> str | None:
    """Why a model of this config cannot be pruned, as far as its kind alone tells; None if it does not."""
    model_type = getattr(config, "model_type", None)
    if model_type in REASONS:
        return REASONS[model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder: pictures go into its encoder, not into the prompt of its decoder"
    return None
