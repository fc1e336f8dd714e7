"""Sizing a model: shapes of published models, memory of serving and training, which cards hold it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpubroker.errors import ConfigError
from gpubroker.gpus import catalogue
from gpubroker.plan.shape import MOST_PARAMS, PUBLISHED, Shape, count_text, estimated, parse_params
from gpubroker.plan.size import (
    GIB,
    QUANTS,
    STORED,
    OwnCards,
    Use,
    advice,
    fit,
    fits,
    need,
    own_fit,
    usable_bytes,
    ways_out,
)

CARDS = tuple(catalogue().values())
LLAMA_70B = estimated(70_553_706_496)
EIGHT_K = {"context": 8192}


def card(name, form_factor=None):
    return next(g for g in CARDS if g.name == name and form_factor in (None, g.form_factor))


def lines(shape, use, gpus=1):
    return {line.item: line.bytes for line in need(shape, use, gpus).lines}


def said(shape, use, own=None):
    return advice(shape, use, fits(shape, use, CARDS), own)


# Numbers of parameters


@pytest.mark.parametrize(
    ("text", "params"),
    [
        pytest.param("70b", 70_000_000_000, id="billions"),
        pytest.param(" 7.5B ", 7_500_000_000, id="a fraction, in capitals"),
        pytest.param("350m", 350_000_000, id="millions"),
        pytest.param("1.3t", 1_300_000_000_000, id="trillions"),
        pytest.param("124439808", 124_439_808, id="a plain number"),
    ],
)
def test_parameters_are_read_as_people_write_them(text, params):
    """With the suffixes that model names have."""
    assert params == parse_params(text)


@pytest.mark.parametrize(
    "text",
    [
        "70bb",
        "NaN",
        "inf",
        "0",
        "-7b",
        "1e30",
        "",
        "b",
        "7 5b",
        "\N{ARABIC-INDIC DIGIT SEVEN}b",
        "1_0b",
        "9" * 5000,
        "8x7b",
        "101t",
        "7b\n7b",
    ],
)
def test_what_is_no_number_of_parameters_is_refused(text):
    """One sentence that shows what would be one."""
    with pytest.raises(ConfigError, match=r"70b, 7\.5b or 350m|between 1000 and 100t"):
        parse_params(text)


def test_a_mixture_is_told_how_to_be_written():
    """8x7b is not 56b: the experts share their attention."""
    with pytest.raises(ConfigError, match="give the total"):
        parse_params("8x7b")


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (70_000_000_000, "70b"),
        (70_553_706_496, "70.6b"),
        (350_000_000, "350m"),
        (999, "999"),
        (10**14, "100t"),
    ],
)
def test_counts_are_shown_with_three_digits(params, text):
    """70.6b, not 70553706496."""
    assert text == count_text(params)


# Shapes


def counted(shape):
    """Matrices of a Llama by its shape."""
    heads, cached = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 2 * shape.hidden * (heads + cached) + 3 * shape.hidden * shape.ffn
    return shape.layers * layer + shape.vocab * shape.hidden * (1 if shape.is_tied else 2)


@pytest.mark.parametrize("shape", PUBLISHED, ids=lambda shape: shape.source)
def test_the_published_shapes_have_the_published_parameters(shape):
    """To 0.1%: norms are not counted."""
    assert shape.params == pytest.approx(counted(shape), rel=1e-3)


def test_a_size_near_a_published_model_takes_its_shape():
    """70b means Llama 3.1 70B."""
    shape = estimated(70_000_000_000)
    assert (80, 8192, 8, 128) == (shape.layers, shape.hidden, shape.kv_heads, shape.head_dim)
    assert "shape of Llama 3.1 70B, assumed" == shape.source


@given(st.integers(1000, MOST_PARAMS))
def test_an_estimated_shape_is_whole_and_says_that_it_is_assumed(params):
    """For every size that is taken."""
    shape = estimated(params)
    assert params == shape.params
    assert shape.heads * shape.head_dim == shape.hidden
    assert "assumed" in shape.source
    assert min(shape.layers, shape.hidden, shape.ffn, shape.layer_params) > 0


@given(st.integers(5 * 10**8, 2 * 10**12))
def test_an_estimated_shape_between_the_published_has_about_its_parameters(params):
    """Counted back from layers and width it is within a factor of 1.8."""
    assert 1 / 1.8 < counted(estimated(params)) / params < 1.8


# Memory


def test_the_weights_of_70b_are_what_the_published_checkpoints_weigh():
    """141.1 GB in bf16, 72.7 in FP8, 39.8 as AWQ, 43.1 as Q4_K_M (llama.cpp's README), within 1%."""
    for quant, gb in (("bf16", 141.1), ("fp8", 72.7), ("int4", 39.8), ("q4_k_m", 43.1)):
        assert gb == pytest.approx(lines(LLAMA_70B, Use(quant=quant))["weights"] / 1e9, rel=0.01)


def test_the_cache_of_llama_70b_takes_320_kib_a_token():
    """2 x 80 layers x 8 heads x 128 x 2 bytes; half of it in fp8."""
    assert 2 * 80 * 8 * 128 * 2 * 8192 == lines(LLAMA_70B, Use(**EIGHT_K))["KV cache"]
    assert 2 * 80 * 8 * 128 * 8192 == lines(LLAMA_70B, Use(kv="fp8", **EIGHT_K))["KV cache"]


def test_tensor_parallelism_splits_weights_and_no_more_of_the_cache_than_there_are_heads():
    """A GPU beyond the KV heads holds a copy."""
    one, eight, sixteen = (lines(LLAMA_70B, Use(**EIGHT_K), n) for n in (1, 8, 16))
    assert one["weights"] == pytest.approx(8 * eight["weights"], abs=8)
    assert one["KV cache"] == 8 * eight["KV cache"] == 8 * sixteen["KV cache"]
    assert ("NCCL" in one, "NCCL" in eight) == (False, True)


def test_training_whole_takes_16_bytes_a_parameter():
    """ZeRO: 2 weights, 2 gradients, 12 of Adam in mixed precision; fp32 needs as much."""
    for quant in ("bf16", "fp32"):
        found = lines(LLAMA_70B, Use(train="full", quant=quant))
        states = found["weights"] + found["gradients"] + found["optimiser"]
        assert 16 * LLAMA_70B.params == states
    split = lines(LLAMA_70B, Use(train="full"), 8)
    assert 2 * LLAMA_70B.params == split["weights"] * 8
    assert split["gathered"] > 0


def test_the_adapters_of_llama_8b_at_rank_16_are_42_million():
    """41,943,040 parameters over all linear layers, as PEFT prints it, at 16 bytes."""
    shape = estimated(8_030_261_248)
    assert 16 * 41_943_040 == lines(shape, Use(train="lora", quant="nf4"))["adapters"]


def test_llama_70b_trains_by_qlora_on_one_48_gb_card_at_a_short_context():
    """The claim of the QLoRA paper, for 65B."""
    use = Use(train="lora", quant="nf4", context=512)
    assert 1 == fit(LLAMA_70B, use, card("RTXA6000")).count


@given(
    st.sampled_from([*QUANTS]),
    st.integers(1, 10**6),
    st.integers(1, 64),
    st.integers(10**6, 10**12),
    st.sampled_from(["", "lora", "full"]),
)
def test_memory_rises_with_context_batch_and_size_and_falls_with_gpus(quant, context, batch, params, train):
    """No line is negative and none is missing its arithmetic and source."""
    if train:
        quant = "bf16" if train == "full" else "nf4"
    use = Use(quant=quant, context=context, batch=batch, train=train)
    shape = estimated(params)
    base = need(shape, use)
    assert all(line.bytes > 0 and line.how and line.source for line in base.lines)
    more = (
        need(shape, Use(quant=quant, context=2 * context, batch=batch, train=train)),
        need(shape, Use(quant=quant, context=context, batch=2 * batch, train=train)),
    )
    assert all(bigger.bytes > base.bytes for bigger in more)
    assert need(shape, use, 8).bytes <= need(shape, use, 4).bytes <= need(shape, use, 2).bytes


def test_stored_weights_count_as_they_lie():
    """What the files weigh, whatever the format."""
    assert 12_345 == lines(LLAMA_70B, Use(quant=STORED, stored_bytes=12_345))["weights"]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        pytest.param(Use(train="full", quant="int4"), "16-bit weights, not int4", id="4 bits trained whole"),
        pytest.param(Use(train="lora", quant="q4_k_m"), "not on GGUF's q4_k_m", id="LoRA on GGUF"),
        pytest.param(Use(quant=STORED), "say --quant", id="stored weights of unknown size"),
    ],
)
def test_what_no_program_offers_is_refused(use, words):
    """One sentence with what to do instead."""
    with pytest.raises(ConfigError, match=words):
        need(LLAMA_70B, use)


def test_a_window_and_a_latent_shrink_the_cache():
    """Mistral keeps 4096 tokens; DeepSeek's latent is no pair of keys and values and is never split."""
    windowed = Shape(**{**fields(LLAMA_70B), "windowed_layers": 80, "window": 4096})
    assert lines(LLAMA_70B, Use(context=4096))["KV cache"] == lines(windowed, Use(context=10**6))["KV cache"]
    latent = Shape(**{**fields(LLAMA_70B), "latent_kv": 576})
    assert 80 * 576 * 2 * 100 == lines(latent, Use(context=100), 8)["KV cache"]


def fields(shape):
    return {name: getattr(shape, name) for name in shape.__dataclass_fields__}


# Cards and advice


def test_70b_in_fp16_does_not_fit_on_one_80_gb_card():
    """It says so, and that two do."""
    use = Use(quant="fp16", **EIGHT_K)
    assert 2 == fit(LLAMA_70B, use, card("H100", "SXM")).count
    assert "it does not fit on one 80 GB card without offload" in said(LLAMA_70B, use)
    assert "2 of them do" in said(LLAMA_70B, use)


def test_70b_in_4_bits_does_not_fit_on_24_gb_without_offload():
    """One card of 48 GB holds it."""
    use = Use(quant="int4", **EIGHT_K)
    text = said(LLAMA_70B, use)
    assert text.startswith("One card of 48 GB holds it")
    assert "it does not fit on one 24 GB card without offload" in text


def test_your_own_gpu_is_enough_when_it_is():
    """Named first; 70B it does not hold."""
    shape, own = estimated(8 * 10**9), [OwnCards(gpu="RTX4090", form_factor="PCIe", vram_gib=24, count=1)]
    mine = own_fit(shape, Use(), own)
    assert "Your own 1x RTX4090 is enough: 16.7 GiB of 22.3 GiB a card." == said(shape, Use(), mine)
    assert None is own_fit(LLAMA_70B, Use(), own)


def test_two_own_cards_are_enough_where_one_is_not():
    """As far as there are that many."""
    own = [OwnCards(gpu="RTX4090", form_factor="PCIe", vram_gib=24, count=3)]
    assert 2 == own_fit(LLAMA_70B, Use(quant="int4"), own).count


def test_the_fits_come_by_memory_rented_and_say_their_headroom():
    """Cards that do not hold it come last and are short of something."""
    found = fits(LLAMA_70B, Use(quant="int4"), CARDS)
    holding = [f for f in found if f.count]
    assert holding == found[: len(holding)]
    assert len(CARDS) == len(found)
    rented = [f.count * f.vram_gib for f in holding]
    assert sorted(rented) == rented
    assert all(f.headroom_bytes >= 0 for f in holding)
    assert all(f.headroom_bytes < 0 for f in found[len(holding) :])


def test_a_model_is_only_split_where_its_heads_divide():
    """14 heads go on 1 or 2 GPUs, not on 4; ZeRO does not mind."""
    odd = Shape(**{**fields(estimated(70 * 10**9)), "heads": 14})
    assert None is fit(odd, Use(quant="int4"), card("RTX4080")).count
    assert 4 == fit(LLAMA_70B, Use(quant="int4"), card("RTX4080")).count


def test_one_grace_hopper_is_alone_in_its_node():
    """A node of GH200 has one."""
    assert None is fit(LLAMA_70B, Use(quant="fp16"), card("GH200")).count


def test_what_is_usable_of_a_card_is_less_than_its_name():
    """93%: what a driver shows at worst."""
    assert int(24 * GIB * 0.93) == pytest.approx(usable_bytes(24), abs=1)


def test_the_ways_out_hold_what_they_promise():
    """Each was tried on the cards asked."""
    cards = [card("RTX4090")]
    ways = ways_out(estimated(405 * 10**9), Use(quant="fp16"), cards, CARDS)
    assert any(way.startswith("another card: ") for way in ways)
    ways = ways_out(LLAMA_70B, Use(quant="fp16", context=32_768, batch=8), cards, CARDS)
    assert any(way.startswith("--batch 1 ") for way in ways)
    assert any(way.startswith("--context ") for way in ways)
    assert ["--train lora (2x H200)"] == [
        w for w in ways_out(LLAMA_70B, Use(train="full"), [card("H200")], [card("H200")]) if "nf4" not in w
    ]
