"""Compress LLaVA-NeXT on one GPU: one call around a stock `generate()`, and the report of what was saved.

LLaVA-NeXT cuts a picture into up to five crops, which become as many as 2,880 visual tokens: most of the prompt. By
default a tiny random model of that architecture runs on whatever device there is; its answers and times mean nothing.

    python demo/examples/llava_next.py
    python demo/examples/llava_next.py --model llava-hf/llava-v1.6-mistral-7b-hf --image cat.jpg --keep 0.11

7B parameters in bfloat16 are 15 GB, so that a GPU of 24 GB will do. Expect the report to show a ninth of the visual
tokens and of their KV cache, and the table a shorter time; how much shorter has not been measured, for no GPU was at
hand. `visiontok bench` measures times properly; this is one call after another that does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

import visiontok
from visiontok.conformance import zoo
from visiontok.named import find_device


def tiny() -> tuple[Any, Any]:
    """A random LLaVA-NeXT and its processor, with the words of the embedded model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextImageProcessor, LlavaNextProcessor

    words = AutoProcessor.from_pretrained(visiontok.demo.WEIGHTS / "llava")
    config = zoo.config("llava_next")
    config.text_config.vocab_size = len(words.tokenizer)
    config.image_token_id = words.tokenizer.convert_tokens_to_ids("<image>")
    size, strategy = config.vision_config.image_size, config.vision_feature_select_strategy
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": size}, crop_size=size, image_grid_pinpoints=config.image_grid_pinpoints
    )
    processor = LlavaNextProcessor(
        pictures, words.tokenizer, config.vision_config.patch_size, strategy, words.chat_template, "<image>", 1
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config), processor


def real(name: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(name, dtype=dtype), AutoProcessor.from_pretrained(name)


def main(arguments: Sequence[str] | None = None) -> visiontok.Compression:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or folder; default: a tiny random one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--image", help="default: a drawn scene")
    parser.add_argument("--ask", default="what color is the star?")
    parser.add_argument("--method", default="visiontok")
    parser.add_argument("--keep", default="0.11", help="tokens per image, or a ratio")
    args = parser.parse_args(arguments)
    device = find_device(args.device)
    model, processor = real(args.model, args.dtype) if args.model else tiny()
    model = model.to(device, getattr(torch, args.dtype)).eval()

    image = Image.open(args.image).convert("RGB") if args.image else visiontok.demo.scene()[0]
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": args.ask}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(device, dtype=model.dtype)

    def row(name: str) -> None:
        for _ in range(2):  # the first call does not count
            start = time.perf_counter()
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
            answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            seconds = time.perf_counter() - start
        print(f"{name:14}{seconds:10.3f} s   {answer.strip()}")

    row("all tokens")
    with visiontok.compress(model, args.method, keep=args.keep) as compression:
        row(f"keep={args.keep}")
        print(f"\n{compression.report}")
    return compression


if __name__ == "__main__":
    main()
