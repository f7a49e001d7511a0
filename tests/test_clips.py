"""Videos of scenes: one thing happens, the rest stays to the pixel, and every question has one right answer."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
import torch
from scene_reader import WITHHELD, World, blind, shares, withheld_here, worlds
from visiontok.demo import clips, raster, scenes
from visiontok.demo.clips import FRAMES, WAYS, Clips
from visiontok.demo.questions import EVENTS
from visiontok.demo.scenes import COLOR_NAMES, SIDE


def film(count: int, start: int = 0) -> Clips:
    return clips.film(scenes.seeds("video", range(start, start + count)))


@pytest.fixture(scope="module")
def shown() -> tuple[Clips, raster.Pictures]:
    videos = film(40)
    return videos, raster.paint(videos.frames())


def test_nothing_but_the_actor_changes(shown):
    """Outside the pixels of the actor and its glyph, frames of a video are equal."""
    videos, pictures = shown
    views = (pictures.objects, pictures.labels, pictures.pixels)
    objects, labels, pixels = (view.unflatten(0, (-1, FRAMES)) for view in views)
    assert torch.equal(videos.pixels(), pixels)
    for row in range(len(videos)):
        actor = videos.actor[row] + 1
        acting = ((objects[row] == actor) | (labels[row] == actor)).any(0)
        changes = (pixels[row] != pixels[row, :1]).any(-1).any(0)
        assert not (changes & ~acting).any()
        assert changes.any() == (videos.event[row] >= 0)
        others = objects[row] * (objects[row] != actor)
        assert torch.equal(others, others[:1].expand_as(others))
    assert set(videos.event.tolist()) >= set(range(len(EVENTS)))


def test_the_event_is_what_is_seen(shown):
    videos, pictures = shown
    for row in range(len(videos)):
        actor, onset, event = int(videos.actor[row]) + 1, int(videos.onset[row]), EVENTS[videos.event[row]]
        if videos.event[row] < 0:
            continue
        view = slice(row * FRAMES, (row + 1) * FRAMES)
        masks = pictures.objects[view] == actor
        seen = masks.any((1, 2)).tolist()
        assert seen == [
            {"appears": frame >= onset, "disappears": frame < onset}.get(event, True) for frame in range(FRAMES)
        ]
        colors = [
            pictures.pixels[view][frame][masks[frame] & (pictures.labels[view][frame] == 0)] for frame in range(FRAMES)
        ]
        places = [mask.nonzero().float().mean(0) for mask, here in zip(masks, seen, strict=True) if here]
        if event == "moves":
            steps = torch.stack([after - before for before, after in itertools.pairwise(places)])
            down, right = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[WAYS[videos.way[row]]]
            assert torch.allclose(steps, torch.tensor([down, right]) * steps.abs().max(), atol=1e-4)
            assert 3 <= steps.abs().max() <= 5
        else:
            assert all(torch.equal(place, places[0]) for place in places)
        if event == "changes":
            first, last = colors[0][0].int(), colors[-1][0].int()
            assert all(
                torch.equal(color[0].int(), last if frame >= onset else first) for frame, color in enumerate(colors)
            )
            old, new = (
                torch.tensor(scenes.COLORS[COLOR_NAMES[int(index)]])
                for index in (videos.scene.color[row, actor - 1], videos.color[row])
            )
            assert (first - old).abs().max() <= 16
            assert (last - new).abs().max() <= 16
        assert onset != FRAMES // 2


def span(mask: torch.Tensor) -> tuple[int, int, int, int]:
    rows, columns = mask.nonzero(as_tuple=True)
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def test_the_actor_keeps_apart_from_all_else(shown):
    """Wherever it is, with its glyph: by the gap of the style, in rows or in columns."""
    videos, pictures = shown
    for row in range(len(videos)):
        view = slice(row * FRAMES, (row + 1) * FRAMES)
        owned = torch.maximum(pictures.objects[view], pictures.labels[view])
        actor = videos.actor[row] + 1
        top, bottom, left, right = span((owned == actor).any(0))
        assert min(top, left) >= 1
        assert max(bottom, right) <= SIDE - 2
        others = [(owned == slot).any(0) for slot in range(1, owned.max() + 1) if slot != actor]
        for mask in (*others, pictures.signs[row * FRAMES] > 0):
            if mask.any():
                top2, bottom2, left2, right2 = span(mask)
                assert max(top - bottom2, top2 - bottom, left - right2, left2 - right) >= scenes.NORMAL.gap


def test_nothing_withheld_is_shown():
    for world in worlds(film(100).frames()):
        assert not {thing.name for thing in world.things} & WITHHELD
        assert not any(withheld_here(glyph, x, y) for glyph, x, y, *_ in world.glyphs)


def answers(video: list[World], text: str) -> set[str]:
    """All answers that somebody who has seen the video could give."""
    first, last = video[0], video[-1]
    before, after = ({(thing.name, thing.x, thing.y) for thing in world.things} for world in (first, last))
    if found := re.fullmatch(r"the (\w+ \w+) moves left or right or up or down\?", text):
        ((one,), (other,)) = (world.named(found[1]) for world in (first, last))
        right, down = other.x - one.x, other.y - one.y
        assert (right == 0) != (down == 0)
        return {("left" if right < 0 else "right") if right else ("up" if down < 0 else "down")}
    if text == "what object moves?":
        return {name for name, *_ in before - after} & {name for name, *_ in after - before}
    if text == "what object appears?":
        return {name for name, *_ in after - before}
    if text == "what object disappears?":
        return {name for name, *_ in before - after}
    if found := re.fullmatch(r"the (\w+) (\w+) changes to what color\?", text):
        places = [(thing.x, thing.y) for thing in first.named(f"{found[1]} {found[2]}")]
        return {thing.color for thing in last.things if (thing.x, thing.y) in places and thing.color != found[1]}
    if found := re.fullmatch(r"the (\w+ \w+) (appears|disappears|changes) in the first or second half\?", text):
        there = [bool(world.named(found[1])) for world in video]
        assert there[0] == (found[2] != "appears")
        (onset,) = (frame for frame in range(1, FRAMES) if there[frame] != there[frame - 1])
        return {"first"} if onset < FRAMES / 2 else {"second"} if onset > FRAMES / 2 else {"first", "second"}
    if found := re.fullmatch(r"is there an? (\w+ \w+) at the (start|end)\?", text):
        return {"yes" if {"start": first, "end": last}[found[2]].named(found[1]) else "no"}
    found = re.fullmatch(r"how many objects are there at the (start|end)\?", text)
    return {str(len({"start": first, "end": last}[found[1]].things))}


def test_every_question_has_exactly_one_answer():
    videos = film(150)
    seen = worlds(videos.frames())
    asked = Counter()
    for row, questions in enumerate(clips.ask(videos).rows()):
        video = seen[row * FRAMES : (row + 1) * FRAMES]
        assert len({question.text for question in questions}) == len(questions)
        for question in questions:
            assert answers(video, question.text) == {question.answer}, question
            assert question.kind == "video"
            assert not any(name in question.text for name in WITHHELD)
            asked[question.text.split()[0]] += 1
    assert set(asked) == {"the", "what", "is", "how"}


def test_a_video_alone_is_the_video_in_a_batch():
    videos = film(9)
    pixels, rows = videos.pixels(), clips.ask(videos).rows()
    alone = film(2, start=5)
    assert torch.equal(alone.pixels(), pixels[5:7])
    assert clips.ask(alone).rows() == rows[5:7]


def test_everything_lies_where_the_seeds_lie():
    seeds = scenes.seeds("video", range(4))
    with torch.device("meta"):
        videos = clips.film(seeds)
        assert torch.equal(videos.pixels(), film(4).pixels())
        assert clips.ask(videos).rows() == clips.ask(film(4)).rows()


EVEN = {
    "video way": (20, 30),
    "video what": (0, 5),
    "video color": (8, 18),
    "video half": (46, 54),
    "video exist": (47, 53),
    "video count": (0, 31),
}


@pytest.fixture(scope="module")
def exam() -> list:
    return [clips.ask(film(1000, start)) for start in range(0, 6000, 1000)]


def test_answers_are_balanced(exam):
    found = shares(exam)
    assert set(found) == set(EVEN)
    for name, row in found.items():
        least, most = EVEN[name]
        assert least <= min(row.values()), (name, row)
        assert max(row.values()) <= most, (name, row)


def test_the_wording_does_not_give_the_answer_away(exam):
    ((kind, (prior, knowing)),) = blind(exam[:4], exam[4:]).items()
    assert kind == "video"
    assert knowing < prior + 3.5
