"""A CLIP model as judge of which patches a text is about, through open_clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torchvision  # noqa: F401  # open_clip imports torchvision
from .errors import ConfigError, UnsupportedError


class OpenClip:
    """Both halves of an open_clip model.

    Args:
        model: of the architecture whose vision half the language model's tower is, on the device of its features.
        encode: text → CLIP token ids, without begin and end.
        decode: ids of the language model's tokenizer → text.
    """

    def __init__(
        self, model: Any, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self.model, self.encode, self.decode = model.eval(), encode, decode

    @classmethod
    def load(cls, name: str, tokenizer: str) -> OpenClip:
        """An open_clip model by name, ``architecture/weights``; downloads what is not there.

        Raises:
            ConfigError: if open_clip is not installed.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError(f"clip={name!r}: needs open_clip; pip install open_clip_torch") from error
        from transformers import AutoTokenizer

        architecture, _, weights = name.partition("/")
        words = AutoTokenizer.from_pretrained(tokenizer)
        model = open_clip.create_model(architecture, pretrained=weights)

        def decode(ids: Sequence[int]) -> str:
            return str(words.decode(list(ids), skip_special_tokens=True))

        return cls(model, open_clip.get_tokenizer(architecture).encode, decode)

    @torch.no_grad()
    def images(self, features: Tensor) -> Tensor:
        """(…, E) tower features, before the tower's last norm → (…, C) float32.

        Raises:
            UnsupportedError: if the tower is not of this architecture.
        """
        visual = self.model.visual
        if features.shape[-1] != visual.proj.shape[0]:
            raise UnsupportedError(
                f"clip: its patches have {visual.proj.shape[0]} channels, the vision tower's {features.shape[-1]}; "
                "name the CLIP model that the tower comes from, or leave clip out"
            )
        visual.to(features.device)
        weight = visual.proj.float()
        norm = visual.ln_post
        with torch.autocast(features.device.type, enabled=False):  # cosines of 16-bit products are full of ties
            rows = torch.nn.functional.layer_norm(
                features.float(), weight.shape[:1], norm.weight.float(), norm.bias.float()
            )
            return rows @ weight

    @torch.no_grad()
    def texts(self, ids: Sequence[int]) -> Tensor:
        """Token ids of the language model → (M, C) float32, M pieces of a context length each."""
        length, vocabulary = self.model.context_length, self.model.vocab_size
        tokens = [vocabulary - 2, *self.encode(self.decode(ids)), vocabulary - 1]  # begin and end come last
        pieces = [tokens[i : i + length] for i in range(0, len(tokens), length)]
        table = torch.tensor([piece + [0] * (length - len(piece)) for piece in pieces])
        device = self.model.token_embedding.weight.device
        with torch.autocast(device.type, enabled=False):
            return self.model.encode_text(table.to(device)).float()
