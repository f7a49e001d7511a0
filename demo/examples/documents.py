"""Documents: units of a page that their neighbours predict never enter the vision tower (PixelPrune).

Most of a rendered page repeats what stands next to it. With tau=0 units are dropped only where the page can be made
again from what is kept, pixel for pixel; budgets behind the tower may follow. On the tiny embedded model:

    python demo/examples/documents.py
    python demo/examples/documents.py --model Qwen/Qwen2.5-VL-7B-Instruct --image page.png --ask "What is the total?"

A white page loses most of its patches before the tower, where the time goes on pages of the real size; a photograph
loses none. Equal pixels do not promise equal answers, for what is kept no longer sees what was dropped: look at yours
with --ask. `tiny-qwen` cannot read, so its answers mean nothing. With a large model this has not been tried here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

import visiontok
from visiontok.named import find_device, load_model, quiet

LINES = (
    "INVOICE 2041",
    "",
    "12 pencils      3.60",
    " 4 notebooks    9.20",
    " 1 stapler     11.90",
    "",
    "total         24.70",
)


def page(side: int) -> Image.Image:
    """A few lines of black text on white, as a browser or an office program draws them."""
    drawn = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(drawn)
    for number, line in enumerate(LINES):
        pen.text((side // 9, side // 9 + 14 * number), line, fill="black", font_size=12)
    return drawn


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-qwen", help="tiny-qwen, or a Hugging Face id or folder")
    parser.add_argument("--image", help="default: a drawn invoice")
    parser.add_argument("--side", type=int, default=288, help="pixels of the drawn page")
    parser.add_argument("--ask", help="a question about it, whose answers are shown")
    parser.add_argument("--tau", type=float, default=0.05, help="difference of pixels, in 0 ... 1, that may be lost")
    parser.add_argument("--keep", default="0.1", help="budget of divprune behind the tower")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    recipes = {
        "all units": visiontok.recipe("random", keep=1.0),
        "tau=0": visiontok.recipe("pixelprune"),
        f"tau={args.tau:g}": visiontok.recipe("pixelprune", tau=args.tau),
        f"tau=0, then {args.keep}": visiontok.recipe("pixelprune") + visiontok.recipe("divprune", keep=args.keep),
    }
    image = Image.open(args.image).convert("RGB") if args.image else page(args.side)
    reports: dict[str, Any] = {}
    with quiet():
        loaded = load_model(args.model, find_device(args.device))
        inputs = loaded.inputs(([image], args.ask or "what is the total?"))
        print(f"{'':18}{'patches':>10}{'tokens':>10}{'tower FLOPs':>14}")
        for name, recipe in recipes.items():
            with visiontok.compress(loaded.model, recipe) as compression:
                output = loaded.model.generate(**inputs, max_new_tokens=64, do_sample=False)
                report = reports[name] = compression.report
            answer = loaded.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            cost = report.account.vision
            flops = f"{cost.tower + cost.projector:.3g}" if cost else "-"
            said = f"   {answer.strip()}" if args.ask else ""
            print(f"{name:18}{report.account.patches:10}{report.layer_average:10.0f}{flops:>14}{said}")
    return reports


if __name__ == "__main__":
    main()
