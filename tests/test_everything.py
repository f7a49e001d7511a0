"""Nothing is ever silently not pruned: every class of the installed transformers passes or is refused for a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from visiontok.adapters import gemma3, molmo, qwen_vl
from visiontok.adapters.base import find
from visiontok.adapters.refused import REASONS

import visiontok
from visiontok import Recipe
from visiontok.conformance import everything, tiny
from visiontok.conformance.everything import CLASSES, examine, line, table
from visiontok.conformance.schedules import SCHEDULES
from visiontok.engine.probe import attention_modules
from visiontok.engine.vision import FeatureRecorder, record_of
from visiontok.errors import UnsupportedError

TABLE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
SAME_VERSION = f"of transformers {transformers.__version__}:" in TABLE.read_text(encoding="utf-8")


def rows():
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return {text.split(" | ")[0].removeprefix("| "): text for text in lines if text.startswith("| ")}


@pytest.mark.skipif(not SAME_VERSION, reason="docs/models.md was made with another transformers")
def test_the_table_knows_every_class_and_none_failed():
    known = {name: text for name, text in rows().items() if name != "model type"}
    assert known.keys() == CLASSES.keys()
    assert "0 failed" in TABLE.read_text(encoding="utf-8")
    assert not [name for name, text in known.items() if "Error" in text]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", CLASSES)
def test_every_class_passes_or_says_why_not(model_type):
    outcome = examine(model_type)
    assert outcome.status != "failed", outcome.prompt
    assert outcome.status == "pass" or outcome.prompt
    if SAME_VERSION:
        assert line(outcome) == rows()[model_type]


# one family for every way of attaching that the other tests do not know
@pytest.mark.parametrize(
    "model_type",
    ["cohere2_vision", "emu3", "ernie4_5_vl_moe", "gemma4", "gemma4_unified", "granite_docling", "molmo2"],
)
def test_these_pass(model_type):
    if model_type not in CLASSES:
        pytest.skip("not in this transformers")
    outcome = examine(model_type)
    assert (outcome.status, outcome.prompt) == ("pass", "pass")
    assert outcome.cut == "pass" or model_type == "gemma4"


def test_large_gemma_4_prunes_inside_the_model_too(monkeypatch):
    """Without shared keys and embeddings per layer; images are seen whole in sliding layers, causally in full ones."""
    special = {k: v for k, v in tiny.SPECIAL["gemma4"].items() if k != "text_config.num_kv_shared_layers"}
    special |= {"text_config.hidden_size_per_layer_input": 0, "text_config.use_bidirectional_attention": "vision"}
    monkeypatch.setitem(tiny.SPECIAL, "gemma4", special)
    outcome = examine("gemma4")
    assert (outcome.status, outcome.prompt, outcome.cut) == ("pass", "pass", "pass")


@pytest.mark.parametrize(
    ("model_type", "adapter", "attribute", "value"),
    [
        ("molmo2", molmo.Molmo2Adapter, "own_mask", False),
        ("gemma4", gemma3.Gemma4Adapter, "token_inputs", ()),
        ("gemma4", gemma3.Gemma4Adapter, "prompt_only", ""),
        ("cohere_compass", qwen_vl.Qwen3VLAdapter, "deepstack", None),
    ],
)
def test_an_adapter_that_is_wrong_does_not_pass(monkeypatch, model_type, adapter, attribute, value):
    if model_type not in CLASSES:
        pytest.skip("not in this transformers")
    monkeypatch.setattr(adapter, attribute, value)
    assert examine(model_type).status != "pass"


@pytest.mark.parametrize("model_type", ["glm4v_moe", "glm_ocr", "exaone4_5", "qwen2_5_omni_thinker", "cohere_compass"])
def test_a_score_goes_to_the_token_that_changes_with_its_patch(model_type):
    if model_type not in CLASSES:
        pytest.skip("not in this transformers")
    model = everything.build(model_type)
    base, inputs = model.model if hasattr(model, "model") else model, everything.batch(model, rows=1)
    adapter, disturbed = find(base), {}
    tower = getattr(base, adapter.tower)
    wanted = attention_modules(tower)[-1]
    block = next(m for m in tower.modules() if any(child is wanted for child in m.children()))

    def disturb(module, args, output):
        hidden = (output if torch.is_tensor(output) else output[0]).clone()
        if "patch" in disturbed:
            hidden[disturbed["patch"]] += torch.linspace(-9, 9, hidden.shape[-1])
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])

    def encode():
        output = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        return record_of(output), torch.cat(list(output.pooler_output))

    recorder, hook = FeatureRecorder.on(base, "image"), block.register_forward_hook(disturb)
    try:
        with torch.no_grad():
            record, plain = encode()
            for patch in range(0, len(inputs["pixel_values"]), 7):
                disturbed["patch"] = patch
                changed = ((encode()[1] - plain).abs().amax(-1) > 1e-9).nonzero().flatten().tolist()
                indicator = torch.zeros(1, len(inputs["pixel_values"]), 1)
                indicator[0, patch] = 1
                scores = torch.cat([group.mean(1)[:, 0] for group in adapter.group(record, [indicator])])
                assert scores.nonzero().flatten().tolist() == changed
    finally:
        hook.remove()
        recorder.remove()


@pytest.mark.parametrize("model_type", [name for name in REASONS if name in CLASSES])
def test_families_refused_by_name_are_refused_by_their_reason(model_type):
    config = tiny.config(model_type)
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[model_type])._from_config(config)
    for schedule in ("prompt", "cut"):
        with pytest.raises(UnsupportedError) as caught:
            visiontok.compress(model, Recipe(stages=SCHEDULES[schedule]))
        assert REASONS[model_type] in str(caught.value)


def test_a_language_model_with_inputs_nobody_knows_is_refused():
    """Such as features that are added between layers, under a new name."""
    model = everything.build("deepseek_vl")
    text = model.model.language_model
    forward = type(text).forward

    def with_more(self, *args, vision_mask=None, **kwargs):
        return forward(self, *args, **kwargs)

    text.forward = with_more.__get__(text)
    with pytest.raises(UnsupportedError, match=r"without side inputs \(it takes args, vision_mask\)"):
        visiontok.compress(model, Recipe(stages=SCHEDULES["prompt"]))


def test_a_bidirectional_language_model_is_refused():
    if "step3p7" not in CLASSES:
        pytest.skip("not in this transformers")
    model = everything.build("step3p7")
    model.model.language_model.config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedError, match="a causal language model"):
        visiontok.compress(model, Recipe(stages=SCHEDULES["prompt"]))


def test_a_failure_is_told_and_not_hidden(monkeypatch):
    def broken(model_type):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(everything, "build", broken)
    outcome = examine("llava")
    assert (outcome.status, outcome.prompt) == ("failed", "RuntimeError: no such luck")
    assert "1 failed" in table([outcome])
    assert "RuntimeError" not in line(outcome)
    assert "no such luck" in line(outcome)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl_moe", "gemma4", "llama4", "qwen3_5_moe", "exaone4_5"])
def test_a_shrunk_config_keeps_every_kind_of_layer(model_type):
    default = transformers.CONFIG_MAPPING[model_type]().text_config
    small = tiny.config(model_type)
    text = small.text_config
    assert text.num_hidden_layers == tiny.DEPTH
    assert text.vocab_size == tiny.VOCAB
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if getattr(default, name, None):
            assert len(getattr(text, name)) == tiny.DEPTH
            assert set(getattr(text, name)) == set(getattr(default, name))
    ids = [v for k, v in small.to_dict().items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)]
    assert all(i < tiny.VOCAB and i not in range(*tiny.TEXT_IDS) for i in ids)
    original = transformers.CONFIG_MAPPING[model_type]()
    if getattr(original, "video_token_id", None):
        assert small.image_token_id != small.video_token_id
