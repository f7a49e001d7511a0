"""Short videos of scenes: nothing but one object changes, and the questions are about that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dice import Dice
from .glyphs import DIGITS, GLYPHS
from .questions import EVENTS, FORM_NAMES, MOMENTS, Questions, joined, padded, word_ids
from .raster import paint
from .scenes import (
    COLOR_NAMES,
    GLYPH_HALVES,
    NORMAL,
    PER_OBJECT,
    SHAPES,
    SIDE,
    SIGN_HALVES,
    Layout,
    Style,
    box,
    boxes_meet,
    cell,
    extent,
    lay_out,
    table,
    union,
    withheld_glyph,
    withheld_pair,
)

FRAMES = 8
WAYS = ("left", "right", "up", "down")
_HEADINGS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # right, down
_STEPS = (3, 5)  # pixels that a moving object takes from frame to frame, least and most
_STREAM = 8  # of the dice


@dataclass(frozen=True)
class Clips:
    """What B videos show; int64 (B,) but the scene.

    Attributes:
        scene: where everything is at first, the object that appears later included.
        event: index into EVENTS, -1 where nothing happens.
        actor: slot of the object that it happens to, the only one of its colour and shape.
        way, step: index into WAYS, and pixels from frame to frame, if the object moves. It moves all the time.
        onset: the first frame after another event, never FRAMES / 2.
        color: index into COLOR_NAMES, what the object changes to if it does.
    """

    scene: Layout
    event: Tensor
    actor: Tensor
    way: Tensor
    step: Tensor
    onset: Tensor
    color: Tensor

    def __len__(self) -> int:
        return len(self.event)

    def happens(self, name: str) -> Tensor:
        """bool (B,): where this of EVENTS is the event."""
        return self.event == EVENTS.index(name)

    def frames(self) -> Layout:
        """The layouts of FRAMES B pictures, those of a video one after the other; an object keeps its slot."""
        scene, time = self.scene, torch.arange(FRAMES, device=self.event.device)
        acts = torch.arange(scene.color.shape[1], device=time.device) == self.actor[:, None, None]  # (B, 1, O)
        later = time >= self.onset[:, None]  # (B, FRAMES)
        hidden = (self.happens("appears")[:, None] & ~later) | (self.happens("disappears")[:, None] & later)
        hidden = (acts & hidden[..., None]).flatten(0, 1)  # (B FRAMES, O)
        colored = acts & (self.happens("changes")[:, None] & later)[..., None]
        way = table(_HEADINGS, time)[self.way] * (self.step * self.happens("moves"))[:, None]
        right, down = (acts[..., None] * time[:, None, None] * way[:, None, None]).unbind(-1)  # (B, FRAMES, O) each
        labelled = (scene.glyph >= 0)[:, None]
        changed = {
            "color": torch.where(colored, self.color[:, None, None], scene.color[:, None]),
            "x": scene.x[:, None] + right,
            "y": scene.y[:, None] + down,
            "glyph_x": scene.glyph_x[:, None] + right * labelled,
            "glyph_y": scene.glyph_y[:, None] + down * labelled,
        }
        frames = scene[torch.arange(len(self), device=time.device).repeat_interleave(FRAMES)]
        frames = replace(frames, **{name: value.flatten(0, 1) for name, value in changed.items()})
        return replace(frames, **{name: torch.where(hidden, -1, getattr(frames, name)) for name in PER_OBJECT})

    def pixels(self) -> Tensor:
        """uint8 (B, FRAMES, SIDE, SIDE, 3), RGB."""
        return paint(self.frames()).pixels.unflatten(0, (-1, FRAMES))


def _free(scene: Layout, step: Tensor, gap: int) -> Tensor:
    """bool (B, O, ways): whether an object can move all the time and meet neither a thing nor a withheld place."""
    time = torch.arange(FRAMES, device=step.device)
    path = step[:, None, None, None] * time[:, None] * table(_HEADINGS, step)[:, None]  # (B, ways, FRAMES, 2)
    reach, labelled = extent(scene.radius), scene.glyph >= 0
    hull = box(scene.x, scene.y, reach, reach)
    label = box(scene.glyph_x, scene.glyph_y, *table(GLYPH_HALVES, step)[scene.glyph_size].unbind(-1))
    hull = torch.where(labelled[..., None], union(hull, label), hull)[:, :, None]  # (B, O, 1, 4)
    swept = union(hull, hull + path[:, None, :, -1].repeat(1, 1, 1, 2))  # (B, O, ways, 4)
    inside = ((swept[..., :2] >= 1) & (swept[..., 2:] <= SIDE - 2)).all(-1)

    sign = box(scene.sign_x, scene.sign_y, *table(SIGN_HALVES, step)[scene.sign_size].unbind(-1))
    things = torch.cat([hull.squeeze(2), sign[:, None]], 1)
    there = torch.cat([scene.there, scene.sign[:, :1] >= 0], 1)
    other = ~torch.eye(hull.shape[1], things.shape[1], dtype=torch.bool, device=step.device)
    meets = boxes_meet(swept[:, :, :, None], things[:, None, None], gap)  # (B, O, ways, O + 1)
    meets = (meets & other[:, None] & there[:, None, None]).any(-1)

    x, y = (torch.stack([scene.glyph_x, scene.glyph_y], -1)[:, :, None, None] + path[:, None]).unbind(-1)
    withheld = withheld_glyph(scene.glyph[..., None, None], cell(x, y)).any(-1)
    return inside & ~meets & ~(withheld & labelled[..., None])


def film(seeds: Tensor, style: Style = NORMAL) -> Clips:
    """Decide what videos show.

    Args:
        seeds: int64 (B,).
        style: how their scenes are filled.

    Returns:
        B videos, on the device of the seeds.
    """
    scene, dice = lay_out(seeds, style), Dice(seeds, _STREAM)
    pair = scene.color * len(SHAPES) + scene.shape
    alone = scene.there & ((pair[:, :, None] == pair[:, None]).sum(-1) == 1)
    step = dice.between(*_STEPS)
    moves = (alone[..., None] & _free(scene, step, style.gap)).flatten(1)  # (B, O ways)
    possible = torch.stack([moves.any(1), *[alone.any(1)] * (len(EVENTS) - 1)], -1)
    (event, happens), (move, _), (other, _) = (dice.choose(mask) for mask in (possible, moves, alone))
    event = torch.where(happens, event, -1)
    actor = torch.where(event == EVENTS.index("moves"), move // len(WAYS), other)

    colors, shape = torch.arange(len(COLOR_NAMES), device=seeds.device), scene.shape.gather(1, actor)
    known = (pair[..., None] == (colors * len(SHAPES) + shape)[:, None]).any(1)  # (B, colours)
    color, _ = dice.choose(~known & ~withheld_pair(colors, shape))
    onset = dice.between(1, FRAMES - 2)
    onset += onset >= FRAMES // 2
    event, actor, way, color = (value.squeeze(1) for value in (event, actor, move % len(WAYS), color))
    return Clips(scene, event, actor, way, step, onset, color)


def ask(clips: Clips) -> Questions:
    """Draw questions about videos, always the same ones for a seed.

    Args:
        clips: what B videos show.

    Returns:
        Seven questions about each video, where they apply: which way the object moves; which object it is that moves,
        appears or disappears; the colour that it changes to; the half of the video in which something happens to it;
        twice whether an object is there at the start or at the end; how many objects are.
    """
    scene, event, frames = clips.scene, clips.event[:, None], clips.frames()
    device = event.device
    dice = Dice(scene.seeds, _STREAM + 1)
    color, shape = (value.gather(1, clips.actor[:, None]) for value in (scene.color, scene.shape))
    actor = torch.stack([color, shape, event, event], -1)  # (B, 1, 4)

    def asked(name: str, valid: Tensor, gaps: Tensor, answer: Tensor) -> Questions:
        return padded(torch.where(valid, FORM_NAMES.index(f"video {name}"), -1), gaps, answer)

    moves, changes = (clips.happens(name)[:, None] for name in ("moves", "changes"))
    colors, shapes = word_ids(COLOR_NAMES, device), word_ids(SHAPES, device)
    halves = word_ids(("first", "second"), device)[(clips.onset > FRAMES // 2).long()]
    which_way = asked("way", moves, actor, word_ids(WAYS, device)[clips.way][:, None])
    what = asked("what", (event >= 0) & ~changes, actor, torch.stack([colors[color], shapes[shape]], -1))
    new_color = asked("color", changes, actor, colors[clips.color][:, None])
    half = asked("half", (event >= 0) & ~moves, actor, halves[:, None])

    pairs = torch.arange(len(COLOR_NAMES) * len(SHAPES), device=device)
    ends = [frames[slice(at, None, FRAMES)] for at in (0, FRAMES - 1)]
    here = torch.stack([(pairs[:, None] == (end.color * len(SHAPES) + end.shape)[:, None]).any(-1) for end in ends], 1)
    moment = dice.below(len(MOMENTS), 2)  # (B, n)
    here, there = (here.gather(1, at[..., None].expand(-1, -1, len(pairs))) for at in (moment, 1 - moment))
    absent = ~here & ~withheld_pair(pairs // len(SHAPES), pairs % len(SHAPES))
    # Where it can be, half of the questions are about what is there at only one of the moments.
    sure = dice.chance(50, 2)[..., None]
    (yes, found), (no, missing) = (
        dice.choose(torch.where(sure & only.any(-1, keepdim=True), only, every))
        for only, every in ((here & ~there, here), (absent & there, absent))
    )
    truth = dice.chance(50, 2)
    pair = torch.where(truth, yes.squeeze(-1), no.squeeze(-1))
    gaps = torch.stack([pair // len(SHAPES), pair % len(SHAPES), moment, moment], -1)
    exist = asked("exist", (found & missing).squeeze(-1), gaps, word_ids(("no", "yes"), device)[truth.long()])

    moment = dice.below(len(MOMENTS), 1)
    number = torch.stack([end.there.sum(1) for end in ends], 1).gather(1, moment)
    gaps = moment[..., None].expand(-1, -1, 4)
    count = asked("count", number < DIGITS, gaps, word_ids(GLYPHS, device)[number])
    return joined([which_way, what, new_color, half, exist, count])
