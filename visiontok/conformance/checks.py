"""The checks on a method: each one a claim about it, tried on a tiny model of one architecture.

A check returns nothing if the claim holds, raises :class:`Failed` with one plain sentence if not, and
:class:`NotApplicable` with the reason where the method makes no such claim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..api import Callback, Compression, base_model
from ..budget import Budget
from ..errors import ConfigError
from ..ledger import TokenLedger
from ..method import Picture
from ..recipe import Recipe
from ..report import Report
from . import zoo
from .oracle import DenseMasked, encodings, greedy
from .spy import Asked, alone, ask, contract, keeps, padded, permuted, spied, take, within, without_ties

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

STEPS = 4
DRAWS = 5
CLOSE = 1e-6  # of the largest logit, in float64


class Failed(Exception):  # noqa: N818  # a verdict
    """The claim does not hold. The message is a sentence about the subject."""


class NotApplicable(Exception):  # noqa: N818
    """The subject makes no such claim. The message says why."""


@dataclass(frozen=True)
class Run:
    """One forward of a compressed model, and the questions its methods were asked."""

    logits: torch.Tensor
    alive: list[torch.Tensor]
    ledger: TokenLedger
    report: Report
    asked: list[Asked]


@dataclass
class Case:
    """A recipe on a tiny model.

    Attributes:
        recipe: as its author gave it.
        architecture: a name of :data:`visiontok.conformance.zoo.ARCHITECTURES`.
        keep: the budget of a recipe that takes one and has none.
    """

    recipe: Recipe
    architecture: str
    keep: Budget = field(default_factory=lambda: Budget.ratio(0.4))

    @property
    def model(self) -> Any:
        """In float64."""
        return zoo.build(self.architecture)

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """Two left-padded prompts of two images each."""
        return self.batch()

    def batch(self, **more: Any) -> dict[str, Any]:
        """Prompts as :func:`visiontok.conformance.zoo.batch` makes them; with margins where pixels decide."""
        margins = any(m.card.stage == "pixel" and not m.card.budget for m in self.selecting)
        return zoo.batch(self.architecture, self.model, margins=margins, **more)

    @functools.cached_property
    def selecting(self) -> list[Any]:
        """The methods of the recipe."""
        return [s.method for s in self.recipe.stages if s.method is not None]

    @functools.cached_property
    def asking(self) -> Recipe:
        """The recipe with a budget, where it takes one."""
        has_own = self.recipe.average is not None or any(s.keep is not None for s in self.recipe.stages)
        return self.recipe if has_own or not self.takes_budget else self.recipe.with_keep(self.keep)

    @property
    def takes_budget(self) -> bool:
        """Whether any method of the recipe does."""
        return any(method.card.budget for method in self.selecting)

    @property
    def exact(self) -> bool:
        """Whether the number of kept tokens is fixed by the budget, not only bounded."""
        fixed = all(contract(m).count_from_grid and m.card.stage not in ("pixel", "merge") for m in self.selecting)
        return self.recipe.fidelity == "fixed" and fixed

    @functools.cached_property
    def plain(self) -> Run:
        """The recipe on the inputs."""
        return self.run(self.asking)

    def run(
        self, recipe: Recipe, inputs: dict[str, Any] | None = None, model: Any = None, *, force: bool = False
    ) -> Run:
        """One forward with the recipe."""
        log: list[Asked] = []
        model = self.model if model is None else model
        with Compression(model, spied(recipe, log), force=force) as compression, torch.no_grad():
            logits = model(**(self.inputs if inputs is None else inputs)).logits
            ledger = compression.ledger
            alive = [ledger.alive(layer) for layer in range(ledger.depth)]
            return Run(logits, alive, ledger, compression.report, log)

    def questions(self) -> list[Asked]:
        """What the methods were asked, in a run with a budget.

        Raises:
            NotApplicable: if the recipe selects nothing.
        """
        if not self.plain.asked:
            raise NotApplicable("it chooses no tokens, its layers fix what is computed")
        return self.plain.asked

    @property
    def whole_groups(self) -> bool:
        """Whether images of a prompt share one budget, and stay or go whole."""
        return any(contract(method).whole_groups for method in self.selecting)

    def need_budget(self, keep: Budget) -> Recipe:
        """The recipe with another budget.

        Raises:
            NotApplicable: if it takes none.
        """
        if not self.takes_budget:
            raise NotApplicable("it takes no budget")
        return self.recipe.with_keep(keep)


def identity(case: Case) -> None:
    """At keep=100 % the model computes what the stock model does, bit for bit."""
    recipe = case.need_budget(Budget.ratio(1.0))
    hiding = [
        s.kind for s in case.recipe.stages if s.kind not in ("pixel", "encoder", "merge", "prompt", "cut", "cache")
    ]
    if hiding:
        raise NotApplicable(f"its {hiding[0]} stage hides tokens at any budget")
    stock, where = _stock(case.architecture), case.inputs["attention_mask"].bool()
    for force, what in ((False, "keep=1.0"), (True, "keep=1.0, sent through the whole machinery,")):
        got = case.run(recipe, force=force).logits
        if not torch.equal(got[where], stock[where]):
            raise Failed(f"{what} changes the logits by up to {gap(got[where], stock[where]):.2g} of the largest")


def rows(case: Case) -> None:
    """A prompt alone gives the tokens and logits that it gives in a left-padded batch."""
    together = case.plain
    for b, mask in enumerate(case.inputs["attention_mask"].bool()):
        single = case.run(case.asking, case.batch(pad=0, only=b))
        for layer in range(together.ledger.depth):
            held, mine = (run.ledger.cached(layer) for run in (together, single))
            if not torch.equal(held[b, mask], mine[0]):
                raise Failed(
                    f"prompt {b} keeps other tokens in a batch than alone (decoder layer {layer}): a token's fate "
                    "must not depend on the other rows, so reduce over dim 1, never over the images"
                )
        far = gap(together.logits[b, mask], single.logits[0])
        if far > CLOSE:
            raise Failed(f"prompt {b} has other logits in a batch than alone (by {far:.2g} of the largest)")


def images(case: Case) -> None:
    """An image alone keeps the tokens that it keeps among others (contract: per_image)."""
    for asked in case.questions():
        if not asked.contract.per_image:
            raise NotApplicable("its contract says per_image=False")
        together = within(asked.answer.keep, asked.context)
        for u in range(len(together)):
            if not torch.equal(keeps(asked.method, alone(asked.context, u))[0], together[u]):
                raise Failed(
                    f"image {u} keeps other tokens alone than among the {len(together)} of the batch, though the "
                    "contract says per_image=True: reduce over dim 1, never over the images"
                )


def budget(case: Case) -> None:
    """Exactly as many tokens of every image as asked for, all of an image that has no more, never none."""
    for keep in (Budget.tokens(2), Budget.tokens(10), Budget.ratio(0.3), Budget.ratio(0.65), Budget.tokens(10_000)):
        recipe = case.need_budget(keep)
        if recipe.average is not None:
            _average(case, recipe, keep)
            continue
        if case.whole_groups:
            _of_prompts(case.run(recipe).report, keep)
            continue
        for image in case.run(recipe).report.images:
            wanted, got = int(keep.counts([image.tokens])[0]), image.cached[-1]
            if got > wanted or got < (wanted if case.exact else 1):
                most = "" if case.exact else "at most "
                raise Failed(
                    f"asked for {most}{wanted} of the {image.tokens} tokens of an image (keep={keep}) it keeps {got}: "
                    "keep ctx.count[u] of the candidates ctx.valid[u]"
                )


def oracle(case: Case) -> None:
    """Greedy generation equals the dense masked oracle of what the ledger says, in every token and logit."""
    # without masses, which this oracle does not know; they have one of their own in the project's tests
    against_oracle(case.model, case.inputs, case.asking.with_mass(None), zoo.BANNED)


def permutation(case: Case) -> None:
    """Tokens in another order, with their features, scores and places, are chosen alike (contract: order_free)."""
    for asked in case.questions():
        if asked.drew:
            raise NotApplicable("it draws at random")
        if not asked.contract.order_free:
            raise NotApplicable("its contract says order_free=False")
        # Symmetric distances and regular grids tie even where tokens are random. So a few images may differ, and a
        # method is order-free if it is so on either kind of grid.
        share = min(_moved(asked, scattered=scattered) for scattered in (False, True))
        if share > 0.25:
            raise Failed(
                f"which tokens stay depends on their index in the sequence (in {share:.0%} of the shuffled images): "
                "rank by what they are, take places from ctx.grid, or declare Contract(order_free=False)"
            )


def something_dropped(case: Case) -> None:
    """A recipe that is asked for fewer tokens drops some, or computes less of them in some layers."""
    if not all(contract(method).keeps_some for method in case.selecting):
        raise NotApplicable("its contract says keeps_some=False: it may leave the tokens where they are, or none")
    ledger = case.plain.ledger
    saves = ledger.narrow() or any(bool(ledger.frozen(layer).any()) for layer in range(ledger.depth))
    if any(method.rebuild is not None for method in case.selecting):
        costs = case.plain.report.account
        if costs.vision is not None and costs.vision == costs.vision_stock:
            raise Failed("units of no picture leave the vision tower")
        saves = True
    if not ledger.dropped and not saves:
        budgets = [case.asking.average, *(s.keep for s in case.asking.stages)]
        if any(b is not None for b in budgets) and all(b is None or b == Budget.ratio(1.0) for b in budgets):
            raise NotApplicable("its own budget is everything")
        still = Picture(pixels=torch.full((2, 4, 4, 3, 1, 16), 0.5), count=32, budgeted=False)
        by_pixels = [m for m in case.selecting if m.card.gives == "units" and not m.card.budget]
        if any(not bool(method.units(still).keep.all()) for method in by_pixels):
            raise NotApplicable("it drops units of a video that stands still, but none of these images")
        if any(method.card.stage == "merge" and not method.card.budget for method in case.selecting):
            raise NotApplicable("it merges what is similar enough, which here is nothing")
        asked = next((f"asked for keep={b}" for b in budgets if b is not None), "run without a budget")
        raise Failed(f"{asked} it silently keeps and computes every visual token in every layer")


def one_token(case: Case) -> None:
    """keep=1 leaves one token of every image, in rows of two, one and no image."""
    recipe = case.need_budget(Budget.tokens(1))
    if recipe.average is not None:
        raise NotApplicable("its budget is an average over layers")
    for number in ([2, 0], [0, 1]):
        inputs = case.batch(images=number)
        run = case.run(recipe, inputs)
        kept = [image.cached[-1] for image in run.report.images]
        if case.whole_groups:
            _of_prompts(run.report, Budget.tokens(1))
        elif kept != [1] * sum(number):
            raise Failed(f"with keep=1 and {number} images per row it keeps {kept} tokens instead of one each")
        if not bool(run.logits[inputs["attention_mask"].bool()].isfinite().all()):
            raise Failed("with keep=1 the logits are not finite")


def nan(case: Case) -> None:
    """Pixels that are not numbers are refused with a clear error."""
    case.questions()
    inputs = dict(case.inputs)
    inputs["pixel_values"] = inputs["pixel_values"].clone().fill_(torch.nan)
    try:
        case.run(case.asking, inputs)
    except ConfigError as error:
        if "NaN" in str(error):
            return
        raise Failed(f"pixels of NaN give an error that does not say so: {error}") from error
    raise Failed("pixels of NaN go through without an error, and what is kept means nothing")


def padding(case: Case) -> None:
    """What stands where no token is (ctx.valid is False) changes nothing and is never kept."""
    for asked in case.questions():
        plain = within(asked.answer.keep, asked.context)
        if not torch.equal(asked.answer.keep, plain):
            raise Failed("it keeps slots that hold no token: keep only where ctx.valid is True")
        n = plain.shape[1]
        for value in (0.0, torch.nan, 1e9, -torch.inf):
            ctx = padded(asked.context, value)
            keep = ask(asked.method, ctx).answer.keep
            if not torch.equal(keep, within(keep, ctx)):
                raise Failed(f"it keeps slots that hold no token once {value} stands there: mask scores by ctx.valid")
            if not torch.equal(keep[:, :n], plain):
                raise Failed(f"{value} in slots that hold no token changes what it keeps: mask by ctx.valid first")


def bfloat16(case: Case) -> None:
    """A bfloat16 model runs, keeps the right number of tokens and gives finite logits."""
    model = zoo.build(case.architecture, dtype=torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in case.inputs.items()}
    run = case.run(case.asking, inputs, model)
    if not bool(run.logits[inputs["attention_mask"].bool()].isfinite().all()):
        raise Failed("on a bfloat16 model its logits are not finite")
    wanted, got = ([image.cached for image in r.report.images] for r in (case.plain, run))
    if case.takes_budget and case.exact and wanted != got:
        raise Failed(
            f"on a bfloat16 model it keeps {got[0]} tokens of the first image per layer, in float64 {wanted[0]}"
        )


def determinism(case: Case) -> None:
    """The same call twice gives the same; only the seed changes a draw, and only a draw."""
    first, again = case.plain, case.run(case.asking)
    if any(asked.global_random for asked in first.asked):
        raise Failed(
            "it uses torch's global random numbers: draw from ctx.generator(u), which the seed of the recipe sets"
        )
    if not _alike(first, again) or not torch.equal(first.logits, again.logits):
        raise Failed("the same call twice keeps different tokens: draw from ctx.generator(u) only")
    drew = any(asked.drew for asked in first.asked)
    for method in case.selecting:
        if not isinstance(method, Callback) and method.card.stochastic and not drew:
            raise Failed("its card says stochastic=True, but it never draws from ctx.generator")
        if not isinstance(method, Callback) and drew and len(case.selecting) == 1 and not method.card.stochastic:
            raise Failed("it draws from ctx.generator, but its card says stochastic=False")
    others = [case.run(replace(case.asking, seed=case.recipe.seed + s)) for s in ((1, 2, 3) if drew else (1,))]
    if drew and all(_alike(first, other) for other in others):
        raise Failed("it draws at random, but four seeds keep the same tokens")
    if not drew and not all(_alike(first, other) for other in others):
        raise Failed("it draws nothing from ctx.generator, but another seed keeps other tokens")


def untouched(case: Case) -> None:
    """It leaves the tensors of its context as they are."""
    for asked in case.questions():
        if asked.touched:
            raise Failed(f"it changes ctx.{asked.touched[0]} in place, which others read: work on a copy")


def question(case: Case) -> None:
    """Another text around the images keeps the same tokens (contract: question_independent)."""
    for asked in case.questions():
        if not asked.contract.question_independent:
            raise NotApplicable("its contract says question_independent=False")
    other = case.run(case.asking, case.batch(seed=1))
    if not _alike(case.plain, other):
        raise Failed(
            "another question keeps other tokens, though the contract says question_independent=True: declare "
            "Contract(question_independent=False)"
        )


def count(case: Case) -> None:
    """Other pixels keep as many tokens (contract: count_from_grid)."""
    for method in case.selecting:
        if not contract(method).count_from_grid:
            raise NotApplicable("its contract says count_from_grid=False")
    other = case.run(case.asking, case.inputs | {"pixel_values": -case.inputs["pixel_values"]})
    kept, others = ([image.cached for image in run.report.images] for run in (case.plain, other))
    if kept != others:
        raise Failed(
            f"other pixels keep {others[0]} instead of {kept[0]} tokens per layer, though the contract says "
            "count_from_grid=True: declare Contract(count_from_grid=False)"
        )


CHECKS = {
    "identity": identity,
    "row versus batch": rows,
    "image alone": images,
    "budget": budget,
    "oracle": oracle,
    "permutation": permutation,
    "no silent no-op": something_dropped,
    "K = 1": one_token,
    "NaN": nan,
    "padding": padding,
    "bfloat16": bfloat16,
    "determinism": determinism,
    "inputs untouched": untouched,
    "question": question,
    "count": count,
}


def against_oracle(
    model: Any,
    inputs: dict[str, Any],
    recipe: Recipe,
    banned: Sequence[int],
    *,
    adapter: type[Adapter] | None = None,
    close: float = CLOSE,
) -> tuple[list[torch.Tensor], Any]:
    """Greedy generation with a cache equals the dense masked oracle, and the cache holds what the ledger says.

    Args:
        model: a tiny model.
        inputs: its prompts.
        recipe: what to attach.
        banned: tokens never generated.
        adapter: instead of the registered one.
        close: how far logits may lie apart, as a part of the largest.

    Returns:
        per layer the (B, N) mask of living tokens, and what ``generate`` returned.

    Raises:
        Failed: if anything differs.
    """
    log: list[Asked] = []
    pixels = any(stage.kind in ("pixel", "encoder", "merge") for stage in recipe.stages)
    with Compression(model, spied(recipe, log), adapter=adapter) as compression:
        with encodings(base_model(model)) if pixels else nullcontext() as features:
            out = generate(model, inputs, banned)
        ledger = compression.ledger
    alive = [ledger.alive(layer) for layer in range(ledger.depth)]
    stored = [layer.keys.shape[-2] - STEPS + 1 for layer in out.past_key_values.layers]
    if stored != ledger.cached_tokens():
        raise Failed(f"the cache holds {stored} prompt tokens per layer, the ledger says {ledger.cached_tokens()}")
    text = inputs["attention_mask"].bool() & ~ledger.visual
    cached = [ledger.cached(layer) for layer in range(ledger.depth)]
    masks = [*alive, *(head for layer in cached for head in layer.unbind(2))]
    if any(not torch.equal(mask & ~ledger.visual, text) for mask in masks):
        raise Failed("text tokens are dropped, or padding is kept")
    with encodings(base_model(model), features) if pixels else nullcontext():
        frozen = [ledger.frozen(layer) for layer in range(ledger.depth)]
        weights = _weights(ledger, log)
        narrow = {layer: (ledger.visual, channels) for layer, (_, channels) in ledger.narrow().items()}
        dense = DenseMasked(
            model, alive, _merged(ledger, log), _means(log), frozen, cached, weights=weights, narrow=narrow
        )
        sequences, logits = greedy(model, inputs, alive, STEPS, banned, dense)
    far = gap(torch.stack(out.logits, 1), logits)
    if far > close or not torch.equal(out.sequences, sequences):
        raise Failed(
            f"generation differs from a stock model in which the dropped tokens are masked (logits by {far:.2g} of "
            "the largest)"
        )
    return alive, out


def generate(model: Any, inputs: dict[str, Any], banned: Sequence[int]) -> Any:
    """Greedy generation of a few tokens, with logits."""
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            suppress_tokens=list(banned),
        )


def gap(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a part of the largest expected value; infinite where one of them is not a number."""
    if not got.numel():
        return 0.0
    far = (got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float(far.nan_to_num(nan=torch.inf))


@functools.cache
def _stock(architecture: str) -> torch.Tensor:
    model = zoo.build(architecture)
    with torch.no_grad():
        return model(**zoo.batch(architecture, model)).logits


def _alike(a: Run, b: Run) -> bool:
    """Whether both kept the same tokens in every layer."""
    first, second = (
        [r.ledger.visual[..., None] & r.ledger.cached(layer) for layer in range(r.ledger.depth)] for r in (a, b)
    )
    return all(map(torch.equal, first, second))


def _average(case: Case, recipe: Recipe, keep: Budget) -> None:
    """The budget of a schedule, an average over all decoder layers, is used up to less than one token."""
    try:
        run = case.run(recipe)
    except ConfigError:
        return  # too little for these stages; the error says so
    for image in run.report.images:
        most = image.tokens * sum(map(bool, image.kept)) / len(image.kept)  # of layers that may see any
        wanted = min(float(keep.value * image.tokens if keep.kind == "ratio" else keep.value), most)
        if image.average > wanted or (case.exact and image.average <= wanted - 1):
            raise Failed(
                f"asked for {wanted:g} tokens per image on layer average (keep={keep}) it keeps {image.average:g}"
            )


def _of_prompts(report: Report, keep: Budget) -> None:
    """Of a prompt at most the shares of its images together, or one group that is larger, but never nothing."""
    for row in {image.row for image in report.images}:
        mine = [image for image in report.images if image.row == row]
        wanted = int(keep.counts([image.tokens for image in mine]).sum())
        kept = [image.kept[-1] for image in mine]
        if not any(kept) or (sum(kept) > wanted and sum(map(bool, kept)) > 1):
            raise Failed(
                f"asked for keep={keep}, {wanted} tokens of a prompt, it keeps {kept} of its images: keep the best "
                "group, and others while they fit"
            )


def _merged(ledger: TokenLedger, log: Sequence[Asked]) -> torch.Tensor | None:
    """(B, N, D) embeddings that merging methods put into the prompt, NaN elsewhere; None if none did."""
    merged = None
    for asked in log:
        features = asked.answer.features
        if features is not None:
            if merged is None:
                merged = features.new_full((*ledger.visual.shape, features.shape[-1]), torch.nan)
            keep, ctx = asked.answer.keep & asked.context.valid, asked.context
            merged[ctx.row[:, None].expand_as(keep)[keep], ctx.place[keep]] = features[keep]
    return merged


def _means(log: Sequence[Asked]) -> dict[int, list[tuple[int, int, list[int]]]]:
    """Per cut that merges: prompt row, position of a token, and positions of those whose mean it becomes."""
    means: dict[int, list[tuple[int, int, list[int]]]] = {}
    for asked in log:
        into, layer, place = asked.answer.into, asked.context.layer, asked.context.place
        if into is None or layer is None:
            continue
        found = means.setdefault(layer, [])
        for u, row in enumerate(asked.context.row.tolist()):
            homes = torch.where(asked.context.valid[u], into[u], -1)
            for home in sorted(set(homes[homes >= 0].tolist())):
                found.append((row, int(place[u, home]), place[u][homes == home].tolist()))
    return means


def _weights(ledger: TokenLedger, log: Sequence[Asked]) -> dict[int, torch.Tensor] | None:
    """Per layer that some tokens pass by the (B, N) factors, 1 for text; None if there are none."""
    units, found = ledger.units, {}
    for asked in log:
        weights, layer = asked.answer.weights, asked.context.layer
        if weights is not None and layer is not None:
            there = units.scatter(asked.context.valid)
            found[layer] = torch.where(there, units.scatter(weights), 1.0)
    return found or None


def _moved(asked: Asked, *, scattered: bool) -> float:
    """The share of images in which other tokens are kept once they stand in another order.

    Raises:
        Failed: if merged tokens become something else.
    """
    moved: list[bool] = []
    for seed in range(DRAWS):
        ctx = without_ties(asked.context, seed, scattered=scattered)
        order = _shuffles(ctx.size, ctx.valid, seed)
        plain, other = ask(asked.method, ctx), ask(asked.method, permuted(ctx, order))
        keep, shuffled = take(within(plain.answer.keep, ctx), order), within(other.answer.keep, other.context)
        moved += (keep != shuffled).flatten(1).any(1).tolist()
        if plain.answer.features is not None and other.answer.features is not None:
            both = keep & shuffled
            if gap(other.answer.features[both], take(plain.answer.features, order)[both]) > CLOSE:
                raise Failed("what merged tokens become depends on their index in the sequence")
    return sum(moved) / len(moved)


def _shuffles(size: torch.Tensor, valid: torch.Tensor, seed: int) -> torch.Tensor:
    """(U, N) long: a random order of the tokens of each image; slots behind them stay."""
    g = torch.Generator().manual_seed(seed)
    order = torch.arange(valid.shape[1]).repeat(len(valid), 1)
    for u, n in enumerate(size.tolist()):
        order[u, :n] = torch.randperm(n, generator=g)
    return order
