"""What surrounds a compressed model: threads, pipelines, casts, files, offloading, PEFT, quantisers, compilers."""

from __future__ import annotations

import copy
import threading

import accelerate
import peft
import pytest
import torch
import transformers
from test_engine import DEPTH, STEPS, generate
from transformers import LlavaForConditionalGeneration

import visiontok
from visiontok.conformance.oracle import DenseMasked, greedy
from visiontok.conformance.schedules import recipe
from visiontok.conformance.zoo import BANNED, batch, build, config, prepare, visual
from visiontok.errors import ConfigError


def fresh(name, dtype=torch.float64, **options):
    """A model that no other test sees, with the weights of ``build(name)``."""
    return copy.deepcopy(build(name, dtype=dtype, **options))


def same(got, expected):
    """Bitwise: two results of ``generate``."""
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


# ---- threads

RECIPES = {
    "grid": lambda: visiontok.recipe("grid", keep=5),
    "random": lambda: visiontok.recipe("random", keep=3),
    "cls_topk": lambda: visiontok.recipe("cls_topk", keep=7),
    "cls_topk, less": lambda: visiontok.recipe("cls_topk", keep=2),
    "fastv": lambda: visiontok.recipe("fastv", keep=6, layer=2),
    "fastv, less": lambda: visiontok.recipe("fastv", keep=2, layer=2),
    "pyramid": lambda: recipe("pyramid"),
}


def in_threads(*work):
    """Run callables at the same time; returns what they return, raises what they raise."""
    results, errors = [None] * len(work), []

    def run(i, function):
        try:
            results[i] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llava", "fastv", "fastv, less"),
        ("llava", "cls_topk", "cls_topk, less"),
        ("llava", "grid", "fastv"),
        ("llava", "pyramid", "cls_topk"),
        ("qwen3_vl", "pyramid", "fastv, less"),
        ("gemma3", "random", "fastv, less"),
    ],
)
def test_two_threads_two_recipes_one_model(name, first, second):
    """In step, layer by layer, on one module object; whoever comes first and leaves first."""
    pair = (first, second)
    model = fresh(name)
    inputs = [batch(name, model, seed=seed) for seed in (0, 1)]
    expected = []
    for recipe_name, given in zip(pair, inputs, strict=True):
        with visiontok.compress(model, RECIPES[recipe_name]()) as compression:
            expected.append((generate(model, given), compression.ledger.tokens()))
    stock = logits(model, inputs[0])

    barrier = threading.Barrier(2, timeout=10)

    def in_step(*_):
        barrier.wait()

    text = model.model.language_model
    steps = [module.register_forward_pre_hook(in_step) for module in (*text.layers, text.norm)]

    def work(i):
        with visiontok.compress(model, RECIPES[pair[i]]()) as compression:
            barrier.wait()
            out = generate(model, inputs[i])
            assert visiontok.attached(model) is compression
            barrier.wait()
            tokens = compression.ledger.tokens()
            if i:  # the second to leave is the first to come half of the time
                barrier.wait()
        if not i:
            barrier.wait()
        return out, tokens

    for _ in range(2):
        found = in_threads(lambda: work(0), lambda: work(1))
        for (got, tokens), (wanted, wanted_tokens) in zip(found, expected, strict=True):
            same(got, wanted)
            assert tokens == wanted_tokens
    for handle in steps:
        handle.remove()
    assert visiontok.attached(model) is None
    assert torch.equal(logits(model, inputs[0]), stock)
    assert not any("visiontok" in key for module in model.modules() for key in vars(module))


def test_a_thread_without_a_recipe_of_its_own_is_served_by_the_oldest():
    model = fresh("llava")
    inputs = batch("llava", model)
    alone = {}
    for keep in (9, 5, 3):
        with visiontok.compress(model, "cls_topk", keep=keep):
            alone[keep] = logits(model, inputs)

    def other(keep):
        with visiontok.compress(model, "cls_topk", keep=keep):
            assert torch.equal(logits(model, inputs), alone[keep])
            # its own worker: the server's recipe, not the recipe of whoever came last
            assert torch.equal(in_threads(lambda: logits(model, inputs))[0], alone[9])
            with pytest.raises(ConfigError, match="already compressed with cls_topk"):
                visiontok.compress(model, "cls_topk", keep=2)
        assert torch.equal(logits(model, inputs), alone[9])

    with visiontok.compress(model, "cls_topk", keep=9) as server:
        assert torch.equal(in_threads(lambda: logits(model, inputs))[0], alone[9])
        in_threads(lambda: other(5))
        in_threads(lambda: other(3))
        assert torch.equal(logits(model, inputs), alone[9])
        assert visiontok.attached(model) is server
    assert in_threads(lambda: visiontok.attached(model)) == [None]


def test_a_copy_holds_what_every_thread_attached():
    model = fresh("llava")
    inputs = batch("llava", model)
    stock = logits(model, inputs)
    with visiontok.compress(model, "grid", keep=4):
        mine = logits(model, inputs)

        def copied():
            with visiontok.compress(model, "cls_topk", keep=2):
                return copy.deepcopy(model), logits(model, inputs)

        [(twin, theirs)] = in_threads(copied)
    assert torch.equal(logits(twin, inputs), mine)
    visiontok.attached(twin).remove()
    assert torch.equal(logits(twin, inputs), theirs)  # of a thread that is gone, and still attached
    visiontok.attached(twin).remove()
    assert torch.equal(logits(twin, inputs), stock)
    assert visiontok.attached(twin) is None


# ---- pipelines


def asked(model, processor, chats):
    """The chats' answers, one by one, by ``generate``."""
    answers = []
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = model.generate(**inputs)
        answers.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def test_pipeline():
    from transformers import pipeline

    from visiontok import demo

    model, processor = demo.load()
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": picture},
                    {"type": "text", "text": question.text},
                ],
            }
        ]
        for picture, questions in map(demo.scene, range(2))
        for question in questions[:2]
    ]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    stock = asked(model, processor, chats)
    with visiontok.compress(model, "grid", keep=2):
        expected = asked(model, processor, chats)
    for size in (1, 4):
        with visiontok.compress(model, "grid", keep=2) as compression:
            found = pipe(chats, return_full_text=False, batch_size=size)
            report = compression.report
        assert [answer[0]["generated_text"].strip() for answer in found] == [answer.strip() for answer in expected]
        assert expected != stock
        assert len(report.images) == size
        assert {image.kept for image in report.images} == {(2,) * 4}


# ---- casting, modes


@pytest.mark.parametrize("method", ["cls_topk", "fastv", "pyramid"])
def test_casting_and_toggling_while_attached(method):
    recipes = {"pyramid": recipe("pyramid")}
    model = fresh("llava", torch.float32)
    with visiontok.compress(model, RECIPES[method]()) as compression:
        first = generate(model, batch("llava", model))
        for cast in (lambda: model.bfloat16(), lambda: model.half(), lambda: model.to(torch.float64)):
            cast()
            inputs = batch("llava", model)
            twin = copy.deepcopy(model)
            visiontok.attached(twin).remove()
            got = generate(model, inputs)
            tokens = compression.ledger.tokens()
            with visiontok.compress(twin, recipes.get(method) or RECIPES[method]()) as other:
                same(got, generate(twin, inputs))
                assert other.ledger.tokens() == tokens
        model.to("cpu").train().eval().requires_grad_(False)
        model.float()
        # float16 has rounded the weights: another model, but one that runs
        assert generate(model, batch("llava", model)).sequences.shape == first.sequences.shape


def test_autocast_and_inference_mode():
    model = fresh("llava", torch.float32)
    inputs = batch("llava", model)
    with visiontok.compress(model, RECIPES["fastv"]()) as compression:
        expected = generate(model, inputs)
        with torch.inference_mode():
            same(generate(model, inputs), expected)
            compiled_in_inference_mode = model(**inputs)
        with torch.no_grad():  # a cache that was made there serves here
            more = model(input_ids=torch.tensor([[7], [8]]), past_key_values=compiled_in_inference_mode.past_key_values)
        assert more.logits.isfinite().all()
        same(generate(model, inputs), expected)
        with torch.autocast("cpu", torch.bfloat16):
            got = logits(model, inputs)
            alive = [compression.ledger.alive(layer) for layer in range(DEPTH)]
    with torch.autocast("cpu", torch.bfloat16), DenseMasked(model, alive):
        oracle = model(**inputs, use_cache=False).logits
    where = alive[-1]
    assert (got - oracle)[where].abs().max() < 0.05 * oracle.abs().max()
    assert (got - expected.logits[0][:, None])[where].abs().max() > 0  # it did something


# ---- saving


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.engine
@pytest.mark.parametrize("method", ["cls_topk", "fastv", "hiprune"])
def test_what_is_saved_while_attached_is_stock(tmp_path, method):
    """Taps give modules a config of their own; nothing of it may reach a file."""
    model = fresh("llava")
    inputs = batch("llava", model)
    model.model.language_model.save_pretrained(tmp_path / "text stock")
    model.save_pretrained(tmp_path / "stock")  # which writes dtype and class into the config
    before, weights = model.config.to_dict(), set(model.state_dict())
    with visiontok.compress(model, method, keep=4):
        compressed = logits(model, inputs)
        model.save_pretrained(tmp_path / "attached")
        model.model.language_model.save_pretrained(tmp_path / "text attached")
        assert model.config.to_dict() == before
        assert set(model.state_dict()) == weights
        loaded = type(model).from_pretrained(tmp_path / "attached")
        assert visiontok.attached(loaded) is None
        sibling = type(model)(model.config).to(torch.float64).eval()
        sibling.load_state_dict(model.state_dict())
    assert files(tmp_path / "attached") == files(tmp_path / "stock")
    assert files(tmp_path / "text attached") == files(tmp_path / "text stock")
    for other in (loaded, sibling):
        assert torch.equal(logits(other, inputs), logits(model, inputs))
        assert not torch.equal(logits(other, inputs), compressed)


# ---- accelerate


def offload(model, way, folder):
    """Put the weights where ``way`` says; the computing stays on the CPU."""
    device = torch.device("cpu")
    if way == "cpu":
        accelerate.cpu_offload(model, execution_device=device)
    elif way == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=device)
    else:
        text = "text_model" if hasattr(model.model, "text_model") else "language_model"
        places = {f"model.{child}": "disk" if child == text else "cpu" for child, _ in model.model.named_children()}
        places["lm_head"] = "disk"  # where its twin is, if it is tied
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["offloaded, then attached", "attached, then offloaded"])
@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in ("llava", "qwen3_vl") for way in ("cpu", "disk", "map")]
    + [(name, way) for name in ("gemma3", "idefics3") for way in ("cpu", "map")],
)
def test_offloaded_weights(tmp_path, name, way, order):
    model = fresh(name, torch.float32)
    inputs = batch(name, model)
    chosen = RECIPES["fastv, less"]()
    stock = logits(model, inputs)
    with visiontok.compress(model, chosen):
        expected = generate(model, inputs)
    if order.startswith("attached"):
        compression = visiontok.compress(model, chosen)
        offload(model, way, tmp_path)
    else:
        offload(model, way, tmp_path)
        compression = visiontok.compress(model, chosen)
    if name in ("gemma3", "idefics3") and way != "map":
        compression.remove()
        with pytest.raises(RuntimeError, match="meta"):  # stock: the family looks at a weight outside its module
            logits(model, inputs)
        return
    same(generate(model, inputs), expected)
    compression.remove()
    assert torch.equal(logits(model, inputs), stock)


# ---- PEFT


def lora(model):
    """The model in a PEFT wrapper, with LoRA on attention and MLP whose matrices are not zero; always the same ones."""
    torch.manual_seed(1)
    where = r".*(language_model|text_model).*_proj"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=where, init_lora_weights=False))
    return wrapped.to(torch.float64).eval()


@pytest.mark.parametrize(
    ("name", "method", "attach_to"),
    [(name, "pyramid", "the wrapper") for name in ("qwen2_5_vl", "gemma3", "idefics3")]
    + [("llava", m, to) for m in ("fastv, less", "pyramid") for to in ("the wrapper", "the inside", "it, unwrapped")],
)
def test_lora(name, method, attach_to):
    plain, inputs = fresh(name), batch(name, build(name))
    if attach_to == "it, unwrapped":
        compression = visiontok.compress(plain, RECIPES[method]())
        wrapped = lora(plain)
    else:
        wrapped = lora(plain)
        compression = visiontok.compress(wrapped if attach_to == "the wrapper" else plain, RECIPES[method]())
    assert visiontok.attached(wrapped) is visiontok.attached(plain) is compression
    out = generate(wrapped, inputs)
    alive = [compression.ledger.alive(layer) for layer in range(DEPTH)]
    with wrapped.disable_adapter():
        without = generate(wrapped, inputs)
        unadapted = [compression.ledger.alive(layer) for layer in range(DEPTH)]
    merged = wrapped.merge_and_unload()
    assert visiontok.attached(merged) is compression
    out_merged = generate(merged, inputs)
    compression.remove()

    sequences, steps = greedy(merged, inputs, alive, STEPS, BANNED)
    for found in (out, out_merged):
        assert torch.equal(found.sequences, sequences)
        assert (torch.stack(found.logits, 1) - steps).abs().max() < 1e-6 * steps.abs().max()
    original = build(name)
    sequences, steps = greedy(original, inputs, unadapted, STEPS, BANNED)
    assert torch.equal(without.sequences, sequences)
    assert (torch.stack(without.logits, 1) - steps).abs().max() < 1e-6 * steps.abs().max()
    if method != "pyramid":
        assert not torch.equal(alive[-1], unadapted[-1]), "the tap must see the queries and keys of the adapter"


@pytest.mark.engine
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_training_lora(name, by_hand):
    """Only the adapter learns, what the oracle says; the wrapper's forward goes past the hooks of the model inside."""
    wrapped = lora(fresh(name)).train()
    inputs = batch(name, build(name))
    labels = inputs["input_ids"].masked_fill(visual(inputs) | (inputs["attention_mask"] == 0), -100)

    def gradients(labels, **options):
        wrapped.zero_grad()
        loss = wrapped(**inputs, labels=labels, **options).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}

    with visiontok.compress(wrapped, recipe("inject, cut, exit")) as compression:
        with torch.no_grad():
            wrapped(**inputs)
        alive = [compression.ledger.alive(layer) for layer in range(DEPTH)]
        learned = labels.clone()
        learned[:, 1:][~alive[-1][:, :-1]] = -100
        loss, got = gradients(learned if by_hand else labels)
    with DenseMasked(wrapped.get_base_model(), alive):
        expected_loss, expected = gradients(learned, use_cache=False)
    assert torch.allclose(loss, expected_loss, rtol=1e-6, atol=0)
    assert all("lora" in n for n in got)
    assert got.keys() == expected.keys()
    for n, gradient in expected.items():
        assert (got[n] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), n


# ---- quantised weights


def stored(folder, width=64):
    """A llava wide enough for blocks of 64 weights, in a folder."""
    sizes = config("llava")
    for part in (sizes.text_config, sizes.vision_config):
        part.hidden_size, part.intermediate_size = width, 2 * width
    text = sizes.text_config
    text.num_key_value_heads, text.head_dim = text.num_attention_heads, width // text.num_attention_heads
    torch.manual_seed(0)
    prepare(LlavaForConditionalGeneration(sizes), torch.float32).save_pretrained(folder)


def torchao_int8():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig()), "Int8Tensor"


def bitsandbytes_int8():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(load_in_8bit=True), "Int8Params"


def bitsandbytes_nf4():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "Params4bit"


def quanto_int8():
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return transformers.QuantoConfig(weights="int8"), "WeightQBytesTensor"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantised", [torchao_int8, bitsandbytes_int8, bitsandbytes_nf4, quanto_int8])
def test_quantised_weights(tmp_path, quantised):
    chosen, kind = quantised()
    stored(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=chosen, dtype=torch.float32, device_map="cpu"
    )
    assert kind in {type(p).__name__ for p in model.model.language_model.parameters()}
    inputs = batch("llava", model)
    stock = generate(model, inputs)
    for method in ("pyramid", "fastv", "cls_topk"):
        with visiontok.compress(model, RECIPES[method]()) as compression:
            out = generate(model, inputs)
            alive = [compression.ledger.alive(layer) for layer in range(DEPTH)]
        sequences, steps = greedy(model, inputs, alive, STEPS, BANNED)
        got = torch.stack(out.logits, 1)
        assert torch.equal(out.sequences, sequences)
        assert (got - steps).abs().max() < 1e-4 * steps.abs().max()
        assert not torch.allclose(got, torch.stack(stock.logits, 1), rtol=1e-2, atol=0)
    same(generate(model, inputs), stock)


# ---- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [("llava", w) for w in ("torch.compile(model)", "model.forward", "model.compile()", "compiled, then attached")]
    + [("qwen2_5_vl", "torch.compile(model)")],
)
@pytest.mark.parametrize("method", ["grid", "pyramid", "fastv"])
def test_compiled_models(name, method, way):
    """The engine itself is not traced: it breaks the graph, but nothing that differs between calls is a guard."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = fresh(name), CompileCounter()
    inputs = batch(name, model)
    with visiontok.compress(model, RECIPES[method]()):
        expected, decoded = logits(model, inputs), generate(model, inputs, 6)

    def compiled():
        if way == "model.forward":
            model.forward = torch.compile(model.forward, backend=counter)
        elif way == "model.compile()":
            model.compile(backend=counter)
        else:
            return torch.compile(model, backend=counter)
        return model

    runs = compiled() if way == "compiled, then attached" else None
    with visiontok.compress(model, RECIPES[method]()) as compression:
        runs = compiled() if runs is None else runs
        graphs = []
        for _ in range(4):
            assert torch.allclose(logits(runs, inputs), expected, rtol=1e-9)
            graphs.append(counter.frame_count)
        assert compression.report.images[0].kept[-1] < 16
        assert graphs[0] > 0
        assert graphs[1:] == graphs[:1] * 3, "the same shapes compile again"
        for _ in range(2):
            assert torch.equal(generate(runs, inputs, 6).sequences, decoded.sequences)
            graphs.append(counter.frame_count)
        assert graphs[-1] == graphs[-2], "a second answer of the same lengths compiles again"
        assert graphs[-1] <= 6 * graphs[0]
    torch._dynamo.reset()
