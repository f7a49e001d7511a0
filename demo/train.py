"""Train the embedded model from random weights: `python -m visiontok.demo.train --out FOLDER`.

Two stages, about 35 minutes of one core. First the vision tower and the projector learn to say what every patch
shows, in the language model's own word vectors, on crowded pictures. Then everything learns together to answer
questions, many per picture, while the patches stay supervised a little. What a step sees depends on its number alone,
so a run that was stopped and taken up again ends with the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import model as vlm
from .measure import accuracy
from .model import GRID, PATCH, TEXT_LAYERS, TOKEN_ID, TOKENS, WIDTH
from .muon import Muon
from .packing import answer_logits, pack, pixel_values, see
from .scenes import BACKGROUNDS, COLOR_NAMES, DENSE, GLYPHS, NORMAL, SHAPES, Scene, Style, questions, render

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_COUNTS = 8  # classes of the count head: 0 … 7 or more
_PAIRS = len(COLOR_NAMES) * len(SHAPES)
_QUESTION_WEIGHTS = {"read": 30, "background": 2}
# Finding an object by its shape is learned last, and these kinds need it; the loss counts them so many times.
_EMPHASIS = {"color": 3.0, "exist": 2.0}


@dataclass(frozen=True)
class Plan:
    """What a run does; stored in its checkpoint.

    Args:
        seed: of the initial weights.
        patch_steps: steps of the first stage, of `patch_batch` pictures.
        joint_steps: steps of the second stage, of `joint_batch` pictures with `per_picture` questions each.
        patch_rate, joint_rate: Muon's highest learning rate in the two stages.
    """

    seed: int = 0
    patch_steps: int = 750
    patch_batch: int = 16
    patch_rate: float = 4e-3
    joint_steps: int = 2900
    joint_batch: int = 8
    joint_rate: float = 2e-3
    per_picture: int = 16

    @property
    def steps(self) -> int:
        return self.patch_steps + self.joint_steps


# ------------------------------------------------------------------------------------------------- initial weights


@torch.no_grad()
def initialise(model: LlavaForConditionalGeneration) -> None:
    """Initial weights for a short training; CLIP's own are made for towers a thousand times larger.

    The patch embedding whitens pictures, positions are two-dimensional sines, and queries resemble keys: each is worth
    minutes of training.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            nn.init.trunc_normal_(weight, std=0.9 * (2 / sum(weight.shape)) ** 0.5)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=WIDTH**-0.5)
    model.model.multi_modal_projector.linear_2.weight.mul_(0.35)
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.mul_(1.4 * (2 * TEXT_LAYERS) ** -0.5)
        layer.mlp.down_proj.weight.mul_(1.4 * (2 * TEXT_LAYERS) ** -0.5)

    tower = model.model.vision_tower
    embeddings = tower.embeddings
    embeddings.patch_embedding.weight.copy_(_whitening().view_as(embeddings.patch_embedding.weight))
    rows, columns = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    frequency = math.pi * torch.exp(torch.linspace(math.log(0.6), math.log(1 / GRID / 1.5), WIDTH // 4))
    waves = [wave(axis.flatten()[:, None] * frequency) for axis in (rows, columns) for wave in (torch.sin, torch.cos)]
    embeddings.position_embedding.weight.copy_(F.pad(0.6 * torch.cat(waves, 1), (0, 0, 1, 0)))
    nn.init.normal_(embeddings.class_embedding, std=0.5)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        attention.k_proj.weight.copy_(1.125 * attention.q_proj.weight + 0.99 * attention.k_proj.weight)
        attention.q_proj.weight.mul_(1.5)
        turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
        attention.out_proj.weight.copy_(0.35 * attention.out_proj.weight + 0.105 * turn)
        layer.mlp.fc2.weight.mul_(0.6)


def _whitening() -> Tensor:
    """(WIDTH, 3 * PATCH * PATCH): the leading principal directions of patches, whitened and mixed."""
    pictures = pixel_values([render("train", index, DENSE).pixels for index in range(96)])
    patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH)
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values.flip(0)[:WIDTH], vectors.flip(1)[:, :WIDTH]
    whitened = (vectors / (values + 1.5 * values[-1]).sqrt()).T
    return 0.9 * torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0] @ whitened


# ----------------------------------------------------------------------------------------------- patch supervision


@dataclass(frozen=True)
class Targets:
    """What the patches of B pictures show; class 0 is "none".

    Attributes:
        words: int64 (B, TOKENS, 3): colour, shape and glyph. A patch of a glyph also names its object's colour and
            shape, and a patch of an object its glyph: reading needs that binding.
        radius: float (B, TOKENS), radius of the object drawn there as a share of the largest, 0 elsewhere.
        present: float (B, colour-shape pairs + glyphs), 1 where the picture has one.
        background: int64 (B,).
        count: int64 (B,), number of objects, at most _COUNTS - 1.
    """

    words: Tensor
    radius: Tensor
    present: Tensor
    background: Tensor
    count: Tensor


def _patch_owners(owners: np.ndarray, things: int, least: int) -> np.ndarray:
    """int64 (TOKENS,): 1 + the object with most pixels in each patch, 0 where it has fewer than `least`."""
    patches = owners.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(TOKENS, -1)
    counts = (patches[:, None] == np.arange(1, max(things, 1) + 1)[None, :, None]).sum(-1)  # (TOKENS, things)
    return np.where(counts.max(1) >= least, counts.argmax(1) + 1, 0)


def targets(scenes: Sequence[Scene]) -> Targets:
    """The targets of B scenes."""
    words, radius = [], []
    present = torch.zeros(len(scenes), _PAIRS + len(GLYPHS))
    for row, scene in enumerate(scenes):
        drawn = _patch_owners(scene.thing_map, len(scene.things), PATCH * PATCH // 8)
        written = _patch_owners(scene.glyph_map, len(scene.things), PATCH * PATCH // 6)
        owner = np.where(drawn > 0, drawn, written)
        table = np.array([(0, 0, 0, 0)] + [(t.color + 1, t.shape + 1, 0, t.radius) for t in scene.things])
        glyphs = np.array([0] + [0 if t.glyph is None else t.glyph + 1 for t in scene.things])
        words.append(np.stack([table[owner, 0], table[owner, 1], glyphs[written]], -1))
        radius.append(table[drawn, 3] / NORMAL.radius[1])
        for thing in scene.things:
            present[row, thing.color * len(SHAPES) + thing.shape] = 1
            if thing.glyph is not None:
                present[row, _PAIRS + thing.glyph] = 1
    return Targets(
        torch.from_numpy(np.stack(words)),
        torch.from_numpy(np.stack(radius)).float(),
        present,
        torch.tensor([scene.background for scene in scenes]),
        torch.tensor([min(_COUNTS - 1, len(scene.things)) for scene in scenes]),
    )


class PatchHeads(nn.Module):
    """The training-only loss on visual tokens and CLS.

    A token's logits for a colour, a shape or a glyph are its products with the word vectors of the answers, so the
    projector learns the language the decoder will read.
    """

    tables = (COLOR_NAMES, SHAPES, GLYPHS)

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.randn(len(self.tables), WIDTH) * WIDTH**-0.5)
        self.geometry = nn.Linear(WIDTH, 3)  # x, y, radius
        self.picture = nn.Linear(WIDTH, _PAIRS + len(GLYPHS) + len(BACKGROUNDS) + _COUNTS)

    def forward(self, features: Tensor, cls: Tensor, words: Tensor, wanted: Targets) -> tuple[Tensor, list[float]]:
        """The loss, and the accuracy on patches that show something.

        Args:
            features: (B, TOKENS, WIDTH), projected visual tokens.
            cls: (B, WIDTH), the tower's pooled output.
            words: (vocabulary, WIDTH), the word embeddings.
            wanted: the targets.

        Returns:
            The loss and [colour, shape, glyph] accuracies.
        """
        loss = features.new_zeros(())
        accuracies = []
        for column, names in enumerate(self.tables):
            vectors = torch.cat([self.none[column : column + 1], words[[TOKEN_ID[name] for name in names]]])
            logits, wish = features @ vectors.T, wanted.words[..., column]
            weight = torch.ones(len(vectors))
            weight[0] = 0.15 if names is GLYPHS else 0.25  # most patches show nothing
            loss = loss + F.cross_entropy(logits.flatten(0, 1), wish.flatten(), weight=weight)
            shown = wish > 0
            accuracies.append((logits.argmax(-1)[shown] == wish[shown]).float().mean().item())
        ends = torch.linspace(-1, 1, GRID)
        places = torch.stack(torch.meshgrid(ends, ends, indexing="xy"), -1).view(1, -1, 2)
        geometry = self.geometry(features)
        loss = loss + 2 * F.mse_loss(geometry[..., :2], places.expand(len(features), -1, -1))
        drawn = (wanted.radius > 0).float()
        error = (F.mse_loss(geometry[..., 2], wanted.radius, reduction="none") * drawn).sum() / drawn.sum().clamp(min=1)
        sizes = (wanted.present.shape[1], len(BACKGROUNDS), _COUNTS)
        present, background, count = self.picture(cls).split(sizes, -1)
        rare = torch.tensor(4.0)  # a picture shows few of the pairs and glyphs
        loss = loss + 4 * error + 3 * F.binary_cross_entropy_with_logits(present, wanted.present, pos_weight=rare)
        loss = loss + 0.5 * F.cross_entropy(background, wanted.background) + 0.5 * F.cross_entropy(count, wanted.count)
        return loss, accuracies


# ----------------------------------------------------------------------------------------------------------- the run


def _rate(fraction: float, step: int, peak: float, warm_up: int) -> float:
    """Linear warm-up, then a cosine down to 4 % of the peak."""
    return peak * min(1.0, (step + 1) / warm_up) * (0.04 + 0.48 * (1 + math.cos(math.pi * fraction)))


def _style(step: int, plan: Plan) -> Style:
    """The curriculum: crowded pictures for the patches; then at most three, five and at last six objects."""
    if step < plan.patch_steps:
        return DENSE if step < 0.8 * plan.patch_steps else NORMAL
    fraction = (step - plan.patch_steps) / plan.joint_steps
    return replace(NORMAL, objects=(1, 3 if fraction < 0.12 else 5 if fraction < 0.3 else 6))


class Trainer:
    """A run in progress.

    Args:
        plan: what to do.
        folder: where the checkpoint and the log go. A checkpoint already there is taken up.

    Raises:
        ValueError: the checkpoint in `folder` belongs to another plan.
    """

    def __init__(self, plan: Plan, folder: Path):
        self.plan, self.folder = plan, folder
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        torch.manual_seed(plan.seed)
        self.model = vlm.build()
        initialise(self.model)
        self.heads = PatchHeads()
        checkpoint = folder / "checkpoint.pt"
        state = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else None
        if state:
            if state["plan"] != asdict(plan):
                raise ValueError(
                    f"folder {str(folder)!r} holds a checkpoint of another plan, {state['plan']}; "
                    "give its options again to take it up, or another --out"
                )
            self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
        self.optimizer = self._new_optimizer()
        if state and state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])

    def _new_optimizer(self) -> Muon:
        named = list(self.model.named_parameters())
        if self.step < self.plan.patch_steps:
            # The word vectors belong to the language model but are the patches' targets.
            named = [(name, p) for name, p in named if "language_model" not in name or "embed_tokens" in name]
        hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
        return Muon(hidden, [*rest, *self.heads.parameters()])

    def save(self) -> None:
        """Write the checkpoint, all of it or nothing, and the log up to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # A stage starts with a fresh optimizer, so the finished one's state is not kept.
        starting = self.step in (0, self.plan.patch_steps)
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": None if starting else self.optimizer.state_dict(),
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")
        (self.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.history))

    def _batch(self) -> list[Scene]:
        plan = self.plan
        if self.step < plan.patch_steps:
            size = plan.patch_batch
            first = self.step * size
        else:
            size = plan.joint_batch
            first = plan.patch_steps * plan.patch_batch + (self.step - plan.patch_steps) * size
        style = _style(self.step, plan)
        return [render("train", index, style) for index in range(first, first + size)]

    def advance(self) -> dict[str, float]:
        """One step; returns what it measured."""
        started, plan = time.process_time(), self.plan
        if self.step == plan.patch_steps:
            self.optimizer = self._new_optimizer()
        scenes = self._batch()
        features, cls = see(self.model, pixel_values([scene.pixels for scene in scenes]))
        words = self.model.model.language_model.embed_tokens.weight
        patch_loss, marks = self.heads(features, cls, words, targets(scenes))
        record = dict(zip(("color", "shape", "glyph"), marks, strict=True), patch_loss=patch_loss.item())
        if self.step < plan.patch_steps:
            loss = patch_loss
            # The cosine stops short of its end: the second stage goes on from here.
            rate = _rate(0.85 * self.step / plan.patch_steps, self.step, plan.patch_rate, 40)
        else:
            done = self.step - plan.patch_steps
            fraction = done / plan.joint_steps
            asked = [questions(scene, plan.per_picture, _QUESTION_WEIGHTS) for scene in scenes]
            logits, labels = answer_logits(self.model, features, pack(asked))
            is_answer = labels != TOKEN_ID["</s>"]
            emphasis = torch.tensor([_EMPHASIS.get(question.kind, 1.0) for row in asked for question in row])
            weight = torch.where(is_answer, emphasis.repeat_interleave(2), 0.05)
            answer_loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
            loss = answer_loss + 0.4 * (1 - 0.7 * fraction) * patch_loss
            record["answer_loss"] = answer_loss.item()
            record["answers"] = (logits.argmax(-1) == labels)[is_answer].float().mean().item()
            rate = _rate(fraction, done, plan.joint_rate, 60)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.parameters, 1.0)
        self.optimizer.step(rate)
        self.step += 1
        self.seconds += time.process_time() - started
        return record

    def log(self, records: Sequence[dict[str, float]]) -> dict[str, float]:
        """Note the mean of the records since the last note."""
        names = records[-1].keys()
        kept = [record for record in records if record.keys() == names]
        line = {"step": self.step, "cpu_minutes": round(self.seconds / 60, 2)}
        line |= {name: round(float(np.mean([record[name] for record in kept])), 3) for name in names}
        self.history.append(line)
        return line

    def validate(self) -> dict[str, float]:
        """Accuracy on scenes that are neither trained on nor reported."""
        self.model.eval()
        table = accuracy(self.model, "validation", scenes=48)["full"]
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
    return {"commit": git.stdout.strip() or "unknown", "cpu": processor, "torch": torch.__version__}


def export(trainer: Trainer, command: str) -> dict[str, Any]:
    """Write the weights as they will be shipped, measure those, and put the result beside them."""
    folder = trainer.folder / "weights"
    vlm.save(trainer.model, folder)
    model, _ = vlm.load(folder)
    result = {
        "command": command,
        **_source(),
        "steps": trainer.step,
        "steps_planned": trainer.plan.steps,
        "cpu_minutes": round(trainer.seconds / 60, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **accuracy(model),
    }
    (folder / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
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
    for name, value in asdict(Plan()).items():
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    options = vars(parser.parse_args(arguments))
    folder, minutes, threads = options.pop("out"), options.pop("minutes"), options.pop("threads")
    command = shlex.join(["python", "-m", "visiontok.demo.train", *(sys.argv[1:] if arguments is None else arguments)])
    torch.set_num_threads(threads)
    trainer = Trainer(Plan(**options), folder)
    plan, begun = trainer.plan, time.monotonic()
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: stopping.append(received))
    records: list[dict[str, float]] = []
    first = trainer.step
    while trainer.step < plan.steps and not stopping and time.monotonic() - begun < 60 * minutes:
        records.append(trainer.advance())
        if trainer.step % 50 == 0:
            left = (time.monotonic() - begun) / (trainer.step - first) * (plan.steps - trainer.step) / 60
            print(f"{trainer.log(records)}, about {left:.0f} min left at this pace", flush=True)
            records.clear()
            trainer.save()
        if trainer.step > plan.patch_steps and trainer.step % 250 == 0:
            print(f"step {trainer.step} of {plan.steps}, validation: {trainer.validate()}", flush=True)
    if records:
        trainer.log(records)
    trainer.save()
    if trainer.step < plan.steps:
        print(f"stopped at step {trainer.step} of {plan.steps}; the same command goes on from there", flush=True)
    print(json.dumps(export(trainer, command), indent=2), flush=True)


if __name__ == "__main__":
    main()
