"""A recipe of one's own: two methods added up, one budget for both, saved as YAML and loaded again.

`hiprune` drops tokens before the language model, `fastv` drops more inside it. The budget of such a sum is an
average over all decoder layers, which makes it comparable with a method that drops everything at once; the engine
shares it out between the stages. `visiontok run` and `visiontok eval` take the file that is written as a method, and
its hash names what was run. The tiny embedded model needs no download:

    python demo/examples/custom_recipe.py
    python demo/examples/custom_recipe.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg --ask "What is on the sofa?"

Of the 576 visual tokens of LLaVA-1.5, an average of 0.25 is 144 per layer: more before the cut and fewer behind it, as
the table shows. One answer says nothing about accuracy, least of all the tiny model's; use `visiontok eval` for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby

from PIL import Image

import visiontok
from visiontok.named import Loaded, find_device, load_model, quiet


def answer(loaded: Loaded, image: Image.Image, question: str) -> str:
    inputs = loaded.inputs(([image], question))
    output = loaded.model.generate(**inputs, max_new_tokens=32, do_sample=False)
    said: str = loaded.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said.strip()


def main(arguments: Sequence[str] | None = None) -> visiontok.Compression:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, or a Hugging Face id or folder")
    parser.add_argument("--image", help="default: a drawn scene")
    parser.add_argument("--ask", help="default: a question about it")
    parser.add_argument("--keep", default="0.25", help="average over the decoder layers, tokens or a ratio")
    parser.add_argument("--out", default="hiprune-fastv.yaml", help="file of the recipe")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    scene, questions = visiontok.demo.scene()
    image = Image.open(args.image).convert("RGB") if args.image else scene
    question = args.ask or questions[0].text

    # Half-way through the decoder, a fifth of what came in stays: with a budget for both, theirs are proportions.
    recipe = visiontok.recipe("hiprune", keep=0.5) + visiontok.recipe("fastv", layer=0.5, keep=0.1)
    recipe = recipe.with_keep(visiontok.Budget.parse(args.keep))
    recipe.save(args.out)
    loaded_again = visiontok.Recipe.load(args.out)
    print(f"{args.out}: {loaded_again.label}, {loaded_again.hash()} (as made: {recipe.hash()})")

    with quiet():
        loaded = load_model(args.model, find_device(args.device))
        stock = answer(loaded, image, question)
        with visiontok.compress(loaded.model, loaded_again) as compression:
            pruned = answer(loaded, image, question)
            [seen] = compression.report.images
    print(f"{question}\nall tokens: {stock}\npruned: {pruned}\n")
    print(f"{'layers':10}{'visual tokens':>14}")
    for kept, several in groupby(range(len(seen.kept)), key=seen.kept.__getitem__):
        layers = list(several)
        print(f"{f'{layers[0]} … {layers[-1]}':10}{kept:14}")
    print(f"{'average':10}{seen.average:14.1f} of {seen.tokens}")
    return compression


if __name__ == "__main__":
    main()
