"""The checks on an adapter: what it says of a model family, compared with what a tiny model of the family does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from visiontok.adapters.base import Adapter

from ..api import Compression, base_model
from ..budget import Budget
from ..engine.pixels import Smaller
from ..engine.probe import attention_modules
from ..engine.vision import Encoded, FeatureRecorder, record_of
from ..errors import UnsupportedError
from ..method import Card, Contract, Encoding, Stage, UnitMethod
from ..recipe import Recipe
from .checks import CLOSE, Failed, NotApplicable, against_oracle, gap, generate
from .schedules import SCHEDULES, cut, leave, prompt

# What the language model reads; the rest of the inputs are for the tower.
TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
TRIES = 8


@dataclass
class AdapterCase:
    """An adapter on a tiny model.

    Attributes:
        adapter: the class.
        model: of one of its families, in float64.
        inputs: left-padded prompts with at least two images.
    """

    adapter: type[Adapter]
    model: Any
    inputs: dict[str, Any]

    @property
    def base(self) -> Any:
        """The module that holds tower and language model."""
        return base_model(self.model)

    @functools.cached_property
    def own(self) -> Adapter:
        """The adapter of this model.

        Raises:
            NotApplicable: if the parts it names are not there.
        """
        try:
            structure(self)
        except Failed as error:
            raise NotApplicable("the parts it names are not there") from error
        return self.adapter(self.base)

    @functools.cached_property
    def banned(self) -> list[int]:
        """Placeholders, which must not be generated."""
        return sorted(set(self.own.placeholders().values()))

    @property
    def tower(self) -> list[nn.Module]:
        """The attention modules of the tower."""
        return attention_modules(getattr(self.base, self.own.tower))

    @property
    def pixels(self) -> torch.Tensor:
        """The pixels of all images, as the model takes them."""
        return self.inputs["pixel_values"]

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """(T, D) features of all images, one behind the other, and the record of the run."""
        rest = {k: v for k, v in self.inputs.items() if k not in TEXT_INPUTS}
        recorder = FeatureRecorder.on(self.base, "image")
        try:
            with torch.no_grad():
                output = recorder(**rest | {"pixel_values": pixels}, return_dict=True)
        finally:
            recorder.remove()
        items = [item.reshape(-1, item.shape[-1]) for item in output.pooler_output]
        return torch.cat(items), record_of(output)

    @contextmanager
    def isolated(self) -> Iterator[list[torch.Tensor]]:
        """In this block no patch of the tower sees another; gives the tower's first states of each run."""
        seen: list[torch.Tensor] = []

        def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).detach())

        def silence(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return output * 0 if torch.is_tensor(output) else (output[0] * 0, *output[1:])

        hooks = [self.tower[0].register_forward_pre_hook(first, with_kwargs=True)]
        hooks += [module.register_forward_hook(silence) for module in self.tower]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def structure(case: AdapterCase) -> None:
    """The parts and keywords that it names exist."""
    base, own = case.base, case.adapter(case.base)
    parts = ", ".join(name for name, _ in base.named_children())
    text = getattr(base, own.text, None)
    if text is None or not isinstance(getattr(text, "layers", None), nn.ModuleList):
        raise Failed(f"text={own.text!r} is no language model with decoder layers at .layers; the model has {parts}")
    tower = getattr(base, own.tower, None)
    if not isinstance(tower, nn.Module) or not attention_modules(tower):
        raise Failed(f"tower={own.tower!r} is no vision tower with attention modules; the model has {parts}")
    if own.projector is not None:
        try:
            base.get_submodule(own.projector)
        except AttributeError:
            raise Failed(
                f"projector={own.projector!r} does not exist; the model has {parts}, None is allowed"
            ) from None
    keywords = inspect.signature(text.forward).parameters
    if own.deepstack is not None and not set(own.deepstack) <= set(keywords):
        raise Failed(f"deepstack={own.deepstack!r} are no keywords of the language model; it has {', '.join(keywords)}")
    ids = own.placeholders()
    if not any(bool((case.inputs["input_ids"] == token).any()) for token in ids.values()):
        raise Failed(f"placeholders() gives {ids}, none of which occurs in a prompt with images")


def identity(case: AdapterCase) -> None:
    """At keep=100 %, skipped or forced through the machinery, and after removal the model is stock, bit for bit."""
    model, inputs, banned = case.model, case.inputs, case.banned
    where = inputs["attention_mask"].bool()
    everything = Recipe(stages=(prompt(3.0),))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    stock, tokens = logits(), generate(model, inputs, banned)
    plain = {name for name, _ in model.named_modules()}, set(case.base.__dict__)
    with Compression(model, everything.with_keep(Budget.ratio(1.0)), adapter=case.adapter) as compression:
        if not torch.equal(logits(), stock) or not torch.equal(
            generate(model, inputs, banned).sequences, tokens.sequences
        ):
            raise Failed("keep=1.0 is not the stock model, bit for bit")
        if not any("nothing was dropped" in warning for warning in compression.report.warnings):
            raise Failed("keep=1.0 drops nothing, and the report does not say so")
    for stages in (everything.stages, (*everything.stages, cut(1, 3.0), cut(2, 3.0))):
        with Compression(model, Recipe(stages=stages), adapter=case.adapter, force=True):
            got, out = logits(), generate(model, inputs, banned)
        equal = [torch.equal(a, b) for a, b in zip(out.logits, tokens.logits, strict=True)]
        if (
            not torch.equal(got[where], stock[where])
            or not all(equal)
            or not torch.equal(out.sequences, tokens.sequences)
        ):
            far = gap(got[where], stock[where])
            raise Failed(f"keeping everything changes the logits by up to {far:.2g} of the largest; they must be equal")
    with Compression(model, Recipe(stages=(prompt(), cut(2), leave(3))), adapter=case.adapter):
        if torch.equal(logits(), stock):
            raise Failed("half of the tokens are dropped, and the logits stay the same: nothing happens")
    if not torch.equal(logits(), stock) or plain != (
        {name for name, _ in model.named_modules()},
        set(case.base.__dict__),
    ):
        raise Failed("after it is removed, the model is not the stock model any more")


def schedules(case: AdapterCase) -> None:
    """Every kind of schedule equals the dense masked oracle in greedy generation."""
    banned = case.banned
    for name, stages in SCHEDULES.items():
        try:
            against_oracle(case.model, case.inputs, Recipe(stages=stages), banned, adapter=case.adapter)
        except Failed as error:
            raise Failed(f"schedule {name!r}: {error}") from error
        except Exception as error:
            text = str(error).splitlines()[0]
            raise Failed(f"schedule {name!r}: the model raises {type(error).__name__}: {text}") from error


def grids(case: AdapterCase) -> None:
    """One grid per encoded image, one entry per token, no cell twice, every frame a full rectangle."""
    places = _grids(case, case.encode(case.pixels)[1])
    for i, grid in enumerate(places):
        known = grid[(grid >= 0).all(1)]
        if len(known.unique(dim=0)) < len(known):
            raise Failed(f"grids() puts two tokens of image {i} on one place")
        for t in known[:, 0].unique():
            rows, columns = (known[known[:, 0] == t][:, 1:].amax(0) + 1).tolist()
            if int((known[:, 0] == t).sum()) != rows * columns:
                raise Failed(f"grids() leaves holes in image {i}: frame {int(t)} has {rows} rows and {columns} columns")


def geometry(case: AdapterCase) -> None:
    """A disturbed patch changes the token that the grid puts on its place, and no other."""
    with case.isolated():
        plain, record = case.encode(case.pixels)
        places = _grids(case, record)
        changed_at_all = _changed(case.encode(-case.pixels)[0], plain)
        where = torch.cat(places)
        ends = torch.tensor([len(grid) for grid in places]).cumsum(0).tolist()
        stray = [i for i in changed_at_all if bool((where[i] < 0).any())]
        if stray:
            raise Failed(f"grids() says that token {stray[0]} shows no patch, but pixels change it")
        g = torch.Generator().manual_seed(0)
        for _ in range(TRIES):
            i = int(torch.randint(len(places), (), generator=g))
            here = places[i][(places[i] >= 0).all(1) & (places[i][:, 0] == 0)]
            cell = here[int(torch.randint(len(here), (), generator=g))]
            pixels = _disturb(case, i, len(places), cell, here.amax(0) + 1)
            changed = _changed(case.encode(pixels)[0], plain)
            expected = [ends[i] - len(places[i]) + int((places[i] == cell).all(1).nonzero())]
            if changed != expected:
                found = [where[j].tolist() for j in changed]
                raise Failed(
                    f"grids(): the patch at (t, row, column) = {cell.tolist()} of image {i} becomes the token that it "
                    f"places at {found[0] if found else 'nothing'}"
                )


def patches(case: AdapterCase) -> None:
    """group() brings the values of tower patches to the tokens that these patches become."""
    if type(case.own).group is Adapter.group:
        raise NotApplicable("it has no group(), so that methods which read the tower's attention are refused")
    skip, tried = int(case.own.cls_token), 0
    with case.isolated() as seen:
        plain, record = case.encode(case.pixels)
        before = _crops(seen[-1])
        g = torch.Generator().manual_seed(0)
        while tried < TRIES:
            pixels = case.pixels.clone().flatten()
            pixels[int(torch.randint(len(pixels), (), generator=g))] += 3.0
            tokens = _changed(case.encode(pixels.view_as(case.pixels))[0], plain)
            if not tokens:  # a crop that the model leaves out
                continue
            tried += 1
            touched = (_crops(seen[-1]) != before).any(-1)[:, skip:, None].to(plain.dtype)
            try:
                groups = case.own.group(record, [touched])
            except (UnsupportedError, RuntimeError) as error:
                raise Failed(
                    f"group() fails on {tuple(touched.shape[:2])} patches: {str(error).splitlines()[0]}"
                ) from error
            said = (torch.cat([x.nan_to_num(0).flatten(1).amax(1) for x in groups]) > 0).nonzero().flatten().tolist()
            if said != tokens:
                raise Failed(f"group(): disturbed patches change the tokens {tokens}, it brings them to {said}")


def units(case: AdapterCase) -> None:
    """Given some units of each picture, the tower makes their tokens of their pixels and of no others."""
    if case.own.fixed_units:
        raise NotApplicable(case.own.fixed_units)
    record: Any = Encoded("image", {k: v for k, v in case.inputs.items() if k not in TEXT_INPUTS})
    shapes = case.own.shapes(record)
    whole = [torch.ones(t * h * w, dtype=torch.bool) for t, h, w in shapes]
    with torch.no_grad():
        plain, everything = case.encode(case.pixels)[0], _some(case, record, whole)
    if not torch.equal(everything, plain):
        raise Failed(f"parts(): all units make other features than the stock tower (by {gap(everything, plain):.2g})")
    g = torch.Generator().manual_seed(0)
    some = [torch.rand(len(mask), generator=g) < 0.5 for mask in whole]
    for mask in some:
        mask[-1] = True
    kept = torch.cat(some)
    with case.isolated(), torch.no_grad():
        plain, alone = case.encode(case.pixels)[0], _some(case, record, some)
        if (far := gap(alone[kept], plain[kept])) > CLOSE:
            raise Failed(f"parts(): kept units are not what they are in the whole picture (by {far:.2g})")
    pixels = case.pixels.clone().requires_grad_()
    record.inputs |= {"pixel_values": pixels}
    (slope,) = torch.autograd.grad(_some(case, record, some)[kept].square().sum(), pixels)
    shown = case.own.units(Encoded("image", record.inputs | {"pixel_values": slope}))
    if [tuple(x.shape[:3]) for x in shown] != list(shapes):
        raise Failed(f"units() has the shapes {[tuple(x.shape[:3]) for x in shown]}, shapes() says {shapes}")
    seen = torch.cat([x.flatten(3).any(-1).flatten() for x in shown])
    if wrong := (seen != kept).nonzero().flatten().tolist():
        said = "dropped, but its pixels" if seen[wrong[0]] else "kept, but no pixel of it"
        raise Failed(f"units(): unit {wrong[0]} is {said} made a difference to the features of those that are kept")


def layers(case: AdapterCase) -> None:
    """Units that leave the tower at a layer are those that are meant, and nothing behind it sees them."""
    if case.own.fixed_layers:
        raise NotApplicable(case.own.fixed_layers)
    record: Any = Encoded("image", {k: v for k, v in case.inputs.items() if k not in TEXT_INPUTS})
    sizes = [t * h * w for t, h, w in case.own.shapes(record)]
    if list(case.own.layers(record).sizes) != sizes:
        raise Failed(
            f"layers() says that the items have {list(case.own.layers(record).sizes)} units, they have {sizes}"
        )
    kept = torch.cat([torch.arange(n) % 3 != 1 for n in sizes])
    for method, what in ((_Thirds(everything=True), "all units"), (_Thirds(), "two units of three")):
        with case.isolated(), Compression(case.model, _in_tower(method), adapter=case.adapter):
            alone = case.encode(case.pixels)[0]
        with case.isolated():
            plain = case.encode(case.pixels)[0]
        if (far := gap(alone[kept], plain[kept])) > CLOSE:
            raise Failed(f"layers(): where {what} stay, they are not what they are in the whole picture (by {far:.2g})")
    with Compression(case.model, _in_tower(_Thirds()), adapter=case.adapter):
        alone = case.encode(case.pixels)[0]
    if not bool((alone[kept] != case.encode(case.pixels)[0][kept]).any()):
        raise Failed("layers(): nothing changes where every third unit leaves the tower")


@dataclass(frozen=True)
class _Thirds(UnitMethod):
    """Two units of three, or all."""

    everything: bool = False
    card: ClassVar[Card] = Card(
        name="thirds",
        title="two units of three",
        paper="-",
        venue="-",
        stage="encoder",
        needs="-",
        budget=False,
        contract=Contract(count_from_grid=False, sync_free=False),
    )

    def stay(self, encoding: Encoding) -> torch.Tensor:
        return (torch.arange(len(encoding.states)) % 3 != 1) | self.everything


def _in_tower(method: UnitMethod) -> Recipe:
    return Recipe(stages=(Stage(kind="encoder", method=method, layer=1),))


def _some(case: AdapterCase, record: Any, kept: list[torch.Tensor]) -> torch.Tensor:
    """(T, D) features of all places, of which those of ``kept`` units are their own."""
    smaller = Smaller.units(record, case.own.parts(record, kept), kept, [None] * len(kept))
    method = type(case.base).get_image_features
    output = smaller.encode(method, case.base, record.inputs | {"return_dict": True})
    return torch.cat([item.reshape(-1, item.shape[-1]) for item in output.pooler_output])


def cls_token(case: AdapterCase) -> None:
    """The tower's first token is a CLS token, which no pixel changes, exactly if it says so."""
    with case.isolated() as seen:
        case.encode(case.pixels)
        case.encode(-case.pixels)
    constant = torch.equal(_crops(seen[0])[:, 0], _crops(seen[1])[:, 0])
    if case.own.cls_token and not constant:
        raise Failed("cls_token=True, but the tower's first token changes with the pixels: it is a patch")
    if constant and not case.own.cls_token:
        raise Failed("cls_token=False, but the tower's first token is the same for all pixels: it is a CLS token")


ADAPTER_CHECKS = {
    "structure": structure,
    "identity": identity,
    "schedules": schedules,
    "grids": grids,
    "geometry": geometry,
    "patches to tokens": patches,
    "units": units,
    "layers": layers,
    "CLS token": cls_token,
}


def _grids(case: AdapterCase, record: Any) -> list[torch.Tensor]:
    """The grids of all images.

    Raises:
        Failed: if they do not fit the images.
        NotApplicable: if they tell nothing.
    """
    places = case.own.grids(record)
    tokens = sum(item.shape[:-1].numel() for item in record.output.pooler_output)
    if sum(map(len, places)) != tokens:
        raise Failed(f"grids() has places for {sum(map(len, places))} tokens, the images have {tokens}")
    if all(bool((grid < 0).all()) for grid in places):
        raise NotApplicable("it does not say where tokens lie, so that methods which read the grid are refused")
    return places


def _disturb(case: AdapterCase, i: int, number: int, cell: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The pixels with one value changed, in the middle of a cell of image i of ``number``.

    Raises:
        NotApplicable: where the pixels are laid out in a way that is not known here.
    """
    pixels, thw = case.pixels.clone(), case.inputs.get("image_grid_thw")
    _, row, column = cell.tolist()
    if pixels.ndim == 2 and thw is not None:  # patches, those of one token behind each other
        start, own = int(thw[:i].prod(1).sum()), int(thw[i].prod())
        merged = own // int(size[1] * size[2] * thw[i, 0])
        pixels[start + (row * int(size[2]) + column) * merged] += 3.0
        return pixels
    if pixels.ndim == 5 and pixels.shape[:2].numel() == number:  # (prompts, tiles, 3, H, W)
        image = pixels.flatten(0, 1)[i]
    elif pixels.ndim in (4, 5) and len(pixels) == number:  # (images, 3, H, W), or (images, crops, 3, H, W)
        image = pixels[i] if pixels.ndim == 4 else pixels[i, 0]
    else:
        raise NotApplicable(f"pixels of shape {tuple(pixels.shape)} are laid out in a way that the kit does not know")
    height, width = image.shape[-2:]
    y, x = (2 * row + 1) * height // (2 * int(size[1])), (2 * column + 1) * width // (2 * int(size[2]))
    image[:, y, x] += 3.0
    return pixels


def _changed(features: torch.Tensor, plain: torch.Tensor) -> list[int]:
    return (features != plain).any(-1).nonzero().flatten().tolist()


def _crops(states: torch.Tensor) -> torch.Tensor:
    """(crops, patches, D), whether the tower works on crops or on one sequence."""
    return states if states.ndim == 3 else states[None]
