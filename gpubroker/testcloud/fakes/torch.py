"""A test fixture: `import torch` on a node without a GPU. Not PyTorch, and nothing to train with.

It stands before any real one on the node's PYTHONPATH. Where a real torch can be imported, that one is handed
out with `torch.cuda` answering what the host's facts say and "cuda" tensors kept in ordinary memory (for the
thread that imports it). Where there is none, this file has just enough to ask about the GPU and to check that
a matrix product on "cuda" comes out right: dense float tensors of one or two dimensions, in plain Python.
"""

from __future__ import annotations

import importlib
import math
import operator
import random
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

__version__ = "0.0.0+testcloud"
_OWN = Path(__file__).resolve().parent
_MIB = 2**20


def _facts() -> dict[str, str]:
    text = (_OWN / "facts").read_text()
    return dict(line.split("=", 1) for line in text.splitlines())


class _Cuda:
    """`torch.cuda` as the host really is."""

    def is_available(self) -> bool:
        """By the driver, so no when cuInit fails."""
        return self.device_count() > 0 and _facts()["cuda_error"] == "0"

    def device_count(self) -> int:
        """By NVML, which counts GPUs that the driver cannot use."""
        return int(_facts()["gpu_count"]) - int(_facts()["lost_gpus"])

    def current_device(self) -> int:
        """Always the first."""
        self.init()
        return 0

    def get_device_name(self, device: Any = None) -> str:
        """As nvidia-smi prints it."""
        return str(self.get_device_properties(device).name)

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        """Major and minor."""
        properties = self.get_device_properties(device)
        return properties.major, properties.minor

    def get_device_properties(self, device: Any = None) -> SimpleNamespace:
        """Raises RuntimeError on a device that is not there."""
        self.init()
        facts, index = _facts(), _index(device)
        if index >= self.device_count():
            raise RuntimeError("CUDA error: invalid device ordinal")
        major, _, minor = facts["capability"].partition(".")
        return SimpleNamespace(
            name=facts["gpu_name"],
            major=int(major),
            minor=int(minor),
            total_memory=int(facts["memory_mib"]) * _MIB,
            multi_processor_count=108,
        )

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Bytes free and in all; another tenant's process holds memory of the first GPU."""
        total = self.get_device_properties(device).total_memory
        foreign = int(_facts()["foreign_process_mib"]) * _MIB if _index(device) == 0 else 0
        return total - foreign, total

    def init(self) -> None:
        """Raises RuntimeError as cuInit does."""
        error = int(_facts()["cuda_error"])
        if error:
            text = {802: "system not yet initialized"}.get(error, "unknown error")
            raise RuntimeError(f"Unexpected error from cudaGetDeviceCount(). Error {error}: {text}")
        if self.device_count() == 0:
            raise RuntimeError("No CUDA GPUs are available")

    def synchronize(self, device: Any = None) -> None:
        """Nothing is ever pending."""
        self.init()

    def set_device(self, device: Any) -> None:
        """Only checks that it is there."""
        self.get_device_properties(device)

    def empty_cache(self) -> None:
        """There is none."""

    def manual_seed_all(self, seed: int) -> None:
        """One generator serves all devices."""


_operations = 0.0  # of all matrix products so far; what an event measures on a GPU that is not there


class _Event:
    """A CUDA event: time passes by the matrix products in between, at the speed of the card in the facts."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Now."""
        self._at = _operations

    def synchronize(self) -> None:
        """It has always happened."""

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds."""
        return max(1e-6, (end._at - self._at) / (float(_facts()["tflops"]) * 1e12) * 1e3)


def _index(device: Any) -> int:
    if device is None or isinstance(device, int):
        return device or 0
    return int(str(device).partition(":")[2] or 0)


def _install(module: ModuleType, cuda: ModuleType) -> None:
    answers = _Cuda()
    for name in filter(lambda n: not n.startswith("_"), dir(_Cuda)):
        setattr(cuda, name, getattr(answers, name))
    cuda.Event = _Event  # type: ignore[attr-defined]
    module.cuda = cuda  # type: ignore[attr-defined]


def _real() -> ModuleType | None:
    """The torch behind this one on the path, which then takes this one's name."""
    shim, path = sys.modules.pop(__name__), list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != _OWN]
    importlib.invalidate_caches()
    try:
        return importlib.import_module(__name__)
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = shim
        return None
    finally:
        sys.path[:] = path


def _keep_in_memory(torch: Any) -> None:
    """From now on every torch function that is given a "cuda" device uses the CPU instead."""

    class OnCpu(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.cuda:
                _Cuda().init()
                return args[0]
            if function in (torch.matmul, torch.mm, torch.Tensor.__matmul__, torch.Tensor.matmul):
                _count(args[0], args[1])
                if args[0].dtype in (torch.bfloat16, torch.float16):  # a CPU may have no units for them
                    return torch.matmul(args[0].float(), args[1].float()).to(args[0].dtype)
            moved = {name: _moved(torch, value) for name, value in (kwargs or {}).items()}
            if function is torch.Tensor.to:
                args = tuple(_moved(torch, value) for value in args)
            return function(*args, **moved)

    OnCpu().__enter__()  # for good
    torch.nn.Module.cuda = lambda module, device=None: module


def _count(a: Any, b: Any) -> None:
    global _operations  # noqa: PLW0603
    _operations += 2.0 * a.numel() * b.shape[-1]


def _moved(torch: Any, value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda":
        _Cuda().init()
        return "cpu"
    return value


float32 = "torch.float32"


class device:  # noqa: N801 its name in torch
    """A device's name."""

    def __init__(self, name: str | device, index: int | None = None) -> None:
        self.type, _, number = str(name).partition(":")
        self.index = index if index is not None else int(number) if number else None
        if self.type == "cuda":
            _Cuda().get_device_properties(self.index)

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


class Tensor:
    """Rows of floats; of one dimension when `flat`."""

    def __init__(self, rows: list[list[float]], *, flat: bool, at: Any = "cpu") -> None:
        self._rows, self._flat, self.device, self.dtype = rows, flat, device(at), float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns, or only columns."""
        columns = len(self._rows[0]) if self._rows else 0
        return (columns,) if self._flat else (len(self._rows), columns)

    @property
    def T(self) -> Tensor:  # noqa: N802 its name in torch
        """Rows as columns."""
        return Tensor([list(column) for column in zip(*self._rows, strict=True)], flat=False, at=self.device)

    def to(self, target: Any, *_: Any, **__: Any) -> Tensor:
        """The same on another device; a type is taken for what it has."""
        return self if target == float32 else Tensor(self._rows, flat=self._flat, at=target)

    def cuda(self) -> Tensor:
        """On the first GPU."""
        return self.to("cuda:0")

    def cpu(self) -> Tensor:
        """In memory."""
        return self.to("cpu")

    def tolist(self) -> list[Any]:
        """Of floats, or of rows."""
        return list(self._rows[0]) if self._flat else [list(row) for row in self._rows]

    def item(self) -> float:
        """Of a tensor with one element."""
        [[value]] = self._rows
        return value

    def sum(self) -> Tensor:
        """Of all elements."""
        return Tensor([[math.fsum(map(math.fsum, self._rows))]], flat=True, at=self.device)

    def mean(self) -> Tensor:
        """Of all elements."""
        return self.sum() * (1 / sum(map(len, self._rows)))

    def __matmul__(self, other: Tensor) -> Tensor:
        columns = other._rows if other._flat else other.T._rows
        if self.device != other.device:
            raise RuntimeError("Expected all tensors to be on the same device")
        if len(self._rows[0]) != len(columns[0]):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        rows = [[math.fsum(map(operator.mul, row, column)) for column in columns] for row in self._rows]
        if other._flat:
            return Tensor([[row[0] for row in rows]], flat=True, at=self.device)
        return Tensor(rows, flat=self._flat, at=self.device)

    def _each(self, other: Tensor | float, function: Callable[[float, float], float]) -> Tensor:
        rows = other._rows if isinstance(other, Tensor) else [[float(other)] * len(row) for row in self._rows]
        pairs = zip(self._rows, rows, strict=True)
        return Tensor([list(map(function, a, b)) for a, b in pairs], flat=self._flat, at=self.device)

    def __add__(self, other: Tensor | float) -> Tensor:
        return self._each(other, operator.add)

    def __sub__(self, other: Tensor | float) -> Tensor:
        return self._each(other, operator.sub)

    def __mul__(self, other: Tensor | float) -> Tensor:
        return self._each(other, operator.mul)

    def __truediv__(self, other: Tensor | float) -> Tensor:
        return self._each(other, operator.truediv)

    def __repr__(self) -> str:
        return f"tensor({self.tolist()}, device='{self.device}')"


def tensor(data: Any, *, device: Any = "cpu", dtype: Any = None) -> Tensor:
    """From a list of numbers or of rows."""
    flat = not isinstance(data[0], Iterable)
    return Tensor([[float(v) for v in row] for row in ([data] if flat else data)], flat=flat, at=device)


def _filled(shape: tuple[Any, ...], at: Any, value: Callable[[], float]) -> Tensor:
    rows, columns = (shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else (1, *shape))[-2:]
    return Tensor([[value() for _ in range(columns)] for _ in range(rows)], flat=len(shape) == 1, at=at)


def zeros(*shape: Any, device: Any = "cpu", dtype: Any = None) -> Tensor:
    """Of a length, or rows and columns."""
    return _filled(shape, device, lambda: 0.0)


def ones(*shape: Any, device: Any = "cpu", dtype: Any = None) -> Tensor:
    """Of a length, or rows and columns."""
    return _filled(shape, device, lambda: 1.0)


def rand(*shape: Any, device: Any = "cpu", dtype: Any = None) -> Tensor:
    """Even, from 0 to 1."""
    return _filled(shape, device, random.random)


def randn(*shape: Any, device: Any = "cpu", dtype: Any = None) -> Tensor:
    """Normal."""
    return _filled(shape, device, lambda: random.gauss(0.0, 1.0))


def eye(size: int, *, device: Any = "cpu", dtype: Any = None) -> Tensor:
    """Ones in the diagonal."""
    return tensor([[float(r == c) for c in range(size)] for r in range(size)], device=device)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`."""
    return a @ b


mm = matmul


def allclose(a: Tensor, b: Tensor, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Element by element."""
    if a.device != b.device:
        raise RuntimeError("Expected all tensors to be on the same device")
    if a.shape != b.shape:
        raise RuntimeError("The sizes of the tensors differ")
    pairs = zip(chain.from_iterable(a._rows), chain.from_iterable(b._rows), strict=True)
    return all(abs(x - y) <= atol + rtol * abs(y) for x, y in pairs)


def manual_seed(seed: int) -> None:
    """Of rand and randn."""
    random.seed(seed)


@contextmanager
def no_grad() -> Any:
    """There are no gradients."""
    yield


_torch = _real()
if _torch is not None:
    _install(_torch, _torch.cuda)
    _keep_in_memory(_torch)
else:
    _install(
        sys.modules[__name__], sys.modules.setdefault(f"{__name__}.cuda", ModuleType(f"{__name__}.cuda"))
    )
    version = SimpleNamespace(cuda=_facts()["cuda"])
