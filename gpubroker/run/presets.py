"""Serving a named model: `--preset vllm --model Qwen/Qwen3-8B` as the job that it means. Pure.

A server listens on the node's loopback alone, where SSH forwards to it: these servers ask nobody for a key.
An image must have python3, for the agent; of llama.cpp's that is the full one. Flags are those of
docs.vllm.ai (`vllm serve`), docs.sglang.io (server arguments) and llama.cpp's tools/server/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gpubroker.errors import ConfigError

_ORG_AND_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
_MODEL = re.compile(_ORG_AND_NAME)
_MODEL_AND_QUANT = re.compile(_ORG_AND_NAME + r"(:[A-Za-z0-9._-]{1,40})?")
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What a job description needs of it."""

    image: str
    command: tuple[str, ...]
    ports: tuple[int, ...]
    secrets: tuple[str, ...]  # names of variables, of use where they are set: gated models want them


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    image: str
    port: int  # its usual one
    names: re.Pattern[str]
    example: str
    command: Callable[[str, int, int], tuple[str, ...]]  # of model, port and number of GPUs


def _vllm(model: str, port: int, gpu_count: int) -> tuple[str, ...]:
    return (
        *("vllm", "serve", model, "--host", _HOST, "--port", str(port)),
        *("--tensor-parallel-size", str(gpu_count)),
    )


def _sglang(model: str, port: int, gpu_count: int) -> tuple[str, ...]:
    return (
        *("python3", "-m", "sglang.launch_server", "--model-path", model, "--host", _HOST),
        *("--port", str(port), "--tp-size", str(gpu_count)),
    )


def _llama_cpp(model: str, port: int, gpu_count: int) -> tuple[str, ...]:
    """It splits a model over all GPUs that it sees."""
    return ("/app/llama-server", "-hf", model, "--host", _HOST, "--port", str(port), "-ngl", "999")


_SERVERS: Mapping[str, _Server] = {
    "vllm": _Server(
        image="vllm/vllm-openai:latest", port=8000, names=_MODEL, example="Qwen/Qwen3-8B", command=_vllm
    ),
    "sglang": _Server(
        image="lmsysorg/sglang:latest", port=30000, names=_MODEL, example="Qwen/Qwen3-8B", command=_sglang
    ),
    "llama.cpp": _Server(
        image="ghcr.io/ggml-org/llama.cpp:full-cuda",
        port=8080,
        names=_MODEL_AND_QUANT,
        example="ggml-org/gemma-3-4b-it-GGUF:Q4_K_M",
        command=_llama_cpp,
    ),
}
NAMES = tuple(_SERVERS)


def preset(name: str, model: str, *, gpu_count: int = 1, port: int | None = None) -> Preset:
    """`port` None = the server's usual one. Raises ConfigError."""
    server = _SERVERS.get(name)
    if server is None:
        raise ConfigError(f"--preset: {name[:40]!r} is none of {', '.join(NAMES)}")
    if not server.names.fullmatch(model):
        raise ConfigError(
            f"--model: {model[:80]!r} is no name of a model on huggingface.co, such as {server.example}"
        )
    listens = server.port if port is None else port
    return Preset(
        image=server.image,
        command=server.command(model, listens, gpu_count),
        ports=(listens,),
        secrets=("HF_TOKEN",),
    )
