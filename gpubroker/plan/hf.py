"""A Hugging Face model's own files -> what it is made of. Pure: the shell reads the files, bounded.

config.json gives the shape, from which the parameters are counted (matrices only: norms and biases are below
0.2%); a safetensors header gives every tensor's shape and bytes; an index gives the total of all its shards.
The files may be anything: whatever is wrong with one is one ConfigError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from gpubroker.errors import ConfigError
from gpubroker.plan.shape import MOST_PARAMS, Shape

# The safetensors library refuses longer headers too.
MOST_HEADER_BYTES = 100_000_000
_MOST_BYTES = MOST_PARAMS * 8
_PLAIN_MLP = frozenset(
    (
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "gpt_bigcode",
        "opt",
        "bloom",
        "falcon",
        "phi",
        "mpt",
        "starcoder2",
    )
)
_TIED = frozenset(("gpt2", "gemma", "gemma2", "gemma3", "gemma3_text"))  # unless the config says else
# The window of these holds for all layers; elsewhere `layer_types` says for which.
_WINDOW_EVERYWHERE = frozenset(("mistral", "mixtral"))
_DTYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
    "I8": "int8",
    **{packed: packed for packed in ("int4", "mxfp4", "nf4")},
}
# Beside packed weights; they are no parameters, but their bytes count.
_NOT_PARAMS = (
    "scales", "qzeros", "g_idx", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "weight_scale",
    "weight_scale_inv", "weight_zero_point", "weight_shape", "input_scale", "SCB",
)  # fmt: skip
_PACKED_INT4 = ("qweight", "weight_packed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a model's files say. None = that file does not say it."""

    shape: Shape | None = None
    params: int | None = None
    weights_bytes: int | None = None  # of all tensors, as they are stored
    quant: str | None = None  # as `size` names them


def parse_json(data: bytes, name: str) -> Mapping[str, Any]:
    """An object, whatever else the file may be. Raises ConfigError naming the file."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is not a JSON object")
    return value


def parse_config(data: bytes, name: str = "config.json") -> Stored:
    """The shape in a config.json: Llama, Mistral, Mixtral, Qwen, Gemma, DeepSeek, GPT-2 and their like.

    Of a model that also sees or hears only the text part is counted, and said so.
    """
    config = parse_json(data, name)
    inner = config.get("text_config")
    is_part = isinstance(inner, dict)
    text = {**config, **inner} if isinstance(inner, dict) else config
    fields = _Fields(text, name)
    layers = fields.count(("num_hidden_layers", "n_layer", "num_layers"), 10_000)
    hidden = fields.count(("hidden_size", "n_embd", "d_model"), 10**6)
    heads = fields.count(("num_attention_heads", "n_head", "num_heads"), 10**5)
    kv_heads = fields.count(("num_key_value_heads",), 10**5, heads)
    head_dim = fields.count(("head_dim",), 10**5, max(1, hidden // heads))
    vocab = fields.count(("vocab_size",), 10**8)
    kind = str(text.get("model_type") or "")
    is_gated = kind not in _PLAIN_MLP
    experts = _Experts.read(fields, hidden, layers)
    latent = fields.count(("kv_lora_rank",), 10**6, 0)
    is_tied = text.get("tie_word_embeddings", kind in _TIED) is True
    positions = fields.count(("n_positions",), 10**8, 0) if kind == "gpt2" else 0
    if latent:
        attention = _latent_attention(fields, hidden, heads, latent)
    else:
        attention = 2 * hidden * head_dim * (heads + kv_heads)
    outside = hidden * (vocab * (1 if is_tied else 2) + positions)
    params, active = (
        outside + layers * attention + hidden * inner for inner in experts.rows(layers, 3 if is_gated else 2)
    )
    if params > MOST_PARAMS:
        raise ConfigError(f"{name}: {params:.2g} parameters are beyond belief")
    windowed, window, cacheless = _windows(fields, kind, layers)
    rope = fields.count(("qk_rope_head_dim",), 10**5, 0)
    shape = Shape(
        params=params,
        active_params=active,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=max(experts.ffn_active, experts.dense_ffn if experts.layers < layers else 0),
        ffn_all=experts.ffn_all if experts.layers else experts.dense_ffn,
        vocab=vocab,
        is_tied=is_tied,
        is_gated=is_gated,
        latent_kv=latent + rope if latent else 0,
        windowed_layers=windowed,
        window=window,
        cacheless_layers=cacheless,
        source=f"{name}, its text part alone" if is_part else name,
    )
    return Stored(shape=shape, params=params, quant=_quant_of(config, text))


class _Fields:
    """Whole numbers out of a config, the first of several names that is there."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values = values
        self._name = name

    def count(self, keys: Sequence[str], most: int, default: int | None = None) -> int:
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if type(value) is not int or not (0 if default == 0 else 1) <= value <= most:
                raise ConfigError(
                    f"{self._name}: {key} is {str(value)[:40]!r}, not a number from 1 to {most}"
                )
            return value
        if default is None:
            raise ConfigError(f"{self._name}: {keys[0]} is missing: is it a language model's config?")
        return default


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """The feed-forward parts of all layers: dense ones, and `layers` with experts."""

    layers: int
    routed: int
    ffn_all: int  # of one such layer: every expert, the shared ones too
    ffn_active: int
    dense_ffn: int

    @classmethod
    def read(cls, fields: _Fields, hidden: int, layers: int) -> _Experts:
        dense_ffn = fields.count(("intermediate_size", "n_inner", "ffn_dim", "d_ff"), 10**8, 4 * hidden)
        routed = fields.count(("num_local_experts", "n_routed_experts", "num_experts"), 10**5, 0)
        if not routed:
            return cls(layers=0, routed=0, ffn_all=0, ffn_active=0, dense_ffn=dense_ffn)
        one = fields.count(("moe_intermediate_size",), 10**8, dense_ffn)
        chosen = min(routed, fields.count(("num_experts_per_tok", "num_experts_per_token"), 10**5, 1))
        shared = fields.count(("n_shared_experts",), 10**4, 0) * one
        shared = fields.count(("shared_expert_intermediate_size",), 10**8, 0) or shared
        first = min(layers, fields.count(("first_k_dense_replace",), 10**4, 0))
        step = fields.count(("decoder_sparse_step", "interleave_moe_layer_step"), 10**4, 1)
        return cls(
            layers=(layers - first) // step,
            routed=routed,
            ffn_all=routed * one + shared,
            ffn_active=chosen * one + shared,
            dense_ffn=dense_ffn,
        )

    def rows(self, layers: int, matrices: int) -> tuple[int, int]:
        """Rows as wide as the model of all layers' feed-forward parts: in memory, and active for a token."""
        dense = (layers - self.layers) * matrices * self.dense_ffn
        whole, active = (
            dense + self.layers * (matrices * ffn + self.routed) for ffn in (self.ffn_all, self.ffn_active)
        )
        return whole, active


def _latent_attention(fields: _Fields, hidden: int, heads: int, latent: int) -> int:
    """Multi-head latent attention (DeepSeek V2 and V3)."""
    nope = fields.count(("qk_nope_head_dim",), 10**5)
    rope = fields.count(("qk_rope_head_dim",), 10**5)
    value = fields.count(("v_head_dim",), 10**5)
    rank = fields.count(("q_lora_rank",), 10**6, 0)
    wide = heads * (nope + rope)
    query = hidden * rank + rank * wide if rank else hidden * wide
    return query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden


def _windows(fields: _Fields, kind: str, layers: int) -> tuple[int, int, int]:
    """Layers with a sliding window, that window, and layers without a growing cache."""
    window = fields.count(("sliding_window",), 10**9, 0)
    types = fields.values.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        sliding = types.count("sliding_attention") if window else 0
        return sliding, window if sliding else 0, types.count("linear_attention")
    if window and kind in _WINDOW_EVERYWHERE:
        return layers, window, 0
    return 0, 0, 0


def _quant_of(config: Mapping[str, Any], text: Mapping[str, Any]) -> str | None:
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        return _DTYPES.get(str(text.get("torch_dtype") or text.get("dtype")))
    if said.get("load_in_4bit") is True:
        return "nf4"
    if said.get("load_in_8bit") is True:
        return "int8"
    method = str(said.get("quant_method"))
    if method in ("fp8", "mxfp4"):
        return method
    bits, is_float = said.get("bits"), False
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            bits, is_float = weights.get("num_bits"), weights.get("type") == "float"
    if type(bits) is not int:
        return None
    return {4: "int4", 8: "fp8" if is_float else "int8"}.get(bits)


def parse_index(data: bytes, name: str = "model.safetensors.index.json") -> Stored:
    """The bytes of all shards, and the parameters where newer indexes state them."""
    index = parse_json(data, name)
    if not isinstance(index.get("weight_map"), dict):
        raise ConfigError(f"{name}: weight_map is missing: is it a safetensors index?")
    about = index.get("metadata")
    about = about if isinstance(about, dict) else {}
    total_bytes, params = about.get("total_size"), about.get("total_parameters")
    if type(total_bytes) is not int or not 0 < total_bytes <= _MOST_BYTES:
        raise ConfigError(f"{name}: metadata.total_size is {str(total_bytes)[:40]!r}, not a number of bytes")
    is_stated = type(params) is int and 0 < params <= MOST_PARAMS
    return Stored(weights_bytes=total_bytes, params=params if is_stated else None)


def header_bytes(first: bytes, file_bytes: int, name: str) -> int:
    """How long a safetensors header is, from the file's first 8 bytes. Raises ConfigError if it cannot be."""
    length = int.from_bytes(first, "little")
    if len(first) != 8 or not 2 <= length <= min(MOST_HEADER_BYTES, file_bytes - 8):
        raise ConfigError(f"{name} is not a safetensors file: its header would be {length} bytes long")
    return length


def parse_header(data: bytes, name: str) -> Stored:
    """Parameters, bytes and the commonest dtype of one safetensors file, from its header alone.

    Packed 4-bit weights (GPTQ, AWQ, compressed-tensors, MXFP4, bitsandbytes) count as what they hold.
    """
    params = total_bytes = 0
    by_dtype: dict[str, int] = {}
    header = parse_json(data, name)
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        dtype, numbers, stored_bytes = _tensor(entry, f"{name}: {tensor[:80]!a}")
        total_bytes += stored_bytes
        if tensor.rpartition(".")[2] in _NOT_PARAMS or ".quant_state" in tensor or tensor.endswith("_scales"):
            continue
        numbers, dtype = _unpacked(tensor, numbers, dtype, header)
        params += numbers
        by_dtype[dtype] = by_dtype.get(dtype, 0) + numbers
    if not params or params > MOST_PARAMS:
        raise ConfigError(f"{name}: a model has between 1 and {MOST_PARAMS} parameters, not {params:.3g}")
    main = max(by_dtype, key=lambda dtype: by_dtype[dtype])
    return Stored(params=params, weights_bytes=total_bytes, quant=_DTYPES.get(main))


def _unpacked(tensor: str, numbers: int, dtype: str, header: Mapping[str, Any]) -> tuple[int, str]:
    """How many weights a tensor holds, and in which format."""
    if tensor.rpartition(".")[2] in _PACKED_INT4 and dtype == "I32":
        return numbers * 8, "int4"
    if dtype == "U8" and tensor.endswith("_blocks"):
        return numbers * 2, "mxfp4"
    if dtype == "U8" and f"{tensor}.quant_state.bitsandbytes__nf4" in header:
        return numbers * 2, "nf4"
    return numbers, dtype


def _tensor(entry: Any, name: str) -> tuple[str, int, int]:
    """dtype, numbers, bytes."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{name} is not a tensor's entry")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise ConfigError(f"{name}: dtype is missing")
    if not _are_counts(shape):
        raise ConfigError(f"{name}: shape is {str(shape)[:60]}, not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConfigError(f"{name}: data_offsets are {str(offsets)[:60]}, not a begin and an end")
    numbers, stored_bytes = math.prod(shape), offsets[1] - offsets[0]
    if numbers > 16 * stored_bytes:
        raise ConfigError(f"{name}: {numbers:.3g} numbers are not in {stored_bytes} bytes")
    return dtype, numbers, stored_bytes


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > 16:
        return False
    return all(type(size) is int and 0 <= size <= _MOST_BYTES for size in value)


def together(parts: Sequence[Stored]) -> Stored:
    """Several files of one model: shards add up, a config adds its shape."""
    shards = [part for part in parts if part.weights_bytes is not None]
    configs = [part for part in parts if part.shape is not None]
    counted = [part.params for part in shards if part.params is not None]
    quants = [part.quant for part in (*configs, *shards) if part.quant]
    from_config = configs[0].params if configs else None
    return Stored(
        shape=configs[0].shape if configs else None,
        params=sum(counted) if counted and len(counted) == len(shards) else from_config,
        weights_bytes=sum(part.weights_bytes or 0 for part in shards) if shards else None,
        quant=quants[0] if quants else None,
    )
