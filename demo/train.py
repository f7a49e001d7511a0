"""Train an embedded model from random weights: `python -m visiontok.demo.train --out FOLDER`.

Two stages. First the vision tower and the projector learn to say what every patch shows, in the language model's own
word vectors, on crowded pictures. Then everything learns together to answer questions, many per picture, while the
patches stay supervised a little. What a step sees depends on its number alone, so a run that was stopped, by whatever
means, and taken up again ends with the same weights as one that was not. Runs on what accelerate finds.
"""

from __future__ import annotations

import visiontok._torchvision  # noqa: F401  # transformers imports torchvision

# isort: split
import argparse
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn import functional as F

from .architectures import ARCHITECTURES
from .measure import accuracy, every_split
from .model import Architecture, load, save
from .muon import Muon
from .packing import answer_logits, pack
from .patches import PatchHeads, Targets, targets
from .questions import KIND_OF_FORM, TOKEN_ID, Questions, ask, ask_pairs, converse
from .raster import paint
from .scenes import DENSE, NORMAL, Style, lay_out, seeds

_EMPHASIS = {"shape": 0.7, "count": 0.7, "background": 0.2}  # how much an answer counts: 1 where nothing is said
_END = 0.05  # how much the end after an answer counts
_TALKING = 20  # percent of the pictures whose questions are asked in conversations
_TURNS = 3  # questions of such a conversation
_BLIND = 4  # percent of the questions are asked without the picture, so that the model knows what answers there are
_PAIRS_EVERY = 8  # one joint step in so many shows pictures two by two
_PAIRS_FROM = 0.3  # from this share of the joint steps on
_AHEAD = 8  # steps whose pictures are drawn at once


@dataclass(frozen=True)
class Plan:
    """What a run does; stored in its checkpoint.

    Args:
        architecture: of the model.
        seed: of the initial weights, and of which scenes are shown.
        patch_steps: steps of the first stage, of `patch_batch` pictures.
        joint_steps: steps of the second stage, of `joint_batch` pictures.
        patch_rate, joint_rate: Muon's highest learning rate in the two stages.
    """

    architecture: str = "llava"
    seed: int = 0
    patch_steps: int = 1400
    patch_batch: int = 16
    patch_rate: float = 4e-3
    joint_steps: int = 7600
    joint_batch: int = 8
    joint_rate: float = 3e-3

    @property
    def steps(self) -> int:
        return self.patch_steps + self.joint_steps

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine down to 4 % of the peak."""
        done, steps, peak, warm_up = step - self.patch_steps, self.joint_steps, self.joint_rate, 60
        share = 1.0
        if step < self.patch_steps:
            done, steps, peak, warm_up = step, self.patch_steps, self.patch_rate, 40
            share = 0.85  # the cosine stops short of its end: the second stage goes on from here
        return peak * min(1.0, (done + 1) / warm_up) * (0.04 + 0.48 * (1 + math.cos(math.pi * share * done / steps)))

    def style(self, step: int) -> Style:
        """The curriculum: crowded pictures for the patches; then at most three, five and at last six objects."""
        if step < self.patch_steps:
            return DENSE if step < 0.8 * self.patch_steps else NORMAL
        fraction = (step - self.patch_steps) / self.joint_steps
        return replace(NORMAL, objects=(1, 3) if fraction < 0.1 else (1, 5) if fraction < 0.2 else NORMAL.objects)


@dataclass(frozen=True)
class Batch:
    """What one step sees.

    Attributes:
        pixels: uint8 (B, SIDE, SIDE, 3).
        wanted: what their patches show.
        questions: about each picture, or about each pair; None in the first stage.
        talk, blind: as `pack` wants them.
    """

    pixels: Tensor
    wanted: Targets
    questions: Questions | None = None
    talk: Tensor | None = None
    blind: Tensor | None = None


class Learner(nn.Module):
    """A model with the heads that only training needs.

    Args:
        architecture: of the model.
        model: the model.
        summary: width of its summary of a picture.
    """

    emphasis: Tensor

    def __init__(self, architecture: Architecture, model: Any, summary: int):
        super().__init__()
        self.architecture, self.model = architecture, model
        self.heads = PatchHeads(architecture.width, summary)
        kinds = torch.tensor([_EMPHASIS.get(kind, 1.0) for kind in KIND_OF_FORM])
        self.register_buffer("emphasis", kinds, persistent=False)

    def forward(self, batch: Batch, patch_share: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, of which patches are this share where there are questions too, and what was measured."""
        features, summary = self.architecture.see(self.model, batch.pixels)
        tokens = features[..., : self.architecture.width]
        words = self.model.model.language_model.embed_tokens.weight
        patch_loss, (color, shape, glyph, sign) = self.heads(tokens, summary, words, batch.wanted)
        record = {"color": color, "shape": shape, "glyph": glyph, "sign": sign, "patch_loss": patch_loss.detach()}
        if batch.questions is None:
            return patch_loss, record
        prompts = features.unflatten(0, (len(batch.questions), -1))
        packed = pack(batch.questions, batch.talk, batch.blind)
        logits, labelled = answer_logits(self.model, self.architecture.prefix(self.model, prompts), packed)
        labels = packed.labels[labelled]
        is_answer = labels != TOKEN_ID["</s>"]
        form = batch.questions.form.gather(1, packed.question)[labelled]
        weight = torch.where(is_answer, self.emphasis[form], _END)
        answer_loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        record["answer_loss"] = answer_loss.detach()
        record["answers"] = (logits.argmax(-1) == labels)[is_answer].float().mean()
        return answer_loss + patch_share * patch_loss, record


class Trainer:
    """A run in progress.

    Args:
        plan: what to do.
        folder: where the checkpoint and the log go. A checkpoint already there is taken up; one of a plan that is
            done may be prolonged by a plan with more joint steps.
        accelerator: where to do it.

    Attributes:
        plans: the plan, behind those that it prolongs.

    Raises:
        ValueError: the checkpoint in `folder` belongs to another plan.
    """

    def __init__(self, plan: Plan, folder: Path, accelerator: Accelerator):
        self.plan, self.folder, self.accelerator = plan, folder, accelerator
        self.plans = [plan]
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self._batches: dict[int, Batch] = {}
        self.architecture = ARCHITECTURES[plan.architecture]()
        torch.manual_seed(plan.seed)
        model = self.architecture.build()
        samples = paint(lay_out(seeds("train", range(96)), DENSE)).pixels
        self.architecture.initialise(model, samples)
        with torch.no_grad():
            summary = self.architecture.see(model, samples[:1])[1].shape[1]
        self.learner = Learner(self.architecture, model, summary)
        checkpoint = folder / "checkpoint.pt"
        state = torch.load(checkpoint, weights_only=True, map_location="cpu") if checkpoint.is_file() else None
        if state:
            *earlier, last = (Plan(**one) for one in state["plans"])
            longer = plan.joint_steps > last.joint_steps and plan == replace(last, joint_steps=plan.joint_steps)
            if plan != last and not (longer and state["step"] == last.steps):
                raise ValueError(
                    f"folder {str(folder)!r} holds a checkpoint of another plan, {last} at step {state['step']}; "
                    "give its options again to take it up, more --joint-steps when it is done, or another --out"
                )
            self.plans = [*earlier, plan] if plan == last else [*earlier, last, plan]
            self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
            self.learner.load_state_dict(state["learner"])
        self.wrapped = accelerator.prepare(self.learner)
        self.optimizer = self._new_optimizer()
        if state and state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])

    @property
    def model(self) -> Any:
        return self.learner.model

    def _new_optimizer(self) -> Muon:
        named = list(self.learner.named_parameters())
        if self.step < self.plan.patch_steps:
            # The word vectors belong to the language model but are the patches' targets.
            named = [(name, p) for name, p in named if "language_model" not in name or "embed_tokens" in name]
        hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name and "heads." not in name]
        rest = [p for name, p in named if p.ndim != 2 or "embed" in name or "heads." in name]
        return Muon(hidden, rest)

    def save(self) -> None:
        """Write the checkpoint, all of it or nothing, and the log up to it."""
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # A stage starts with a fresh optimizer, so the finished one's state is not kept.
        starting = self.step in (0, self.plan.patch_steps)
        state = {
            "plans": [asdict(plan) for plan in self.plans],
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "learner": self.learner.state_dict(),
            "optimizer": None if starting else self.optimizer.state_dict(),
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")
        (self.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.history))

    def _draw(self, step: int) -> None:
        """Draw the pictures of the block of steps around `step`, which share a style and a size."""
        plan, accelerator = self.plan, self.accelerator
        joint = step >= plan.patch_steps
        size = plan.joint_batch if joint else plan.patch_batch
        offset = plan.patch_steps if joint else 0
        start = step - (step - offset) % _AHEAD
        end = min(start + _AHEAD, plan.steps if joint else plan.patch_steps)
        done = offset * plan.patch_batch + (start - offset) * size
        # No scene is shown twice: every seed and every process has scenes of its own.
        first = (plan.seed * accelerator.num_processes + accelerator.process_index << 28) + done
        drawn = seeds("train", range(first, first + size * (end - start)), accelerator.device)
        layout = lay_out(drawn, plan.style(start))
        pixels = paint(layout)
        wanted = targets(layout, pixels, self.architecture.cell)
        for number in range(start, end):
            rows = slice((number - start) * size, (number - start + 1) * size)
            part = Targets(*(getattr(wanted, name)[rows] for name in Targets.__dataclass_fields__))
            self._batches[number] = self._questioned(number, layout[rows], pixels.pixels[rows], part)

    def _questioned(self, step: int, layout: Any, pixels: Tensor, wanted: Targets) -> Batch:
        done = step - self.plan.patch_steps
        if done < 0:
            return Batch(pixels, wanted)
        if done % _PAIRS_EVERY == 0 and done >= _PAIRS_FROM * self.plan.joint_steps:
            return Batch(pixels, wanted, ask_pairs(layout))
        questions, talk = converse(ask(layout), layout.seeds, _TURNS, _TALKING)
        generator = torch.Generator().manual_seed(step)
        alone = F.pad(talk[:, 1:] != talk[:, :-1], (1, 0), value=True) & F.pad(
            talk[:, 1:] != talk[:, :-1], (0, 1), value=True
        )
        chance = torch.rand(talk.shape, generator=generator) < _BLIND / 100
        return Batch(pixels, wanted, questions, talk, alone & chance.to(talk.device))

    def advance(self) -> dict[str, Tensor]:
        """One step; returns what it measured."""
        started, plan = time.perf_counter(), self.plan
        if self.step == plan.patch_steps:
            self.optimizer = self._new_optimizer()
        if self.step not in self._batches:
            self._batches.clear()
            self._draw(self.step)
        batch = self._batches.pop(self.step)
        fraction = max(0, self.step - plan.patch_steps) / plan.joint_steps
        loss, record = self.wrapped(batch, 0.4 * (1 - 0.7 * fraction))
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        nn.utils.clip_grad_norm_(self.optimizer.parameters, 1.0)
        self.optimizer.step(plan.rate(self.step))
        self.step += 1
        self.seconds += time.perf_counter() - started
        return record

    def log(self, records: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Note the mean of the records since the last note."""
        line: dict[str, float] = {"step": self.step, "minutes": round(self.seconds / 60, 2)}
        for name in records[-1]:
            values = torch.stack([record[name] for record in records if name in record])
            line[name] = round(values.nanmean().item(), 3)  # a batch without a glyph has no accuracy of glyphs
        self.history.append(line)
        return line

    def validate(self) -> dict[str, float]:
        """Accuracy on scenes that are neither trained on nor reported."""
        self.model.eval()
        table: dict[str, float] = accuracy(self.architecture, self.model, "validation", 64, controls=False)["full"]
        self.model.train()
        self.history.append({"step": self.step, **table})
        return table


def _source() -> dict[str, str]:
    """Where a result comes from: commit and processor."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    processor = platform.processor() or platform.machine()
    names = Path("/proc/cpuinfo")
    if names.is_file():
        models = [line.split(":", 1)[1].strip() for line in names.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    return {"commit": git.stdout.strip() or "unknown", "processor": processor, "torch": torch.__version__}


def command(plan: Plan) -> str:
    """What trains by a plan."""
    changed = {name: value for name, value in asdict(plan).items() if value != getattr(Plan, name)}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    return shlex.join(["python", "-m", "visiontok.demo.train", "--out", "FOLDER", *options])


def export(trainer: Trainer) -> dict[str, Any]:
    """Write the weights as they will be shipped, measure those on every split, and put result and log beside them."""
    folder = trainer.folder / "weights"
    save(trainer.architecture, trainer.model.cpu(), folder)
    model, _ = load(folder)
    result = {
        "command": "\n".join(map(command, trainer.plans)),
        **_source(),
        **asdict(trainer.plan),
        "steps_done": trainer.step,
        "minutes": round(trainer.seconds / 60, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "splits": every_split(trainer.architecture, model),
    }
    (folder / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trainer.history))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m visiontok.demo.train", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of checkpoint, log and weights; a run found there is taken up")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after so many minutes; the same command goes on from there",
    )
    add("--threads", type=int, default=1, help="processor threads")
    add("--save-every", type=float, default=30, help="seconds between checkpoints, default 30")
    for name, value in asdict(Plan()).items():
        choices = sorted(ARCHITECTURES) if name == "architecture" else None
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, choices=choices, help=f"default {value}")
    options = vars(parser.parse_args(arguments))
    folder, minutes, threads, pause = (options.pop(name) for name in ("out", "minutes", "threads", "save_every"))
    torch.set_num_threads(threads)
    # The first stage leaves the language model alone.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    trainer = Trainer(Plan(**options), folder, accelerator)
    plan, begun = trainer.plan, time.monotonic()
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopping.append(received))
    records: list[dict[str, Tensor]] = []
    first, saved = trainer.step, begun
    while trainer.step < plan.steps and not stopping and time.monotonic() - begun < 60 * minutes:
        records.append(trainer.advance())
        if trainer.step % 50 == 0:
            left = (time.monotonic() - begun) / (trainer.step - first) * (plan.steps - trainer.step) / 60
            accelerator.print(f"{trainer.log(records)}, about {left:.0f} min left at this pace", flush=True)
            records.clear()
        if trainer.step > plan.patch_steps and trainer.step % 250 == 0:
            accelerator.print(f"step {trainer.step} of {plan.steps}, validation: {trainer.validate()}", flush=True)
        if time.monotonic() - saved > pause:
            trainer.save()
            saved = time.monotonic()
    trainer.save()
    if trainer.step < plan.steps:
        accelerator.print(f"stopped at step {trainer.step} of {plan.steps}; the same command goes on from there")
    elif accelerator.is_main_process:
        print(json.dumps(export(trainer)["splits"]["heldout"], indent=1), flush=True)


if __name__ == "__main__":
    main()
