"""The second plane: shorter inputs for the stock model, for recipes that act before the language model.

The vision tower runs once, the prompt stages choose, and what is left goes to the model's own ``generate``: fewer
placeholders, their features, and the positions that the whole prompt would have had. Nothing of visiontok takes part in
prefill or decoding, so every cache, compiled decoding and layers with a recurrent state work as they do without it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.cache_utils import Cache

from .._window import minor
from ..errors import ConfigError, UnsupportedError
from ..ledger import TokenLedger
from .attach import Policy, bypass, modalities
from .cache import SHORT, adoptable
from .layout import Layout
from .prompt import run_prompt_stages
from .trace import Trace, Traces
from .vision import begin_forward, record_features, take_records

if TYPE_CHECKING:
    from visiontok.adapters.base import Adapter

_PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}
_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_VISION = ("pixel_", "image_", "video_", "vision_", "batch_num_images", "second_per_grid_ts")  # beginnings of names
_ALONG = ("input_ids", "attention_mask", "position_ids", *_TYPES)
_FEATURES = "mm_encoder_outputs"  # transformers ≥ 5.18: features in the place of pixels


@dataclass(frozen=True)
class Prompt:
    """A prompt before and after shortening; B rows, N positions of which M are left.

    Attributes:
        full: (B, N) ids as the caller gave them.
        ids: (B, M) ids that are left.
        mask: (B, M), 1 where a slot holds a token.
        positions: (…, B, M), of the whole prompt.
        in_sequences: whether ``generate`` was given ``ids``, which then begin its sequences, or embeddings.
    """

    full: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    in_sequences: bool = True

    @property
    def dropped(self) -> int:
        """N - M."""
        return self.full.shape[1] - self.ids.shape[1]

    def restore(self, sequences: torch.Tensor) -> torch.Tensor:
        """See :meth:`CompressedInputs.restore`."""
        full, ids = (_repeated(x, len(sequences), "sequences") for x in (self.full, self.ids))
        if self.in_sequences:
            if not torch.equal(sequences[:, : ids.shape[1]], ids):
                raise ConfigError(
                    "sequences: they do not begin with these inputs; give what generate(**inputs) returned"
                )
            sequences = sequences[:, ids.shape[1] :]
        return torch.cat([full, sequences], 1)

    def extend(self, ids: torch.Tensor, cache: Any, attention_mask: torch.Tensor | None) -> Prompt:
        """See :meth:`CompressedInputs.extend`."""
        rows, n = len(ids), self.full.shape[1]
        if ids.shape[1] <= n or not torch.equal(ids[:, :n], _repeated(self.full, rows, "ids")):
            raise ConfigError(
                f"ids={tuple(ids.shape)}: a turn goes on with the whole conversation: the {n} ids of the prompt, all "
                "that was generated (inputs.restore(output)), and new text behind it"
            )
        stored, first, last = int(cache.get_seq_length()), self.ids.shape[1], ids.shape[1] - self.dropped - 1
        if not first <= stored <= last:
            raise ConfigError(
                f"past_key_values: it holds {stored} tokens, where this conversation has {first} to {last}; give the "
                "cache that generate(**inputs) filled"
            )
        mask = _repeated(self.mask, rows, "ids")
        fresh = torch.ones_like(ids[:, n:]) if attention_mask is None else attention_mask[:, n:]
        fresh = fresh.to(mask.dtype)
        positions = self.positions.repeat_interleave(rows // self.positions.shape[-2], -2)
        return Prompt(
            full=ids,
            ids=torch.cat([_repeated(self.ids, rows, "ids"), ids[:, n:]], 1),
            mask=torch.cat([mask, fresh], 1),
            positions=torch.cat([positions, positions[..., -1:] + fresh.cumsum(1)], -1),
        )

    def inputs(self) -> dict[str, Any]:
        """What runs along the prompt, for ``generate``."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "use_cache": True,
        }


def _repeated(x: torch.Tensor, rows: int, name: str) -> torch.Tensor:
    """(B, …) → (rows, …), each row as often as ``generate`` repeats it for beams."""
    if rows % len(x):
        raise ConfigError(f"{name}: {rows} rows do not belong to {len(x)} prompts")
    return x.repeat_interleave(rows // len(x), 0)


class CompressedInputs(Mapping[str, Any]):
    """Shorter inputs; ``model.generate(**inputs)`` and ``model(**inputs)`` take them.

    B prompt rows, N prompt positions, M of them left in the longest row. ``input_ids``, ``attention_mask`` and token
    types are (B, M), left padded; ``position_ids`` (B, M), or (3 or 4, B, M) for M-RoPE, are those of the whole prompt.
    ``use_cache=True`` is among them: with neither cache nor mask, Transformers takes gaps in positions for the borders
    of packed sequences.

    Attributes:
        ledger: which token is left.
        trace: what was measured.
    """

    def __init__(
        self,
        data: dict[str, Any],
        prompt: Prompt,
        ledger: TokenLedger,
        trace: Trace,
        describe: Callable[[TokenLedger, Trace], Any],
    ) -> None:
        self._data, self.prompt = data, prompt
        self.ledger, self.trace, self._describe = ledger, trace, describe

    def __getitem__(self, name: str) -> Any:
        value = self._data[name]
        if name == _FEATURES:  # generate() repeats them in place for beams
            return {modality: _marked(copy.copy(output)) for modality, output in value.items()}
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        full, short = self.prompt.full.shape[1], self.prompt.ids.shape[1]
        return f"CompressedInputs({', '.join(self)}; {short} of {full} positions)"

    @property
    def report(self) -> Any:
        """Requested and realised budget, per-layer counts, KV bytes, FLOPs and times: a :class:`visiontok.Report`."""
        return self._describe(self.ledger, self.trace)

    def restore(self, output: Any) -> Any:
        """What ``generate`` returned, in the format it has for the whole prompt: its (B, N) ids, then the new ones.

        Args:
            output: the (B·r, M + new) sequences, or the output object that holds them (``return_dict_in_generate``).

        Returns:
            the same with (B·r, N + new) sequences; hidden states, attentions and caches keep the shorter length.

        Raises:
            ConfigError: for sequences that do not begin with these inputs.
        """
        if torch.is_tensor(output):
            return self.prompt.restore(output)
        restored = copy.copy(output)
        restored.sequences = self.prompt.restore(output.sequences)
        return restored

    def extend(
        self, ids: torch.Tensor, past_key_values: Any, attention_mask: torch.Tensor | None = None
    ) -> CompressedInputs:
        """The next turn, of text, on the cache of these inputs.

        Args:
            ids: (B·r, T) the whole conversation in the format of stock ``generate``: the restored sequences, then the
                new text.
            past_key_values: the cache that ``generate(**inputs)`` filled.
            attention_mask: (B·r, T), where rows of the conversation are padded behind the first prompt.

        Returns:
            inputs for ``generate``, the cache among them; they can be extended again.

        Raises:
            ConfigError: if ``ids`` do not begin with the prompt, or the cache is not that of these inputs.
        """
        prompt = self.prompt.extend(ids, past_key_values, attention_mask)
        data = prompt.inputs() | {"past_key_values": past_key_values}
        return CompressedInputs(data, prompt, self.ledger, self.trace, self._describe)


def _marked(output: Any) -> Any:
    """Tell hooks, which another thread may have attached, that these features are already a choice."""
    output.__dict__[SHORT] = True
    return output


class InputPlane:
    """What must be on a model for its prompt stages to run: recorders of the tower's runs and the policy's taps.

    Args:
        adapter: where the parts of the model are.
        serves: whether the calls of the present thread are this plane's; others may stand beside it.
        guard: refuse forwards with pixels of their own, which would not be compressed.
    """

    def __init__(self, adapter: Adapter, *, serves: Callable[[], bool], guard: bool = False) -> None:
        self.adapter, self.serves = adapter, serves
        self.layers: list[nn.Module] = list(getattr(adapter.base, adapter.text).layers)
        self.traces = Traces()
        self._removables: list[Any] = list(record_features(adapter.base))
        if guard:
            self.add(adapter.base.register_forward_pre_hook(self._refuse, with_kwargs=True))

    def add(self, removable: Any) -> None:
        """Tie the life of a tap to this plane."""
        self._removables.append(removable)

    def remove(self) -> None:
        """Take everything away; the model is stock again."""
        for removable in self._removables:
            removable.remove()
        self._removables = []
        begin_forward()

    def _refuse(self, module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None and modalities(kwargs) and self.serves():
            raise UnsupportedError(
                f"{self.adapter.base.config.model_type}: with recurrent layers, generate() is the only call that is "
                "compressed as it is; for a forward, give the model visiontok.compress_inputs(model, inputs, recipe)"
            )


@torch.no_grad()
def shorten(
    model: Any,
    adapter: Adapter,
    policy: Policy,
    inputs: Mapping[str, Any],
    describe: Callable[[TokenLedger, Trace], Any],
) -> CompressedInputs:
    """Run tower and prompt stages, and hand over what is left.

    Args:
        model: the model that generates.
        adapter: of its base model, on which an :class:`InputPlane` or an attachment must be.
        policy: who decides, before the language model only.
        inputs: what a processor returned, with pixels.
        describe: makes the report.

    Raises:
        ConfigError: for inputs that are incomplete or contradict each other.
        UnsupportedError: for inputs or models that this plane cannot serve.
    """
    ids, mask = _checked(model, adapter, inputs)
    by_features = _takes_features(model)
    family, remedy = adapter.base.config.model_type, "use transformers >= 5.18, or compress() with a DynamicCache"
    embeddable = "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters
    if not by_features and (adapter.deepstack or not embeddable):
        raise UnsupportedError(
            f"{family}: generate() of transformers {transformers.__version__} takes neither encoded images nor "
            f"{'DeepStack features' if embeddable else 'embeddings'}; {remedy}"
        )
    outputs = encode(adapter.base, inputs)
    masks = {m: ids == token for m, token in adapter.placeholders().items() if m in outputs}
    visual = functools.reduce(torch.logical_or, masks.values())
    embeds = adapter.base.get_input_embeddings()(ids.masked_fill(visual, 0))  # a placeholder may lie outside its table
    for modality, output in outputs.items():
        features, places = _flat(output.pooler_output), masks[modality]
        if len(features) != int(places.sum()):
            error = f"inputs: {len(features)} encoded {modality} tokens stand against {int(places.sum())} placeholders"
            if not by_features and outputs.keys() == {"video"}:  # LLaVA-OneVision adds a newline in its forward
                raise UnsupportedError(f"{error}, in transformers {transformers.__version__}; {remedy}")
            raise ConfigError(f"{error}; give input_ids and pixels of one processor call")
        embeds[places] = features.to(embeds)
    attended = torch.ones_like(visual) if mask is None else mask.bool()
    positions = _positions(model, adapter, inputs, ids)
    depth = len(getattr(adapter.base, adapter.text).layers)
    trace = Trace(depth)
    trace.clock.mark("prefill")
    call, _, embeds = run_prompt_stages(
        adapter,
        policy,
        trace,
        masks={m: places.cpu() for m, places in masks.items()},
        records=take_records(outputs),
        ids=ids,
        ids_host=ids.cpu(),
        embeds=embeds,
        attended=attended.cpu(),
        positions=lambda: positions,
    )
    trace.promises.settle(wait=True)
    drops = list(call.counts) != call.units.sizes
    keep = torch.where(visual, call.kept, attended) if drops else torch.ones_like(visual)
    layout = Layout(keep, keep.sum(1).tolist())
    prompt, types = _along(model, adapter, inputs, ids, attended, positions, layout)
    data = prompt.inputs() | types
    if by_features:
        data[_FEATURES] = {m: _left(o, embeds, masks[m], call.kept) for m, o in outputs.items()}
    else:
        prompt = replace(prompt, in_sequences=False)
        del data["input_ids"]
        data["inputs_embeds"] = F.pad(layout.gather(embeds), (0, 0, prompt.ids.shape[1] - layout.width, 0))
    data |= {name: value for name, value in inputs.items() if not _is_input(adapter.base, name)}
    alive = torch.where(visual, call.kept, attended)
    trace.plane, trace.steps = "inputs", None
    trace.finish([alive] * depth, [prompt.ids.shape[1]] * depth, [call.mass] * depth)
    return CompressedInputs(data, prompt, trace.ledger, trace, describe)  # type: ignore[arg-type]


def _takes_features(model: Any) -> bool:
    """Whether ``generate`` and ``forward`` take encoded images, as they do from transformers 5.18 on."""
    return _FEATURES in inspect.signature(model.forward).parameters


def _checked(model: Any, adapter: Adapter, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, N) ids and mask of inputs that can be shortened."""
    ids, mask, cache = (inputs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
    if ids is None or inputs.get("inputs_embeds") is not None:
        raise ConfigError("inputs: they need input_ids, and no inputs_embeds; give what the processor returned")
    if not any(inputs.get(name) is not None for names in _PIXELS.values() for name in names):
        raise ConfigError("inputs: no pixels, so there is nothing to compress; give them to the model as they are")
    if inputs.get("labels") is not None:
        raise UnsupportedError("labels: shorter inputs are for inference; train inside compress(model, recipe)")
    if cache is not None and cache.get_seq_length():
        raise UnsupportedError(
            "past_key_values: shorter inputs begin a conversation; for a new image, start again without the cache"
        )
    if mask is not None and mask.shape != ids.shape:
        raise ConfigError(f"attention_mask={tuple(mask.shape)}: expected the 2-D padding mask {tuple(ids.shape)}")
    pad = _pad_id(model, adapter)
    if mask is None and len(ids) > 1 and bool((ids[:, [0, -1]] == pad).any()):
        raise ConfigError(
            f"attention_mask: it is missing, and rows of input_ids begin or end with the padding id {pad}; give the "
            "processor's mask"
        )
    return ids, mask


def _pad_id(model: Any, adapter: Adapter) -> int:
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return 0 if pad is None or pad in adapter.placeholders().values() else pad


def _is_input(base: Any, name: str) -> bool:
    """Whether ``name`` is among what is shortened, or only the tower reads it."""
    if name in _ALONG or name.startswith(_VISION):
        return True
    encoders = (getattr(base, f"get_{modality}_features", None) for modality in _PIXELS)
    return "output" not in name and any(e is not None and name in inspect.signature(e).parameters for e in encoders)


def encode(base: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Modality → what its ``get_…_features`` makes of the inputs, called as ``generate`` does."""
    begin_forward()
    outputs = {}
    for modality, names in _PIXELS.items():
        pixels = next((inputs[name] for name in names if inputs.get(name) is not None), None)
        if pixels is None:
            continue
        encoder = getattr(base, f"get_{modality}_features")
        parameters = list(inspect.signature(encoder).parameters)
        given = {name: inputs[name] for name in parameters if inputs.get(name) is not None}
        given[parameters[0]] = pixels  # up to transformers 5.17, LLaVA-OneVision calls a video's pixels pixel_values
        outputs[modality] = encoder(**given, return_dict=True)
    return outputs


def _flat(features: Any) -> torch.Tensor:
    """(n, D): features of all items in the order of their placeholders."""
    return torch.cat([item.reshape(-1, item.shape[-1]) for item in features])


def _left(output: Any, embeds: torch.Tensor, places: torch.Tensor, kept: torch.Tensor) -> Any:
    """The tower's output with the features of kept tokens only, one item per prompt row.

    ``generate`` repeats items for beams by comparing their lengths with the placeholders of each row; where the family
    stacks them in one tensor, every token is an item.
    """
    left = places & kept
    counts = [n for n in left.sum(1).tolist() if n]
    stacked = torch.is_tensor(output.pooler_output)
    features = embeds[left]
    fields: dict[str, Any] = {"pooler_output": features[:, None] if stacked else list(features.split(counts))}
    levels = getattr(output, "deepstack_features", None)
    if levels is not None:
        fields["deepstack_features"] = [list(_flat(level)[left[places]].split(counts)) for level in levels]
    return type(output)(**fields)


def _positions(model: Any, adapter: Adapter, inputs: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """(…, B, N) positions of the whole prompt, as ``generate()`` numbers it."""
    if inputs.get("position_ids") is not None:
        return inputs["position_ids"]
    with _unchanged(adapter.base, "rope_deltas"):
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        return model._prepare_position_ids_for_generation(ids, rest)


def _along(
    model: Any,
    adapter: Adapter,
    inputs: Mapping[str, Any],
    ids: torch.Tensor,
    attended: torch.Tensor,
    positions: torch.Tensor,
    layout: Layout,
) -> tuple[Prompt, dict[str, torch.Tensor]]:
    """What runs along the prompt, without the dropped positions: the prompt, and token types by name."""
    types = {name: inputs[name] for name in _TYPES if inputs.get(name) is not None}
    rows = [ids, attended.long(), *types.values()]
    *rows, positions = layout.gather_each([*rows, positions], [*[1] * len(rows), positions.ndim - 1])
    fill = [_pad_id(model, adapter)] + [0] * (len(rows) - 1)
    if layout.valid is not None:
        rows = [x.masked_fill(~layout.valid, value) for x, value in zip(rows, fill, strict=True)]
    if positions.ndim == 3 and len(positions) == 4:
        # Row 0 counts text for masks and attention kernels, which take a gap for the border of a packed sequence;
        # rotary embeddings use the other three.
        count = (rows[1].cumsum(1) - 1).clamp_min(0)
        positions = torch.cat([count[None], positions[1:]])
    elif "flash" in str(model.config.get_text_config()._attn_implementation) and len(ids) == 1 and bool(rows[1].all()):
        # the same reading of gaps; a padded row is cut out by its mask instead
        rows = [F.pad(x, (1, 0), value=value) for x, value in zip(rows, fill, strict=True)]
        positions = F.pad(positions, (1, 0))
    return Prompt(ids, rows[0], rows[1], positions), dict(zip(types, rows[2:], strict=True))


@contextlib.contextmanager
def _unchanged(module: Any, name: str) -> Iterator[None]:
    """Put an attribute back that the stock code sets on the way."""
    there, value = hasattr(module, name), getattr(module, name, None)
    try:
        yield
    finally:
        if there:
            setattr(module, name, value)


class Generate:
    """Stands before ``model.generate`` and chooses the plane call by call; all else is the stock method's.

    Args:
        model: the model that generates.
        adapter: of its base model.
        policy: of prompt stages only.
        traces: where what was measured is published.
        describe: makes the report.
        serves: whether the calls of the present thread are to be looked at; others may stand beside this one.
        always: whether every call with pixels takes this plane.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        policy: Policy,
        traces: Traces,
        describe: Callable[..., Any],
        *,
        serves: Callable[[], bool],
        always: bool,
    ) -> None:
        self.model, self.adapter, self.policy, self.traces = model, adapter, policy, traces
        self.describe, self.serves, self.always = describe, serves, always
        self.covered = model.__dict__.get("generate")  # a checkpoint may bring its own
        model.__dict__["generate"] = self

    def remove(self) -> None:
        """Uncover what was there before; another compression may stand before this one."""
        above, top = None, self.model.__dict__.get("generate")
        while isinstance(top, Generate) and top is not self:
            above, top = top, top.covered
        if top is not self:
            return
        if above is not None:
            above.covered = self.covered
        elif self.covered is not None:
            self.model.__dict__["generate"] = self.covered
        else:
            del self.model.__dict__["generate"]

    @property
    def _stock(self) -> Callable[..., Any]:
        return self.covered or type(self.model).generate.__get__(self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).generate.__get__(self.model))  # a patched one may hide its own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.serves():
            return self._stock(*args, **kwargs)
        given = self.__signature__.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        cache = given.get("past_key_values")
        if not isinstance(cache, Cache):
            cache = None
        if cache is not None and not cache.get_seq_length():
            cache.__dict__.pop(SHORT, None)  # it was reset since
        turn: Prompt | None = getattr(cache, SHORT, None)
        pixels = any(given.get(name) is not None for names in _PIXELS.values() for name in names)
        if turn is None and not (pixels and (self.always or self._hooks_cannot(given, cache))):
            return self._stock(*args, **kwargs)
        if self._setting(given, "use_cache") is False:
            raise UnsupportedError("use_cache=False: a prompt compressed before the model needs a cache; leave it out")
        if self._setting(given, "prefill_chunk_size") is not None and minor(transformers.__version__) < (5, 23):
            raise UnsupportedError(
                f"prefill_chunk_size: transformers {transformers.__version__} answers a prompt with images in chunks "
                "wrongly; leave it out, or use transformers >= 5.23"
            )
        if given.get("inputs") is not None:
            given["input_ids"] = given.pop("inputs")
        inputs = {name: value for name, value in given.items() if _is_input(self.adapter.base, name)}
        options = {name: value for name, value in given.items() if name not in (*inputs, "past_key_values")}
        if turn is None:
            short: Any = shorten(
                self.model, self.adapter, self.policy, inputs | {"past_key_values": cache}, self.describe
            )
            self.traces.publish(short.trace)
            prompt = short.prompt
        elif pixels:
            raise UnsupportedError(
                "past_key_values: it holds a prompt that was compressed before the model, to which no image can be "
                "added; start again without the cache"
            )
        else:
            prompt = turn.extend(inputs["input_ids"], cache, inputs.get("attention_mask"))
            short = prompt.inputs()
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if self._setting(given, new) is None and (value := self._setting(given, total)):
                options[total] = max(value - prompt.dropped, 0)  # the caller counts the whole prompt
        with bypass():
            output = self._stock(**{**options, **short, "past_key_values": cache})
        filled = getattr(output, "past_key_values", None) if cache is None else cache
        if filled is not None:
            filled.__dict__[SHORT] = prompt
        if torch.is_tensor(output):
            return prompt.restore(output)
        output.sequences = prompt.restore(output.sequences)
        return output

    def _hooks_cannot(self, given: Mapping[str, Any], cache: Cache | None) -> bool:
        """Whether the call asks for a cache, or a way to fill it, that hooks cannot serve."""
        return (
            (cache is not None and not adoptable(cache))
            or self._setting(given, "cache_implementation") not in (None, "dynamic")
            or self._setting(given, "prefill_chunk_size") is not None
        )

    def _setting(self, given: Mapping[str, Any], name: str) -> Any:
        """A generation setting, from where ``generate`` takes it."""
        sources = (given.get("generation_config"), self.model.generation_config)
        return next((v for v in (given.get(name), *(getattr(s, name, None) for s in sources)) if v is not None), None)
