"""Methods × budgets on a Qwen-VL model, and what the differences mean.

As `visiontok eval` and `visiontok compare`, from Python: every question is asked of the stock model and of each method,
the answers are kept in a folder, and runs are compared question by question. The tiny embedded model needs no download:

    python demo/examples/sweep_qwen.py
    python demo/examples/sweep_qwen.py --model Qwen/Qwen2.5-VL-7B-Instruct --task textvqa --limit 500

`resize`, which gives the model a smaller picture, is the baseline to beat. 48 questions about four pictures cannot tell
methods apart, as the p-values say; take --limit 1000. What a method loses on `tiny-qwen`, a tiny Qwen3-VL,
predicts nothing about Qwen2.5-VL. Data sets other than `scenes` come from the hub (`pip install visiontok[data]`; not
tried) or from a file, `--data FILE`. Killed and started again, a sweep goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from visiontok.eval.compare import Line, compare_job
from visiontok.eval.job import Sweep, eval_job


def main(arguments: Sequence[str] | None = None) -> list[Line]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-qwen", help="tiny-qwen, or a Hugging Face id or folder")
    parser.add_argument("--task", default="scenes", help="as `visiontok eval --task`")
    parser.add_argument("--data", help="file or folder with its questions")
    parser.add_argument("--methods", nargs="+", default=["random", "resize", "divprune", "visiontok"])
    parser.add_argument("--keeps", nargs="+", default=["0.5", "0.25"])
    parser.add_argument("--limit", type=int, default=48, help="questions")
    parser.add_argument("--out", default="evaluation", help="folder of the answers")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)

    sweep = Sweep(
        model=args.model,
        tasks=(args.task,),
        methods=("full", *args.methods),
        keeps=tuple(args.keeps),
        data={args.task: args.data} if args.data else {},
        limit=args.limit,
        out=args.out,
        device=args.device,
    )
    eval_job(sweep)
    lines = [line for line in compare_job(args.out, []).whole if line.task == args.task]

    first = lines[0].comparison
    stock = lines[0].points * first.reference.value
    print(f"{args.task}, {first.questions} questions in {first.clusters} clusters; all tokens: {stock:.1f}")
    print(f"{'method':18}{'tokens':>8}{'score':>8}{'difference':>12}  95 % interval    p (Holm)")
    for line in lines:
        score, change = line.comparison.score.value, line.comparison.difference
        tokens = "-" if line.tokens is None else f"{line.tokens:.1f}"
        scaled = [line.points * x for x in (score, change.value, change.low, change.high)]
        print(
            "{:18}{:>8}{:8.1f}{:+12.1f}  [{:+6.1f}, {:+6.1f}]{:10.3f}".format(line.method, tokens, *scaled, line.p_holm)
        )
    return lines


if __name__ == "__main__":
    main()
