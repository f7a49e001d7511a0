"""Mutation test: classic bugs of engines like this, planted in ours, are caught by the suite.

A mutant is a piece of the engine written wrongly, as people do write it. Its probes are cases of this suite, run as
they stand: each passes on the engine as it is and fails on the mutant, for a wrong result. A mutant whose text is no
longer in the engine, or that breaks it in another way, is an error.

Greedy generation alone sees less than one thinks: positions are explicit, and a single new token sees everything before
it, so a wrong length or a wrong offset needs several tokens at once, a second turn, or a decoding by hand.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import test_cache
import test_conformance
import test_engine
import test_evict
import test_freeze
import test_generate
import test_mass
import test_mllama
import test_narrow
import test_surroundings
import test_training
import transformers
from packaging.version import Version
from transformers.modeling_layers import GradientCheckpointingLayer

import visiontok
from visiontok.api import Compression
from visiontok.conformance.checks import Failed
from visiontok.engine import evict, narrow, vision
from visiontok.engine.attach import Attachment
from visiontok.engine.cache import TwoLengthCache, TwoLengthLayer, TwoLengthSlidingLayer
from visiontok.engine.cross import CrossAttachment, CrossCache
from visiontok.engine.layout import Layout, Parted
from visiontok.engine.masks import LayerMasks
from visiontok.engine.policy import StagePolicy
from visiontok.engine.readings import DecoderReadings
from visiontok.engine.split import Rows, Split
from visiontok.ledger import TokenLedger

pytestmark = pytest.mark.engine
REPLAYS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)
NEW_TYPES_ALONE = Version(transformers.__version__) < Version("5.21")


class Probe:
    """A case of the suite: ``test`` with one of the sets of arguments that it is parametrised with."""

    def __init__(self, test: Callable[..., None], **arguments: Any) -> None:
        self.test, self.arguments, missing = test, arguments, set(arguments)
        for mark in getattr(test, "pytestmark", ()):
            if mark.name == "parametrize":
                names = [n.strip() for n in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
                known = [getattr(v, "values", v) if len(names) > 1 or _is_param(v) else (v,) for v in mark.args[1]]
                if tuple(arguments[name] for name in names) not in map(tuple, known):
                    raise LookupError(f"{self}: the suite has no such case")
                missing -= set(names)
        assert not missing

    def __str__(self) -> str:
        return f"{self.test.__module__}.py::{self.test.__name__}[{'-'.join(map(str, self.arguments.values()))}]"

    def __call__(self) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            fixtures = {"monkeypatch": monkeypatch, "record_property": lambda *_: None}
            wanted = inspect.signature(self.test).parameters.keys() - self.arguments
            self.test(**self.arguments, **{name: fixtures[name] for name in wanted})

    def catches(self) -> str:
        """How it fails; nothing if it passes.

        Raises:
            Exception: what no wrong result explains.
        """
        try:
            self()
        except (AssertionError, Failed) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        except pytest.fail.Exception as error:  # it did not raise what it should
            return str(error)
        except RuntimeError as error:  # shapes that do not fit, or a refusal of Transformers
            return f"RuntimeError: {error}"
        return ""


def _is_param(value: Any) -> bool:
    return isinstance(value, type(pytest.param()))


class Mutant:
    """Functions of the engine in which ``right`` is written as ``wrong``."""

    def __init__(self, name: str, where: Any, right: str, wrong: str, *probes: Probe) -> None:
        self.name, self.right, self.wrong, self.probes = name, right, wrong, probes
        self.functions = [inspect.unwrap(f) for f in (where if isinstance(where, tuple) else (where,))]

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        whole = [f.__code__ for f in self.functions]
        try:
            for function in self.functions:
                function.__code__ = rewritten(function, self.right, self.wrong)
            yield
        finally:
            for function, code in zip(self.functions, whole, strict=True):
                function.__code__ = code


def rewritten(function: Any, right: str, wrong: str) -> CodeType:
    """The code of ``function`` as it would be with ``wrong`` instead of ``right`` in its source."""
    path, code = inspect.getsourcefile(function), function.__code__
    lines, first = inspect.getsourcelines(function)
    source = "".join(lines)
    if source.count(right) != 1:
        raise LookupError(f"{code.co_qualname} has {source.count(right)} times {right!r}: plant this bug elsewhere")
    module = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    module[first - 1 : first - 1 + len(lines)] = [source.replace(right, wrong)]
    pending = [compile("".join(module), path, "exec", dont_inherit=True)]
    while (found := pending.pop()).co_qualname != code.co_qualname or found.co_firstlineno != code.co_firstlineno:
        pending += [c for c in found.co_consts if isinstance(c, CodeType)]
    return found


def both(name: str) -> tuple[Any, Any]:
    """A method of the two kinds of cache layers."""
    return getattr(TwoLengthLayer, name), getattr(TwoLengthSlidingLayer, name)


def oracle(name: str, schedule: str) -> Probe:
    """The core test of the engine."""
    return Probe(test_engine.test_generation_equals_the_oracle, name=name, schedule=schedule, attention="sdpa")


def masses(name: str, schedule: str) -> Probe:
    """The core test of mass attention."""
    return Probe(test_mass.test_generation_equals_the_dense_model_with_masses, name=name, schedule=schedule)


def by_hand(name: str, schedule: str, rows: int) -> Probe:
    return Probe(test_generate.test_decoding_by_hand, name=name, schedule=schedule, rows=rows)


def text_turns(name: str, schedule: str) -> Probe:
    return Probe(test_generate.test_text_turns, name=name, schedule=schedule)


def evicted(name: str, recipe: str) -> Probe:
    """The core test of the cache stage."""
    return Probe(test_evict.test_generation_equals_the_oracle, architecture=name, name=recipe, attention="sdpa")


def states(name: str, layers: tuple[int, ...]) -> Probe:
    """The core test of narrow MLPs."""
    return Probe(test_narrow.test_states_logits_and_cache_are_those_of_the_literal_twin, name=name, layers=layers)


def narrowed(name: str, recipe: str) -> Probe:
    return Probe(test_narrow.test_generation_with_other_stages_equals_the_masked_literal_twin, name=name, recipe=recipe)


def every_check(method: str) -> Probe:
    """The conformance kit on a method."""
    card = next(card for card in visiontok.methods() if card.name == method)
    return Probe(test_conformance.test_every_method, card=card, architecture="llava")


LABELS = Probe(
    test_training.test_labels_predicted_from_dropped_positions_are_ignored,
    name="llava",
    schedule="pyramid",
    case="placeholders",
)
GAPS = Probe(test_engine.test_gaps_in_positions_are_no_packed_sequences, name="llava")
FLASH = Probe(test_engine.test_flash_attention_gets_consecutive_positions, name="llava", schedule="prompt")
WIDTHS = Probe(test_cache.test_layers_of_one_width_may_hold_different_slots, name="llava", schedule="cut")
ROWS = Probe(test_cache.test_rows_of_a_cache_can_be_reordered_repeated_and_selected)
HEAVY_ROWS = Probe(test_mass.test_masses_live_with_the_cache)
DRAWS = Probe(test_engine.test_a_draw_depends_on_the_prompt_not_on_the_batch, name="llava")
OTHER_COLUMNS = Probe(test_mllama.test_a_cache_whose_rows_are_reordered, mass=None)

MUTANTS = [
    # ---- where a query stands, and how long the cache is
    Mutant(
        "logical query offset in masks",
        TwoLengthCache.get_query_offset,
        "logical - self.layers[layer_idx].dropped if",
        "logical if",
        by_hand("qwen2_5_vl", "prompt", 1),
        text_turns("llava", "prompt"),
        Probe(test_generate.test_candidates, name="llava", schedule="prompt", candidates="two right, one wrong"),
    ),
    Mutant(
        "physical length reported by the cache",
        both("get_seq_length"),
        "super().get_seq_length() + self.dropped",
        "super().get_seq_length()",
        oracle("llava", "prompt"),
        by_hand("llava", "prompt", 1),
        text_turns("qwen2_5_vl", "prompt"),
    ),
    Mutant(
        "crop counts logical tokens",
        both("crop"),
        "dropped, self.dropped = self.dropped, 0",
        "dropped = self.dropped",
        Probe(test_cache.test_a_sliding_layer_that_stores_less_than_its_window_can_be_cropped),
    ),
    Mutant(
        "crop into the compressed prompt",
        both("check_crop"),
        "self.physical_length() + tokens_to_remove < self.floor",
        "self.get_seq_length() + tokens_to_remove < self.floor",
        Probe(test_engine.test_the_cache_of_a_compressed_prompt_cannot_be_cut_into_the_prompt),
    ),
    Mutant(
        "no crop behind the image either",
        both("note_prefill"),
        "self.floor = self.prompt - text",
        "self.floor = self.prompt",
        Probe(test_cache.test_text_behind_the_last_image_can_be_taken_back, schedule="prompt"),
    ),
    Mutant(
        "empty slots forgotten by a crop",
        both("crop"),
        "self.valid[:, : self.prompt]",
        "self.valid[:, -self.prompt :]",
        Probe(test_cache.test_text_behind_the_last_image_can_be_taken_back, schedule="cut"),
    ),
    # ---- masks
    Mutant(
        "mask not compacted",
        Attachment._enter,
        "call.width, call.entry_valid = entry.width, entry.valid",
        "call.width, call.entry_valid = entry.width, call.attended[:, : entry.width]",
        oracle("llava", "prompt"),
    ),
    Mutant(
        "mask not compacted behind a cut",
        LayerMasks.prefill,
        "mask_2d = layout.valid if layout is not None else call.entry_valid",
        "mask_2d = call.entry_valid if layout is None else call.entry_valid_or_ones()[:, : layout.width]",
        oracle("llava", "cut"),
        oracle("qwen2_5_vl", "pyramid"),
    ),
    Mutant(
        "mask not compacted in decode",
        LayerMasks.stored,
        "return cache.layers[layer].valid_through(new, mask, batch, x.device)",
        "return mask if mask is None else mask[:, : cache.layers[layer].physical_length() + new].bool()",
        oracle("llava", "prompt"),
    ),
    Mutant(
        "one decode mask for all layers",
        LayerMasks.decode,
        "key = self._kinds[index], first",
        "key = self._kinds[0], 0",
        oracle("llava", "pyramid"),
        oracle("qwen3_vl", "inject"),
    ),
    Mutant(
        "one decode mask for layers of one width",
        TwoLengthCache.first_alike,
        "layer.pattern",
        "()",
        WIDTHS,
    ),
    Mutant(
        "own masks see all of the past",
        LayerMasks._own,
        "if seen is not None:",
        "if False:",
        Probe(test_cache.test_own_masks_of_a_new_image_lie_behind_what_is_stored, name="gemma3", force=False),
        Probe(test_cache.test_a_new_image_in_the_second_turn, name="gemma3", schedule="prompt"),
    ),
    Mutant(
        "padding of an earlier turn forgotten",
        both("valid_slots"),
        "history[:, -tail:].bool().to(device)",
        "fresh",
        Probe(test_cache.test_an_image_behind_a_padded_text_turn, schedule="cut"),
    ),
    Mutant(
        "window counted from the first slot",
        LayerMasks.windowed,
        "slot[columns - rows :, None]",
        "slot[:rows, None]",
        Probe(test_cache.test_own_masks_of_a_new_image_lie_behind_what_is_stored, name="short windows", force=True),
    ),
    Mutant(
        "one mask for sliding and full layers",
        LayerMasks.decode,
        "key = self._kinds[index], first",
        "key = '', first",
        Probe(test_cache.test_windows_shorter_than_the_prompt, name="qwen2"),
    ),
    # ---- frozen tokens
    Mutant(
        "frozen and computed rows joined in the order in which they were made",
        Rows.join,
        "both.gather(2, self._place.to(both.device)[:, None, :, None].expand_as(both))",
        "both",
        oracle("llava", "freeze"),
        oracle("gemma3", "freeze"),
    ),
    Mutant(
        "text rows masked as if they stood first",
        LayerMasks.rows,
        "place = slots + past - offset",
        "place = torch.arange(slots.shape[1]).expand_as(slots) + past - offset",
        oracle("llava", "freeze"),
    ),
    Mutant(
        "frozen tokens computed all the same",
        Split.leave,
        "hidden = self.rows.computed.scatter(self._x, hidden)",
        "hidden = self.rows.computed.fill(hidden)",
        oracle("llava", "freeze"),
        oracle("qwen3_vl", "freeze"),
    ),
    Mutant(
        "keys of frozen tokens at the positions of the text",
        Attachment._split,
        "self._gather_tokens(call, rows.frozen, frozen)\n        self._gather_tokens(call, rows.computed, kwargs)",
        "self._gather_tokens(call, rows.computed, kwargs)\n        frozen.update((n, kwargs[n]) for n in kwargs)\n"
        "        frozen['position_embeddings'] = tuple(e[:, -1:] for e in frozen['position_embeddings'])",
        oracle("llava", "freeze"),
        oracle("qwen2_5_vl", "freeze"),
    ),
    Mutant(
        "window of frozen layers counted from the text",
        LayerMasks.rows,
        "place[..., None] - column < self.config.sliding_window",
        "place[..., None] - column < slots.shape[1]",
        Probe(test_freeze.test_windows_shorter_than_the_prompt, name="mistral", pad=0),
    ),
    Mutant(
        "padding seen in frozen layers",
        LayerMasks.rows,
        "mask & seen[:, None, offset : offset + length]",
        "mask",
        oracle("llava", "freeze"),
    ),
    Mutant(
        "frozen keys without gradient",
        Split.attend,
        "self.rows.join(a, b)",
        "self.rows.join(a.detach(), b)",
        Probe(test_training.test_loss_and_gradients_equal_the_oracle, name="llava", schedule="freeze"),
    ),
    # ---- narrow MLPs
    Mutant(
        "the whole MLP for visual rows",
        narrow._leaves,
        "type(module).forward(first,",
        "type(module).forward(module,",
        states("llava", (0,)),
        states("glm4v", (3,)),
        narrowed("qwen2_5_vl", "behind a cut"),
    ),
    Mutant(
        "text is narrow, and the image is not",
        Parted.__init__,
        "self.others, self.visual = order.split([visual.numel() - count, count])",
        "self.visual, self.others = order.split([visual.numel() - count, count])",
        states("llava", (0,)),
        narrowed("gemma3", "yopo"),
    ),
    Mutant(
        "padding counts as visual where rows hold few",
        Attachment._parted,
        "call.held(index, call.visual & call.alive[index]) & call.slots_in_use(index)",
        "call.held(index, call.visual & call.alive[index]) | ~call.slots_in_use(index)",
        narrowed("llava", "yopo behind a method"),
    ),
    Mutant(
        "places of the prompt are taken for slots",
        Attachment._parted,
        "call.held(index, call.visual & call.alive[index])",
        "(call.visual & call.alive[index])[:, -call.slots(index) :]",
        narrowed("llava", "behind a cut"),
        narrowed("qwen3_vl", "around a cut"),
    ),
    Mutant(
        "the layer before is narrow",
        StagePolicy.attach,
        "narrow_mlp(attachment.layers[layer], layer, self)",
        "narrow_mlp(attachment.layers[layer - 1], layer, self)",
        states("llava", (0,)),
        narrowed("llava", "yopo"),
    ),
    Mutant(
        "rows come back in the order in which they were computed",
        narrow._leaves,
        "joined.index_copy_(0, rows.to(x.device), result[0])",
        "joined.index_copy_(0, rows.sort().values.flip(0).to(x.device), result[0])",
        states("llava", (0,)),
    ),
    Mutant(
        "the last channels instead of the first",
        narrow._First.__getattr__,
        "part.weight[:, :n]",
        "part.weight[:, -n:]",
        states("qwen3_vl", (3,)),
        states("phi", (3,)),
    ),
    Mutant(
        "gate and up of one matrix, sliced as one",
        narrow._First.__getattr__,
        "x.unflatten(0, (2, -1))[:, :n].flatten(0, 1)",
        "x[: 2 * n]",
        states("glm4v", (0,)),
    ),
    # ---- positions
    Mutant(
        "positions renumbered",
        Attachment._enter,
        "entry.gather(call.numbers, call.numbers.ndim - 1)",
        "torch.arange(entry.width)[None].expand(call.batch, -1)",
        oracle("llava", "prompt"),
    ),
    Mutant(
        "positions renumbered behind a cut",
        Attachment._gathered,
        "layout.gather(e, e.ndim - 2) for e in embeddings",
        "e[..., : layout.width, :] for e in embeddings",
        oracle("llava", "cut"),
        oracle("qwen2_5_vl", "pyramid"),
    ),
    Mutant(
        "second turn numbered from 0",
        Attachment._enter,
        "torch.arange(length, device=embeds.device) + past",
        "torch.arange(length, device=embeds.device)",
        Probe(test_cache.test_own_masks_of_a_new_image_lie_behind_what_is_stored, name="gemma3", force=True),
    ),
    Mutant(
        "second turn numbered from 0 behind own masks",
        Attachment._text_pre,
        'kwargs["position_ids"] + handover["cache"].get_seq_length()',
        'kwargs["position_ids"]',
        Probe(test_cache.test_own_masks_of_a_new_image_lie_behind_what_is_stored, name="paligemma", force=False),
    ),
    Mutant(
        "gaps in positions read as packed sequences",
        LayerMasks.entering,
        "if call.entry_valid is None and first is not None:",
        "if call.entry_valid is None:",
        GAPS,
    ),
    Mutant(
        "gaps in positions read as packed sequences by flash attention",
        Attachment._in_layer,
        'if self._is_flash() and torch.is_tensor(kwargs.get("position_ids")):',
        "if False:",
        FLASH,
    ),
    # ---- hidden states
    Mutant(
        "DeepStack planes not pruned",
        Attachment._enter_deepstack,
        "[level[kept.to(level.device)] for level in levels]",
        "levels",
        oracle("qwen3_vl", "prompt"),
    ),
    Mutant(
        "DeepStack planes pruned to the first tokens",
        Attachment._enter_deepstack,
        "[level[kept.to(level.device)] for level in levels]",
        "[level[: int(kept.sum())] for level in levels]",
        oracle("qwen3_vl", "prompt"),
    ),
    Mutant(
        "DeepStack planes not for tokens injected later",
        Attachment._add_level,
        "states + level * ~layout.keep[..., None]",
        "states",
        oracle("qwen3_vl", "inject"),
    ),
    Mutant(
        "stale states behind a cut",
        Attachment._relayout,
        "states = x if before is None else before.scatter(states, x)",
        "states = x if before is None else states",
        oracle("llava", "pyramid"),
    ),
    pytest.param(
        Mutant(
            "edits not repeated when gradient checkpointing replays a layer",
            Attachment._relayout,
            "call.edits.get(index)",
            "call.edits.pop(index, None)",
            Probe(test_mass.test_gradients, name="llava", checkpointing=True),
        ),
        marks=pytest.mark.skipif(not REPLAYS_HOOKS, reason="this transformers replays layers without their hooks"),
    ),
    Mutant(
        "logits one token off",
        Layout.slot_of,
        "self.keep.long().cumsum(1) - 1 + shift",
        "self.keep.long().cumsum(1) + shift",
        Probe(test_engine.test_right_padding, name="llava"),
    ),
    # ---- books
    Mutant(
        "ledger one layer off",
        TokenLedger.alive,
        "self._alive[layer]",
        "self._alive[layer - 1]",
        oracle("llava", "cut"),
    ),
    Mutant(
        "ledger one token off",
        TokenLedger.alive,
        "self._alive[layer]",
        "self._alive[layer].roll(1, 1)",
        oracle("llava", "prompt"),
    ),
    Mutant(
        "ledger counts one slot too many",
        TokenLedger.cached_tokens,
        "else width for",
        "else width + 1 for",
        oracle("llava", "prompt"),
    ),
    Mutant(
        "images of other rows",
        vision.locate,
        "torch.tensor([u[0] for u in units], dtype=torch.long)",
        "torch.tensor([u[0] for u in units][::-1], dtype=torch.long)",
        every_check("hiprune"),
        DRAWS,
    ),
    Mutant(
        "images in another order",
        vision.locate,
        "queue.pop(0)",
        "queue.pop()",
        every_check("hiprune"),
    ),
    Mutant(
        "a draw that depends on the place in the batch",
        StagePolicy._generator,
        "call.units.ordinal[unit]",
        "unit",
        DRAWS,
    ),
    # ---- labels
    Mutant(
        "labels of dropped positions not ignored",
        Attachment._ignore_labels,
        "labels[:, 1:].masked_fill_",
        "labels[:, 1:].masked_fill",
        LABELS,
    ),
    Mutant(
        "labels of the next position ignored",
        Attachment._ignore_labels,
        "labels[:, 1:].masked_fill_(gone[:, :-1]",
        "labels[:, 1:].masked_fill_(gone[:, 1:]",
        LABELS,
    ),
    Mutant(
        "labels of the caller changed in place",
        Attachment._copy_labels,
        "labels.clone()",
        "labels",
        LABELS,
    ),
    # ---- several recipes on one model
    Mutant(
        "a recipe serves the calls of every thread",
        Compression._serves,
        "_serving(self._base) is self",
        "_serving(self._base) is not None",
        Probe(test_surroundings.test_a_thread_without_a_recipe_of_its_own_is_served_by_the_oldest),
    ),
    Mutant(
        "layers do not ask whose call it is",
        Attachment._layer_pre,
        "call is None or call.policy is not self.policy",
        "call is None",
        Probe(
            test_surroundings.test_two_threads_two_recipes_one_model, name="llava", first="fastv", second="fastv, less"
        ),
    ),
    # ---- rows of the cache
    Mutant(
        "empty slots stay behind when rows are reordered",
        both("_each"),
        "self.valid = None if self.valid is None else change(self.valid)",
        "pass",
        ROWS,
    ),
    Mutant(
        "mass stays behind when rows are reordered",
        both("_each"),
        "self.bias = None if self.bias is None else change(self.bias)",
        "pass",
        HEAVY_ROWS,
    ),
    # ---- masses
    Mutant(
        "mass forgotten in decode",
        LayerMasks.decode,
        "self._with_bias(bias,",
        "self._with_bias(None,",
        masses("llava", "cut"),
    ),
    Mutant(
        "mass forgotten in prefill",
        LayerMasks.prefill,
        "self._with_bias(biases,",
        "self._with_bias(None,",
        masses("llava", "prompt"),
    ),
    Mutant(
        "mass of the first turn forgotten in the second",
        LayerMasks.prefill,
        "stored.bias_with(bias, x.shape[1])",
        "torch.nn.functional.pad(bias, (stored.physical_length(), 0))",
        Probe(test_mass.test_a_second_image_brings_its_own_masses, name="llava"),
    ),
    Mutant(
        "mass of slots that have left the window",
        LayerMasks._keys,
        "slice(offset, offset + length)",
        "slice(0, length)",
        Probe(test_mass.test_masses_leave_the_window_with_their_tokens, name="mistral", schedule="prompt"),
        Probe(test_mass.test_masses_leave_the_window_with_their_tokens, name="gemma3", schedule="cut"),
    ),
    Mutant(
        "mass forgotten in the second stage",
        StagePolicy._weigh,
        "size = present.float() if call.mass is None else call.mass * present",
        "size = present.float()",
        masses("llava", "pyramid"),
    ),
    Mutant(
        "merged values not weighted by mass",
        StagePolicy._weigh,
        "absorb(units.gather(x), group, size, mass.merge)",
        "absorb(units.gather(x), group, (size > 0).float(), mass.merge)",
        masses("llava", "pyramid"),
    ),
    Mutant(
        "attention taps do not see the mass",
        DecoderReadings._bias,
        "bias = call.slot_bias(layer) if call.cache is None else call.cache.layers[layer].bias",
        "bias = None",
        Probe(test_mass.test_attention_taps_see_the_bias),
    ),
    # ---- refusals
    Mutant(
        "chunks may split an image",
        Attachment._refuse_split_images,
        "if any(",
        "if False and any(",
        Probe(test_cache.test_chunked_prefill_is_refused),
    ),
    Mutant(
        "a compressed cache goes on outside its block",
        TwoLengthCache.update,
        "if not self.served and any(",
        "if False and any(",
        Probe(test_cache.test_a_compressed_cache_is_refused_outside_its_block),
    ),
    # ---- cross-attention
    Mutant(
        "cross-attention columns stay behind when rows are reordered",
        CrossCache._select,
        "self.slots = self.slots[rows.to(self.slots.device)]",
        "pass",
        OTHER_COLUMNS,
    ),
    Mutant(
        "empty columns stay behind when rows are reordered",
        CrossCache._select,
        "self.valid = self.valid[rows.to(self.valid.device)]",
        "pass",
        OTHER_COLUMNS,
    ),
    Mutant(
        "mass of columns stays behind when rows are reordered",
        CrossCache._select,
        "self.bias = self.bias[rows.to(self.bias.device)]",
        "pass",
        Probe(test_mllama.test_a_cache_whose_rows_are_reordered, mass=visiontok.Mass()),
    ),
    Mutant(
        "cross-attention mask not compacted",
        CrossAttachment._masks,
        "mask.gather(3, slots[:, None, None].expand(-1, 1, mask.shape[2], -1))",
        "mask[..., :width]",
        Probe(test_mllama.test_generation_equals_the_oracle, attention="sdpa", images=test_mllama.RAGGED, caching=True),
    ),
    Mutant(
        "columns of a second image counted from 0",
        CrossCache.extend,
        "slots + self.columns",
        "slots",
        Probe(test_mllama.test_a_new_image_on_a_used_cache, fraction=0.4, then=0.6),
    ),
    # ---- what a cache stage leaves
    Mutant(
        "a thinned cache forgets what it stands for",
        TwoLengthLayer.thin,
        "self.dropped + gone,",
        "self.dropped,",
        Probe(test_evict.test_rows_and_crops_of_a_thinned_cache),
    ),
    Mutant(
        "a thinned cache can be cropped into the image",
        TwoLengthLayer.thin,
        "self.floor - gone",
        "self.floor - 2 * gone",
        Probe(test_evict.test_rows_and_crops_of_a_thinned_cache),
    ),
    Mutant(
        "padding of rows that keep less is seen",
        TwoLengthLayer.thin,
        "torch.cat([known, fresh], 1)",
        "torch.ones_like(torch.cat([known, fresh], 1))",
        evicted("llava", "any heads"),
    ),
    Mutant(
        "a view holds on to what is freed",
        TwoLengthLayer.thin,
        "torch.cat([x[:, :, :past], x[:, :, past:].gather(2, index.expand(-1, -1, -1, x.shape[3]))], 2)",
        "torch.cat([x[:, :, past:].gather(2, index.expand(-1, -1, -1, x.shape[3])), x], 2)[:, :, : slots.shape[2]]",
        Probe(test_evict.test_storages_shrink_to_what_the_report_says, architecture="llava", name="one choice"),
    ),
    Mutant(
        "a thinned sliding layer counts what is gone",
        TwoLengthSlidingLayer.thin,
        "self.cumulative_length = past + slots.shape[2]",
        "pass",
        Probe(test_evict.test_a_window_that_holds_the_prompt_slides_over_what_was_kept),
    ),
    Mutant(
        "all heads keep what the first one does",
        evict.thin,
        "index.expand(-1, k.shape[1], -1)",
        "index[:, :1].expand(-1, k.shape[1], -1)",
        evicted("qwen2_5_vl", "any heads"),
    ),
    Mutant(
        "the image looks at itself from the window",
        evict._window,
        "(slot > last)",
        "(slot >= 0)",
        Probe(
            test_evict.test_each_head_keeps_what_a_plain_loop_does,
            architecture="llava",
            case="snapkv, all text behind the image",
            joined=False,
        ),
    ),
    pytest.param(
        Mutant(
            "token types of the whole text are read at stored places",
            Attachment._base_pre,
            "types[:, -x.shape[1] :]",
            "types",
            Probe(test_evict.test_a_second_turn_sees_what_was_kept, made=test_evict.TURNS[-1], architecture="gemma3"),
        ),
        marks=pytest.mark.skipif(
            Version(transformers.__version__) < Version("5.21"),
            reason="this transformers hands over the types of new tokens alone",
        ),
    ),
    Mutant(
        "crop takes visual tokens away",
        CrossCache.crop,
        "if index not in self.cross:",
        "if True:",
        Probe(test_mllama.test_text_turn_on_a_compressed_cache, cropped=2),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_suite_catches(mutant: Mutant) -> None:
    for probe in mutant.probes:
        probe()
    with mutant.planted():
        seen = {str(probe): probe.catches() for probe in mutant.probes}
    assert seen
    assert all(seen.values()), "\n".join(f"{probe}: {how or 'PASSES'}" for probe, how in seen.items())


def test_what_is_no_mutant_is_an_error() -> None:
    """Texts and cases that are gone, and patches that break something else, are never taken for a caught bug."""
    offset = TwoLengthCache.get_query_offset
    with pytest.raises(LookupError, match="plant this bug elsewhere"), Mutant("", offset, "no such text", "").planted():
        pass
    with pytest.raises(LookupError, match="no such case"):
        oracle("llava", "no such schedule")
    code, probe = offset.__code__, oracle("llava", "prompt")
    with Mutant("", offset, "return logical -", "return no_such_name -").planted():
        assert offset.__code__ != code
        with pytest.raises(NameError):
            probe.catches()
    assert offset.__code__ is code
    assert probe.catches() == ""
