"""Triton kernels against their PyTorch twins, and both as operators of PyTorch.

Without a GPU, kernels are interpreted (tests/conftest.py sets TRITON_INTERPRET).
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kernel_samples.columns
import kernel_samples.compaction
import kernel_samples.greedy
import kernel_samples.matching
import kernel_samples.segments
import pytest
import torch
from kernel_samples import Samples
from visiontok.kernels import gather_rows, ops
from visiontok.kernels.runtime import VARIABLE, use_triton

from visiontok.errors import ConfigError, UnsupportedError

FAMILIES = [
    *kernel_samples.greedy.SAMPLES,
    *kernel_samples.columns.SAMPLES,
    *kernel_samples.matching.SAMPLES,
    *kernel_samples.segments.SAMPLES,
    *kernel_samples.compaction.SAMPLES,
]
QUICK = 5  # samples of an operator that the default run takes; the interpreter is slow, and CI runs all
EVERY = [
    pytest.param(s, name, id=f"{s.op._name}: {name}", marks=[pytest.mark.slow] if at >= QUICK else [])
    for s in FAMILIES
    for at, name in enumerate(s.make)
]
FIRST = [pytest.param(s, next(iter(s.make)), id=s.op._name) for s in FAMILIES]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to is noticed."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan if out.dtype.is_floating_point else 99) if type(out) is torch.Tensor else out

    monkeypatch.setattr(torch, "empty", filled)


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def both(samples: Samples, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What PyTorch and what Triton makes of the arguments, which neither changes."""
    results = []
    before = [x.clone() for x in tensors(args)]
    for choice in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, choice)
        results.append(samples.op(*args))
        assert all(torch.equal(x, y) or x.isnan().any() for x, y in zip(tensors(args), before, strict=True))
    return results[0], results[1]


@pytest.mark.parametrize(("samples", "name"), EVERY)
def test_the_twins_agree(samples: Samples, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = samples.make[name]()
    expected, got = both(samples, args, monkeypatch)
    for x, y in zip(tensors(expected), tensors(got), strict=True):
        assert (x.dtype, x.shape, x.device) == (y.dtype, y.shape, y.device)
        exact = samples.tolerance is None or not x.dtype.is_floating_point
        rtol, atol = (0.0, 0.0) if exact else samples.tolerance  # type: ignore[misc]
        torch.testing.assert_close(y, x, rtol=rtol, atol=atol, equal_nan=True)
    if samples.check is not None:
        samples.check(args, expected)
        samples.check(args, got)


@pytest.mark.parametrize(
    ("op", "name"), [("determinant", "zero vectors"), ("determinant", "duplicates"), ("coverage", "words")]
)
def test_programs_that_share_a_row_pick_the_same(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one program after the other, so that a row has one, which waits for itself alone."""
    module = importlib.import_module(f"visiontok.kernels.{op}_triton")
    configured = []
    config = module._config
    monkeypatch.setattr(module, "LARGEST_ALONE", 0)
    monkeypatch.setattr(module, "_config", lambda *given: configured.append(config(*given)) or configured[-1])
    samples = next(s for s in FAMILIES if s.op is getattr(ops, op))
    test_the_twins_agree(samples, name, monkeypatch)
    assert [(c.constants["SHARED"], c.cooperative) for c in configured] == [(True, True)]


@pytest.mark.parametrize(("samples", "name"), FIRST)
def test_operators_are_registered_as_pytorch_wants(samples: Samples, name: str) -> None:
    torch.library.opcheck(samples.op, samples.make[name]())


@pytest.mark.parametrize(("samples", "name"), FIRST)
def test_operators_are_one_node_of_a_compiled_and_an_exported_graph(samples: Samples, name: str) -> None:
    args = samples.make[name]()
    inputs = tuple(tensors(args))

    class Calls(torch.nn.Module):
        def forward(self, *given: torch.Tensor) -> Any:
            left = iter(given)
            return samples.op(*torch.utils._pytree.tree_map_only(torch.Tensor, lambda _: next(left), args))

    expected = list(tensors(samples.op(*args)))
    torch.compiler.reset()  # all operators share the code of this module, which is compiled anew a few times only
    compiled = torch.compile(Calls(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Calls(), inputs)
    nodes = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum(node.startswith("visiontok.") for node in nodes) == 1
    for run in (compiled, exported.module()):
        for x, y in zip(expected, tensors(run(*inputs)), strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)


def test_the_variable_decides_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    for choice, expected in (("auto", False), ("reference", False), ("triton", True)):
        monkeypatch.setenv(VARIABLE, choice)
        assert use_triton(x) is expected
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ConfigError, match=r"VISIONTOK_KERNELS='cuda': give one of auto, triton, reference"):
        use_triton(x)


def test_kernels_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr("visiontok.kernels.runtime.interpreted", lambda: False)
    with pytest.raises(UnsupportedError, match=r"tensors are on cpu.*TRITON_INTERPRET=1"):
        use_triton(torch.zeros(1))
    monkeypatch.setattr("visiontok.kernels.runtime._installed", lambda: False)
    with pytest.raises(UnsupportedError, match="Triton is not installed"):
        use_triton(torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_the_gradient_of_segment_means(choice: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against automatic differentiation of a product with the matrix of memberships."""
    monkeypatch.setenv(VARIABLE, choice)
    group = torch.tensor([[0, 3, -1, 0, 5, 3, 3], [2, 2, 2, 2, 1, -1, 4]])  # left out, empty, and of zero weight: 4
    weight = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7, 0]])
    start = kernel_samples.normal(2, 7, 3).cpu().to(dtype)
    pull = kernel_samples.normal(2, 6, 3, seed=1).cpu()
    x, y = start.clone().requires_grad_(), start.double().requires_grad_()

    mean, size = ops.segment_mean(x, group, 6, weight)
    assert mean.requires_grad
    assert not size.requires_grad
    mean.backward(pull.to(mean.dtype))
    member = (group[:, None] == torch.arange(6)[:, None]) * weight[:, None].double()
    (member @ y / member.sum(-1, keepdim=True).clamp_min(1e-30)).backward(pull.double())
    assert x.grad is not None
    assert x.grad.dtype is dtype
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_the_gradient_of_segment_means_is_registered() -> None:
    x, *others = kernel_samples.segments.SAMPLES[0].make["plain"]()
    torch.library.opcheck(ops.segment_mean, (x.requires_grad_(), *others))


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_gathered_rows_have_a_gradient_where_one_is_asked_for(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, choice)
    x, still = torch.zeros(1, 4, 2, requires_grad=True), torch.zeros(2, 4)
    slots = torch.tensor([[0, 3, 3], [1, 3, 0]])
    hidden, positions = gather_rows([x, still], [1, 1], slots)
    hidden.sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [2, 1, 0, 3]  # how often each is taken
    assert not positions.requires_grad
    with torch.no_grad():
        assert not gather_rows([x], [1], slots)[0].requires_grad


def test_a_bare_import_from_the_top_of_the_repository_leaves_the_operators_alone() -> None:
    """transformers probes for a package of the name ``kernels``, and imports what it finds."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import torch, visiontok.kernels.ops as ops\n"
        "import importlib; importlib.import_module('kernels')\n"
        "x = torch.eye(3)[None]\n"
        "print(ops.nearest_unit(x, x)[1].tolist(), [name for name in sys.modules if name.startswith('kernels')])"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout == "[[0, 1, 2]] ['kernels']\n", run.stderr
