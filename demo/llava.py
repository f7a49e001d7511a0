"""The embedded model in the LLaVA architecture: CLIP tower with CLS, two-layer projector, Llama; 144 visual tokens."""

from __future__ import annotations

import visiontok._torchvision  # noqa: F401  # transformers imports torchvision

# isort: split
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from .model import (
    Architecture,
    Prefix,
    build_tokenizer,
    chat_template,
    initialise_block,
    initialise_text,
    normalise,
    waves,
    whitening,
)
from .questions import TOKEN_ID
from .scenes import SIDE

_HEADS = 4
_VISION_LAYERS = 5
_TEXT_LAYERS = 4
# The projector reads the last but one CLIP layer, as in LLaVA-1.5; the last layer serves the CLS token only.
_FEATURE_LAYER = -2


class Llava(Architecture):
    """1.7 million parameters: five CLIP layers and four Llama layers, all 128 wide."""

    name = "llava"
    width = 128
    cell = 12

    def build(self) -> LlavaForConditionalGeneration:
        vision = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=_VISION_LAYERS,
            num_attention_heads=_HEADS,
            image_size=SIDE,
            patch_size=self.cell,
            projection_dim=self.width,
        )
        text = LlamaConfig(
            vocab_size=len(TOKEN_ID),
            hidden_size=self.width,
            intermediate_size=5 * self.width // 2,
            num_hidden_layers=_TEXT_LAYERS,
            num_attention_heads=_HEADS,
            num_key_value_heads=_HEADS,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=TOKEN_ID["<s>"],
            eos_token_id=TOKEN_ID["</s>"],
            pad_token_id=TOKEN_ID["<pad>"],
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=TOKEN_ID["<image>"],
            image_seq_length=(SIDE // self.cell) ** 2,
            tie_word_embeddings=True,
            vision_feature_layer=_FEATURE_LAYER,
            vision_feature_select_strategy="default",
        )
        return LlavaForConditionalGeneration(config)

    def processor(self) -> LlavaProcessor:
        size = {"height": SIDE, "width": SIDE}
        return LlavaProcessor(
            CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
            build_tokenizer(self.token_id, image_token="<image>"),
            patch_size=self.cell,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # the CLS token, which "default" drops again
            chat_template=chat_template("<image>"),
            image_token="<image>",
        )

    @torch.no_grad()
    def initialise(self, model: Any, pixels: Tensor) -> None:
        """Whitened patches, two-dimensional sines as positions, queries that resemble keys.

        CLIP's own initial weights are made for towers a thousand times larger; each of these is worth minutes.
        """
        initialise_text(model)
        model.model.multi_modal_projector.linear_2.weight.mul_(0.35)
        tower = model.model.vision_tower
        embeddings = tower.embeddings
        patches = embeddings.patch_embedding.weight
        patches.copy_(whitening(pixels, self.cell, self.width).view_as(patches))
        places = waves(torch.arange(SIDE // self.cell).float(), self.width)
        embeddings.position_embedding.weight.copy_(F.pad(0.6 * places, (0, 0, 1, 0)))
        nn.init.normal_(embeddings.class_embedding, std=0.5)
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            initialise_block(
                attention.q_proj.weight, attention.k_proj.weight, attention.out_proj.weight, layer.mlp.fc2.weight
            )

    def see(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vision = model.model.vision_tower(normalise(pixels), output_hidden_states=True)
        features = model.model.multi_modal_projector(vision.hidden_states[_FEATURE_LAYER][:, 1:])
        return features, vision.pooler_output

    def prefix(self, model: Any, features: Tensor) -> Prefix:
        batch, pictures = features.shape[:2]
        embed = model.model.language_model.embed_tokens

        def words(*names: str) -> Tensor:
            ids = torch.tensor([TOKEN_ID[name] for name in names], device=features.device)
            between: Tensor = embed(ids).expand(batch, -1, -1)
            return between

        parts = [words("<s>", "<user>")]
        for picture in range(pictures):
            parts += [words("and")] if picture else []
            parts.append(features[:, picture])
        embeddings = torch.cat(parts, 1)
        length = embeddings.shape[1]
        positions = torch.arange(length, device=features.device).expand(1, batch, length)
        return Prefix(embeddings, positions, positions[0, :, -1] + 1)
