"""Attention with a bias per key in kernels that take none: the columns by themselves, and in models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_cache import short_windows
from test_engine import DEPTH, STEPS, generate, masks
from test_mass import DenseMass, agreeing, weighed
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from visiontok.kernels.bias import KeyBias, augment, columns, variants, widened

import visiontok
from visiontok import Recipe
from visiontok.conformance.oracle import greedy
from visiontok.conformance.schedules import cut, freeze, inject, leave, prompt
from visiontok.conformance.zoo import BANNED, IMAGE, batch, build, visual
from visiontok.errors import UnsupportedError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """The definition, in float64 and with all logits at once; ``visible`` (…, Q, K)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = scale * q @ k.transpose(2, 3)
    if bias is not None:
        logits = logits + bias.double()[:, None, None]
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    return logits.softmax(-1) @ v


def heads(head_dim: int, dtype: torch.dtype, rows: int = 21, keys: int = 21) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (2, 4, rows, d), k and v (2, 2, keys, d), a bias (2, keys) between log(1/100) and log(1000), some of it 0."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, head_dim, generator=g, dtype=torch.float64).to(dtype)
        for h, n in ((4, rows), (2, keys), (2, keys))
    )
    bias = math.log(0.01) + (math.log(1000) - math.log(0.01)) * torch.rand(2, keys, generator=g, dtype=torch.float64)
    bias[:, ::5] = 0
    return q, k, v, bias if dtype == torch.float64 else bias.float()


# ---- columns


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("head_dim", "scale"), [(64, 64**-0.5), (80, 1.0), (128, 1 / 128), (248, 168**-0.5)])
def test_the_sum_of_the_columns_is_the_bias_over_the_scale(name: str, head_dim: int, scale: float) -> None:
    """But for the rounding of the scale and of one division to float32; also in a kernel that rounds to bfloat16."""
    dtype = DTYPES[name]
    bias = torch.cat([torch.linspace(math.log(0.01), math.log(1000), 999), torch.tensor([0.0, 1e-3, -1e-3])]).double()
    if dtype != torch.float64:
        bias = bias.float().double()
    got = columns(bias[None] if dtype == torch.float64 else bias[None].float(), scale, head_dim, dtype)
    assert got.dtype == dtype
    assert got.shape == (1, len(bias), widened(head_dim) - head_dim)
    smallest = 2.0**-25 * 3 if dtype == torch.float16 else 0.0
    bound = (2.0**-52 if dtype == torch.float64 else 2.0**-23) * bias.abs() + scale * smallest
    assert ((got.double().sum(-1)[0] * scale - bias).abs() <= bound).all()
    if dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(got.bfloat16().to(dtype), got)


@pytest.mark.parametrize("head_dim", [8, 20, 64, 72, 80, 128])
def test_shapes_are_those_that_flash_attention_takes(head_dim: int) -> None:
    q, k, v, bias = heads(head_dim, torch.bfloat16, rows=3)
    wide = augment(q, k, v[..., :8], KeyBias(bias).columns(k, 1.0))
    assert {x.shape[-1] for x in wide} == {widened(head_dim)}
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in wide)
    assert widened(head_dim) % 8 == 0
    assert head_dim + 4 <= widened(head_dim) < head_dim + 12


def test_a_head_dimension_without_room_is_refused() -> None:
    assert widened(248) == 256
    with pytest.raises(UnsupportedError, match=r'head_dim=256 to 264, and flash attention takes 256.*"sdpa", or mass'):
        columns(torch.zeros(1, 2), 1.0, 256, torch.bfloat16)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 21])
@pytest.mark.parametrize(("head_dim", "scale"), [(64, 0.125), (80, 0.3), (128, 128**-0.5)])
def test_attention_with_columns_is_attention_with_a_bias(name: str, rows: int, head_dim: int, scale: float) -> None:
    """In kernels that know queries, keys, values and a scale alone: one that rounds nothing, and PyTorch's."""
    dtype = DTYPES[name]
    q, k, v, bias = heads(head_dim, dtype, rows)
    visible = torch.ones(rows, 21, dtype=torch.bool).tril(21 - rows)
    expected, plain = dense(q, k, v, scale, bias, visible), dense(q, k, v, scale, None, visible)
    assert (expected - plain).abs().max() > 0.1
    most = v.double().abs().max()
    wide = augment(q, k, v, KeyBias(bias).columns(k, scale))

    got = dense(*wide, scale, visible=visible)
    assert not got[..., head_dim:].any()
    # a bias, at most log(1000), is off by 2**-23 of itself, and the weights by twice that
    assert (got[..., :head_dim] - expected).abs().max() < most * (1e-14 if dtype == torch.float64 else 2.0**-20)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)

    rounding = (kernel(q, k, v) - plain).abs().max() + torch.finfo(dtype).eps * most
    assert (kernel(*wide)[..., :head_dim] - expected).abs().max() < 4 * rounding


def test_one_term_would_not_do() -> None:
    """A bias that bfloat16 rounds, in a mask or in one column, shifts weights by a percent."""
    bias = torch.linspace(math.log(0.01), math.log(1000), 999)
    assert ((bias.bfloat16().float() - bias).exp() - 1).abs().max() > 0.01
    whole = columns(bias[None], 0.125, 64, torch.bfloat16).float()
    assert ((whole[0, :, 0] * 0.125 - bias).exp() - 1).abs().max() > 0.01
    assert ((whole[0].sum(-1) * 0.125 - bias).exp() - 1).abs().max() < 1e-6


def test_a_whole_weight_counts_as_copies() -> None:
    q, k, v, _ = heads(16, torch.float64, 3)
    weight = torch.arange(21) % 4 + 1
    wide = augment(q, k, v, KeyBias(weight.double().log().expand(2, -1)).columns(k, 0.25))
    copies = torch.arange(21).repeat_interleave(weight)
    torch.testing.assert_close(dense(*wide, 0.25)[..., :16], dense(q, k[:, :, copies], v[:, :, copies], 0.25))


@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("variant", variants())
def test_the_variants_compute_the_same(variant: str, rows: int) -> None:
    """With PyTorch's flash kernel of the CPU, causal and without a mask, for one of them."""
    q, k, v, bias = heads(64, torch.float32, rows)
    got = variants()[variant](q, k, v, bias, 0.125)()
    expected = dense(q, k, v, 0.125, bias, torch.ones(rows, 21, dtype=torch.bool).tril(21 - rows))
    assert (got - expected).abs().max() < 1e-5


def test_columns_have_gradients() -> None:
    q, k, v, bias = (x.requires_grad_() for x in heads(16, torch.float64))

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.square().sum(), (q, k, v, bias))

    wide = augment(q, k, v, KeyBias(bias).columns(k, 0.25))
    for got, expected in zip(
        gradients(dense(*wide, 0.25)[..., :16]), gradients(dense(q, k, v, 0.25, bias)), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flexattention_attends_with_columns() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, bias = heads(16, torch.float32)
    block = create_block_mask(lambda b, h, i, j: i >= j, 2, None, 21, 21, device="cpu")
    wide = augment(q, k, v, KeyBias(bias).columns(k, 0.25))
    got = flex_attention(*wide, block_mask=block, scale=0.25, enable_gqa=True)
    expected = dense(q, k, v, 0.25, bias, torch.ones(21, 21, dtype=torch.bool).tril())
    assert (got[..., :16] - expected).abs().max() < 1e-5


def test_columns_are_made_once_for_the_layers_that_share_them() -> None:
    _, k, _, bias = heads(16, torch.float32)
    shared = KeyBias(bias)
    assert shared.columns(k, 0.25) is shared.columns(k + 1, 0.25)
    assert shared.columns(k, 0.25) is not shared.columns(k, 0.5)
    assert shared.columns(k.bfloat16(), 0.25).dtype == torch.bfloat16


# ---- models whose kernel takes no bias


class Flash:
    """Stands for a flash kernel: it knows queries, keys, values, a scale, a window and which keys are padding.

    Attributes:
        widths: (layer, head dimension of what it was given) of every call.
    """

    def __init__(self) -> None:
        self.widths: list[tuple[int, int]] = []

    def __call__(
        self,
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        assert not any(name.startswith("visiontok") for name in others)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert mask is None or mask.shape == (len(k), k.shape[2])
        self.widths.append((module.layer_idx, q.shape[-1]))
        row = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        column = torch.arange(k.shape[2])
        seen = column <= row
        if sliding_window is not None:
            seen = seen & (row - column < sliding_window)
        if mask is not None:
            seen = seen & mask[:, None, None].bool() | (row == column)  # no row is empty
        return dense(q, k, v, scaling or q.shape[-1] ** -0.5, visible=seen).to(q.dtype).transpose(1, 2), None


@pytest.fixture
def flash() -> Flash:
    kernel = Flash()
    ALL_ATTENTION_FUNCTIONS.register("stand_in_flash", kernel)
    ALL_MASK_ATTENTION_FUNCTIONS.register("stand_in_flash", flash_attention_mask)
    return kernel


def with_flash(model: Any) -> Any:
    """A copy whose language model runs the stand-in."""
    model = copy.deepcopy(model)
    for module in model.model.language_model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "stand_in_flash"
    return model


def causal(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A batch in which no image sees itself whole, which flash attention cannot let it."""
    inputs = batch(name, *args, **kwargs)
    return {k: v for k, v in inputs.items() if k != "token_type_ids"} if name == "gemma3" else inputs


def close(got: Any, expected: Any, tolerance: float = 2e-6) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    a, b = torch.stack(got.logits), torch.stack(expected.logits)
    assert (a - b).abs().max() < tolerance * b.abs().max()


SCHEDULES = {
    "prompt": (weighed(prompt()),),
    "cut": (weighed(cut(2)),),
    "pyramid": (weighed(cut(1, 0.75, 1)), weighed(cut(2, 0.7, 2)), weighed(cut(3, 0.5, 3))),
    "prompt, injected, leaving": (weighed(prompt()), inject(1), leave(3)),
    "prompt, then a cut without": (weighed(prompt(0.7)), cut(2)),
}
NAMES = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"]


@pytest.mark.engine
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_the_dense_model_with_masses(name: str, schedule: str, pad: int, flash: Flash) -> None:
    """Several images; rows of one length and of several; prefill and steps; each layer runs its own kernel."""
    reference, stages = build(name), SCHEDULES[schedule]
    model = with_flash(reference)
    inputs = causal(name, reference, rows=2 if pad else 1, pad=pad)
    recipe = Recipe(stages=stages)
    with visiontok.compress(model, recipe) as compression:
        out = generate(model, inputs)
        alive, frozen = masks(compression), [compression.ledger.frozen(layer) for layer in range(DEPTH)]
        owner = torch.where(visual(inputs), compression.ledger.grid()[..., 0], -1)
        assert "sdpa" not in str(compression.report.warnings)
    head_dim = getattr(model.config.text_config, "head_dim", None) or 8
    first = min(s.layer or 0 for s in stages if s.mass is not None)
    if schedule == "prompt, injected, leaving":
        weighs = {1, 2}
    else:
        weighs = set(range(first, DEPTH))
    assert set(flash.widths) == {(i, widened(head_dim) if i in weighs else head_dim) for i in range(DEPTH)}
    assert len(flash.widths) == DEPTH * STEPS
    sequences, logits = greedy(
        reference, inputs, alive, STEPS, BANNED, oracle=DenseMass(reference, alive, stages, owner, frozen)
    )
    assert torch.equal(out.sequences, sequences)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < 2e-6 * logits.abs().max()
    with visiontok.compress(reference, recipe):
        close(out, generate(reference, inputs))


@pytest.mark.engine
@pytest.mark.parametrize("schedule", ["prompt", "cut"])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2"])
def test_masses_leave_the_window_with_their_tokens(name: str, schedule: str, flash: Flash) -> None:
    """With windows shorter than the prompt: what is stored, and the bias of what has left it."""
    reference = short_windows(name)
    kind = "gemma3" if name == "gemma3" else "llava"
    for rows, pad in ((1, 0), (2, 2)):
        inputs = causal(kind, reference, rows=rows, pad=pad)
        with visiontok.compress(reference, Recipe(stages=SCHEDULES[schedule])) as compression:
            expected = generate(reference, inputs)
            assert all(compression.ledger.mass(layer).max() > 1 for layer in (2, 3))
        model = with_flash(reference)
        with visiontok.compress(model, Recipe(stages=SCHEDULES[schedule])):
            close(generate(model, inputs), expected)
    assert {width for _, width in flash.widths} >= {widened(8)}


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_later_turns(name: str, flash: Flash) -> None:
    """With an image, and with several tokens of text alone, on what earlier turns have stored with their masses."""
    reference = build(name)
    image = [causal(name, reference, images=1, pad=2, seed=seed) for seed in (0, 3)]
    text = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}

    def turns(model: Any) -> list[Any]:
        ids = mask = torch.zeros(2, 0, dtype=torch.long)
        said: list[Any] = []
        with visiontok.compress(model, Recipe(stages=(weighed(prompt(0.7)), weighed(cut(2))))):
            for turn in (*image, text):
                ids = torch.cat([ids, turn["input_ids"]], 1)
                mask = torch.cat([mask, turn["attention_mask"]], 1)
                cache = {"past_key_values": said[-1].past_key_values} if said else {}
                said.append(generate(model, turn | {"input_ids": ids, "attention_mask": mask}, 3, **cache))
                ids, mask = said[-1].sequences, torch.cat([mask, mask.new_ones(2, 3)], 1)
        return said

    for got, expected in zip(turns(with_flash(reference)), turns(reference), strict=True):
        close(got, expected)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_beams_keep_their_masses(name: str, flash: Flash) -> None:
    reference = build(name)
    inputs = causal(name, reference, images=1)
    recipe = Recipe(stages=tuple(agreeing(s) for s in SCHEDULES["pyramid"]))
    found = []
    for model in (with_flash(reference), reference):
        with visiontok.compress(model, recipe), torch.no_grad():
            found.append(
                model.generate(
                    **inputs, max_new_tokens=STEPS, suppress_tokens=list(BANNED), num_beams=3, do_sample=False
                )
            )
    assert torch.equal(*found)


@pytest.mark.engine
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_gradients(name: str, checkpointing: bool, flash: Flash) -> None:
    reference = copy.deepcopy(build(name)).train()
    if checkpointing:
        reference.gradient_checkpointing_enable()
    inputs = batch(name, reference)
    found = []
    for model in (with_flash(reference), reference):
        with visiontok.compress(model, Recipe(stages=(weighed(prompt(0.7)), weighed(cut(2))))):
            model(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    got, expected = found
    assert got.keys() == expected.keys()
    for parameter, gradient in got.items():
        scale = max(float(expected[parameter].abs().max()), 1e-6)
        assert (gradient - expected[parameter]).abs().max() < 1e-6 * scale, parameter


@pytest.mark.engine
@pytest.mark.parametrize("method", ["fastv", "sparsevlm"])
def test_methods_that_read_the_attention_count_the_masses(method: str, flash: Flash) -> None:
    """What they keep behind a weighed selection is what they keep beside a mask of numbers."""
    reference = build("llava")
    inputs = batch("llava", reference)
    recipe = Recipe(stages=(weighed(prompt(0.7)), *visiontok.recipe(method, keep=0.4).stages))
    found = []
    for model in (with_flash(reference), reference):
        with visiontok.compress(model, recipe) as compression:
            found.append((generate(model, inputs), masks(compression)))
    close(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.engine
def test_layers_with_frozen_tokens_still_run_sdpa(flash: Flash) -> None:
    reference = build("llava")
    model, inputs = with_flash(reference), batch("llava", reference)
    recipe = Recipe(stages=(weighed(prompt()), freeze(0), freeze(2)))
    with visiontok.compress(reference, recipe):
        expected = generate(reference, inputs)
    with visiontok.compress(model, recipe) as compression:
        close(generate(model, inputs), expected)
        said = " ".join(compression.report.warnings)
    assert "frozen run sdpa instead of stand_in_flash" in said
    assert "mass attention" not in said
    prefill = [layer for layer, _ in flash.widths[: 2 + DEPTH * (STEPS - 1)]][:2]
    assert prefill == [1, 3]
    assert {width for _, width in flash.widths} == {widened(8)}


@pytest.mark.engine
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("schedule", ["prompt", "cut", "pyramid"])
def test_families_with_masks_of_their_own_have_none_under_flash(schedule: str, pad: int, flash: Flash) -> None:
    """Stock Gemma 3 is causal there, with whatever is dropped and without masses, too."""
    reference = build("gemma3")
    inputs = causal("gemma3", reference, pad=pad)
    types = {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}
    recipe = Recipe(stages=tuple(weighed(s, None) for s in SCHEDULES[schedule]))
    model = with_flash(reference)
    with visiontok.compress(reference, recipe):
        expected = generate(reference, inputs)
    with visiontok.compress(model, recipe):
        close(generate(model, inputs | types), expected)


@pytest.mark.engine
def test_a_recipe_without_masses_cannot_go_on_with_them(flash: Flash) -> None:
    """Its attention would leave the bias of the stored keys out."""
    model = with_flash(build("llava"))
    inputs = batch("llava", model)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    with visiontok.compress(model, Recipe(stages=SCHEDULES["cut"])), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    with (
        visiontok.compress(model, Recipe(stages=(cut(2),))),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="as another recipe left them"),
    ):
        model(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=cache)
