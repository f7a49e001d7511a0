"""LLaVA-1.5 and ViP-LLaVA: one crop per image, CLIP tower with a CLS token; Pixtral as LLaVA, in native resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from visiontok.errors import UnsupportedError

from .base import Adapter, Record, raster, unpadded
from .encoder import Encoder
from .transformers_encoder import tower_encoder


class LlavaAdapter(Adapter):
    """LLaVA-1.5, ViP-LLaVA."""

    model_types = ("llava", "vipllava")
    inseparable = ""

    @property
    def cls_token(self) -> bool:  # type: ignore[override]
        """CLIP towers begin with a CLS token, SigLIP towers (some LLaVA derivatives) have none."""
        return self.base.config.vision_config.model_type.startswith("clip")

    @property
    def fixed_pictures(self) -> str:  # type: ignore[override]
        """CLIP and SigLIP towers interpolate their table of positions; every token must be a patch."""
        tower = self.base.config.vision_config.model_type
        if not tower.startswith(("clip", "siglip")):
            return f"its {tower} tower is not known to interpolate positions"
        strategy = getattr(self.base.config, "vision_feature_select_strategy", "default")
        if (strategy == "default") != self.cls_token:
            return (
                f"vision_feature_select_strategy={strategy!r} makes its {tower} tower's tokens other than its patches"
            )
        return ""

    def alone(self, record: Record) -> list[dict[str, Any]]:
        return [unpadded(one) for one in super().alone(record)]

    @property
    def fixed_units(self) -> str:  # type: ignore[override]
        """As for smaller pictures; Pixtral packs them in a way of its own."""
        return self.fixed_pictures

    @property
    def fixed_layers(self) -> str:  # type: ignore[override]
        """As for smaller pictures."""
        return self.fixed_pictures

    @property
    def no_rebuild(self) -> str:  # type: ignore[override]
        """One layer alone must be read, and not the last, behind which a norm may stand."""
        layer = getattr(self.base.config, "vision_feature_layer", None)
        single = isinstance(layer, int) and layer not in (-1, self.base.config.vision_config.num_hidden_layers)
        return "" if single else Adapter.no_rebuild

    @property
    def unmergeable(self) -> str:  # type: ignore[override]
        """Features come from one layer of a CLIP or SigLIP tower; nothing else has as many tokens."""
        config = self.base.config
        name = "vision_feature_layer" if hasattr(config, "vision_feature_layer") else "vision_feature_layers"
        if not isinstance(layers := getattr(config, name, -1), int):
            return f"its features come from several layers, {name}={list(layers)}, each with tokens of its own"
        return self.fixed_pictures.replace("interpolate positions", "merge")

    def encoder(self) -> Encoder:
        found = None if self.unmergeable else tower_encoder(self.base.vision_tower)
        return super().encoder() if found is None else found

    def _sizes(self, record: Record) -> list[tuple[int, int]]:
        """Rows and columns of patches per image."""
        patch, sizes = self.base.config.vision_config.patch_size, record.inputs.get("image_sizes")
        if sizes is None:
            sizes = [record.inputs["pixel_values"].shape[-2:]] * len(record.output.pooler_output)
        return [(int(h) // patch, int(w) // patch) for h, w in sizes]

    def grids(self, record: Record) -> list[torch.Tensor]:
        grids = []
        for item, (h, w) in zip(record.output.pooler_output, self._sizes(record), strict=True):
            grid = raster(1, h, w)
            if self.cls_token and len(item) == len(grid) + 1:  # vision_feature_select_strategy="full"
                grid = torch.cat([torch.full((1, 3), -1), grid])
            grids.append(grid if len(grid) == len(item) else torch.full((len(item), 3), -1))
        return grids

    def group(self, record: Record, patches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        x = torch.cat([p.flatten(0, 1) for p in patches])[:, None]
        tokens = [len(item) for item in record.output.pooler_output]
        if len(x) == sum(tokens):  # also the projector's input, CLS included
            return list(x.split(tokens))
        sizes = [h * w for h, w in self._sizes(record)]
        if not self.cls_token or len(x) != sum(sizes) or tokens != [n + 1 for n in sizes]:
            raise UnsupportedError(
                f"{self.base.config.model_type}: {len(x)} patches became {sum(tokens)} tokens, which "
                f"vision_feature_select_strategy={self.base.config.vision_feature_select_strategy!r} does not explain; "
                "use a method that reads features only"
            )
        return [torch.cat([part.new_full((1, *part.shape[1:]), torch.nan), part]) for part in x.split(sizes)]
