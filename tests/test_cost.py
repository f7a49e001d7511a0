"""The cost model against `torch.utils.flop_counter`, and against real caches."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from visiontok import cost
from visiontok.errors import ConfigError, UnsupportedError

pytestmark = pytest.mark.engine  # configurations and what is computed from them differ between transformers versions

VOCAB, IMAGE, VIDEO = 120, 100, 101
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
PARTIAL = dict(ROPE, partial_rotary_factor=1.0)
VIT = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32}
CLIP = dict(VIT, model_type="clip_vision_model", patch_size=8, projection_dim=32)
SIGLIP = dict(VIT, model_type="siglip_vision_model", patch_size=8)
PIXTRAL = dict(VIT, model_type="pixtral", patch_size=4)
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
IDS = {"image_token_id": IMAGE}
IDS_V = {"image_token_id": IMAGE, "video_token_id": VIDEO}
GRID_VIT = {
    "depth": 3,
    "hidden_size": 48,
    "out_hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "intermediate_size": 40,
}
QWEN3 = dict(GRID_VIT, num_position_embeddings=64)
DEEPSTACK = dict(QWEN3, deepstack_visual_indexes=[0, 1])
WINDOWED = dict(GRID_VIT, window_size=16, fullatt_block_indexes=[1])
MOE = dict(TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def text(family="llama", **more):
    return dict(TEXT, model_type=family, **more)


def build_config(name):
    if name == "llava":
        return T.LlavaConfig(text_config=text(), vision_config=CLIP, **IDS)
    if name == "llava-full":  # class token and two layers into the projector
        return T.LlavaConfig(text_config=text(), vision_config=CLIP, vision_feature_layer=[-2, -1],
                             vision_feature_select_strategy="full", **IDS)  # fmt: skip
    if name == "llava-pixtral":
        return T.LlavaConfig(text_config=text("mistral"), vision_config=PIXTRAL, vision_feature_layer=-1,
                             vision_feature_select_strategy="full", **IDS)  # fmt: skip
    if name == "vipllava":
        return T.VipLlavaConfig(text_config=text(), vision_config=CLIP, vision_feature_layers=[-2, -1], **IDS)
    if name == "llava_next":
        return T.LlavaNextConfig(text_config=text(), vision_config=CLIP, image_grid_pinpoints=PINPOINTS, **IDS)
    if name == "llava_onevision":
        return T.LlavaOnevisionConfig(text_config=text("qwen2"), vision_config=SIGLIP, image_grid_pinpoints=PINPOINTS,
                                      **IDS_V)  # fmt: skip
    if name == "internvl":
        vision = dict(VIT, image_size=[32, 32], patch_size=[4, 4])
        return T.InternVLConfig(text_config=text("qwen2"), vision_config=vision, **IDS)
    if name in ("idefics3", "smolvlm"):
        kind = {"idefics3": T.Idefics3Config, "smolvlm": T.SmolVLMConfig}[name]
        return kind(text_config=text(), vision_config=dict(VIT, patch_size=4), scale_factor=2, pad_token_id=0, **IDS)
    if name == "gemma3":
        language = text(
            "gemma3_text", head_dim=16, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2
        )
        return T.Gemma3Config(text_config=language, vision_config=dict(SIGLIP, vision_use_head=False),
                              mm_tokens_per_image=4, **IDS)  # fmt: skip
    if name == "paligemma":
        return T.PaliGemmaConfig(text_config=text("gemma", head_dim=8), vision_config=dict(SIGLIP, projection_dim=32),
                                 projection_dim=32, **IDS)  # fmt: skip
    if name == "mistral3":
        return T.Mistral3Config(text_config=text("mistral"), vision_config=PIXTRAL, spatial_merge_size=2, **IDS)
    language = dict(TEXT, rope_parameters=dict(ROPE))
    if name == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 48, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
        return T.Qwen2VLConfig(text_config=language, vision_config=vision, **IDS_V)
    if name == "qwen2_5_vl":
        return T.Qwen2_5_VLConfig(text_config=language, vision_config=WINDOWED, **IDS_V)
    if name == "qwen3_vl":
        return T.Qwen3VLConfig(text_config=dict(language, head_dim=16), vision_config=DEEPSTACK, **IDS_V)
    if name == "qwen3_vl_moe":
        language = dict(MOE, rope_parameters=dict(ROPE), mlp_only_layers=[2])
        return T.Qwen3VLMoeConfig(text_config=language, vision_config=DEEPSTACK, **IDS_V)
    if name == "qwen3_5":
        language = dict(TEXT, head_dim=8, rope_parameters=dict(PARTIAL), linear_num_value_heads=4,
                        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                        layer_types=["linear_attention", "full_attention"] * 2)  # fmt: skip
        return T.Qwen3_5Config(text_config=language, vision_config=QWEN3, **IDS_V)
    assert name == "glm4v"
    vision = dict(GRID_VIT, out_hidden_size=64, image_size=32)
    language = dict(TEXT, hidden_size=64, rope_parameters=dict(PARTIAL, mrope_section=[3, 3, 2]))
    return T.Glm4vConfig(text_config=language, vision_config=vision, **IDS_V)


GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v")
MODELS = ("llava", "llava-full", "llava-pixtral", "vipllava", "llava_next", "llava_onevision", "internvl", "idefics3",
          "smolvlm", "gemma3", "paligemma", "mistral3", *GRID)  # fmt: skip


def pixels_for(name):
    """Two images of different shapes where the family knows shapes; odd windows; padding crops and images."""
    torch.manual_seed(0)
    if name in GRID:
        grids = torch.tensor([[1, 6, 10], [1, 4, 12]])
        return {"pixel_values": torch.randn(60 + 48, 3 * 2 * 16), "image_grid_thw": grids}
    if name in ("llava_next", "llava_onevision"):  # five crops and three, padded to five
        return {"pixel_values": torch.randn(2, 5, 3, 32, 32), "image_sizes": torch.tensor([[64, 64], [30, 64]])}
    if name in ("idefics3", "smolvlm"):
        pixels = torch.randn(2, 2, 3, 32, 32)
        pixels[1, 1] = 0
        return {"pixel_values": pixels}
    if name in ("mistral3", "llava-pixtral"):
        return {"pixel_values": torch.randn(2, 3, 32, 24), "image_sizes": torch.tensor([[32, 16], [24, 24]])}
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def build(config, attention="eager", auto=T.AutoModelForImageTextToText):
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=attention).eval()
    if "moe" in config.model_type:
        model.set_experts_implementation("eager")
    return model


class Call(torch.nn.Module):
    """Gives the counter one root, so that methods other than `forward` are attributed to the modules they call."""

    def __init__(self, model, run):
        super().__init__()
        self.model, self.run = model, run

    def forward(self):
        self.run(self.model)


def cpu_sdpa_flops(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query, key, value)


def count(model, run):
    """{path of a module in the model: FLOPs}. torch has no formula for the CPU's SDPA kernel; it gets the GPU ones'."""
    formula = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_sdpa_flops}
    with torch.no_grad(), FlopCounterMode(display=False, depth=99, custom_mapping=formula) as counter:
        Call(model, run)()
    prefix = "Call.model."
    totals = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    return {path.removeprefix(prefix): n for path, n in totals.items() if path.startswith(prefix)}


def layer_counts(flops, *containers):
    """FLOPs of the numbered children of the first container that has any."""
    for container in containers:
        numbered = {
            int(p[len(container) :]): n
            for p, n in flops.items()
            if p.startswith(container) and p[len(container) :].isdigit()
        }
        if numbered:
            return [numbered[i] for i in range(len(numbered))]
    raise AssertionError(f"none of {containers} in {sorted(flops)}")


def rotary_tables(flops):
    """Rotary tables are made by a matrix product in transformers 5.17, by broadcasting in 5.23; never counted here."""
    return sum(n for path, n in flops.items() if path.endswith(("rotary_emb", "patch_positional_embedding")))


TOWER = ("model.vision_tower", "model.vision_model", "model.visual")
LAYERS = (".encoder.layers.", ".encoder.layer.", ".transformer.layers.", ".blocks.")
PROJECTOR = ("model.multi_modal_projector", "model.connector", "model.visual.merger", "model.visual.downsample",
             "model.visual.deepstack_merger_list.0", "model.visual.deepstack_merger_list.1")  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_tower_and_projector_equal_the_counter(name, attention):
    config = build_config(name)
    model, call = build(config, attention), pixels_for(name)
    flops = count(model, lambda m: m.get_image_features(**call, return_dict=True))
    got = cost.vision_flops(config, cost.VisionInputs.from_call(config, call))
    tower = next(path for path in TOWER if path in flops)
    projector = sum(flops.get(path, 0) for path in PROJECTOR)
    assert list(got.layers) == layer_counts(flops, *(tower + suffix for suffix in LAYERS))
    assert got.projector == projector
    inside = projector if tower == "model.visual" else 0
    assert got.tower == flops[tower] - inside - rotary_tables(flops)


@pytest.mark.parametrize("name", GRID)
def test_video_grids_equal_the_counter(name):
    config = build_config(name)
    call = {"pixel_values_videos": torch.randn(3 * 24, 96), "video_grid_thw": torch.tensor([[3, 4, 6]])}
    flops = count(build(config), lambda m: m.get_video_features(**call, return_dict=True))
    got = cost.vision_flops(config, cost.VisionInputs.from_call(config, call))
    assert got.tower + got.projector == flops["model.visual"]


def test_video_frames_equal_the_counter():
    config, call = build_config("llava_onevision"), {"pixel_values_videos": torch.randn(1, 3, 3, 32, 32)}
    flops = count(build(config), lambda m: m.get_video_features(call["pixel_values_videos"]))
    got = cost.vision_flops(config, cost.VisionInputs.from_call(config, call))
    assert (got.tower, got.projector) == (flops["model.vision_tower"], flops["model.multi_modal_projector"])


def test_single_image_samples_only_are_tiled_by_onevision():
    config = build_config("llava_onevision")
    call = {
        "pixel_values": torch.randn(3, 5, 3, 32, 32),
        "image_sizes": torch.tensor([[64, 64]] * 3),
        "batch_num_images": torch.tensor([1, 2]),
    }
    assert cost.VisionInputs.from_call(config, call).grids == ((1, 4, 4),) * 7


def test_shorter_sequences_inside_the_tower_equal_the_counter():
    config = build_config("llava")
    model, kept = build(config), [17, 11, 6]

    def shorten(layer, args):
        return (args[0][:, : kept[layer]], *args[1:])

    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_pre_hook(lambda module, args, i=index: shorten(i, args))
    flops = count(
        model, lambda m: m.get_image_features(torch.randn(2, 3, 32, 32), vision_feature_layer=-1, return_dict=True)
    )
    got = cost.vision_flops(config, cost.VisionInputs(((1, 4, 4),) * 2), lengths=[[n, n] for n in kept])
    assert list(got.layers) == layer_counts(flops, "model.vision_tower.encoder.layers.")
    assert got.projector == flops["model.multi_modal_projector"]


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_nothing_is_left_out_of_a_whole_prefill(name):
    config = build_config(name)
    model, call = build(config), pixels_for(name)
    inputs = cost.VisionInputs.from_call(config, call)
    first, second = {"llava": (16, 16), "gemma3": (4, 4)}.get(name, (15, 12))
    ids = torch.tensor([[1, 5, *[IMAGE] * first, 6, *[IMAGE] * second, 7, 8, 9]])
    tokens = [ids.shape[1]] * 4
    kinds = {"gemma3": "token_type_ids"}.get(name, "mm_token_type_ids" if name in GRID else None)
    if kinds:
        call[kinds] = (ids == IMAGE).long()
    flops = count(model, lambda m: m(input_ids=ids, logits_to_keep=1, **call))
    got = cost.account(config, inputs, stock=tokens, kept=tokens, text=6)
    assert got.vision.tower + got.vision.projector + sum(got.decoder) + got.lm_head == flops["model"] + flops[
        "lm_head"
    ] - rotary_tables(flops)
    assert got.speed_up().time_to_first_token == got.speed_up().language_model == 1


def slice_layers(model, tokens):
    """Make decoder layer l see only the first tokens[l] tokens."""

    def hook(n, args, kwargs):
        kwargs = dict(kwargs)
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = tuple(part[..., :n, :] for part in kwargs["position_embeddings"])
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"][..., :n, :n]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][..., :n]
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = kwargs["hidden_states"][:, :n]
        return tuple(a[:, :n] if i == 0 else a for i, a in enumerate(args)), kwargs

    for layer, n in zip(model.layers, tokens, strict=True):
        layer.register_forward_pre_hook(lambda m, a, k, n=n: hook(n, a, k), with_kwargs=True)


TEXTS = {
    "mistral": {}, "ministral": {"head_dim": 8}, "ministral3": {}, "qwen3": {"head_dim": 16}, "gemma2": {"head_dim": 8},
    "phi3": {}, "granite": {}, "olmo2": {}, "cohere": {}, "cohere2": {}, "smollm3": {}, "glm4": {"head_dim": 8},
    "starcoder2": {}, "phi": {}, "qwen3_moe": {**MOE, "decoder_sparse_step": 2},
}  # fmt: skip
TEXT_CASES = [m for m in MODELS if m not in ("qwen3_5", "llava-full", "llava-pixtral", "smolvlm", "vipllava")] + list(
    TEXTS
)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TEXT_CASES)
def test_decoder_layers_equal_the_counter_at_every_token_count(name, attention):
    if name in TEXTS:
        config = T.AutoConfig.for_model(name, **{**TEXT, **TEXTS[name]})
    else:
        config = build_config(name).get_text_config()
    if name == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has no SDPA for Gemma 2: its logits are soft-capped")
    model = build(config, attention, T.AutoModel)
    tokens, batch = [23, 17, 17, 5], 2
    slice_layers(model, tokens)
    embeds = torch.randn(batch, tokens[0], config.hidden_size)
    flops = count(model, lambda m: m(inputs_embeds=embeds, use_cache=False))
    assert cost.decoder_flops(config, tokens, batch=batch) == layer_counts(flops, "layers.")


def test_the_text_family_list_is_the_tested_list():
    tested = set(TEXTS) | {build_config(m).get_text_config().model_type for m in MODELS if m != "qwen3_5"}
    assert tested == cost._GATED_MLP | cost._PLAIN_MLP | cost._EXPERTS
    assert {build_config(m).vision_config.model_type for m in MODELS} == cost._TOWERS
    assert {build_config(m).model_type for m in MODELS} == cost._PROJECTORS


def test_a_decoding_step_and_the_head_equal_the_counter():
    config = build_config("llava").get_text_config()
    model = build(config, auto=T.AutoModelForCausalLM)
    with torch.no_grad():
        cache = model(torch.randint(5, 90, (2, 9)), use_cache=True).past_key_values
    flops = count(model, lambda m: m(torch.randint(5, 90, (2, 1)), past_key_values=cache))
    assert cost.decoder_flops(config, [1] * 4, keys=[10] * 4, batch=2) == layer_counts(flops, "model.layers.")
    assert cost.lm_head_flops(config, 2) == flops["lm_head"]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "mistral3"])
def test_kv_bytes_equal_a_real_cache(name):
    config = build_config(name).get_text_config()
    model = build(config, auto=T.AutoModel)
    with torch.no_grad():
        cache = model(torch.randint(5, 90, (3, 11)), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert cost.kv_bytes(config, [11] * 4, dtype_bytes=4, batch=3) == held
    assert cost.kv_bytes(config, [11] * 4, batch=3) == held // 2


# --------------------------------------------------------------------------------------------- account and speed-up


def llava_7b():
    vision = T.CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                                image_size=336, patch_size=14)  # fmt: skip
    return T.LlavaConfig(text_config=T.LlamaConfig(), vision_config=vision)


def test_account_of_llava_7b():
    config = llava_7b()
    inputs = cost.VisionInputs(((1, 24, 24),))
    result = cost.account(config, inputs, stock=[636] * 32, kept=[124] * 32, text=60)
    assert result.kv_stock == 2 * 32 * 636 * 4096 * 2
    assert result.kv == 2 * 32 * 124 * 4096 * 2
    ratios = result.speed_up()
    assert 1 < ratios.time_to_first_token < min(ratios.cap, ratios.language_model)
    nothing = cost.account(config, inputs, stock=[636] * 32, kept=[60] * 32, text=60).speed_up()
    assert nothing.time_to_first_token == pytest.approx(nothing.cap)
    assert result.not_counted == ()
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["decoder"] == list(result.decoder)
    assert plain["speed_up_flops"] == ratios.to_dict()


def test_an_unknown_family_is_named_and_never_guessed():
    config = build_config("qwen3_5")
    inputs = cost.VisionInputs(((1, 4, 4),))
    result = cost.account(config, inputs, stock=[20] * 4, kept=[10] * 4, text=4)
    assert result.vision is not None
    assert result.decoder is None
    assert result.kv is None
    assert result.speed_up() is None
    assert len(result.not_counted) == 1
    assert "'qwen3_5_text'" in result.not_counted[0]
    other = SimpleNamespace(
        model_type="novel", vision_config=SimpleNamespace(model_type="eva"), text_config=llava_7b().text_config
    )
    with pytest.raises(UnsupportedError, match="'eva'"):
        cost.vision_flops(other, inputs)
    other.vision_config = llava_7b().vision_config
    with pytest.raises(UnsupportedError, match="'novel'"):
        cost.vision_flops(other, inputs)


def test_the_cap_counts_the_tower():
    cap = cost.time_to_first_token_cap(preprocess=5, vision=60, prefill=100, prefill_text=10)
    assert cap == pytest.approx(165 / 75)
    got = cost.speed_up(
        preprocess=5, vision_stock=60, vision=60, selection=2, prefill_stock=100, prefill=18, prefill_text=10
    )
    assert got == cost.SpeedUp(pytest.approx(165 / 85), pytest.approx(5.0), pytest.approx(cap))


def test_errors_name_argument_value_and_remedy():
    config = llava_7b()
    with pytest.raises(ConfigError, match="tokens has 3 entries for 32 layers"):
        cost.decoder_flops(config, [1, 2, 3])
    with pytest.raises(ConfigError, match=r"tokens\[0\]=-1"):
        cost.decoder_flops(config, [-1] * 32)
    with pytest.raises(ConfigError, match="lengths has 1 entries for 24 tower layers"):
        cost.vision_flops(config, cost.VisionInputs(((1, 24, 24),)), lengths=[[577]])
    with pytest.raises(ConfigError, match="no vision_config"):
        cost.vision_flops(config.text_config, cost.VisionInputs(()))
    with pytest.raises(ConfigError, match="vision=-1"):
        cost.time_to_first_token_cap(vision=-1, prefill=1, prefill_text=1)
    with pytest.raises(ConfigError, match="all 0"):
        cost.time_to_first_token_cap(vision=0, prefill=1, prefill_text=0)
    with pytest.raises(ConfigError, match="never free"):
        cost.speed_up(vision_stock=1, vision=1, prefill_stock=1, prefill=0, prefill_text=0)


def test_a_call_without_images_costs_the_tower_nothing():
    for name in ("llava", "mistral3", "qwen2_5_vl"):
        got = cost.vision_flops(build_config(name), cost.VisionInputs.from_call(build_config(name), {}))
        assert got.tower == got.projector == 0
