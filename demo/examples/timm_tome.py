"""ToMe in a classifier of timm: patches merge in every layer, and the stock model reads the result.

No training and no copy of the model: `compress` attaches to what `timm.create_model` returns. By default the model is
random, so that nothing is downloaded:

    python demo/examples/timm_tome.py
    python demo/examples/timm_tome.py --model vit_base_patch16_384 --images pictures/ --device cuda

The table has the patches that are left behind the last layer, the FLOPs of all blocks, pictures per second, and how
often the best class is the stock model's, which only means something for pretrained weights and many pictures. The
paper reports twice the throughput of a ViT-L at 512 pixels for 0.2 to 0.3 points of ImageNet accuracy; here neither has
been measured. Small models and batches gain less than FLOPs promise, or lose, because matching takes time too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import visiontok
import visiontok._torchvision  # a torchvision that was built for another torch, which timm imports
from visiontok.named import find_device

REPEATS = 3  # the first does not count


@torch.no_grad()
def classify(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The best class of each picture, and pictures per second."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        best = model(pixels).argmax(-1).cpu()
        times.append(time.perf_counter() - start)
    return best, len(pixels) / min(times[1:])


def main(arguments: Sequence[str] | None = None) -> list[tuple[float, float]]:
    import timm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a vision transformer that timm knows, pretrained; default: a small random one")
    parser.add_argument("--images", default=str(Path(__file__).parent), help="folder of pictures")
    parser.add_argument("--keeps", nargs="+", default=["0.75", "0.5", "0.25"], help="tokens per picture, or ratios")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    device = find_device(args.device)
    torch.manual_seed(0)
    model = timm.create_model(args.model or "vit_tiny_patch16_224", pretrained=args.model is not None)
    model = model.eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted(f for f in Path(args.images).iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files]).to(device)

    stock, speed = classify(model, pixels)
    print(f"{'keep':8}{'patches':>9}{'FLOPs':>8}{'pictures/s':>12}{'same class':>12}")
    print(f"{'stock':8}{'':9}{'100%':>8}{speed:12.1f}")
    rows = []
    for keep in args.keeps:
        with visiontok.compress(model, "tome", keep=keep) as compression:
            best, speed = classify(model, pixels)
            report: Any = compression.report
        left = sum(report.kept) / len(report.kept)
        flops = (sum(report.flops) + report.matching) / sum(report.flops_stock)
        same = float((best == stock).float().mean())
        print(f"{keep:8}{left:9.0f}{flops:8.0%}{speed:12.1f}{same:12.0%}")
        rows.append((left, flops))
    return rows


if __name__ == "__main__":
    main()
