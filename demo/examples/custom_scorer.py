"""A method of one's own as a class: attention of the vision tower times rarity, with options, a card and a certificate.

Attended tokens often resemble each other. `Rare` weighs what a token is looked at by how little it resembles the mean
token of its picture, and keeps the top k. It is used by its file and name, and certified before it is believed:

    visiontok check demo/examples/custom_scorer.py:Rare --arch llava --arch qwen2_5_vl
    python demo/examples/custom_scorer.py
    python demo/examples/custom_scorer.py --model llava-hf/llava-1.5-7b-hf --keep 0.11

shows the answers to ten questions about one drawn scene, next to attention alone (`cls_topk`). So few answers of a tiny
model say nothing about the method; `visiontok eval` does, where a package registers `Rare` by the entry point
`visiontok.methods`. The short form, a function, is in docs/own-method.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

import visiontok
from visiontok import functional as F
from visiontok.errors import ConfigError
from visiontok.method import Tower
from visiontok.named import find_device, load_model, quiet


@dataclass(frozen=True)
class Rare(visiontok.Method):
    """Attention times rarity.

    Attributes:
        rarity: exponent of the cosine distance to the mean token; 0 leaves attention alone.
        scorer: ``cls``, what the tower's CLS token looks at, or ``received``, what tokens get from all others; by
            default the first where there is a CLS token.
    """

    rarity: float = 1.0
    scorer: Literal["cls", "received"] | None = None
    card: ClassVar[visiontok.Card] = visiontok.Card(
        name="rare",
        title="top-k by attention of the vision tower times distance to the mean token",
        paper="-",
        venue="an example",
        formula="top-K of a_i (1 - cos(z_i, mean z))^rarity",
        stage="prompt",
        needs="CLS attention of the last tower layer; received attention on towers without CLS",
        cost="O(ND) beside the attention",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.rarity < float("inf"):
            raise ConfigError(f"rarity={self.rarity}: give an exponent of at least 0")

    def adapt(self, tower: Tower) -> Rare:
        """What the vision tower at hand can say, which results then name."""
        return self if self.scorer else replace(self, scorer="cls" if tower.has_cls else "received")

    @property
    def label(self) -> str:
        return "rare[received]" if self.scorer == "received" else "rare"

    def needs(self) -> visiontok.Needs:
        """Only what is named here is computed, beside the model's own attention kernel."""
        return (
            visiontok.Needs(vision_received=(-1,)) if self.scorer == "received" else visiontok.Needs(vision_cls=(-1,))
        )

    def select(self, ctx: visiontok.Context) -> torch.Tensor:
        """(U, N) bool from features (U, N, D): U pictures, of which ``ctx.valid`` says what is no padding."""
        attention = ctx.attention.received(-1) if self.scorer == "received" else ctx.attention.cls(-1)
        there = ctx.valid[..., None]
        features = torch.nn.functional.normalize(ctx.features.float().masked_fill(~there, 0.0), dim=-1)
        mean = features.sum(1, keepdim=True) / there.sum(1, keepdim=True)
        distance = 1 - torch.cosine_similarity(features, mean, dim=-1)
        return F.topk(attention * distance.clamp_min(0) ** self.rarity, ctx.count, ctx.valid)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, or a Hugging Face id or folder")
    parser.add_argument("--keep", default="0.11", help="tokens per image, or a ratio")
    parser.add_argument("--rarity", type=float, default=3.0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    methods: dict[str, Any] = {
        "cls_topk": "cls_topk",
        "FILE.py:Rare": f"{__file__}:Rare",
    }  # by name, by file, as an object
    methods[f"rarity={args.rarity:g}"] = Rare(rarity=args.rarity)
    picture, questions = visiontok.demo.scene()
    said = {"right": [question.answer for question in questions]}
    kept = {"right": "-"}
    with quiet():
        loaded = load_model(args.model, find_device(args.device))
        inputs = loaded.inputs(*[([picture], question.text) for question in questions])
        for name, method in methods.items():
            with visiontok.compress(loaded.model, method, keep=args.keep) as compression:
                output = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
                kept[name] = f"{compression.report.layer_average:.0f}"
            answers = output[:, inputs["input_ids"].shape[1] :]
            said[name] = loaded.processor.batch_decode(answers, skip_special_tokens=True)
    print(f"{'':14}{'tokens':>6}  answers")
    for name, answers in said.items():
        print(f"{name:14}{kept[name]:>6}  {', '.join(answer.strip() for answer in answers)}")
    return said


if __name__ == "__main__":
    main()
