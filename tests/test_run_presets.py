"""A server for a named model, as the command that it comes to."""

import json
import shlex

import pytest

from gpubroker.errors import ConfigError
from gpubroker.run.presets import NAMES, Preset, preset


@pytest.mark.parametrize(
    ("name", "model", "expected"),
    [
        pytest.param(
            "vllm",
            "Qwen/Qwen3-8B",
            Preset(
                image="vllm/vllm-openai:latest",
                command=(
                    "vllm", "serve", "Qwen/Qwen3-8B", "--host", "127.0.0.1", "--port", "8000",
                    "--tensor-parallel-size", "2",
                ),
                ports=(8000,),
                secrets=("HF_TOKEN",),
            ),
            id="vllm",
        ),
        pytest.param(
            "sglang",
            "Qwen/Qwen3-8B",
            Preset(
                image="lmsysorg/sglang:latest",
                command=(
                    "python3", "-m", "sglang.launch_server", "--model-path", "Qwen/Qwen3-8B",
                    "--host", "127.0.0.1", "--port", "30000", "--tp-size", "2",
                ),
                ports=(30000,),
                secrets=("HF_TOKEN",),
            ),
            id="sglang",
        ),
        pytest.param(
            "llama.cpp",
            "ggml-org/gemma-3-4b-it-GGUF:Q4_K_M",
            Preset(
                image="ghcr.io/ggml-org/llama.cpp:full-cuda",
                command=(
                    "/app/llama-server", "-hf", "ggml-org/gemma-3-4b-it-GGUF:Q4_K_M",
                    "--host", "127.0.0.1", "--port", "8080", "-ngl", "999",
                ),
                ports=(8080,),
                secrets=("HF_TOKEN",),
            ),
            id="llama.cpp",
        ),
    ],
)  # fmt: skip
def test_a_preset_is_an_image_a_command_and_a_port(name, model, expected):
    """On two GPUs, at the server's usual port."""
    assert expected == preset(name, model, gpu_count=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_port_of_ones_own_is_in_the_command(name):
    """And is the one to forward."""
    found = preset(name, "org/model", port=9001)
    assert ((9001,), True) == (found.ports, "9001" in found.command)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "model",
    ["", "x; rm -rf ~", "$(id)", "--trust-remote-code", "-hf", "a/b/c", "a b", "../etc/passwd", "org/na\nme"],
)
def test_what_is_no_name_of_a_model_is_refused(name, model):
    """It never becomes a word of a shell or an option of the server."""
    with pytest.raises(ConfigError, match="is no name of a model"):
        preset(name, model)


def test_a_quantisation_is_llama_cpps_alone():
    """The others would look for a model of that name."""
    for name in ("vllm", "sglang"):
        with pytest.raises(ConfigError, match="is no name of a model"):
            preset(name, "org/model:Q4_K_M")


def test_a_preset_nobody_knows_is_refused_with_those_there_are():
    """One sentence."""
    with pytest.raises(ConfigError, match=r"'ollama' is none of vllm, sglang, llama\.cpp"):
        preset("ollama", "org/model")


def test_a_command_comes_through_the_shell_as_it_is():
    """Every word is one word there."""
    command = preset("vllm", "org/model").command
    assert list(command) == shlex.split(shlex.join(json.loads(json.dumps(command))))
