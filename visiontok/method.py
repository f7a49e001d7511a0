"""What a compression method is: a card, the attention it needs, and one function of the context.

A method is a frozen dataclass whose fields are its options. It says *which* visual tokens survive; where in the model
that happens is a :class:`Stage`, and a list of stages is a :class:`visiontok.Recipe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from .budget import Budget
from .errors import ConfigError

if TYPE_CHECKING:
    import torch

    from .context import Context

Layer = int | float
StageKind = Literal[
    "pixel", "encoder", "merge", "prompt", "cut", "inject", "exit", "skip", "freeze", "narrow", "route", "cache"
]


def labelled(name: str, *notes: str) -> str:
    """``name[note, note]``, without the notes that are empty; they join those that ``name`` already has."""
    said = ", ".join(note for note in notes if note)
    if not said:
        return name
    return f"{name[:-1]}, {said}]" if name.endswith("]") else f"{name}[{said}]"


def resolve_layer(layer: Layer, depth: int, *, name: str, lowest: int = 0) -> int:
    """0-based layer index of ``layer`` in a stack of ``depth`` layers.

    Args:
        layer: an index (negative counts from the end), or a float in [0, 1): a fraction of the depth, rounded down.
        depth: number of layers of the stack.
        name: what the caller calls this argument; used in the error.
        lowest: smallest index allowed; fractions are raised to it, explicit indices below it are errors.

    Raises:
        ConfigError: if an explicit index lies outside ``lowest … depth-1`` or a fraction outside [0, 1), and for bools.
    """
    if isinstance(layer, bool):
        raise ConfigError(f"{name}={layer}: a layer is an index or a fraction of the depth")
    if isinstance(layer, float):
        if not 0.0 <= layer < 1.0:
            raise ConfigError(
                f"{name}={layer}: a fraction of the depth must lie in [0, 1); write an int for a layer index"
            )
        return min(max(int(layer * depth), lowest), depth - 1)
    index = layer + depth if layer < 0 else layer
    if not lowest <= index < depth:
        raise ConfigError(
            f"{name}={layer}: this model has {depth} layers; use {lowest} … {depth - 1} or a fraction in [0, 1)"
        )
    return index


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a server may assume of a method.

    Attributes:
        count_from_grid: the number of kept tokens follows from the image grid alone.
        per_image: a token's fate depends on its own image only.
        question_independent: the question does not matter, so compressed images can be cached.
        sync_free: selection needs no host synchronisation.
        order_free: a token's fate does not depend on its index, except between equals; where it lies is ``ctx.grid``.
        prefix_cacheable: what follows an image in the prompt does not matter in models of causal attention, so that the
            cache of a prefix that ends with it can be shared between questions; by default ``question_independent``.
        keeps_some: at least one token of every image stays; without, a cut may be an exit.
        whole_groups: pictures, or frames, stay whole or go whole. The budget is one for all images of a prompt, and the
            best group stays in any case.
    """

    count_from_grid: bool = True
    per_image: bool = True
    question_independent: bool = True
    sync_free: bool = True
    order_free: bool = True
    keeps_some: bool = True
    whole_groups: bool = False
    prefix_cacheable: bool | None = None

    def __post_init__(self) -> None:
        if self.prefix_cacheable is None:
            object.__setattr__(self, "prefix_cacheable", self.question_independent)


@dataclass(frozen=True, kw_only=True)
class Card:
    """The machine-readable description of a method.

    Attributes:
        name: the name in the literature, which is also the name in the API and on the command line.
        title: one line of what it does.
        paper: reference; ``"-"`` for baselines.
        venue: where it appeared.
        formula: one line of mathematics: x tokens before and z behind the projector M, a attention, q the question's
            tokens, S what is kept so far, N tokens of which K stay.
        stage: ``"pixel"``, ``"encoder"``, ``"merge"``, ``"prompt"``, ``"decoder"`` or ``"cache"``.
        needs: what the method reads, in words.
        official: what the published code does.
        bugs: its known bugs; fixed here unless ``departures`` says otherwise.
        trained: trained weights that the published form needs and a model does not bring along.
        departures: where this implementation differs from paper or code, and why.
        defaults: defaults per model family and budget.
        cost: extra work, in O-notation.
        gives: of a pixel method, what the tower gets: ``smaller`` pictures, or some ``units`` of each.
        budget: whether the method takes ``keep``.
        stochastic: whether the outcome depends on ``seed``.
        contract: the serving contract.
    """

    name: str
    title: str
    paper: str
    venue: str
    formula: str = "-"
    stage: Literal["pixel", "encoder", "merge", "prompt", "decoder", "cache"]
    needs: str
    official: str = "-"
    bugs: str = "none known"
    trained: str = "none"
    departures: str = "none"
    defaults: str = "-"
    cost: str = "-"
    gives: Literal["smaller", "units"] = "smaller"
    budget: bool = True
    stochastic: bool = False
    contract: Contract = Contract()


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method reads beyond the features; everything else is not computed.

    Vision layers are indices into the tower (0-based, negative from the end) or fractions of its depth. Decoder layers
    are offsets from the cut: ``-1`` is the layer just before it, ``0`` the first that sees the reduced set, asked what
    it would attend to without the cut. What they yield is said at the method of
    :class:`visiontok.context.Attention` that reads it.

    Attributes:
        vision_cls: layers for ``ctx.attention.cls``; the others name theirs likewise.
        decoder_transition: decoder layers, indices or fractions of the depth, from which ``ctx.attention.transition``
            sums up to the one just before the cut.
        decoder_ahead: decoder layers, indices or fractions of the depth, for ``ctx.attention.ahead`` in a prompt stage.
        relevance: ``ctx.attention.relevance`` in a prompt stage.
        cache_window: numbers of last prompt tokens, for ``ctx.attention.cache_window`` in a cache stage.
        cache_received: (0,) for ``ctx.attention.cache_received`` in a cache stage.
        encoder_features: ``ctx.encoder_features``.
        projector: ``ctx.project``, and with it ``ctx.encoder_features``.
        pixels: ``ctx.pixels``.
        question: ``ctx.question_features`` and ``ctx.question_valid``.
        final_norm: ``ctx.normed``.
    """

    vision_cls: tuple[Layer, ...] = ()
    vision_cls_joined: tuple[Layer, ...] = ()
    vision_cls_logits: tuple[Layer, ...] = ()
    vision_keys: tuple[Layer, ...] = ()
    vision_received: tuple[Layer, ...] = ()
    decoder_last_row: tuple[int, ...] = ()
    decoder_text_rows: tuple[int, ...] = ()
    decoder_text_heads: tuple[int, ...] = ()
    decoder_received: tuple[int, ...] = ()
    decoder_flow: tuple[int, ...] = ()
    decoder_to_text: tuple[int, ...] = ()
    decoder_unturned_row: tuple[int, ...] = ()
    decoder_own_peaks: tuple[int, ...] = ()
    decoder_text_peaks: tuple[int, ...] = ()
    decoder_states: tuple[int, ...] = ()
    decoder_queries: tuple[int, ...] = ()
    decoder_keys: tuple[int, ...] = ()
    decoder_values: tuple[int, ...] = ()
    decoder_transition: tuple[Layer, ...] = ()
    decoder_ahead: tuple[Layer, ...] = ()
    relevance: bool = False
    cache_window: tuple[int, ...] = ()
    cache_received: tuple[int, ...] = ()
    encoder_features: bool = False
    projector: bool = False
    pixels: bool = False
    question: bool = False
    final_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What is known of a vision tower before it runs, for defaults that depend on it.

    Attributes:
        depth: attention layers.
        has_cls: whether every crop begins with a CLS token.
        feature_layer: the layer whose output becomes the visual features.
        full_attention: layers in which a patch sees its whole image; windowed layers are missing.
        thumbnail: whether a picture comes twice, as a thumbnail (t = 0 in its grid) and re-tiled from crops of the
            thumbnail's size, without padding (t = 1).
    """

    depth: int
    has_cls: bool
    feature_layer: int
    full_attention: tuple[int, ...]
    thumbnail: bool = False


@dataclass(frozen=True, kw_only=True)
class Merging:
    """What a method merges of one picture in the layers of a vision tower; one of the two is given.

    Attributes:
        r: tokens that each layer merges away.
        thresholds: the cosine above which each layer merges every pair.
        rounds: whether a layer that is to merge away more than half of its tokens matches several times.
        proportional: whether log(size) is added to the attention logits of merged tokens.
        observe: called with each layer, and (B, n) the cosines of its pairs, -inf where there is none.
    """

    r: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()
    rounds: bool = True
    proportional: bool = True
    observe: Callable[[int, torch.Tensor], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A method's answer when it merges: which tokens stay, and what they become.

    Attributes:
        keep: (U, N) bool, tokens that stay; at a cache stage also (U, N, G), those of each of G key-value heads.
        features: (U, N, D) or None; rows of kept tokens replace the originals, other rows are ignored. Prompt stage
            only.
        into: (U, N) long or None; for each token the place of the kept token whose features contain it, -1 for tokens
            that went nowhere. Mass attention counts such tokens there and moves them no further. At a cut, a kept
            token's state becomes the mean of those that went into it; its own is one of them if ``into`` says so.
        weights: (U, N) float or None, for a route: the factor of the state of a token that passes the layer by, and of
            what the MLP adds to the state of one that goes through it. None is 1.
    """

    keep: torch.Tensor
    features: torch.Tensor | None = None
    into: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image or a video before the vision tower, in units: what becomes one token of the language model.

    Attributes:
        pixels: (t, rows, columns, 3, m, P) float32, not normalised, 0 … 1: the P pixels of the m patches of each unit.
        count: units that may stay; all of them without a budget.
        budgeted: whether there is one.
    """

    pixels: torch.Tensor
    count: int
    budgeted: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns of units."""
        t, rows, columns = self.pixels.shape[:3]
        return t, rows, columns


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A pixel method's answer: which units of a picture the tower gets.

    Attributes:
        keep: (t, rows, columns) bool.
        source: (t, rows, columns) long or None; the kept unit, by its index in ``keep`` flattened, that each unit is
            represented by, of kept ones themselves. By default it is the last kept one before it.
    """

    keep: torch.Tensor
    source: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The units of an image or video on the input of a layer of the vision tower.

    Attributes:
        states: (n, m, D), the m patches of each of the n units that the tower got.
        before: the same on the input of the layer before; None on that of the first.
        received: (n, m) attention that each patch receives in the layer before, mean over heads and the patches of its
            own picture or window; None unless declared as ``vision_received`` of that layer.
        count: units that may stay.
        budgeted: whether there is a budget; without, all may.
    """

    states: torch.Tensor
    before: torch.Tensor | None
    received: torch.Tensor | None
    count: int
    budgeted: bool


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """How units that leave a tower come back behind it, so that all tokens reach the language model.

    A patch that left has its last state and, on top, what its nearest kept patches have moved since, on average.

    Attributes:
        neighbours: how many, by Euclidean distance on the input of the layer where they leave.
        layers: tower layers from there on whose attention sees them so; their MLP sees kept ones alone.
    """

    neighbours: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Mass:
    """Mass attention: a kept token speaks for the tokens of its image that it replaces.

    Every dropped token goes to the kept one of largest cosine, or to the one that a merging method has put it into,
    whose value then is the method's and moves no further. A kept token that stands for n tokens, itself included,
    takes over a share of their mean, and ``beta · log n`` is added to the attention logit of its key in every layer
    from there on, in prefill and decode. With ``beta=1, merge=0`` that is attention over n copies of each kept token.

    Attributes:
        beta: factor of the log mass, at least 0; 0 merges only.
        merge: share of the mean in the token's new value, in [0, 1]; 0 leaves values as they are.
    """

    beta: float = 1.0
    merge: float = 0.5

    def __post_init__(self) -> None:
        for name, value, most in (("beta", self.beta, math.inf), ("merge", self.merge, 1.0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                wanted = "a number in [0, 1]" if name == "merge" else "a number of at least 0"
                raise ConfigError(f"mass.{name}={value!r}: must be {wanted}")
        if self.beta == math.inf:
            raise ConfigError("mass.beta=inf: must be finite")
        for name in ("beta", "merge"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 2 and 2.0 have one hash

    def __str__(self) -> str:
        """As labels name it: ``mass``, with what differs from the defaults."""
        changed = [f"{f.name}={getattr(self, f.name):g}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(["mass", *changed])

    @classmethod
    def parse(cls, value: Any) -> Mass | None:
        """What a user means: True the defaults, False or None nothing, a mapping its fields.

        Raises:
            ConfigError: for anything else.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and set(value) <= {"beta", "merge"}:
            return cls(**value)
        raise ConfigError(f"mass={value!r}: give True, a Mass, or a mapping with beta and merge")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One event on the way through the model.

    Attributes:
        kind: ``pixel`` gives the vision tower less, smaller pictures or some units of them; ``encoder`` selects on the
            input of layer ``layer`` of the tower; ``merge`` merges tokens in its layers; ``prompt`` selects before the
            language model; ``cut`` selects on the input of decoder layer ``layer``; ``inject`` keeps visual tokens out
            of the layers below ``layer``; ``exit`` keeps them out from ``layer`` on. In each of the layers
            ``layer … until-1``, ``skip`` keeps them out, ``freeze`` lets them pass as they are, attended to but not
            computed, ``narrow`` gives those that go through the MLP the first of its inner channels only, and
            ``route`` chooses anew who goes through the layer; the others pass it by. ``cache`` selects which of the
            keys and values that a layer has stored stay for what comes behind the prompt.
        layer: decoder layer, or tower layer (index or fraction of the depth); None for ``pixel``, ``merge`` and
            ``prompt``. A ``cache`` stage acts in every layer from it on, by default in all; with a layer, its method
            may read what a cut there may.
        until: first layer after a ``skip``, a ``freeze``, a ``narrow`` or a ``route``; the last three are of one layer
            without. 1.0 is the end.
        method: who selects, for ``pixel``, ``encoder``, ``merge``, ``prompt``, ``cut``, ``route`` and ``cache``.
        keep: how many of the *original* visual tokens of an image are left afterwards, for these but ``route``; at most
            as many for ``pixel`` and ``merge``.
        mass: whether kept tokens speak for the dropped ones, for ``pixel``, ``encoder``, ``merge``, ``prompt`` and
            ``cut``.
        reserve: share of the budget that goes, before the method is asked for the rest, to the tokens of largest mean
            cosine under the language model's rotary positions, and once more to those of largest mean sine (IVC-Prune,
            arXiv 2602.03060), which tell it where things are; below 1/2, for ``prompt`` and ``cut``. The paper keeps
            half of the tokens and reserves a tenth of all for either, which is 0.2. What is kept then depends on where
            in the prompt the image stands, too.
        shrink: by what a ``narrow`` stage divides the number of the MLP's inner channels, rounded down; at least 1.
    """

    kind: StageKind
    method: Method | None = None
    layer: Layer | None = None
    until: Layer | None = None
    keep: Budget | None = None
    mass: Mass | None = None
    reserve: float = 0.0
    shrink: float | None = None

    def __post_init__(self) -> None:
        before = self.kind in ("pixel", "encoder", "merge", "prompt")
        speaks = before or self.kind == "cut"
        selects = speaks or self.kind in ("route", "cache")
        if self.kind not in get_args(StageKind):
            raise ConfigError(f"kind={self.kind!r}: a stage is one of {', '.join(get_args(StageKind))}")
        if selects != (self.method is not None):
            raise ConfigError(
                f"method={self.method!r}: a {self.kind} stage " + ("needs a method" if selects else "has no method")
            )
        places = {"pixel": "before", "encoder": "inside"}
        mine = places.get(self.kind, "behind")
        if self.method is not None and (acts := places.get(self.method.card.stage, "behind")) != mine:
            raise ConfigError(
                f"method={self.method.card.name!r}: it acts {acts} the vision tower, which is no place for a "
                f"{self.kind} stage"
            )
        if self.method is not None and (self.kind == "merge") != (self.method.card.stage == "merge"):
            raise ConfigError(
                f"method={self.method.card.name!r}: it "
                + ("merges nothing" if self.kind == "merge" else "merges tokens")
                + f" inside the vision tower, which is no place for a {self.kind} stage"
            )
        if before and self.method is not None and not self.method.card.contract.keeps_some:
            raise ConfigError(
                f"method={self.method.card.name!r}: it may drop images whole, which only a cut can do; use its "
                "own stages"
            )
        if self.method is not None and (self.kind == "cache") != (self.method.card.stage == "cache"):
            raise ConfigError(
                f"method={self.method.card.name!r}: it chooses "
                + ("tokens, not what a cache keeps of each head" if self.kind == "cache" else "what a cache keeps")
                + f", which is no answer for a {self.kind} stage"
            )
        layered = self.kind == "encoder" or not before
        if (self.layer is not None) != layered and self.kind != "cache":
            raise ConfigError(
                f"layer={self.layer!r}: a {self.kind} stage " + ("needs a layer" if layered else "has no layer")
            )
        if self.until is None and self.kind == "skip":
            raise ConfigError("until=None: a skip stage needs until, the first layer after it")
        if self.until is not None and self.kind not in ("skip", "freeze", "narrow", "route"):
            raise ConfigError(f"until={self.until!r}: only a skip, a freeze, a narrow or a route stage has until")
        if (self.shrink is None) == (self.kind == "narrow"):
            needs = "needs shrink, such as 2.0" if self.kind == "narrow" else "has no shrink"
            raise ConfigError(f"shrink={self.shrink!r}: a {self.kind} stage {needs}")
        if self.shrink is not None:
            number = isinstance(self.shrink, int | float) and not isinstance(self.shrink, bool)
            if not number or not 1 <= self.shrink < math.inf:
                raise ConfigError(f"shrink={self.shrink!r}: a finite number of at least 1, which is the whole MLP")
            object.__setattr__(self, "shrink", float(self.shrink))  # 2 and 2.0 have one hash
        if self.keep is not None and (not selects or self.kind == "route"):
            does = "drops no visual token" if self.kind in ("freeze", "narrow", "route") else "drops every visual token"
            raise ConfigError(f"keep={self.keep}: a {self.kind} stage {does} and takes no budget")
        if self.kind == "cache" and self.keep is not None and self.keep.kind in ("flops", "layer_average"):
            raise ConfigError(
                f"keep={self.keep}: a cache stage leaves the prefill as it is and every layer as many tokens; give "
                "tokens or a ratio"
            )
        if self.mass is not None and not speaks:
            raise ConfigError(f"mass={self.mass}: a {self.kind} stage keeps no token that could speak for others")
        if isinstance(self.reserve, bool) or not isinstance(self.reserve, int | float) or not 0 <= self.reserve < 0.5:
            raise ConfigError(f"reserve={self.reserve!r}: a share of the budget, at least 0 and below 1/2")
        if self.reserve and self.kind not in ("prompt", "cut"):
            raise ConfigError(f"reserve={self.reserve}: the {self.kind} stage picks no tokens to put others before")

    @property
    def label(self) -> str:
        """Its method as results name it, or its kind."""
        if self.method is None:
            return self.kind
        mass = "" if self.mass is None else str(self.mass)
        return labelled(self.method.label, f"reserve={self.reserve:g}" if self.reserve else "", mass)


@dataclass(frozen=True)
class Method:
    """Base of all methods: subclasses are frozen dataclasses whose fields are the options.

    A subclass sets ``card`` and implements :meth:`select`; decoder methods also override :meth:`stages`, pixel methods
    also implement :meth:`picture` or :meth:`units`, encoder methods :meth:`stay`; their candidates are the tokens that
    the tower made of what it got. Merge methods also implement :meth:`merging`; their candidates are one token for each
    that the tower was left with. A cache method is asked once per decoder layer, and may answer for each head.
    """

    card: ClassVar[Card]

    @property
    def label(self) -> str:
        """The name results are reported under; names every substitute, as in ``idpruner[cls]``."""
        return self.card.name

    def adapt(self, tower: Tower) -> Method:
        """The method with the defaults that depend on the model's vision tower filled in."""
        return self

    def check(self) -> None:
        """Called before the method is attached to a model.

        Raises:
            ConfigError: if it cannot run as it is, without trained weights for instance.
        """

    def needs(self) -> Needs:
        """What :meth:`select` reads from the context beyond features, grid and budget."""
        return Needs()

    def stages(self) -> tuple[Stage, ...]:
        """Where in the model the method acts when it is used by name; budgets come later."""
        acts = self.card.stage
        return (Stage(kind="prompt" if acts == "decoder" else acts, method=self),)

    def select(self, ctx: Context) -> torch.Tensor | Selection:
        """(U, N) bool keep mask over the visual tokens of each image, or a :class:`Selection` when tokens change."""
        raise NotImplementedError

    def shared_out(
        self, n: int, average: float, *, cuts: Sequence[int], shape: Sequence[float], **limits: int
    ) -> list[int]:
        """How an average over all decoder layers is spent on the cuts of a method that alone selects.

        Args:
            n: visual tokens of the image.
            average: wanted mean, in tokens per layer.
            cuts: layers on whose input the set shrinks, ascending.
            shape: share that each of them leaves by default; 1 where that is open.
            **limits: ``depth``, ``start`` and ``stop`` of :func:`visiontok.allocators.layer_average`.

        Returns:
            One count per cut; by default in the proportion of ``shape``.

        Raises:
            ConfigError: if the average is too small.
        """
        from .allocators import layer_average

        return layer_average(n, average, cuts=cuts, shape=shape, **limits)

    def picture(self, shape: tuple[int, int], count: int) -> tuple[int, int]:
        """Pixel methods: the size of the picture that the vision tower gets instead, in tokens.

        Args:
            shape: rows and columns of tokens of the picture.
            count: tokens that it may become; fewer than it has.

        Returns:
            rows and columns, neither larger than in ``shape``, at most ``count`` tokens in all.
        """
        raise NotImplementedError

    def units(self, picture: Picture) -> Kept:
        """Pixel methods whose card says ``gives="units"``: which units of a picture the vision tower gets.

        Returns:
            at least one unit, and ``picture.count`` of them if the contract says ``count_from_grid``.
        """
        raise NotImplementedError

    @property
    def rebuild(self) -> Rebuild | None:
        """Encoder methods: how what leaves the tower comes back; None if it is dropped."""
        return None

    def stay(self, encoding: Encoding) -> torch.Tensor:
        """Encoder methods: (n,) bool, which units of an image or video stay in the vision tower.

        At least one, and ``encoding.count`` of them if the contract says ``count_from_grid``.
        """
        raise NotImplementedError

    def merging(self, tokens: int, count: int | None, *, depth: int, layers: int, official: bool) -> Merging:
        """Merge methods: what each layer of a vision tower merges of one picture.

        Args:
            tokens: patches of the picture.
            count: those to be left, at least 1; None where there is no budget.
            depth: layers up to the one whose output becomes the features; those behind it merge nothing.
            layers: all layers of the tower.
            official: with the behaviour of the published code.

        Raises:
            ConfigError: if an option does not fit the tower.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults, as plain values."""
        types = _types(type(self))
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: _exact(value, types.get(name, Any)) for name, value in changed.items()}

    @classmethod
    def build(cls, options: Mapping[str, Any]) -> Method:
        """An instance from plain values, as read from JSON or the command line.

        Raises:
            ConfigError: for an option that the method does not have, or a value of another type.
        """
        known = {f.name for f in fields(cls)}
        types = _types(cls)
        for name, value in options.items():
            if name not in known:
                remedy = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
                raise ConfigError(f"{name}={value!r}: {cls.card.name} has no such option; {remedy}")
            if not _fits(value, types.get(name, Any)):
                raise ConfigError(f"{name}={value!r}: {cls.card.name} takes {_named(types[name])}")
        return cls(**options)


def _types(cls: type) -> dict[str, Any]:
    """The types of a class's fields; none if one of them has a name that only type checkers know."""
    try:
        return get_type_hints(cls)
    except NameError:
        return {}


def _fits(value: Any, wanted: Any) -> bool:
    """Whether an option's value has its type. Names out of a list and objects are left to the method."""
    origin, args = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is tuple and args[1:] == (...,):
        return isinstance(value, tuple | list) and all(_fits(one, args[0]) for one in value)
    if wanted in (int, float):
        numbers = int if wanted is int else int | float
        return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, wanted) if wanted in (bool, str, NoneType) else True


def _exact(value: Any, wanted: Any) -> Any:
    """``value`` as a float where its type is one, for 2 and 2.0 are the same option; an integral layer stays an int."""
    members = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    if isinstance(value, tuple):
        each = next((get_args(member)[0] for member in members if get_args(member)[1:] == (...,)), Any)
        return tuple(_exact(one, each) for one in value)
    number = float in members and int not in members and isinstance(value, int)
    return float(value) if number else value


def _named(wanted: Any) -> str:
    """What a type is called in an error."""
    origin, args = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_named, args)))
    if origin is tuple:
        return f"a list, each {_named(args[0])}"
    names = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", NoneType: "None"}
    return names.get(wanted, f"a {getattr(wanted, '__name__', wanted)}")


@dataclass(frozen=True)
class UnitMethod(Method):
    """Base of methods that let some units of each picture through the tower: all that comes out of it stays."""

    def select(self, ctx: Context) -> torch.Tensor:
        return ctx.valid


@dataclass(frozen=True)
class VectorMethod(Method):
    """Base of methods that see a token as a vector and nothing else, so that it may come from before the projector.

    Attributes:
        features: ``projected``, what the language model reads; or ``merger_in``, what the projector reads, the patches
            of a token one behind the other. The choice alone changes, not what is kept of a token. Tokens without a
            patch (newlines of tiled pictures) come last then.

    Reference:
        Rank-Before-Merge (2026, a draft): a patch merger hides the lengths that text on a picture has before it.
    """

    features: Literal["projected", "merger_in"] = field(default="projected", kw_only=True)

    def __post_init__(self) -> None:
        if self.features not in ("projected", "merger_in"):
            raise ConfigError(f"features={self.features!r}: use 'projected' or 'merger_in'")

    @property
    def space(self) -> str:
        """The note of a label: where the vectors come from, empty by default."""
        return "" if self.features == "projected" else self.features

    def needs(self) -> Needs:
        return Needs(encoder_features=self.features == "merger_in")

    def vectors(self, ctx: Context) -> torch.Tensor:
        """(U, N, ·) float; NaN where a token has no patch before the projector."""
        if self.features == "projected":
            return ctx.features
        inputs = ctx.need_encoder_features()
        return inputs.masked_fill(~inputs.any(-1, keepdim=True), math.nan)
