"""What the GPUs compute, by torch: a product timed, a small transformer against the CPU, a sum over all.

bf16 from compute capability 8 on; older cards have no such units, and fp16 is what they are sold for.
"""

from __future__ import annotations

import datetime
import importlib
import time
from typing import Any, Callable, Dict

Facts = Dict[str, Any]
Say = Callable[[str], None]
_LARGEST_MATRIX = 8192
_SLOW_PRODUCT_S = 0.02
_PRODUCTS_S = 0.2
_SUMMED = 1 << 22
_RENDEZVOUS_S = 60.0
_MOST_WORDS = 300


def facts(told: Facts, say: Say) -> Facts:
    """`missing`: why nothing could be computed, where that is no fault of the GPUs."""
    say("import torch")
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return {"missing": str(error)[:_MOST_WORDS]}
    if not hasattr(torch, "nn"):  # any folder of that name can be imported
        return {"missing": "what is called torch there is not PyTorch"}
    found: Facts = {"version": str(torch.__version__), "devices": [], "has_nccl": _has_nccl(torch)}
    try:
        count = torch.cuda.device_count()
        if count == 0 and not torch.backends.cuda.is_built():
            return {"missing": f"torch {torch.__version__} is built without CUDA"}
        say("CPU: forward pass")
        expected = _forward(torch, "cpu")
        for index in range(count):
            found["devices"].append(_device(torch, index, expected, say))
        if count > 1 and not found["has_nccl"]:
            say("copies between the GPUs")
            found["copies_are_right"] = _copies(torch, count)
    except Exception as error:  # whatever torch raises is the fact
        found["error"] = f"{type(error).__name__}: {str(error)[:_MOST_WORDS]}"
    return found


def rank(told: Facts, say: Say) -> Facts:
    """One GPU's part in a sum over all of them. `meet`: a file that all ranks know."""
    say("import torch")
    torch: Any = importlib.import_module("torch")
    group: Any = importlib.import_module("torch.distributed")
    own, count = told["rank"], told["count"]
    try:
        torch.cuda.set_device(own)
        say("all-reduce: meeting the others")
        group.init_process_group(
            told["backend"],
            init_method=f"file://{told['meet']}",
            rank=own,
            world_size=count,
            timeout=datetime.timedelta(seconds=_RENDEZVOUS_S),
        )
        say("all-reduce")
        share = torch.full((_SUMMED,), float(own + 1), device=f"cuda:{own}")
        group.all_reduce(share)
        torch.cuda.synchronize(own)
        is_right = bool((share == count * (count + 1) / 2).all().item())
        began = time.perf_counter()
        group.all_reduce(share)
        torch.cuda.synchronize(own)
        spent_s = max(time.perf_counter() - began, 1e-6)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:_MOST_WORDS]}"}
    # What each link carries: nccl-tests, "bus bandwidth".
    return {"is_right": is_right, "gb_s": round(4 * _SUMMED * 2 * (count - 1) / count / spent_s / 1e9, 3)}


def _has_nccl(torch: Any) -> bool:
    group = getattr(torch, "distributed", None)
    return bool(group is not None and group.is_available() and group.is_nccl_available())


def _device(torch: Any, index: int, expected: Any, say: Say) -> Facts:
    device = f"cuda:{index}"
    say(f"GPU {index}: context")
    torch.cuda.set_device(index)
    say(f"GPU {index}: forward pass")
    difference = (_forward(torch, device).cpu() - expected).abs().max().item()
    say(f"GPU {index}: product")
    is_new = torch.cuda.get_device_capability(index)[0] >= 8
    return {
        "index": index,
        "forward_difference": difference,
        "kind": "bf16" if is_new else "fp16",
        **_product(torch, device, torch.bfloat16 if is_new else torch.float16),
    }


def _forward(torch: Any, device: str) -> Any:
    """One pass of a small transformer, its weights from a fixed seed, in full precision."""
    torch.manual_seed(7)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    layer = torch.nn.TransformerEncoderLayer(d_model=128, nhead=4, dim_feedforward=256, batch_first=True)
    tokens = torch.randn(2, 32, 128)
    model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval().to(device)
    with torch.no_grad():
        return model(tokens.to(device))


def _product(torch: Any, device: str, kind: Any) -> Facts:
    """TFLOPS of the largest product that is quick, by CUDA events."""
    size, tflops = 1024, 0.0
    while True:
        a = torch.randn(size, size, device=device).to(kind)
        b = torch.randn(size, size, device=device).to(kind)
        torch.matmul(a, b)
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.matmul(a, b)
        torch.cuda.synchronize(device)
        once_s = time.perf_counter() - began
        count = max(2, min(50, int(_PRODUCTS_S / max(once_s, 1e-4))))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            c = torch.matmul(a, b)
        end.record()
        torch.cuda.synchronize(device)
        tflops = 2.0 * size**3 * count / (start.elapsed_time(end) / 1e3) / 1e12
        if size >= _LARGEST_MATRIX or once_s > _SLOW_PRODUCT_S:
            break
        size *= 2
    right = (a[:4].float() @ b.float())[:, :64]
    error = ((c[:4, :64].float() - right).abs().max() / right.abs().max()).item()
    return {"matrix": size, "tflops": round(tflops, 2), "product_error": error}


def _copies(torch: Any, count: int) -> bool:
    """Every GPU's share reaches every other: less than an all-reduce, for a torch that has no NCCL."""
    parts = [torch.full((1024,), float(index + 1), device=f"cuda:{index}") for index in range(count)]
    expected = count * (count + 1) / 2
    return all(
        bool((sum(part.to(f"cuda:{index}") for part in parts) == expected).all().item())
        for index in range(count)
    )
