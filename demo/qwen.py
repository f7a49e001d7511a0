"""The embedded model in the Qwen3-VL architecture: any picture size, 2 x 2 merger, DeepStack, multimodal positions."""

from __future__ import annotations

import visiontok._torchvision  # noqa: F401  # transformers imports torchvision

# isort: split
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from .model import (
    MEAN,
    STD,
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
from .scenes import SIDE

_HEADS = 4
_PATCH = 8
_MERGE = 2
_FRAMES = 2  # a picture is given to the tower twice, as two frames
_VISION_WIDTH = 96
_VISION_LAYERS = 3
_TEXT_LAYERS = 4


class Qwen(Architecture):
    """1.5 million parameters: three tower layers, 96 wide, four decoder layers, 128 wide; 16-pixel visual tokens."""

    name = "qwen3_vl"
    specials = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    width = 128
    cell = _PATCH * _MERGE

    def build(self) -> Qwen3VLForConditionalGeneration:
        ids = self.token_id
        vision = {
            "depth": _VISION_LAYERS,
            "hidden_size": _VISION_WIDTH,
            "intermediate_size": 2 * _VISION_WIDTH,
            "num_heads": _HEADS,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": _FRAMES,
            "out_hidden_size": self.width,
            "num_position_embeddings": (SIDE // _PATCH) ** 2,
            "deepstack_visual_indexes": [1],
        }
        text = {
            "vocab_size": len(ids),
            "hidden_size": self.width,
            "intermediate_size": 5 * self.width // 2,
            "num_hidden_layers": _TEXT_LAYERS,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _HEADS,
            "head_dim": self.width // _HEADS,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": ids["<s>"],
            "eos_token_id": ids["</s>"],
            "pad_token_id": ids["<pad>"],
        }
        config = Qwen3VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=ids["<image>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=True,
        )
        return Qwen3VLForConditionalGeneration(config)

    def processor(self) -> Qwen3VLProcessor:
        sizes: dict[str, Any] = {
            "patch_size": _PATCH,
            "temporal_patch_size": _FRAMES,
            "merge_size": _MERGE,
            "size": {"shortest_edge": (SIDE // 3) ** 2, "longest_edge": (2 * SIDE) ** 2},
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
        tokenizer = build_tokenizer(
            self.token_id,
            image_token="<image>",
            video_token="<|video_pad|>",
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
        )
        template = chat_template("<|vision_start|><image><|vision_end|>")
        videos = Qwen3VLVideoProcessor(**sizes)
        return Qwen3VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, videos, chat_template=template)

    @torch.no_grad()
    def initialise(self, model: Any, pixels: Tensor) -> None:
        """As for LLaVA: whitened patches, sines as positions, queries that resemble keys."""
        initialise_text(model)
        tower = model.model.visual
        for merger in (tower.merger, *tower.deepstack_merger_list):
            merger.linear_fc2.weight.mul_(0.35)
        frames = whitening(pixels, _PATCH, _VISION_WIDTH).view(_VISION_WIDTH, 3, 1, _PATCH, _PATCH) / _FRAMES
        tower.patch_embed.proj.weight.copy_(frames.expand_as(tower.patch_embed.proj.weight))
        tower.patch_embed.proj.bias.zero_()
        tower.pos_embed.weight.copy_(0.6 * waves(torch.arange(SIDE // _PATCH) / 1.5, _VISION_WIDTH))
        for block in tower.blocks:
            query, key, _ = block.attn.qkv.weight.chunk(3)
            initialise_block(query, key, block.attn.proj.weight, block.mlp.linear_fc2.weight)

    def see(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        batch, grid = len(pixels), SIDE // _PATCH
        blocks = normalise(pixels).view(batch, 3, grid // _MERGE, _MERGE, _PATCH, grid // _MERGE, _MERGE, _PATCH)
        # The processor's order: picture, row and column of the visual token, row and column in it, colour, frame.
        patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].expand(*([-1] * 6), _FRAMES, -1, -1)
        sizes = torch.tensor([[1, grid, grid]], device=pixels.device).expand(batch, -1)
        seen = model.model.visual(patches.reshape(batch * grid * grid, -1), grid_thw=sizes)
        planes = [seen.pooler_output, *seen.deepstack_features]
        features = torch.cat(planes, -1).view(batch, -1, len(planes) * self.width)
        return features, features[..., : self.width].mean(1)

    def prefix(self, model: Any, features: Tensor) -> Prefix:
        batch, pictures, tokens, numbers = features.shape
        embed, device = model.model.language_model.embed_tokens, features.device
        start, end = self.specials[:2]
        grid = SIDE // self.cell
        embeddings, positions, visual = [], [], []
        begin = 0  # where the next part begins
        for picture in range(max(1, pictures)):
            names = (["and"] if picture else ["<s>", "<user>"]) + [start] * (pictures > 0)
            if picture:
                names.insert(0, end)
            ids = torch.tensor([self.token_id[name] for name in names], device=device)
            embeddings.append(embed(ids).expand(batch, -1, -1))
            positions.append((begin + torch.arange(len(ids), device=device)).expand(3, -1))
            visual.append(torch.zeros(len(ids), dtype=torch.bool, device=device))
            begin += len(ids)
            if pictures:
                place = torch.arange(tokens, device=device)
                embeddings.append(features[:, picture, :, : self.width])
                positions.append(begin + torch.stack([torch.zeros_like(place), place // grid, place % grid]))
                visual.append(torch.ones_like(place, dtype=torch.bool))
                begin += grid
        if pictures:
            embeddings.append(embed(torch.tensor([self.token_id[end]], device=device)).expand(batch, -1, -1))
            positions.append(torch.full((3, 1), begin, device=device))
            visual.append(torch.zeros(1, dtype=torch.bool, device=device))
            begin += 1
        planes = features[..., self.width :].reshape(-1, numbers - self.width).split(self.width, -1)
        return Prefix(
            torch.cat(embeddings, 1),
            torch.cat(positions, 1)[:, None].expand(-1, batch, -1),
            torch.full((batch,), begin, device=device),
            visual=torch.cat(visual).expand(batch, -1) if pictures else None,
            planes=planes if pictures else (),
        )
