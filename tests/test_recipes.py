"""The methods as classes: what they ask of the context, and what they answer, for images of different sizes."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import visiontok
from visiontok import Budget, Context, Method
from visiontok.context import Attention
from visiontok.engine.policy import StagePolicy
from visiontok.errors import ConfigError, UnsupportedError
from visiontok.method import Card, Selection, Stage, Tower, VectorMethod
from visiontok.recipes import find
from visiontok.recipes.agile import Agile
from visiontok.recipes.aim import Aim
from visiontok.recipes.aim_merge import AimMerge
from visiontok.recipes.cdpruner import CDPruner
from visiontok.recipes.cls_topk import ClsTopK
from visiontok.recipes.dart import Dart
from visiontok.recipes.divprune import DivPrune
from visiontok.recipes.dycoke_cache import DyCokeCache
from visiontok.recipes.eadp import EADP
from visiontok.recipes.entropyprune import EntropyPrune
from visiontok.recipes.erase import Erase
from visiontok.recipes.explain import Explain
from visiontok.recipes.fastv import FastV
from visiontok.recipes.feather import Feather
from visiontok.recipes.fitprune import FitPrune
from visiontok.recipes.gemfilter import GemFilter
from visiontok.recipes.globalcom2 import GlobalCom2
from visiontok.recipes.grid import Grid
from visiontok.recipes.h2o import H2O
from visiontok.recipes.hidrop import HiDrop
from visiontok.recipes.hiprune import HiPrune
from visiontok.recipes.holov import HoloV
from visiontok.recipes.idpruner import IDPruner
from visiontok.recipes.kmeans import KMeans
from visiontok.recipes.m3_pool import M3Pool
from visiontok.recipes.mmtok import MMTok
from visiontok.recipes.norm import Norm
from visiontok.recipes.prumerge import PruMerge
from visiontok.recipes.prumerge_plus import PruMergePlus
from visiontok.recipes.prunesid import PruneSID
from visiontok.recipes.pyramiddrop import PyramidDrop
from visiontok.recipes.random import Random
from visiontok.recipes.scope import Scope
from visiontok.recipes.sieve import Sieve
from visiontok.recipes.snapkv import SnapKV
from visiontok.recipes.sparsevlm import SparseVLM
from visiontok.recipes.sparsevlm_plus import SparseVLMPlus
from visiontok.recipes.textmonkey import TextMonkey
from visiontok.recipes.todre import ToDRE
from visiontok.recipes.todre_exit import ToDREExit
from visiontok.recipes.transprune import TransPrune
from visiontok.recipes.urag import URaG
from visiontok.recipes.v2drop import V2Drop
from visiontok.recipes.visiontok import Visiontok
from visiontok.recipes.visionzip import VisionZip
from visiontok.recipes.vispruner import VisPruner
from visiontok.recipes.vscan import VScan
from visiontok.recipes.vtw import VTW
from visiontok.recipes.zoo_prune import ZooPrune

SIZES, COUNTS = (30, 12, 1), (7, 12, 1)
PADDED = torch.arange(30) < torch.tensor(SIZES)[:, None]
CLIP = Tower(depth=24, has_cls=True, feature_layer=22, full_attention=tuple(range(24)))
NEXT = dataclasses.replace(CLIP, thumbnail=True)
QWEN = Tower(depth=32, has_cls=False, feature_layer=31, full_attention=(7, 15, 23, 31))
METHODS: list[Method] = [
    Visiontok().adapt(CLIP),
    Visiontok().adapt(QWEN),
    Random(),
    Grid(),
    ClsTopK().adapt(CLIP),
    ClsTopK().adapt(QWEN),
    DivPrune(),
    IDPruner().adapt(CLIP),
    IDPruner(balance=0.3).adapt(QWEN),
    IDPruner(scorer="norm"),
    DivPrune(background=0),
    IDPruner(scorer="norm", background=2),
    HiPrune().adapt(CLIP),
    HiPrune(object_layer=15, deep_layer=-1, alpha=0.5),
    Norm(),
    Norm(features="merger_in"),
    DivPrune(features="merger_in", background=1),
    IDPruner(features="merger_in").adapt(CLIP),
    ToDRE(features="merger_in").adapt(QWEN),
    VisionZip().adapt(CLIP),
    VisionZip(share=0.5).adapt(QWEN),
    VisionZip(share=0.5, space="projected").adapt(CLIP),
    PruMerge().adapt(CLIP),
    PruMerge(neighbours=2).adapt(QWEN),
    PruMergePlus().adapt(CLIP),
    VisPruner().adapt(CLIP),
    VisPruner(important=0.2).adapt(QWEN),
    VScan().adapt(CLIP),
    VScan(window=2).adapt(QWEN),
    GlobalCom2().adapt(CLIP),
    GlobalCom2().adapt(NEXT),
    GlobalCom2(tiled=True).adapt(QWEN),
    AimMerge(),
    M3Pool(),
    TextMonkey(),
    KMeans(),
    ToDRE().adapt(CLIP),
    ToDRE(objective="maxmin").adapt(QWEN),
    ZooPrune(directions=4),
    ZooPrune(derivative="exact", directions=4),
    Scope().adapt(CLIP),
    Scope(alpha=0.5, combine="add").adapt(QWEN),
    CDPruner(),
    MMTok().adapt(CLIP),
    EADP(),
    Dart(),
    Dart(image_pivots=1, text_pivots=0),
    HoloV().adapt(CLIP),
    HoloV(beta=1.0).adapt(QWEN),
    PruneSID().adapt(CLIP),
    PruneSID().adapt(QWEN),
    Agile().adapt(CLIP),
    Agile(rate=1.0, most=1.5).adapt(QWEN),
    FastV(),
    PyramidDrop(),
    SparseVLM(),
    SparseVLM(recycled=0.0),
    SparseVLMPlus(),
    Feather(),
    Feather(part="later"),
    HiDrop(),
    Aim(),
    VScan(cut=0.5).adapt(CLIP),
    Sieve(),
    V2Drop(layers=(3,), shares=(0.5,)),
    TransPrune(layers=(3,), shares=(0.5,)),
    TransPrune(layers=(3,), shares=(0.5,), guided=False),
    EntropyPrune(),
    GemFilter(),
    FitPrune(layers=(3,), shares=(0.5,)),
    EntropyPrune(of="states"),
    Explain(),
    DyCokeCache(),
    H2O(),
    H2O(joined=True),
    SnapKV(),
    SnapKV(width=1, joined=True),
]


def values(stat: str, layer: float, units: int) -> Tensor:
    """What a tap yields, 9 where no token is."""
    heads = dict.fromkeys(("keys", "decoder_keys", "decoder_queries", "decoder_values"), (2, 4))
    wide: dict[str, tuple[int, ...]] = heads | {"decoder_states": (8,), "text_heads": (2, 3), "rotary_pull": (3,)}
    wide |= dict.fromkeys(("cache_window", "cache_received"), (2,))
    shape = (3, 30, *wide.get(stat, ()))
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(len(stat) + int(10 * layer))) / 30
    padding = ~PADDED.view(3, 30, *[1] * (len(shape) - 2))
    return drawn.masked_fill(padding, 9.0)[:units]


def keeps(answer: Tensor | Selection) -> Tensor:
    """(U, N); of a cache what its last head keeps."""
    keep = answer.keep if isinstance(answer, Selection) else answer
    return keep[..., -1] if keep.ndim == 3 else keep


def context(
    method: Method,
    *,
    has_cls: bool = True,
    fidelity: Literal["fixed", "official"] = "fixed",
    units: slice = slice(None),
) -> Context:
    """Three images of 5×6, 3×4 and 1×1 tokens, padded with values that would win; `units` picks some of them.

    Their questions have three words, one and none.
    """
    g = torch.Generator().manual_seed(0)
    needs = method.needs()
    asked = {field.name: getattr(needs, field.name) for field in dataclasses.fields(needs)}
    scores = {
        (stat, layer): values(stat, layer, 3)
        for name, layers in asked.items()
        if isinstance(layers, tuple)
        for stat in [name if hasattr(Attention, name) else name.removeprefix("vision_").removeprefix("decoder_")]
        for layer in layers
    }
    rows = torch.arange(3)[units]
    valid = PADDED[units]
    width = int(valid.sum(1).max())
    grid = torch.full((3, 30, 3), -1)
    for u, (height, breadth) in enumerate(((5, 6), (3, 4), (1, 1))):
        grid[u, : height * breadth] = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(breadth))
    features = torch.randn(3, 30, 8, generator=g).masked_fill(~PADDED[..., None], 50.0)
    encoder = torch.randn(3, 30, 6, generator=g).masked_fill(~PADDED[..., None], 50.0)
    pixels = torch.rand(3, 30, 3, 16, generator=g)
    projector = torch.randn(6, 8, generator=g)

    def read(stat: str, layer: float) -> Tensor:
        if stat == "cls" and not has_cls:
            raise UnsupportedError("no CLS")
        found = values(stat, layer, 3) if stat in ("rotary_pull", "relevance") else scores[stat, layer]
        return found[units, :width]

    empty: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(Context))
    return Context(
        **empty
        | {
            "stage": method.card.stage,
            "features": features[units, :width],
            "valid": valid[:, :width],
            "count": torch.tensor(COUNTS)[units],
            "size": torch.tensor(SIZES)[units],
            "grid": grid[units, :width],
            "row": rows,
            "place": torch.arange(30).expand(3, 30)[units, :width],
            "text_features": torch.randn(3, 33, 8, generator=g),
            "question_place": 30 + torch.arange(3).expand(3, 3),
            "encoder_features": encoder[units, :width],
            "text_valid": torch.arange(33).expand(3, 33) >= 30,
            "final_norm": lambda x: x,
            "project": lambda x: (x @ projector.to(x)).tanh(),
            "pixels": pixels[units, :width],
            "question_features": torch.randn(3, 3, 8, generator=g),
            "question_valid": torch.arange(3) < torch.tensor([[3], [1], [0]]),
            "has_grid": True,
            "attention": Attention(read),
            "has_cls": has_cls,
            "model_type": "test",
            "fidelity": fidelity,
            "generator": lambda u: torch.Generator().manual_seed(int(rows[u])),
        }
    )


@pytest.mark.parametrize("method", METHODS, ids=repr)
class TestEveryMethod:
    def test_keeps_exactly_the_count_of_valid_tokens(self, method: Method) -> None:
        ctx = context(method, has_cls=bool(method.needs().vision_cls))
        answer = method.select(ctx)
        keep = keeps(answer)
        if isinstance(answer, Selection) and method.card.stage == "prompt":
            assert answer.features is not None
            assert answer.features[keep].isfinite().all()
            # where nothing is dropped nothing is merged
            torch.testing.assert_close(answer.features[1, :12], ctx.features[1, :12])
            torch.testing.assert_close(answer.features[2, :1], ctx.features[2, :1])
        assert keep.dtype is torch.bool
        assert not (keep & ~PADDED).any()
        assert keep.sum(1).tolist() == list(COUNTS)

    def test_an_image_does_not_depend_on_its_batch(self, method: Method) -> None:
        batch = method.select(context(method))
        for u in range(3):
            single = method.select(context(method, units=slice(u, u + 1)))
            kept = keeps(batch)[u, : SIZES[u]]
            assert torch.equal(kept, keeps(single)[0])
            if isinstance(batch, Selection) and isinstance(single, Selection) and batch.features is not None:
                mine, alone = batch.features, single.features
                assert alone is not None
                torch.testing.assert_close(mine[u, : SIZES[u]][kept], alone[0][kept])

    def test_what_is_no_number_is_never_kept(self, method: Method) -> None:
        """The engine refuses such features; an operator called on its own ranks them last."""
        if isinstance(method, AimMerge | KMeans | M3Pool | PruMerge | Random | Grid | VisionZip | VScan):
            pytest.skip("merges every token into some token, or looks at none")

        def spoilt(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, 3] = torch.nan
            return x

        ctx = context(method)
        assert ctx.encoder_features is not None
        read = ctx.attention._read
        ctx = dataclasses.replace(
            ctx,
            features=spoilt(ctx.features),
            encoder_features=spoilt(ctx.encoder_features),
            attention=Attention(lambda stat, layer: spoilt(read(stat, layer))),
        )
        keep = keeps(method.select(ctx))
        assert not keep[0, 3]
        assert keep.sum(1).tolist() == list(COUNTS)

    def test_what_has_no_patch_comes_last(self, method: Method) -> None:
        """Tokens such as image_newline: off the grid, unseen by the tower. They have no say in what else is kept."""
        needs = method.needs()
        if isinstance(method, MMTok | ToDRE) or not any(
            value for name, value in vars(needs).items() if "vision" in name
        ):
            pytest.skip("does not ask which tokens the tower saw")
        ctx, odd = context(method), torch.arange(30) >= 28
        assert ctx.encoder_features is not None
        read = ctx.attention._read

        def unseen(stat: str, layer: float) -> Tensor:
            x = read(stat, layer).clone()
            x[0, odd] = 0.0 if stat in ("keys", "cls_logits") else -1.0
            return x

        grid, encoder = ctx.grid.clone(), ctx.encoder_features.clone()
        grid[0, odd], encoder[0, odd] = -1, 0.0
        ctx = dataclasses.replace(ctx, grid=grid, encoder_features=encoder, attention=Attention(unseen))
        for count in (5, 28, 29):
            answer = method.select(dataclasses.replace(ctx, count=torch.tensor([count, 12, 1])))
            assert keeps(answer)[0, odd].sum() == max(0, count - 28)
            assert keeps(answer)[0].sum() == count
        without = dataclasses.replace(ctx, valid=ctx.valid & ~(odd & (torch.arange(3) == 0)[:, None]))
        assert torch.equal(keeps(method.select(ctx)), keeps(method.select(without)))

    def test_a_call_without_images(self, method: Method) -> None:
        ctx = context(method)
        none = {f.name: value[:0] for f in dataclasses.fields(ctx) if isinstance(value := getattr(ctx, f.name), Tensor)}
        attention = Attention(lambda stat, layer: values(stat, layer, 0))
        # A grid that is unknown is an error; none at all is not reached, because nothing is selected then.
        if not isinstance(method, Grid | HiPrune | AimMerge | GlobalCom2 | M3Pool | VScan):
            assert keeps(method.select(dataclasses.replace(ctx, **none, attention=attention))).shape == (0, 30)

    def test_round_trips_its_options_and_is_found_by_name(self, method: Method) -> None:
        cls = find(method.card.name)
        assert cls is type(method)
        assert cls.build(method.options()) == method

    def test_its_stages(self, method: Method) -> None:
        selecting = [stage for stage in method.stages() if stage.method is not None]
        mine = [stage for stage in selecting if type(stage.method) is type(method)]
        assert {stage.kind for stage in mine} == {"cut" if method.card.stage == "decoder" else method.card.stage}
        assert len(selecting) == 1 or all(stage.keep is not None for stage in selecting)


@pytest.mark.parametrize("card", visiontok.methods(), ids=lambda card: card.name)
def test_every_card_is_complete(card: Card) -> None:
    assert find(card.name).__doc__
    written = {k: v for k, v in dataclasses.asdict(card).items() if isinstance(v, str)}
    assert all(written.values())
    assert not any(text != text.strip() or "  " in text for text in written.values())
    missing = {field for field, text in written.items() if text == "-"}
    assert missing <= ({"paper", "official"} if card.venue == "baseline" else set())


# What a card's ``needs`` calls what a method declares, or reads from the context.
WORDS = {
    "vision_cls": "CLS attention",
    "vision_cls_joined": "CLS attention joined to one head",
    "vision_cls_logits": "CLS logits",
    "vision_keys": "keys of one tower layer",
    "vision_received": "received attention",
    "decoder_last_row": "attention of the last prompt token",
    "decoder_text_rows": "attention of the text rows",
    "decoder_text_heads": "attention of every head and question token",
    "decoder_unturned_row": "attention without rotary positions",
    "decoder_flow": "where attention leads",
    "decoder_to_text": "attention to text",
    "decoder_received": "attention received in the decoder",
    "decoder_states": "states on the input of the layer before the cut",
    "decoder_queries": "queries of the layer before the cut",
    "decoder_own_peaks": "peaks of attention from the image",
    "decoder_text_peaks": "peaks of attention from the text",
    "decoder_ahead": "looked ahead at",
    "cache_window": "what the end of the prompt looks at",
    "cache_received": "what all of the prompt looks at",
    "decoder_transition": "inputs and outputs of modules",
    "relevance": "attention and its gradient in every decoder layer",
    "final_norm": "final norm",
    "encoder_features": "projector inputs",
    "projector": "the projector",
    "pixels": "pixels",
    "question": "question tokens",
    "features": "features",
    "grid": "grid",
}


class Watched(Context):
    """A context that notes which of its fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("features", "grid"):
            object.__getattribute__(self, "__dict__").setdefault("read", set()).add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("card", visiontok.methods(), ids=lambda card: card.name)
def test_what_a_card_needs_is_what_its_method_reads(card: Card) -> None:
    if card.name == "pmod":
        pytest.skip("reads nothing without its routers; tests/test_pmod.py gives it some")
    told, cls = set(), find(card.name)
    variants = [cls(), cls(features="merger_in")] if issubclass(cls, VectorMethod) else [cls()]
    for tower, variant in itertools.product((CLIP, NEXT, QWEN), variants):
        for stage in variant.adapt(tower).stages():
            method = stage.method
            if method is None:
                continue
            needs = dataclasses.asdict(method.needs())
            told |= {name for name, value in needs.items() if value}
            ctx = context(method, has_cls=tower.has_cls)
            if isinstance(method, URaG):  # it refuses prompts without a question
                ctx = dataclasses.replace(ctx, question_valid=torch.ones(3, 3, dtype=torch.bool))
            watched = Watched(**{f.name: getattr(ctx, f.name) for f in dataclasses.fields(ctx)})
            method.select(watched)
            told |= watched.__dict__.get("read", set())
    if "vision_cls_joined" in told:
        told.add("vision_cls")  # its words begin so
    if "projector" in told:
        told.add("encoder_features")  # comes with it
    named = {name for name, words in WORDS.items() if words in card.needs.replace("and keys of", "keys of")}
    if card.name == "cdpruner":
        named.remove("encoder_features")  # with a CLIP pair alone
    assert named == told, card.needs


def test_substitutes_are_named() -> None:
    assert IDPruner().adapt(CLIP).label == "idpruner[cls]"
    assert IDPruner().adapt(QWEN).label == "idpruner[received]"
    assert IDPruner(scorer="norm").adapt(QWEN).label == "idpruner[norm]"
    assert IDPruner(background=0).adapt(CLIP).label == "idpruner[cls, centred]"
    assert [DivPrune(background=r).label for r in (None, 0, 3)] == [
        "divprune", "divprune[centred]", "divprune[residual]",
    ]  # fmt: skip
    for cls in (Norm, DivPrune):
        assert cls(features="merger_in").label == f"{cls.card.name}[merger_in]"
    both = {"background": 0, "features": "merger_in"}
    assert IDPruner(**both).adapt(CLIP).label == "idpruner[cls, centred, merger_in]"
    assert ToDRE(features="merger_in").adapt(QWEN).label == "todre[received, merger_in]"
    assert ClsTopK().adapt(CLIP).label == "cls_topk"
    assert ClsTopK().adapt(QWEN).label == "cls_topk[received]"
    assert VScan().adapt(QWEN).label == "vscan"  # its Qwen code uses received attention itself
    for cls in (VisionZip, VisPruner, PruMerge, PruMergePlus):
        name = cls.card.name
        assert (cls().adapt(CLIP).label, cls().adapt(QWEN).label) == (name, f"{name}[received]")
    assert GlobalCom2().adapt(NEXT).label == "globalcom2"
    assert GlobalCom2().adapt(CLIP).label == "globalcom2[untiled]"
    assert GlobalCom2().adapt(QWEN).label == "globalcom2[received, untiled]"
    for cls in (ToDRE, Scope, HoloV, PruneSID, Agile):
        name = cls.card.name
        assert (cls().adapt(CLIP).label, cls().adapt(QWEN).label) == (name, f"{name}[received]")
    assert ToDRE(objective="maxmin").adapt(QWEN).label == "todre[received, maxmin]"
    assert [m.label for m in (CDPruner(), EADP(), Dart())] == ["cdpruner[embedding]", "eadp[embedding]", "dart[norm]"]


def test_defaults_follow_the_tower() -> None:
    assert HiPrune().adapt(CLIP).needs().vision_received == (8, 22)
    assert HiPrune().adapt(QWEN).needs().vision_received == (15, 31)
    assert HiPrune(object_layer=3).adapt(QWEN).needs().vision_received == (3, 31)
    assert ClsTopK().adapt(CLIP).needs().vision_cls == (22,)
    assert IDPruner().adapt(QWEN).needs().vision_received == (31,)
    assert VScan().adapt(CLIP).needs().vision_cls == (5, 22)
    assert VScan().adapt(QWEN).needs().vision_received == (7, 31)
    assert (VScan().adapt(CLIP).window, VScan().adapt(QWEN).window) == (6, 4)  # type: ignore[attr-defined]
    assert VisionZip().adapt(CLIP).needs().vision_keys == (22,)
    assert PruMerge().adapt(CLIP).needs().vision_cls_joined == (-1,)
    assert (MMTok().adapt(CLIP).text_temperature, MMTok().adapt(QWEN).text_temperature) == (0.02, 0.01)
    assert (HoloV().adapt(CLIP).stretches, HoloV().adapt(QWEN).stretches) == (16, None)


def test_only_what_is_read_is_asked_for() -> None:
    assert IDPruner(scorer="norm").needs() == DivPrune().needs()
    assert IDPruner().adapt(QWEN).needs().vision_cls == ()
    for cls in (Norm, DivPrune, IDPruner, ToDRE):
        wants = [cls(features=space).needs().encoder_features for space in ("projected", "merger_in")]
        assert wants == [False, True]


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (IDPruner, {"scorer": "best"}, "scorer='best': use one of cls, received, norm"),
        (IDPruner, {"balance": 2}, "balance=2"),
        (IDPruner, {"background": -1}, "background=-1"),
        *((cls, {"features": "raw"}, "features='raw': use 'projected'") for cls in (Norm, DivPrune, IDPruner, ToDRE)),
        (DivPrune, {"background": -1}, "background=-1: at least 0 directions"),
        (HiPrune, {"alpha": -0.1}, "alpha=-0.1"),
        (VisionZip, {"share": 1.0}, "share=1.0"),
        (VisionZip, {"space": "pixels"}, "space='pixels': use 'tower' or 'projected'"),
        (VisPruner, {"important": 1.5}, "important=1.5"),
        (VScan, {"window": 0}, "window=0"),
        (PruMerge, {"neighbours": -1}, "neighbours=-1"),
        (PruMergePlus, {"outstanding": 0.0}, "outstanding=0.0"),
        (GlobalCom2, {"temperature": 0.0}, "temperature=0.0"),
        (KMeans, {"rounds": -1}, "rounds=-1"),
        *((cls, {"scorer": "norm"}, "scorer='norm': use 'cls' or 'received'") for cls in (VisionZip, PruMerge, VScan)),
        (ToDRE, {"objective": "sum"}, "objective='sum': use 'maxsum' or 'maxmin'"),
        (ToDRE, {"scorer": "norm"}, "scorer='norm': use 'cls' or 'received'"),
        (ZooPrune, {"derivative": "second"}, "derivative='second'"),
        (ZooPrune, {"step": 0.0}, "step=0.0: must be positive"),
        (ZooPrune, {"directions": 0}, "directions=0"),
        (Scope, {"alpha": -1.0}, "alpha=-1.0"),
        (Scope, {"combine": "max"}, "combine='max'"),
        (CDPruner, {"clip": "ViT-L-14-336"}, "clip='ViT-L-14-336', tokenizer=None: name model/weights"),
        (MMTok, {"alpha": -1}, "alpha=-1"),
        (MMTok, {"vision_temperature": 0.0}, "vision_temperature=0.0: must be positive"),
        (EADP, {"sign": 2}, "sign=2: use -1 or 1"),
        (EADP, {"telling": 1.5}, "telling=1.5: a share"),
        (EADP, {"spread": 0.0}, "spread=0.0: must be positive"),
        (Dart, {"image_pivots": 0}, "image_pivots=0: at least 1"),
        (HoloV, {"stretches": 0}, "stretches=0: at least 1"),
        (HoloV, {"beta": -1.0}, "beta=-1.0"),
        (PruneSID, {"scorer": "norm"}, "scorer='norm'"),
        (Agile, {"rate": -0.1}, "rate=-0.1: must be at least 0"),
        (Agile, {"typical": 0}, "typical=0: must be positive"),
        (Agile, {"most": 2.1}, "most=2.1: cosine distances"),
        (Agile, {"scorer": "norm"}, "scorer='norm'"),
        (Erase, {"part": "last"}, "part='last'"),
        (Erase, {"thresholds": [1, 2, 3]}, r"thresholds=\[1, 2, 3\]: give 3 numbers in descending order"),
        (Erase, {"shares": (0.9, 0.5, 0.4)}, "shares=.*: give 4 numbers"),
        (Erase, {"shares": (1.9, 0.5, 0.4, 0.1)}, "shares=.*: shares lie in"),
        (Erase, {"final": 0.0}, "final=0.0"),
        (Sieve, {"energy": 0.0}, "energy=0.0: a share"),
        *(
            (cls, {"layers": (1, 2)}, "shares=.*: give one per layer, of which there are 2")
            for cls in (V2Drop, TransPrune, FitPrune)
        ),
        (GemFilter, {"width": 4}, "width=4: an odd number"),
        (Explain, {"scores": [[]]}, r"scores=\[\[\]\]: give finite numbers"),
        (URaG, {"groups": 0}, "groups=0: at least 1"),
        (URaG, {"of": "page"}, "of='page': use 'image' or 'frame'"),
        (URaG, {"tail": -1}, "tail=-1: a number of tokens"),
        (EntropyPrune, {"of": "heads"}, "of='heads': use 'queries'"),
        (V2Drop, {"shares": (0.5, 0.6, 0.1)}, "shares=.*: shares lie in"),
        (TransPrune, {"layers": [3], "shares": [1.5]}, "shares=.*: shares lie in"),
        (SparseVLM, {"recycled": 1.5}, "recycled=1.5: a share"),
        (SparseVLMPlus, {"heads": 0.0}, "heads=0.0: a share"),
        (ToDREExit, {"threshold": 0.0}, "threshold=0.0: a share"),
        (Aim, {"merged": 0.0}, "merged=0.0: a share"),
        (VScan, {"left": 0.0}, "left=0.0: a share"),
        (Feather, {"stride": 0}, "stride=0: at least 1"),
        (Feather, {"reduction": 1.0}, "reduction=1.0: a share"),
        (Feather, {"part": "last"}, "part='last'"),
        (HiDrop, {"preset": 50}, "preset=50: use one of 48, 64, 80"),
        (PyramidDrop, {"shares": [0.5, 0.25]}, "shares=.*: give one per layer, of which there are 3"),
        (PyramidDrop, {"layers": [1, 2], "shares": [0.2, 0.5]}, "shares=.*: shares lie in"),
    ],
)
def test_bad_options_are_refused(cls: type[Method], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls.build(options)


@pytest.mark.parametrize("name", [card.name for card in visiontok.methods()])
def test_options_of_another_type_are_refused(name: str) -> None:
    method = find(name)
    for option in dataclasses.fields(method):
        for wrong in ((), math.nan):
            with pytest.raises(ConfigError, match=f"^{option.name}="):
                method.build({option.name: wrong})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dart", {"image_pivots": 1.5}, "image_pivots=1.5: dart takes an integer"),
        ("dart", {"image_pivots": True}, "image_pivots=True"),
        ("vscan", {"window": "3"}, "window='3': vscan takes an integer or None"),
        ("hiprune", {"alpha": None}, "alpha=None: hiprune takes a finite number"),
        ("hiprune", {"deep_layer": "x"}, "deep_layer='x': hiprune takes an integer or a finite number or None"),
        ("prumerge", {"adaptive": "yes"}, "adaptive='yes': prumerge takes True or False"),
        ("erase", {"thresholds": 0.5}, "thresholds=0.5: erase takes a list, each a finite number or None"),
        ("cdpruner", {"clip": 3}, "clip=3: give a ClipPair"),
    ],
)
def test_a_wrong_type_is_named_with_the_right_one(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        visiontok.recipe(name, keep=3, **options)


def test_no_option_has_a_name_that_is_taken() -> None:
    """It could not be given there, and the argument would be taken for it; nor that of what every method has."""
    taken = set(inspect.signature(visiontok.compress).parameters) | set(inspect.signature(visiontok.recipe).parameters)
    taken |= {name for name in vars(Method) if not name.startswith("__")}
    for card in visiontok.methods():
        assert not taken & {option.name for option in dataclasses.fields(find(card.name))}, card.name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (visiontok.recipe("scope", keep=3, alpha=2), visiontok.recipe("scope", keep=3, alpha=2.0)),
        (
            visiontok.recipe("mmtok", keep=3, text_temperature=1),
            visiontok.recipe("mmtok", keep=3, text_temperature=1.0),
        ),
        (visiontok.recipe("erase", thresholds=[3, 2, 1]), visiontok.recipe("erase", thresholds=(3.0, 2.0, 1.0))),
        (
            visiontok.recipe("scope").with_mass(visiontok.Mass(beta=2, merge=1)),
            visiontok.recipe("scope").with_mass(visiontok.Mass(beta=2.0, merge=1.0)),
        ),
    ],
)
def test_whole_numbers_hash_as_they_compare(one: visiontok.Recipe, other: visiontok.Recipe) -> None:
    assert one == other
    assert one.hash() == other.hash()
    assert visiontok.Recipe.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_vtw_takes_no_budget() -> None:
    [stage] = VTW(layer=3).stages()
    assert (stage.kind, stage.layer) == ("exit", 3)
    with pytest.raises(ConfigError, match="no budget"):
        visiontok.recipe("vtw", keep=4)


@pytest.mark.parametrize(
    ("name", "options", "average", "counts"),
    [
        ("vscan", {"cut": 16 / 32}, 64, [96, 32]),
        ("hidrop", {}, 48, [87, 10, 5, 1]),
        ("hidrop", {"preset": 64}, 64, [215, 10, 5, 1]),
        ("hidrop", {}, 64, [215, 10, 5, 1]),  # the layers are those of the 48-token preset
        ("hidrop", {"preset": 80}, 80.03125, [453, 10, 5, 1]),
        ("hidrop", {}, 118, [576, 88, 45, 9]),  # the first cut has all: 320 are left for 2, 2 and 6 layers, as 10:5:1
        ("pyramiddrop", {}, 270, [288, 144, 72]),
        ("pyramiddrop", {}, 233.5, [230, 92, 36]),  # published with a ratio of 0.4
        ("pyramiddrop", {}, 313, [345, 207, 124]),  # and of 0.6
        ("pyramiddrop", {"shares": (0.5, 0.25, 0.25)}, 252, [216, 108, 108]),  # no powers: in proportion
        ("sparsevlm", {}, 206.53125, [309, 204, 113]),
    ],
)
def test_published_averages_are_shared_out_as_published(
    name: str, options: dict[str, Any], average: float, counts: list[int]
) -> None:
    """On LLaVA-1.5: 576 tokens, 32 layers."""
    recipe = visiontok.recipe(name, keep=Budget.layer_average(average), **options)
    policy = StagePolicy(recipe.stages, 32, average=recipe.average)
    units = [stage for stage in recipe.stages if stage.method is not None]
    assert [policy._share(stage, 576) for stage in units] == counts


def test_cuts_that_meet_in_a_shallow_model_are_one() -> None:
    stages = (*HiDrop().stages(), Stage(kind="exit", layer=0.75))
    assert {layer: stage.keep.value * 576 for layer, stage in StagePolicy(stages, 4).cuts.items()} == {1: 10, 2: 1}  # type: ignore[union-attr]
    assert sorted(StagePolicy(Aim().stages(), 4).cuts) == [2]  # the exit is where the last cut would be
    for layers in ((1, 1), (1, 0.25)):
        with pytest.raises(ConfigError, match="two cuts at one layer"):
            StagePolicy(PyramidDrop(layers=layers, shares=(0.5, 0.2)).stages(), 4)
    with pytest.raises(ConfigError, match="two cuts at one layer"):
        StagePolicy((*FastV(layer=0.25).stages(), *PyramidDrop(layers=(0.25,), shares=(0.5,)).stages()), 4)


def test_todre_exit_asks_both_ways_of_all_pictures_of_a_prompt() -> None:
    method = ToDREExit(threshold=0.1)
    ctx = dataclasses.replace(context(method), row=torch.tensor([0, 0, 1]))

    def left(from_text: float, to_text: float) -> list[bool]:
        """Which images stay; ``from_text`` is the attention of the second image alone, ``to_text`` a token's."""
        told = {"text_rows": torch.full((3, 30), 0.0), "to_text": torch.full((3, 30), to_text)}
        told["text_rows"][1, :12] = from_text / 12
        read = Attention(lambda stat, layer: told[stat])
        return method.select(dataclasses.replace(ctx, attention=read)).any(1).tolist()  # type: ignore[union-attr]

    assert left(0.05, 0.05) == [False, False, False]
    assert left(0.2, 0.05) == [True, True, False]
    assert left(0.05, 0.2) == [True, True, True]


def test_random_differs_between_seeds_and_is_uniform() -> None:
    hits = torch.zeros(6)
    for seed in range(600):
        ctx = dataclasses.replace(
            context(Random()),
            valid=torch.ones(1, 6, dtype=torch.bool),
            count=torch.tensor([3]),
            generator=lambda u, seed=seed: torch.Generator().manual_seed(seed),
        )
        hits += Random().select(ctx)[0]  # type: ignore[index]
    assert (hits / 600 - 0.5).abs().max() < 0.08


def test_official_divprune_keeps_duplicates_out() -> None:
    ctx = context(DivPrune(), fidelity="official")
    features = ctx.features.clone()
    features[0, :30] = features[0, torch.arange(30) % 5]
    keep = DivPrune().select(dataclasses.replace(ctx, features=features))
    assert keep.sum(1).tolist() == [5, 12, 1]


def test_official_hiprune_wraps_around_row_ends() -> None:
    method = HiPrune(alpha=1.0).adapt(CLIP)
    middle, deep = torch.zeros(1, 30), torch.zeros(1, 30)
    middle[0, 12] = 1  # the first column of row 2 of a 5×6 grid
    deep[0] = torch.linspace(0.9, 0.1, 30)
    answers = {}
    for fidelity in ("fixed", "official"):
        ctx = dataclasses.replace(
            context(method, fidelity=fidelity, units=slice(0, 1)),
            count=torch.tensor([5]),
            attention=Attention(lambda stat, layer: middle if layer == 8 else deep),
        )
        answers[fidelity] = method.select(ctx)[0].nonzero()[:, 0].tolist()  # type: ignore[index]
    assert answers == {"fixed": [0, 6, 12, 13, 18], "official": [6, 11, 12, 13, 18]}


def answer_to(method: Method, received: Tensor, **changes: Any) -> Tensor:
    """What the method keeps of one image of 5×6 tokens with this attention."""
    ctx = context(method, units=slice(0, 1), **changes)
    keys = ctx.attention.keys(-1)
    read = Attention(lambda stat, layer: keys if stat == "keys" else received[None])
    return keeps(method.select(dataclasses.replace(ctx, count=torch.tensor([20]), attention=read)))[0]


def test_adaptive_prumerge_keeps_what_stands_out_and_one_for_the_rest() -> None:
    attention = torch.linspace(0.01, 0.02, 30)
    attention[[4, 17]] = torch.tensor([0.5, 0.4])
    assert answer_to(PruMerge(adaptive=True), attention).nonzero()[:, 0].tolist() == [4, 17, 29]
    assert answer_to(PruMerge(), attention).sum() == 20
    # flat attention: the published code divides by zero or keeps nothing; one token and one for the rest stay
    assert answer_to(PruMerge(adaptive=True), torch.full((30,), 1 / 30)).sum() == 2
    assert answer_to(PruMergePlus(adaptive=True), torch.full((30,), 1 / 30)).sum() == 5
    assert not PruMerge(adaptive=True).card.contract.count_from_grid
    assert PruMerge.card.contract.count_from_grid


def test_official_adaptive_prumerge_plus_takes_the_published_steps() -> None:
    attention = torch.linspace(0.01, 0.02, 30)
    attention[[4, 17]] = torch.tensor([0.5, 0.4])
    kept = answer_to(PruMergePlus(adaptive=True), attention, fidelity="official").nonzero()[:, 0].tolist()
    assert kept == sorted({4, 17, *range(0, 29, 30 // 2 // 3), 29})


def test_globalcom2_gives_more_to_the_crop_that_the_thumbnail_points_at() -> None:
    """A thumbnail of 2×2 and a picture of 1×2 crops, each row ended by a newline."""
    newline = torch.full((1, 3), -1)
    rows = [torch.cartesian_prod(torch.tensor([1]), torch.tensor([r]), torch.arange(4)) for r in range(2)]
    thumbnail = torch.cartesian_prod(torch.tensor([0]), torch.arange(2), torch.arange(2))
    grid = torch.cat([thumbnail, rows[0], newline, rows[1], newline])[None]
    logits = torch.zeros(1, 14)
    logits[0, [1, 3]] = 20.0  # the right half
    logits[0, 4:] = torch.linspace(1, 0.1, 10)
    method = GlobalCom2(temperature=1.0).adapt(NEXT)
    kept = {}
    for fidelity in ("fixed", "official"):
        ctx = dataclasses.replace(
            context(method, fidelity=fidelity, units=slice(0, 1)),
            valid=torch.ones(1, 14, dtype=torch.bool),
            grid=grid,
            count=torch.tensor([6]),
            attention=Attention(lambda stat, layer: logits),
        )
        kept[fidelity] = method.select(ctx)[0].nonzero()[:, 0].tolist()  # type: ignore[index]
    # 6 of 12: two of the thumbnail, a quarter of the left crop, three quarters of the right one. The thumbnail,
    # stretched to 2×4, prefers the right column of each crop: 5 before 4, 12 before 11.
    assert kept == {"fixed": [1, 3, 5, 6, 7, 12], "official": [1, 3, 5, 6, 7, 8, 12, 13]}


def test_what_has_no_patch_has_no_sensitivity() -> None:
    """Behind a projector that is steepest at 0, where such tokens would be."""
    ctx = context(ZooPrune(directions=4))
    encoder = ctx.encoder_features.clone()  # type: ignore[union-attr]
    encoder[0, 3] = 0
    ctx = dataclasses.replace(
        ctx, encoder_features=encoder, project=lambda x: x / (x.norm(dim=-1, keepdim=True) + 1e-3)
    )
    assert not ZooPrune(directions=4).select(ctx)[0, 3]  # type: ignore[index]
