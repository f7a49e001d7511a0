"""A pretended accelerator: tensors that live on it compute on the CPU, and every value that the host reads is noted.

Anything that would make the host wait for a real device passes through here: reading a value (``bool``, ``item``,
``tolist``, ``cpu``) and operations whose result has a shape that depends on values (``nonzero``, boolean indices).
Mixing host and device tensors is an error, as on a real device.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from visiontok.kernels import ops

DEVICE = torch.device("lazy")  # a device type without which PyTorch insists on nothing
_SHAPED_BY_VALUES = {
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.equal.default,
    torch.ops.aten.allclose.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_consecutive.default,
    torch.ops.aten.bincount.default,
    # solvers ask whether they succeeded
    torch.ops.aten._linalg_eigh.default,
    torch.ops.aten._linalg_svd.default,
    torch.ops.aten.linalg_inv_ex.default,
}
_INDEXED = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}


class OnDevice(torch.Tensor):
    """A tensor on the pretended device, around one on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE, requires_grad=False
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __format__(self, spec: str) -> str:
        return format(str(self.inner), spec)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a device tensor outside of Watch")


class _Bypasses(TorchFunctionMode):
    """``torch.tensor(..., device=...)``, ``new_tensor`` and ``tolist`` bypass dispatch."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            self.watch.note("tolist")
            return args[0].inner.tolist()
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnDevice):
            return OnDevice(args[0].inner.new_tensor(*args[1:], **kwargs))
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return OnDevice(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    """Runs the pretended device; ``reads`` are the places where the host waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self._bypasses = _Bypasses(self)
        self._autocast, self._is_enabled = torch.autocast, torch.is_autocast_enabled

    def __enter__(self) -> Watch:
        self._bypasses.__enter__()
        # PyTorch has no autocast for this type, and up to transformers 5.17 rotary embeddings ask
        torch.autocast = lambda device, **options: self._autocast("cpu", **options)  # type: ignore[assignment, misc]
        torch.is_autocast_enabled = lambda device: self._is_enabled("cpu")  # type: ignore[assignment]
        super().__enter__()
        self._keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.autocast, torch.is_autocast_enabled = self._autocast, self._is_enabled  # type: ignore[misc]
        self._bypasses.__exit__(*error)

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Watch on while an operation is dispatched, which stops it."""
        with self._bypasses:
            super().__enter__()
            try:
                # As outside, what is composed of other operations (`item`, `cpu`) must arrive as those.
                with torch._C._ForceDispatchKeyGuard(*self._keys):
                    yield
            finally:
                super().__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, OnDevice)]
        wanted = kwargs.get("device")
        to_device = wanted is not None and torch.device(wanted).type == DEVICE.type
        if not ours and not to_device:
            return func(*args, **kwargs)
        if func.namespace == "visiontok":
            # Our operators compute in PyTorch here, which is to be watched, and each is the function of its name.
            with self._again():
                return getattr(ops, func._opname)._init_fn(*args, **kwargs)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        leaves = ours and wanted is not None and not to_device
        if ours and func is not torch.ops.aten.copy_.default and func is not torch.ops.aten._to_copy.default:
            strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim]
            if strangers:
                raise RuntimeError(f"{func}: a host tensor {tuple(strangers[0].shape)} meets device tensors")
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], OnDevice):
            self.note("copy to the host")
        indices = args[1] if func in _INDEXED else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        if leaves or by_mask or func in _SHAPED_BY_VALUES:
            self.note(str(func))
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, OnDevice) else t, (args, kwargs))
        out = func(*args, **kwargs)
        if leaves:
            return out
        return tree_map(lambda t: OnDevice(t) if isinstance(t, torch.Tensor) else t, out)

    def note(self, what: str) -> None:
        """Remember who asked: the innermost line of visiontok on the stack, or else the innermost of all."""
        stack = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        own = [f for f in stack if "visiontok" in f.filename or "/adapters/" in f.filename or "/kernels/" in f.filename]
        frame = (own or stack)[-1]
        self.reads.append(f"{'ours' if own else 'stock'} {frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {what}")


def put(model: torch.nn.Module) -> None:
    """Move parameters and buffers to the pretended device; only the watched may touch the model from then on."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(OnDevice(parameter.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
