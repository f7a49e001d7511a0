"""The embedded model: its sizes, its vocabulary, its processor, and how it is saved and loaded.

Everything is stock Hugging Face: `LlavaForConditionalGeneration` around `CLIPVisionModel`, the two-layer projector and
`LlamaForCausalLM`, with `LlavaProcessor`. A saved folder loads through the Auto classes like any other checkpoint.
"""

from __future__ import annotations

import visiontok._torchvision  # noqa: F401  # transformers imports torchvision

# isort: split
import os
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .scenes import BACKGROUNDS, COLOR_NAMES, GLYPHS, PLURALS, SHAPES, SIZE

PATCH = 12  # pixels
GRID = SIZE // PATCH
TOKENS = GRID * GRID  # visual tokens per picture
WIDTH = 128
HEADS = 4
VISION_LAYERS = 5
TEXT_LAYERS = 4
# The projector reads the last but one CLIP layer, as in LLaVA-1.5; the last layer serves the CLS token only.
FEATURE_LAYER = -2

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
_WORDS = tuple(
    "what color is the shape object objects there a an are how many in image picture which one left right of or to "  # noqa: SIM905
    "above below digit letter number next on where background pattern yes no it top bottom half any".split()
)
VOCABULARY = tuple(dict.fromkeys((*_SPECIAL, *_WORDS, *COLOR_NAMES, *SHAPES, *PLURALS, *GLYPHS, *BACKGROUNDS)))
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
<assistant>
{%- else -%}
<user>
{%- endif -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}
<image>
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] }}
{%- if not loop.last %} {% endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
</s>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<assistant>
{%- endif -%}
"""


def build_config() -> LlavaConfig:
    """The architecture: 144 visual tokens, five CLIP layers, four Llama layers, all 128 wide."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=5 * WIDTH // 2,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=TOKEN_ID["<s>"],
        eos_token_id=TOKEN_ID["</s>"],
        pad_token_id=TOKEN_ID["<pad>"],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_ID["<image>"],
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
    )


def build() -> LlavaForConditionalGeneration:
    """The model with Hugging Face's initial weights."""
    return LlavaForConditionalGeneration(build_config())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, punctuation ignored, British "colour" understood, `<unk>` for the rest."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\w\s]"), " "),
            normalizers.Replace("colour", "color"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", TOKEN_ID["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        model_max_length=1024,
        padding_side="left",
    )


def build_processor() -> LlavaProcessor:
    """The processor: any picture becomes 144 x 144 RGB, a chat becomes `<s><user><image>… question <assistant>`."""
    size = {"height": SIZE, "width": SIZE}
    image_processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which "default" drops again
        chat_template=_CHAT_TEMPLATE,
        image_token="<image>",
    )


def save(model: LlavaForConditionalGeneration, folder: str | os.PathLike[str]) -> None:
    """Write model and processor to a folder, the weights as bfloat16 safetensors; the model itself is not changed."""
    stored = LlavaForConditionalGeneration(model.config)
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
    build_processor().save_pretrained(folder)


def load(folder: str | os.PathLike[str]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
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
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval(), processor
