"""The command line: `visiontok --help` lists its commands.

Everything heavy is imported inside the commands, so that `visiontok --help` is instant.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visiontok.errors import ConfigError, VisiontokError

if TYPE_CHECKING:
    from rich.console import Console

    from visiontok.conventions import Bill
    from visiontok.method import Card

app = typer.Typer(
    help="Visual-token pruning and merging for stock Hugging Face vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    # Plain help and plain one-line errors, which read the same in a terminal, a log and a pipe.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def main() -> None:
    """Entry point. Exit code 2 and one line on standard error for what the user can cure; 1 for anything else."""
    try:
        app()
    except VisiontokError as error:
        message = " ".join(str(error).split())
        print(f"visiontok: {message}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import visiontok

        print(visiontok.__version__)
        raise typer.Exit


@app.command()
def run(
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="Image. Default: a scene of the embedded model.")
    ] = None,
    ask: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Question. Default: one that suits the scene.")
    ] = None,
    method: Annotated[str, typer.Option(help="Method; `visiontok methods` lists them.")] = "visiontok",
    keep: Annotated[
        str | None,
        typer.Option(help="What to keep: a share (0.25) or a number of tokens (128). Default: 0.25, if it takes one."),
    ] = None,
    mass: Annotated[bool, typer.Option("--mass", help="Let kept tokens speak for those they replace.")] = False,
    model: Annotated[
        str, typer.Option(help="Hugging Face id, folder, or an embedded model: `tiny` (LLaVA), `tiny-qwen` (Qwen3-VL).")
    ] = "tiny",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    overlay: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the image with the dropped patches dimmed.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a question about an image with and without compression, and compare."""
    options = _parse_options(option or [])
    from visiontok.run import run_job

    result = run_job(
        image=image,
        ask=ask,
        method=method,
        keep=keep,
        mass=mass,
        model=model,
        device=device,
        overlay=overlay,
        max_new_tokens=max_new_tokens,
        seed=seed,
        options=options,
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        result.render(_console())


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="Hugging Face id, folder, or an embedded model: `tiny` (LLaVA), `tiny-qwen` (Qwen3-VL).")
    ] = "tiny",
    port: Annotated[int | None, typer.Option(help="Port. Default: the first free one from 7860.")] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    results: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="Results of `visiontok eval` to draw; may be repeated."),
    ] = None,
) -> None:
    """Serve a page that asks a question with two settings side by side. Needs the extra `demo`."""
    try:
        from visiontok.demo.app import demo_job
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "pandas"):
            raise
        raise ConfigError(
            f"demo: {error.name} is not installed; pip install 'visiontok[demo]', or use `visiontok run`"
        ) from error
    demo_job(model=model, port=port, host=host, device=device, results=results or ())


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face id, folder, or an embedded model: `tiny` (LLaVA, the default), `tiny-qwen`."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task, by name or YAML file; may be repeated. Default: scenes.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method or recipe file, `full` (stock) or `blind` (no picture); may be repeated. Default: full, "
            "random, resize, visiontok."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Budget, as for `run`; may be repeated. Default: 0.25.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=PATH", help="Questions of a task; may be repeated. Default: the hub."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions of each task.")] = None,
    batch: Annotated[int | None, typer.Option(help="Questions answered together. Default: 16.")] = None,
    vision_cache: Annotated[
        bool | None,
        typer.Option(help="Run the vision tower once per picture and share it among methods, which is the default."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws of methods. Default: 0.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps. Default: auto.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Answers and results. Default: evaluation.")] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML with these options; those given here count.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a model the questions of benchmarks, once per method and budget; goes on where it was interrupted."""
    from visiontok.eval.job import Sweep, eval_job

    given = {
        "model": model, "tasks": task, "methods": method, "keeps": keep, "limit": limit, "batch": batch, "seed": seed,
        "device": device, "out": out, "vision_cache": vision_cache, "data": _parse_options(data) if data else None,
    }  # fmt: skip
    sweep = Sweep.of((Sweep.read(config) if config else {}) | {k: v for k, v in given.items() if v is not None})
    found = eval_job(sweep)
    if as_json:
        _print_json(found)
    else:
        from visiontok.eval.table import print_results

        print_results(found, _console())


@app.command()
def compare(
    reference: Annotated[
        str, typer.Argument(metavar="RUN|SWEEP", help="Folder of the run to compare with, or of a whole sweep.")
    ],
    others: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="Folders of other runs of the same task.")
    ] = None,
    against: Annotated[str, typer.Option(metavar="RUN", help="In a sweep: what is compared with.")] = "full",
    by: Annotated[
        str | None,
        typer.Option(metavar="GROUP", help="Within groups of questions; `kind`: over the tasks of each kind."),
    ] = None,
    split_by: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Apart for what this run gets right (easy) and the rest; in a sweep e.g. `resize`."
        ),
    ] = None,
    margin: Annotated[float, typer.Option(help="Loss that does not matter, in percent of the highest score.")] = 1.0,
    anyhow: Annotated[bool, typer.Option("--anyhow", help="Also runs that came about in different ways.")] = False,
    form: Annotated[str, typer.Option("--format", help="text, markdown, latex, csv or json.")] = "text",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs of `eval` question by question: differences, their intervals, and what chance explains."""
    from visiontok.eval.compare import compare_job
    from visiontok.eval.sheets import FORMATS, written

    form = "json" if as_json else form
    if form not in FORMATS:
        raise ConfigError(f"--format {form!r}: use {', '.join(FORMATS)}")
    if out is not None and not out.expanduser().parent.is_dir():
        raise ConfigError(f"--out {str(out)!r}: there is no folder {str(out.parent)!r}; create it first")
    found = compare_job(
        reference, others or [], against=against, by=by, split_by=split_by, margin=margin, anyhow=anyhow
    )
    text = written(found, form, shutil.get_terminal_size((200, 24)).columns)
    if out is None:
        print(text, end="")
    else:
        out.expanduser().write_text(text, encoding="utf-8")


@app.command()
def score(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run of `eval`.")],
    metric: Annotated[str | None, typer.Option(help="Default: that of the task.")] = None,
    dialect: Annotated[str | None, typer.Option(help="official, llava, lmms-eval or vlmevalkit.")] = None,
) -> None:
    """Mark the answers of a run anew, in another dialect for one; needs no model."""
    from visiontok.eval.compare import score

    _print_json(score(run, metric, dialect))


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help="Hugging Face id, folder, or an embedded model: `tiny` (LLaVA), `tiny-qwen` (Qwen3-VL).")
    ] = "tiny",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method or recipe file; may be repeated. Stock, random and resize stand beside it. Default: visiontok."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Budget, as for `run`; may be repeated. Default: 0.25.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Requests answered together, of different sizes; may be repeated.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="Image. Default: scenes of the embedded models.")
    ] = None,
    side: Annotated[
        list[int] | None, typer.Option(metavar="PIXELS", help="Longer side of pictures; may be repeated.")
    ] = None,
    text: Annotated[
        list[int] | None, typer.Option(metavar="TOKENS", help="Text tokens of a prompt; may be repeated.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Length of every answer.")] = 16,
    runs: Annotated[int, typer.Option(help="Rounds; every row runs once in each.")] = 20,
    warm_up: Annotated[int, typer.Option(help="Rounds before them that do not count.")] = 3,
    memory: Annotated[
        str | None,
        typer.Option(help="24GiB: what concurrent requests have to fit in. Default: all of an accelerator's."),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Methods with a static cache, too; stock always.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="And with compiled decoding; stock always.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draws of methods.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    out: Annotated[str, typer.Option(metavar="FILE", help="JSON file to write, or to go on with.")] = "efficiency.json",
    as_json: Json = False,
) -> None:
    """Measure time, memory and FLOPs of methods beside stock at its best; goes on where it was interrupted."""
    from visiontok.eval.efficiency.job import Bench, bench_job

    found = bench_job(
        Bench(
            model=model,
            methods=tuple(method or Bench.methods),
            keeps=tuple(keep or Bench.keeps),
            batches=tuple(batch or Bench.batches),
            sides=tuple(side or ()),
            texts=tuple(text or ()),
            image=image,
            new_tokens=new_tokens,
            runs=runs,
            warm_up=warm_up,
            memory=memory,
            static=static,
            compile=compiled,
            seed=seed,
            device=device,
            out=out,
        )
    )
    if as_json:
        _print_json(found)
    else:
        from rich.console import Console

        from visiontok.eval.efficiency.table import WIDE, print_rows

        print_rows(found, Console(highlight=False, width=WIDE))


@app.command()
def reproduce(
    table: Annotated[
        str | None, typer.Argument(metavar="TABLE", help="Name or YAML file. Without it the tables are listed.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the table's, or its folder.")] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row; may be repeated. The stock model is always asked.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=PATH", help="Questions of a task; may be repeated. Default: the hub."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many questions of each task: a trial, no reproduction.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Questions answered together. Default: as the table says.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Answers and receipt. Default: reproduction/TABLE.")
    ] = None,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Give the processor the table's chat template and picture sizes.")
    ] = False,
    anyhow: Annotated[
        bool, typer.Option("--anyhow", help="Go on with another protocol, or a baseline that is off.")
    ] = False,
    flops: Annotated[bool, typer.Option("--flops", help="Only what needs no model: published FLOPs.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a published table again, its baseline first, and leave a receipt; exit code 1 if it does not come out."""
    from visiontok.eval import reproduce

    if table is None:
        if as_json:
            _print_json(reproduce.tables())
        else:
            reproduce.print_tables(_console())
        return
    request = reproduce.Request(
        table=table, model=model, rows=tuple(row or ()), tasks=tuple(task or ()),
        data=_parse_options(data or []), limit=limit, batch=batch, device=device, out=out, adapt=adapt, anyhow=anyhow,
        flops=flops,
    )  # fmt: skip
    found = reproduce.reproduce(request, _console(quiet=as_json))
    if as_json:
        _print_json(found)
    if found["findings"]["verdict"] == "outside of tolerance":
        raise typer.Exit(1)


@app.command()
def verify(
    receipt: Annotated[str, typer.Argument(metavar="RECEIPT", help="receipt.json, with the answers beside it.")],
    sample: Annotated[int, typer.Option(min=1, help="Questions that are asked again.")] = 50,
    seed: Annotated[int | None, typer.Option(help="Of the sample. Default: one that nobody could have known.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is here. Default: as in the receipt.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=PATH", help="Where the questions of a task are here; may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Check a receipt of `reproduce` and ask a random sample of its questions again; exit code 1 if any differ."""
    from visiontok.eval.verify import verify

    given = _parse_options(data) if data else None
    found = verify(
        receipt, sample=sample, seed=seed, model=model, data=given, device=device, console=_console(quiet=as_json)
    )
    if as_json:
        _print_json(found)
    if not found["ok"]:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="What `eval --out` wrote.")],
    bench: Annotated[
        str | None, typer.Option(metavar="FILE", help="efficiency.json of `bench`, for plots of times and FLOPs.")
    ] = None,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where to write it.")] = "report",
    examples: Annotated[
        int, typer.Option(help="Failures of every method that are drawn, which needs the model; 0: none.")
    ] = 3,
    against: Annotated[str, typer.Option(metavar="RUN", help="What is compared with.")] = "full",
    margin: Annotated[float, typer.Option(help="Loss that does not matter, in percent of the highest score.")] = 1.0,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=PATH", help="Questions of a task, as for `eval`; for the examples."),
    ] = None,
    device: Annotated[str, typer.Option(help="For the examples: auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Write what a sweep found: plots of scores against costs, tables, failing examples; HTML and Markdown."""
    from visiontok.eval.report import report_job

    given = _parse_options(data or [])
    page = report_job(
        folder,
        bench=bench,
        out=out,
        number_of_examples=examples,
        against=against,
        margin=margin,
        data=given,
        device=device,
    )
    print(page)


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="Hugging Face id, folder, or an embedded model: `tiny` (LLaVA), `tiny-qwen` (Qwen3-VL).")
    ] = "tiny",
    method: Annotated[str, typer.Option(help="Method, or `full` (stock); requests may name others.")] = "visiontok",
    keep: Annotated[str | None, typer.Option(help="Budget, as for `run`. Default: 0.25, if it takes one.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the method's draws. Default: 0.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    host: Annotated[str, typer.Option(help="Interface; whoever reaches it may use the model.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, and that of requests that name none.")] = 2048,
    max_images: Annotated[int, typer.Option(help="Pictures in a request.")] = 16,
    max_seconds: Annotated[float, typer.Option(help="For an answer.")] = 300,
) -> None:
    """Serve a model by OpenAI's chat interface, for evaluation harnesses; needs visiontok[serve]."""
    options = _parse_options(option or [])
    try:
        from visiontok.eval.chat import Limits
        from visiontok.eval.serve import serve_job
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve: {error.name} is not installed; run `pip install visiontok[serve]`") from error

    given = {"method": method, "keep": keep, "options": options or None, "seed": seed}
    serve_job(
        model,
        device,
        {name: value for name, value in given.items() if value is not None},
        host,
        port,
        Limits(queue=queue, tokens=max_new_tokens, images=max_images, seconds=max_seconds),
        lambda text: print(text, flush=True),
    )


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Print this method's card.")] = None,
    as_json: Json = False,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table of methods into a file, between its markers.")
    ] = None,
) -> None:
    """List the methods, or print the card of one."""
    from visiontok import catalogue, recipes

    if markdown is not None:
        if name is not None or as_json:
            raise ConfigError(f"--markdown {markdown}: writes the table of all methods; leave NAME and --json out")
        catalogue.write(markdown)
        return
    if name is not None:
        card = recipes.find(name).card
        if as_json:
            _print_json(_plain(card))
        else:
            _print_card(card, _console())
        return
    cards = recipes.methods()
    if as_json:
        _print_json([_plain(card) for card in cards])
    else:
        _print_table(cards, _console())


@app.command()
def recommend(
    workload: Annotated[str, typer.Option(help="document, photo, multi-image or chat.")],
    model: Annotated[
        str, typer.Option(help="Hugging Face id, folder, an embedded model, or a model type such as qwen2_5_vl.")
    ] = "tiny",
    goal: Annotated[
        str, typer.Option(help="ttft (time to the first token), memory (cache) or loss (of accuracy).")
    ] = "ttft",
    margin: Annotated[float, typer.Option(help="Points of accuracy that may be lost.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Which method and budget, by what was measured, with the evidence; or that nothing here is safe."""
    from visiontok.demo.recommend import recommend_for, render

    advice = recommend_for(model, workload, goal, margin)
    if as_json:
        _print_json(advice.to_dict())
    else:
        render(advice, _console())


@app.command()
def check(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET...",
            help="FILE.py:NAME (function, method, recipe or adapter), a recipe file, a method, or a model type.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every registered method.")] = False,
    arch: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Tiny model to try methods on; may be repeated. `all`: every one."),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Budget of a method wherever a check needs any; checks of the budget vary it.")
    ] = "0.4",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the method; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Certify methods and adapters on tiny models; exit code 1 if a check failed."""
    options = _parse_options(option or [])
    import torch

    from visiontok import recipes
    from visiontok.budget import Budget
    from visiontok.conformance import matrix, zoo
    from visiontok.options import typed_options

    torch.set_num_threads(1)  # threads only slow models as tiny as these down

    names = [*(targets or []), *(recipes.names() if everything else [])]
    if not names:
        raise ConfigError("check: name a target (FILE.py:NAME, a recipe file, a method, a model type), or give --all")
    architectures = zoo.ARCHITECTURES if arch == ["all"] else tuple(arch or matrix.DEFAULT)
    found = []
    for name in names:
        typed = typed_options(recipes.find(name), options) if name in recipes.names() else options
        found.append(matrix.check(name, architectures, keep=Budget.parse(keep), options=typed))
    if as_json:
        _print_json({"ok": all(m.ok for m in found), "targets": [m.to_dict() for m in found]})
    else:
        for one in found:
            one.render(_console())
    if not all(m.ok for m in found):
        raise typer.Exit(1)


@app.command()
def cost(
    schedule: Annotated[
        str,
        typer.Option(
            metavar="SCHEDULE",
            help="Visual tokens per layer: 2x576,30x288. 576>513: dropped behind a layer's attention; kv576: keys and "
            "values only. With --average a shape: single@2, geometric@8,16,24, linear@14, concave@10,14,16,18:10,5,1.",
        ),
    ],
    model: Annotated[
        str, typer.Option(help="llava-1.5-7b, qwen2.5-vl-7b, …, or a folder with a config.json.")
    ] = "llava-1.5-7b",
    convention: Annotated[
        list[str] | None, typer.Option(metavar="A|B|C|D", help="Published formula; may be repeated. Default: all.")
    ] = None,
    stock: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Visual tokens of the stock model. Default: most of a layer.")
    ] = None,
    average: Annotated[
        float | None, typer.Option(metavar="TOKENS", help="Solve the shape for this mean over all layers.")
    ] = None,
    start: Annotated[int, typer.Option(help="With --average: first layer that sees visual tokens.")] = 0,
    stop: Annotated[int | None, typer.Option(help="With --average: first layer that sees none any more.")] = None,
    text: Annotated[int, typer.Option(metavar="TOKENS", help="Text tokens, which every layer sees.")] = 0,
    as_json: Json = False,
) -> None:
    """Count a schedule of visual tokens by the formulas of published tables, and exactly."""
    from visiontok import conventions
    from visiontok.cost import Widths

    config = conventions.decoder_config(model)
    if average is None:
        if "@" in schedule or start or stop is not None:
            raise ConfigError(f"--schedule {schedule}: a shape, --start and --stop need --average, and --stock tokens")
        loads = conventions.parse_schedule(schedule)
    elif stock is None:
        raise ConfigError(f"--average {average:g}: say of how many visual tokens, for example --stock 576")
    else:
        depth = Widths.of(config).layers
        loads = conventions.solve_schedule(schedule, stock, average, depth=depth, start=start, stop=stop)
    names = convention or conventions.CONVENTIONS
    whole = conventions.parse_schedule(f"{len(loads)}x{max(load.keys for load in loads) if stock is None else stock}")
    found, before = (conventions.bill(config, one, text=text, conventions=names) for one in (loads, whole))
    if as_json:
        _print_json({"model": model, "text": text, "schedule": found.to_dict(), "stock": before.to_dict()})
    else:
        _print_bills(found, before, _console())


@app.command()
def calibrate(
    method: Annotated[str, typer.Argument(help="vtw, shortv, fitprune, entropyprune, hidrop or todre_exit.")],
    model: Annotated[
        str, typer.Option(help="Hugging Face id, folder, or an embedded model: `tiny` (LLaVA), `tiny-qwen` (Qwen3-VL).")
    ] = "tiny",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|JSONL",
            help='Pictures, each with its question in a .txt of the same name, or lines of {"image": path, "question": '
            "text}. Default: scenes of the embedded models.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many of them.")] = 20,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Artefact to write; a drawing goes beside it. Default: METHOD.json."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the calibration; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model and recommend layers, in a file that `run --method` takes; goes on where it was interrupted."""
    options = _parse_options(option or [])
    from visiontok.calibration.job import run_job

    found, path, drawing = run_job(
        method=method, model=model, data=data, samples=samples, out=out, device=device, options=options
    )
    if as_json:
        _print_json(found.to_dict())
        return
    print(f"{found.calibration}: {found.title}\n{found.source}\n")
    for name, points in found.curves.items():
        print(f"{name}: " + " ".join(f"{layer}:{value:.3g}" for layer, value in points))
    for note in found.notes:
        print(f"note: {note}")
    said = "nothing" if found.recommended is None else json.dumps(found.recommended)
    print(f"recommended: {said}\nwritten: {path}, {drawing}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what this machine has: versions, devices, kernels."""
    from visiontok.doctor import inspect, render

    findings = inspect()
    if as_json:
        _print_json(findings)
    else:
        render(findings, _console())


def _parse_options(pairs: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--option {pair!r}: write it as name=value, for example --option layer=2")
        if name.strip() in options:
            raise ConfigError(f"--option {name.strip()!r} is given twice; give it once")
        options[name.strip()] = value.strip()
    return options


def _console(quiet: bool = False) -> Console:
    from rich.console import Console

    # Away from a terminal rich assumes 80 columns and wraps, which breaks what a script would read.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160, quiet=quiet)


def _print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2, ensure_ascii=False, default=str)
    print()


def _plain(card: Card) -> dict[str, Any]:
    return dataclasses.asdict(card)


def _print_table(cards: list[Card], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True, style="bold")
    for heading in ("stage", "needs", "paper"):
        table.add_column(heading, overflow="fold")
    for card in cards:
        paper = card.paper if card.venue in ("", "-") else f"{card.paper} ({card.venue})"
        table.add_row(*map(escape, (card.name, card.stage, card.needs, paper)))
    console.print(table)


def _print_bills(found: Bill, stock: Bill, console: Console) -> None:
    from rich.table import Table

    from visiontok.conventions import MEANING

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", f"{stock.schedule}", "schedule", "left"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows: list[tuple[str, float, float, float, str]]
    rows = [(f"{name}: {MEANING[name]}", stock.published[name], n, 1e12, "T") for name, n in found.published.items()]
    if found.exact is not None and found.kv is not None and stock.exact is not None and stock.kv is not None:
        rows.append(("executed FLOPs", stock.exact, found.exact, 1e12, "T"))
        rows.append(("keys and values, 16 bit", stock.kv, found.kv, 1e6, "MB"))
    rows.append(("visual tokens per layer", stock.layer_average, found.layer_average, 1, ""))
    for name, before, after, unit, letter in rows:
        share = f"{100 * after / before:.1f} %" if before else "-"
        digits = 1 if unit < 1e12 else 3
        table.add_row(name, *(f"{n / unit:.{digits}f} {letter}".strip() for n in (before, after)), share)
    console.print(table)
    console.print(f"schedule: {found.schedule}")
    if found.exact is None:
        console.print("The cost model does not know this family; measure it with torch.utils.flop_counter.")


def _print_card(card: Card, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    rows = _plain(card)
    contract = rows.pop("contract")
    for name, value in (rows | contract).items():
        text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
        table.add_row(name.replace("_", " "), escape(text))
    console.print(table)
