"""A device that is not there: each operation on it is checked, and what is copied to the host is counted.

Tensors say that they are on "cuda:0", or on "mps:0", Apple's, which has no float64. Each operation runs twice: under
torch's FakeTensorMode, which raises where devices don't fit and knows the shapes that CUDA's kernels give; and on the
numbers, on the processor. So branches that only this device takes give numbers that can be compared, on machines
without it.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

CPU = torch.device("cpu")
TORCH = str(Path(torch.__file__).parent)
aten: Any = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default)
DATA = Tensor.data.__get__  # type: ignore[attr-defined]
Module = TypeVar("Module", bound=nn.Module)


class DeviceTensor(Tensor):
    """A tensor that says it is on the device, whose `numbers` are on the processor."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> DeviceTensor:
        make: Any = torch.Tensor._make_wrapper_subclass
        layout = numbers.shape, numbers.stride(), numbers.storage_offset()
        # Wrappers of inference tensors and of others may be views of one another.
        with torch.inference_mode(False):
            made: DeviceTensor = make(cls, *layout, dtype=numbers.dtype, device=CPU)
        made.numbers = numbers
        FakeDevice.now.check_type(numbers.dtype)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says it is."""
        return FakeDevice.now.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """As for a tensor of that device."""
        return self.device.type == "cuda"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """An operation with at least one such tensor."""
        return FakeDevice.now.run(op, args, kwargs or {})


class FakeDevice(TorchFunctionMode):
    """While it is on, torch has the device. Raises where an operation mixes devices or makes numbers of a type that the
    device has not, or where the shape that its kernel gives is not that of the numbers."""

    now: FakeDevice

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self.reads: list[str] = []
        """What was copied from the device to the host, each with the line that asked for it. Each waits until the
        device has done all it was given."""
        self.largest = 0
        """Elements of the largest tensor that was made there."""
        self._fakes = FakeTensorMode()
        self._checked: set[Any] = set()
        FakeDevice.now = self

    def put(self, module: Module) -> Module:
        """A module with its weights and buffers on the device, in place."""
        moved: dict[Tensor, Any] = {}
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None and weight not in moved:
                    moved[weight] = nn.Parameter(DeviceTensor(weight.detach()), requires_grad=weight.requires_grad)
                part._parameters[name] = None if weight is None else moved[weight]
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else DeviceTensor(buffer)
        return module

    def check_type(self, dtype: torch.dtype) -> None:
        """Raise as torch does where the device has no such numbers."""
        if self.device.type == "mps" and dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu) and isinstance(args[0], DeviceTensor):
            self._read(func.__name__)
            return func(args[0].numbers.detach().clone(), *args[1:], **kwargs)
        if func == DATA and isinstance(args[0], DeviceTensor):
            return args[0].detach()
        if func is Tensor.backward:
            # `torch.autograd.backward` would turn this off again.
            with self:
                options = {"allow_unreachable": True, "accumulate_grad": True}
                return _engine_run_backward(args[:1], (torch.ones_like(args[0]),), False, False, (), **options)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if _device(kwargs.get("device")) == self.device:
            out = func(*args, **{**kwargs, "device": CPU})
            return out if isinstance(out, DeviceTensor) else DeviceTensor(out)
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = [*args, *kwargs.values()]
        device = next((found for each in asked if (found := _device(each)) is not None), tensor.device)
        dtypes = [each.dtype if isinstance(each, Tensor) else each for each in asked]
        dtype = next((each for each in dtypes if isinstance(each, torch.dtype)), tensor.dtype)
        if isinstance(tensor, DeviceTensor) and device == CPU:
            self._read("to the CPU")
            return tensor.numbers.detach().to(dtype, copy=True)
        out = tensor.to(dtype, copy=kwargs.get("copy", False))
        return out if isinstance(out, DeviceTensor) or device == CPU else DeviceTensor(out.detach())

    def _read(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if not frame.filename.startswith((TORCH, __file__))]
        self.reads.append(f"{what}: {frames[-1].filename.rpartition('/')[2]}, {frames[-1].line}")

    def run(self, op: Any, args: Any, kwargs: Any) -> Any:
        """An operation, checked and on the numbers."""
        flat, form = tree_flatten((args, kwargs))
        numbers = _on_numbers(op, flat, form)
        if op in READS or (op is aten.copy_.default and not isinstance(args[0], DeviceTensor)):
            self._read(op.__name__)
            return numbers
        if op in (aten.index.Tensor, aten.index_put_.default) and any(map(_is_mask, args[1])):
            self._read("a mask as an index")
        else:
            self._check(op, flat, form, numbers)
        made = [out.numel() for out in tree_leaves(numbers) if isinstance(out, Tensor) and not out._is_view()]
        self.largest = max(self.largest, *made, 0)
        # What is changed in place is the tensor that came in.
        known = {id(each.numbers): each for each in flat if isinstance(each, DeviceTensor)}
        return tree_map(lambda out: _wrapped(out, known), numbers)

    def _check(self, op: Any, flat: list[Any], form: Any, numbers: Any) -> None:
        """Run an operation on fake tensors; once for all that are alike."""
        alike = (op, str(form), *map(_described, flat))
        # Fake random numbers are not to be had from a torch that is built without CUDA.
        if alike in self._checked or torch.Tag.nondeterministic_seeded in op.tags:
            return
        with torch.no_grad(), self._fakes:
            args, kwargs = tree_unflatten([_faked(each) for each in flat], form)
            try:
                fakes = tree_leaves(op(*args, **kwargs))
            except DynamicOutputShapeException:
                self._read(op.__name__)
                return
        found = [(each.shape, each.dtype) for each in fakes if isinstance(each, Tensor)]
        expected = [(each.shape, each.dtype) for each in tree_leaves(numbers) if isinstance(each, Tensor)]
        if found != expected:
            raise AssertionError(f"{op} gives {expected}, and {found} on {self.device}")
        self._checked.add(alike)


def _on_numbers(op: Any, flat: list[Any], form: Any) -> Any:
    args, kwargs = tree_unflatten([each.numbers if isinstance(each, DeviceTensor) else each for each in flat], form)
    return ON_HOST.get(op, op)(*args, **kwargs)


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *, scale: float) -> Any:
    if q.shape[-1] % 8:
        raise RuntimeError(f"the kernel takes no heads of width {q.shape[-1]}")
    out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale)
    state = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, log_sum, None, None, q.shape[2], k.shape[2], *state, q.new_empty(0)


def _flash_backward(grad: Tensor, *args: Any, scale: float) -> Any:
    q, k, v, out, log_sum, *_, dropout, causal, _, _ = args
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, log_sum, dropout, causal, scale=scale
    )


ON_HOST = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
}
"""What CUDA's kernels compute, on the processor."""


def _all_alike(tensors: list[list[Tensor]]) -> Any:
    return {(FakeDevice.now.device, tensors[0][0].dtype): (tensors, [])}


def _flash_takes(asked: Any) -> bool:
    # Of any width up to that: `scaled_dot_product_attention` fills heads up.
    return asked.query.dtype in (torch.bfloat16, torch.float16) and asked.query.shape[-1] <= 256


def _wrapped(out: Any, known: dict[int, DeviceTensor]) -> Any:
    if not isinstance(out, Tensor):
        return out
    return known[id(out)] if id(out) in known else DeviceTensor(out)


def _described(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else repr(value)


def _faked(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _device(value: Any) -> torch.device | None:
    """The device that a value names, or that it is a tensor of."""
    if isinstance(value, Tensor):
        return value.device
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith(("cuda", "mps", "cpu"))):
        asked, there = torch.device(value), FakeDevice.now.device
        return there if asked.type == there.type else asked
    return None


@contextlib.contextmanager
def fake_device(kind: str) -> Iterator[FakeDevice]:
    """torch with a device inside the block: "cuda", of the newest kind, or "mps"."""
    real, is_enabled = torch.autocast, torch.is_autocast_enabled

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        return real(_host(device_type), *args, **options)

    with (
        mock.patch.object(torch, "autocast", autocast),
        mock.patch.object(torch.amp, "autocast", autocast),
        mock.patch.object(torch, "is_autocast_enabled", lambda *device: is_enabled(*map(_host, device))),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch.cuda, "get_rng_state", return_value=torch.zeros(16, dtype=torch.uint8)),
        mock.patch.object(torch.cuda, "set_rng_state"),
        # Modules that are moved get new weights, since a tensor can't become one of another class.
        mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", return_value=True),
        # It asks behind Python's back, where the tensors are on the CPU.
        mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", _all_alike),
        mock.patch.object(torch.backends.cuda, "can_use_flash_attention", _flash_takes),
        FakeDevice(kind) as device,
    ):
        yield device


def _host(device: str) -> str:
    return "cpu" if device in ("cuda", "mps") else device
