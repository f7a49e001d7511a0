"""What the embedded models have in common: their tokenizer, and how they are saved and loaded.

Every model is a stock Hugging Face architecture in a small size. A saved folder loads through the Auto classes like any
other checkpoint.
"""

from __future__ import annotations

import visiontok._torchvision  # noqa: F401  # transformers imports torchvision

# isort: split
import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from visiontok.adapters.base import CLIP_STATISTICS

from .questions import TOKEN_ID

MEAN, STD = CLIP_STATISTICS  # which all image processors here use


@dataclass(frozen=True)
class Prefix:
    """What stands before the questions about B prompts.

    Attributes:
        embeddings: (B, P, D).
        positions: int64 (rows, B, P), as the language model counts: one row, or three for multimodal rotary positions.
        next: int64 (B,), the position of the first word after it.
        bias: float (B, P), what is added to the attention that a token gets, -inf where a shorter prompt is filled
            up; None for nothing.
        visual: of DeepStack models, bool (B, P), the visual tokens among them.
        planes: of DeepStack models, what is added to the visual tokens after the first layers, each (V, D) for the V
            visual tokens of all prompts.
    """

    embeddings: torch.Tensor
    positions: torch.Tensor
    next: torch.Tensor
    bias: torch.Tensor | None = None
    visual: torch.Tensor | None = None
    planes: tuple[torch.Tensor, ...] = ()


class Architecture(ABC):
    """One of the architectures that an embedded model can have.

    Attributes:
        name: of the architecture.
        specials: what its vocabulary has beyond the words of the questions.
        width: of the language model.
        cell: pixels of a picture that become one visual token, per side.
    """

    name: str
    specials: tuple[str, ...] = ()
    width: int
    cell: int

    @abstractmethod
    def build(self) -> PreTrainedModel:
        """The model with Hugging Face's initial weights."""

    @abstractmethod
    def processor(self) -> ProcessorMixin:
        """The processor of pictures and chats."""

    @abstractmethod
    def initialise(self, model: Any, pixels: torch.Tensor) -> None:
        """Give the model initial weights for a short training.

        Args:
            model: what `build` made.
            pixels: uint8 (B, SIDE, SIDE, 3), pictures to take statistics from.
        """

    @abstractmethod
    def see(self, model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The eyes of the model, from which gradients flow.

        Args:
            model: the model.
            pixels: uint8 (B, SIDE, SIDE, 3).

        Returns:
            Visual tokens (B, N, F), row by row, of which the first D numbers enter the language model, and a summary
            of each picture (B, any width).
        """

    @abstractmethod
    def prefix(self, model: Any, features: torch.Tensor) -> Prefix:
        """The prompts up to their first question.

        Args:
            model: the model.
            features: (B, M, N, F), the visual tokens of M pictures each; M = 0 asks without a picture.
        """

    @property
    def token_id(self) -> dict[str, int]:
        """Every token's id: the words of the questions, then the architecture's own."""
        return TOKEN_ID | {token: len(TOKEN_ID) + index for index, token in enumerate(self.specials)}


def waves(places: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of places on a square grid, row by row: (len(places)^2, width)."""
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    shortest = math.log(0.6 / places[1].item())
    frequency = math.pi * torch.exp(torch.linspace(shortest, math.log(1 / places.max().item() / 1.6), width // 4))
    return torch.cat(
        [wave(axis.flatten()[:, None] * frequency) for axis in (rows, columns) for wave in (torch.sin, torch.cos)], 1
    )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """What the image processors make of pictures that have the right size: uint8 (B, H, W, 3) to float (B, 3, H, W)."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def chat_template(picture: str) -> str:
    """A chat template that writes `picture` for every picture and "and" between two.

    A chat becomes `<s><user>` picture question `<assistant>` answer `</s><user>` question `<assistant>` …
    """
    return (
        "{%- for message in messages -%}"
        "{{ '<assistant> ' if message['role'] == 'assistant' else '<user> ' }}"
        "{%- if message['content'] is string -%}"
        "{{ message['content'] }}"
        "{%- else -%}"
        "{%- for part in message['content'] if part['type'] == 'image' -%}"
        "{{ '" + picture + "' if loop.last else '" + picture + " and ' }}"
        "{%- endfor -%}"
        "{%- for part in message['content'] if part['type'] == 'text' -%}"
        "{{ ' ' + part['text'] }}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
        "{%- endfor -%}"
        "{{ '<assistant>' if add_generation_prompt else '' }}"
    )


def build_tokenizer(token_id: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, punctuation ignored, British "colour" understood, `<unk>` for the rest.

    Args:
        token_id: the vocabulary.
        named: special tokens that the processor looks up by name.
    """
    tokenizer = Tokenizer(models.WordLevel(token_id, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\w\s]"), " "),
            normalizers.Replace(Regex(r"\ban\b"), "a"),
            normalizers.Replace("colour", "color"),
            normalizers.Replace("centre", "center"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", token_id["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"user_token": "<user>", "assistant_token": "<assistant>", **named},
        model_max_length=2048,
        padding_side="left",
    )


def initialise_text(model: Any) -> None:
    """Initial weights of the language model and of every other matrix that is not an embedding.

    Queries that resemble keys let a word find the patches that hold its own vector, from the first step on.
    """
    text = model.model.language_model
    depth = len(text.layers)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            nn.init.trunc_normal_(weight, std=0.9 * (2 / sum(weight.shape)) ** 0.5)
    nn.init.normal_(text.embed_tokens.weight, std=text.config.hidden_size**-0.5)
    with torch.no_grad():
        for layer in text.layers:
            resemble(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
            layer.self_attn.o_proj.weight.mul_(1.4 * (2 * depth) ** -0.5)
            layer.mlp.down_proj.weight.mul_(1.4 * (2 * depth) ** -0.5)


@torch.no_grad()
def resemble(query: torch.Tensor, key: torch.Tensor) -> None:
    """Make the weights of queries and keys alike."""
    key.copy_(1.125 * query + 0.99 * key)
    query.mul_(1.5)


@torch.no_grad()
def initialise_block(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor, down: torch.Tensor) -> None:
    """Initial weights of a tower block: queries resemble keys, and what it adds to its input is small.

    Args:
        query, key: (D, D).
        out: (D, D), the attention's last projection.
        down: (D, F), the MLP's last one.
    """
    resemble(query, key)
    turn = torch.linalg.qr(torch.randn(len(out), len(out)))[0]
    out.copy_(0.35 * out + 0.105 * turn)
    down.mul_(0.6)


@torch.no_grad()
def whitening(pixels: torch.Tensor, patch: int, width: int) -> torch.Tensor:
    """A patch embedding (width, 3 * patch * patch) that whitens pictures: their leading principal directions, mixed."""
    patches = nn.functional.unfold(normalise(pixels), patch, stride=patch).transpose(1, 2).flatten(0, 1)
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    whitened = (vectors / (values + 1.5 * values[-1]).sqrt()).T
    return 0.9 * torch.linalg.qr(torch.randn(width, width))[0] @ whitened


def save(architecture: Architecture, model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write model and processor to a folder, the weights as bfloat16 safetensors; the model itself is not changed."""
    stored = type(model)(model.config)
    stored.load_state_dict(model.state_dict())
    stored.bfloat16()
    stored.generation_config = GenerationConfig(
        bos_token_id=TOKEN_ID["<s>"],
        eos_token_id=TOKEN_ID["</s>"],
        pad_token_id=TOKEN_ID["<pad>"],
        max_new_tokens=4,
        do_sample=False,
    )
    stored.save_pretrained(folder)
    architecture.processor().save_pretrained(folder)


def load(folder: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Read what `save` wrote, without touching the network.

    Args:
        folder: where the weights are.

    Returns:
        The model in evaluation mode and float32, and its processor.

    Raises:
        FileNotFoundError: there are no weights in `folder`.
    """
    if not (Path(folder) / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"folder {str(folder)!r} holds no model.safetensors; write one with `python -m visiontok.demo.train`"
        )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
