"""A Hugging Face model's files: shapes and parameters of known models, and files that are not what they seem."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.errors import ConfigError
from gpubroker.plan import hf
from gpubroker.plan.hf import Stored, header_bytes, parse_config, parse_header, parse_index, together

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
MISTRAL = {**LLAMA, "model_type": "mistral", "vocab_size": 32000, "sliding_window": 4096}
MIXTRAL = {
    **MISTRAL,
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
QWEN = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    "sliding_window": 131072, "use_sliding_window": False,
}  # fmt: skip
QWEN_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma2", "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000,
    "sliding_window": 4096,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "n_ctx": 1024,
    "vocab_size": 50257,
}
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 129280, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


def compressed(kind, bits):
    groups = {"group_0": {"weights": {"num_bits": bits, "type": kind}}}
    return {**LLAMA, "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def read(config):
    return parse_config(json.dumps(config).encode())


@pytest.mark.parametrize(
    ("config", "params", "active"),
    [
        pytest.param(LLAMA, 8_030_261_248, 8_030_261_248, id="Llama 3.1 8B"),
        pytest.param(MISTRAL, 7_241_732_096, 7_241_732_096, id="Mistral 7B"),
        pytest.param(MIXTRAL, 46_702_792_704, 12_879_925_248, id="Mixtral 8x7B"),
        pytest.param(QWEN, 7_615_616_512, 7_615_616_512, id="Qwen2.5 7B"),
        pytest.param(QWEN_MOE, 30_532_122_624, 3_350_000_000, id="Qwen3 30B-A3B"),
        pytest.param(GEMMA, 9_241_705_984, 9_241_705_984, id="Gemma 2 9B"),
        pytest.param(GPT2, 124_439_808, 124_439_808, id="GPT-2"),
        pytest.param(DEEPSEEK, 671_026_419_200, 37_550_000_000, id="DeepSeek V3"),
    ],
)
def test_the_parameters_of_known_models_follow_from_their_configs(config, params, active):
    """Within 0.2%; the active ones of a mixture within 1%."""
    shape = read(config).shape
    assert params == pytest.approx(shape.params, rel=2e-3)
    assert active == pytest.approx(shape.active_params, rel=1e-2)


def test_the_cache_follows_from_the_config():
    """Grouped heads, an explicit head size, a latent, a window on every layer or on none."""
    assert 2 * 8 * 128 == read(LLAMA).shape.kv_per_token
    assert 2 * 8 * 256 == read(GEMMA).shape.kv_per_token
    assert (512 + 64, 1) == (read(DEEPSEEK).shape.kv_per_token, read(DEEPSEEK).shape.kv_splits)
    assert (32, 4096) == (read(MISTRAL).shape.windowed_layers, read(MISTRAL).shape.window)
    assert 0 == read(QWEN).shape.windowed_layers == read(MIXTRAL).shape.windowed_layers


def test_layer_types_say_which_layers_slide_and_which_keep_nothing():
    """Gemma 3 slides on five of six; linear attention has a state that does not grow."""
    types = ["sliding_attention"] * 35 + ["full_attention"] * 6 + ["linear_attention"]
    shape = read({**GEMMA, "layer_types": types}).shape
    assert 6 * 10**6 + 35 * 4096 == shape.cached_tokens(10**6)


def test_a_model_that_also_sees_is_read_for_its_text_part():
    """And says so."""
    shape = read({"model_type": "llava", "vision_config": {}, "text_config": LLAMA}).shape
    assert ("config.json, its text part alone", 32) == (shape.source, shape.layers)


@pytest.mark.parametrize(
    ("config", "quant"),
    [
        pytest.param(LLAMA, "bf16", id="bfloat16"),
        pytest.param({**LLAMA, "torch_dtype": "float32"}, "fp32", id="float32"),
        pytest.param({**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4}}, "int4", id="AWQ"),
        pytest.param({**LLAMA, "quantization_config": {"load_in_4bit": True}}, "nf4", id="bitsandbytes"),
        pytest.param({**LLAMA, "quantization_config": {"bits": 8}}, "int8", id="8 bits"),
        pytest.param(DEEPSEEK, "fp8", id="FP8"),
        pytest.param({**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}, "mxfp4", id="MXFP4"),
        pytest.param(compressed("int", 4), "int4", id="compressed to 4 bits"),
        pytest.param(compressed("float", 8), "fp8", id="compressed to FP8"),
        pytest.param({**LLAMA, "quantization_config": {"bits": "4"}}, None, id="bits in text"),
        pytest.param(
            {**LLAMA, "quantization_config": {"config_groups": [1]}}, None, id="groups that are none"
        ),
        pytest.param(GPT2, None, id="nothing said"),
    ],
)
def test_the_format_of_the_weights_is_what_the_config_says(config, quant):
    """None where it says nothing that is known."""
    assert quant == read(config).quant


HOSTILE_CONFIGS = [
    pytest.param(b"", "is not JSON", id="empty"),
    pytest.param(b"\xff\xfe\x00", "is not JSON", id="binary"),
    pytest.param(b"[" * 100_000, "is not JSON", id="nested"),
    pytest.param(b"[]", "not a JSON object", id="a list"),
    pytest.param(b'{"hidden_size": NaN}', "is not JSON: NaN", id="NaN"),
    pytest.param(b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", "is not JSON", id="an endless number"),
    pytest.param(b"{}", "num_hidden_layers is missing", id="another object"),
    *(
        pytest.param(json.dumps({**LLAMA, key: value}).encode(), key, id=f"{key} {str(value)[:12]}")
        for key, value in (
            ("hidden_size", -1), ("hidden_size", 0), ("num_hidden_layers", 1e9), ("num_hidden_layers", "32"),
            ("num_attention_heads", True), ("vocab_size", 10**30), ("intermediate_size", [1]),
            ("num_local_experts", -8), ("head_dim", 0),
        )
    ),
    pytest.param(
        json.dumps({**LLAMA, "hidden_size": 10**6, "intermediate_size": 10**8, "num_hidden_layers": 10**4}).encode(),
        "beyond belief",
        id="too large together",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), HOSTILE_CONFIGS)
def test_a_config_that_is_none_is_one_sentence(data, words):
    """It names the file, and the key where one is wrong."""
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        parse_config(data)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from([*DEEPSEEK, *GPT2, "layer_types", "text_config", "sliding_window"]), JSON)
)
def test_no_config_raises_anything_but_a_sentence(changes):
    """Any value under any key that is read."""
    for base in (LLAMA, DEEPSEEK):
        try:
            found = read({**base, **changes})
        except ConfigError:
            continue
        assert found.shape.params >= found.shape.active_params > 0
        assert found.shape.cached_tokens(8192) >= 0


# safetensors


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.embed_tokens.weight": tensor("BF16", [100, 8], 0, 1600),
    "model.layers.0.mlp.down_proj.weight": tensor("BF16", [8, 32], 1600, 2112),
}


def test_a_header_gives_parameters_bytes_and_dtype():
    """From the shapes; no weight is read."""
    found = parse_header(json.dumps(HEADER).encode(), "model.safetensors")
    assert Stored(params=1056, weights_bytes=2112, quant="bf16") == found


def test_packed_weights_count_as_what_they_hold():
    """Eight 4-bit numbers in an I32; scales and zeros are bytes but no parameters."""
    packed = {
        "mlp.qweight": tensor("I32", [16, 8], 0, 512),
        "mlp.scales": tensor("F16", [1, 8], 512, 528),
        "mlp.qzeros": tensor("I32", [1, 1], 528, 532),
    }
    assert Stored(params=1024, weights_bytes=532, quant="int4") == parse_header(
        json.dumps(packed).encode(), "m"
    )


@pytest.mark.parametrize(
    ("header", "quant"),
    [
        pytest.param(
            {
                "w.weight": ("U8", 512),
                "w.weight.absmax": ("U8", 16),
                "w.weight.quant_state.bitsandbytes__nf4": ("U8", 9),
            },
            "nf4",
            id="bitsandbytes",
        ),
        pytest.param(
            {"w.gate_up_proj_blocks": ("U8", 512), "w.gate_up_proj_scales": ("U8", 32)}, "mxfp4", id="MXFP4"
        ),
    ],
)
def test_bytes_of_two_weights_count_twice(header, quant):
    """Their scales and states do not count."""
    tensors = {name: tensor(dtype, [size], 0, size) for name, (dtype, size) in header.items()}
    found = parse_header(json.dumps(tensors).encode(), "m")
    assert (1024, quant, sum(size for _, size in header.values())) == (
        found.params, found.quant, found.weights_bytes,
    )  # fmt: skip


def test_shards_add_up_and_the_config_adds_the_shape():
    """Parameters as stored win over those counted from the config."""
    shard = parse_header(json.dumps(HEADER).encode(), "m")
    whole = together([read(LLAMA), shard, shard])
    assert (2 * 1056, 2 * 2112, "bf16", 32) == (
        whole.params, whole.weights_bytes, whole.quant, whole.shape.layers,
    )  # fmt: skip
    assert read(LLAMA).params == together([read(LLAMA), Stored(weights_bytes=5)]).params


def test_an_index_gives_the_bytes_of_all_shards():
    """Newer ones the parameters, too."""
    index = {"metadata": {"total_size": 16_060_522_496}, "weight_map": {}}
    assert Stored(weights_bytes=16_060_522_496) == parse_index(json.dumps(index).encode())
    index["metadata"]["total_parameters"] = 8_030_261_248
    assert 8_030_261_248 == parse_index(json.dumps(index).encode()).params


@pytest.mark.parametrize(
    "index",
    [
        {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {}, "metadata": []},
        *({"weight_map": {}, "metadata": {"total_size": size}} for size in (0, -1, "9", 1.5, 10**30, True, None)),
    ],
)  # fmt: skip
def test_an_index_that_is_none_is_one_sentence(index):
    """It names what is missing."""
    with pytest.raises(ConfigError, match=r"weight_map|total_size"):
        parse_index(json.dumps(index).encode())


@pytest.mark.parametrize(
    ("first", "size"),
    [
        pytest.param((2**63).to_bytes(8, "little"), 10**9, id="a huge length"),
        pytest.param((10**9).to_bytes(8, "little"), 10**12, id="longer than any header"),
        pytest.param((200).to_bytes(8, "little"), 100, id="longer than the file"),
        pytest.param((0).to_bytes(8, "little"), 100, id="nothing"),
        pytest.param(b"abc", 3, id="three bytes"),
    ],
)
def test_a_header_length_that_cannot_be_is_refused_before_it_is_read(first, size):
    """A hostile file costs no memory."""
    with pytest.raises(ConfigError, match="not a safetensors file"):
        header_bytes(first, size, "m.safetensors")
    assert 80 == header_bytes((80).to_bytes(8, "little"), 100, "m.safetensors")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        pytest.param(tensor("BF16", [-4, 8], 0, 64), "shape", id="a negative shape"),
        pytest.param(tensor("BF16", [2**80], 0, 64), "shape", id="an endless shape"),
        pytest.param(tensor("BF16", [10**6, 10**6], 0, 64), "not in 64 bytes", id="more than its bytes hold"),
        pytest.param(tensor("BF16", [True], 0, 2), "shape", id="a truth for a size"),
        pytest.param(tensor("BF16", [1] * 40, 0, 2), "shape", id="40 dimensions"),
        pytest.param(tensor("BF16", [4], 8, 0), "data_offsets", id="an end before the begin"),
        pytest.param(tensor("BF16", [4], "0", 8), "data_offsets", id="an offset in text"),
        pytest.param({**tensor("BF16", [4], 0, 8), "data_offsets": [0]}, "data_offsets", id="one offset"),
        pytest.param({"shape": [4], "data_offsets": [0, 8]}, "dtype", id="no dtype"),
        pytest.param([], "entry", id="no entry"),
        pytest.param(None, "entry", id="null"),
    ],
)  # fmt: skip
def test_a_broken_tensor_is_one_sentence(entry, words):
    """It names the tensor."""
    with pytest.raises(ConfigError, match=r"m\.safetensors: 't'") as caught:
        parse_header(json.dumps({"t": entry}).encode(), "m.safetensors")
    assert words in str(caught.value)


def test_a_tensors_name_does_not_reach_the_terminal_as_it_is():
    """It may paint, or break the line."""
    with pytest.raises(ConfigError) as caught:
        parse_header(json.dumps({"\x1b[31m\nt": []}).encode(), "m")
    assert str(caught.value).isprintable()


def test_a_header_without_tensors_is_refused():
    """There is no model of no size."""
    with pytest.raises(ConfigError, match="between 1 and"):
        parse_header(b'{"__metadata__": {}}', "m")


@given(st.dictionaries(st.text(max_size=6), JSON | st.builds(tensor, st.text(max_size=4), JSON, JSON, JSON)))
def test_no_header_raises_anything_but_a_sentence(header):
    """Whatever it holds."""
    try:
        found = parse_header(json.dumps(header).encode(), "m")
    except ConfigError:
        return
    assert 0 < found.params <= hf.MOST_PARAMS
