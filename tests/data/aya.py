"""An adapter of another package, with a tiny model to check it on."""

from __future__ import annotations

import torch
import transformers
from visiontok.adapters.base import Adapter, raster

from visiontok.conformance.zoo import IMAGE, SIGLIP, TEXT


class AyaAdapter(Adapter):
    """Aya Vision: SigLIP, pixel shuffle by 2 × 2."""

    model_types = ("aya_vision",)

    def grids(self, record):
        return [raster(1, 2, 2)] * len(record.output.pooler_output)

    def group(self, record, patches):
        x = torch.cat(list(patches))
        x = x.view(len(x), 2, 2, 2, 2, -1).transpose(2, 3)
        return list(x.flatten(3, 4).flatten(1, 2))


def tiny():
    """A random model and two left-padded prompts with two images each."""
    torch.manual_seed(0)
    config = transformers.AyaVisionConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=SIGLIP, image_token_id=IMAGE, downsample_factor=2
    )
    config.image_token_index = IMAGE
    ids = torch.tensor([[0, 1, 5, *[IMAGE] * 4, 7, *[IMAGE] * 4, 8, 9], [1, 5, 6, *[IMAGE] * 4, 7, 8, *[IMAGE] * 4, 9]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(4, 3, 32, 32)}
    return transformers.AutoModelForImageTextToText.from_config(config), inputs
