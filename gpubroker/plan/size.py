"""How much GPU memory a model needs to serve or to train, and which cards hold it. Pure.

shape -> need (lines in bytes, each with its arithmetic and source) -> fits (cards, how many, headroom) ->
advice. Serving splits a model by tensor parallelism, training by ZeRO-3/FSDP. Every figure is an estimate
from published formulas; what is assumed says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from gpubroker.errors import ConfigError
from gpubroker.model import Gpu
from gpubroker.plan.shape import Shape, count_text

Train = Literal["", "lora", "full"]
GIB = 2**30
COUNTS = (1, 2, 4, 8)
DEFAULT_QUANT = "bf16"
STORED = "stored"

# Of a card's nominal memory, what a program gets at worst: the driver shows 275040 MiB of a B300's 288 GiB,
# and 23028 of an A10G's 24576 with ECC on.
_USABLE = Decimal("0.93")
# GPUs that one node of these has at most.
_MOST_IN_NODE = {"GH200": 1, "GH200-144GB": 1, "GB200": 4, "GB300": 4}
# What is sold as one card and shown as several devices, each with its share of the memory.
_DEVICES = {"MI250X": 2}

_FRAMEWORK_BYTES = GIB
_NCCL_BYTES = GIB // 2
# Less to spare than this is within the error of the estimate.
_TIGHT_BYTES = GIB
_STEP_TOKENS = 8192
_GGUF_STEP_TOKENS = 512
_ADAPTER_BYTES = 16

_LLAMA_CPP = "llama.cpp tools/quantize/README.md, measured on Llama 3.1 8B"
_ZERO = "ZeRO, arXiv 1910.02054, section 3: 16 bytes a parameter with Adam in mixed precision"
_KV = "2 x layers x KV heads x head size; GQA, arXiv 2305.13245"
_ACTIVATIONS = "arXiv 2205.05198, section 4 and full recomputation in 5: 34 bytes x tokens x width a layer"
_ASSUMED = "assumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quant:
    """A format of weights. `outer_bits`: of embedding and head; None = `bits` is the average over all."""

    name: str
    bits: Decimal
    outer_bits: Decimal | None
    how: str
    source: str


def _quant(name: str, bits: str, outer: str | None, how: str, source: str) -> Quant:
    outer_bits = None if outer is None else Decimal(outer)
    return Quant(name=name, bits=Decimal(bits), outer_bits=outer_bits, how=how, source=source)


_FORMAT = "by the format"
_GROUPS = "GPTQ and AWQ checkpoints with group size 128: a 16-bit scale and a 4-bit zero a group"
_QLORA = "QLoRA, arXiv 2305.14314, section 3: double quantisation costs 0.127 bits"
QUANTS: Mapping[str, Quant] = {
    q.name: q
    for q in (
        _quant("fp32", "32", None, "4 bytes", _FORMAT),
        _quant("fp16", "16", None, "2 bytes", _FORMAT),
        _quant("bf16", "16", None, "2 bytes", _FORMAT),
        _quant("fp8", "8", "16", "1 byte, embedding and head 2", "FP8 checkpoints of compressed-tensors"),
        _quant("int8", "8", "16", "1 byte, embedding and head 2", "LLM.int8(), arXiv 2208.07339"),
        _quant("int4", "4.15625", "16", "4 + 20/128 bits, embedding and head 16", _GROUPS),
        _quant("mxfp4", "4.25", "16", "4 + 8/32 bits, embedding and head 16", "OCP Microscaling v1.0"),
        _quant("nf4", "4.127", "16", "4.127 bits, embedding and head 16", _QLORA),
        *(
            _quant(name, bits, None, f"{bits} bits on average", _LLAMA_CPP)
            for name, bits in (
                ("q8_0", "8.5008"),
                ("q6_k", "6.5633"),
                ("q5_k_m", "5.7036"),
                ("q4_k_m", "4.8944"),
                ("q4_k_s", "4.6672"),
                ("iq4_xs", "4.4597"),
                ("q3_k_s", "3.6429"),
                ("q2_k", "3.1593"),
            )
        ),
    )
}  # fmt: skip
_TRAINABLE_WHOLE = ("fp32", "fp16", "bf16")
_LORA_BASES = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "nf4")
KV_BITS = {"fp16": 16, "bf16": 16, "fp8": 8, "fp32": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What is done with the model. `batch`: sequences at once; training: on each GPU."""

    quant: str = DEFAULT_QUANT  # of QUANTS, or STORED
    context: int = 4096
    batch: int = 1
    kv: str = "fp16"
    train: Train = ""
    lora_rank: int = 16
    stored_bytes: int | None = None  # of the weights, for STORED


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One part of the memory of one GPU: bytes, the arithmetic in words, and where the figures are from."""

    item: str
    bytes: int
    how: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What each of `gpus` equal GPUs must hold."""

    gpus: int
    lines: tuple[Line, ...]

    @property
    def bytes(self) -> int:
        """Of one GPU."""
        return sum(line.bytes for line in self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The least number of one card that holds the model; count None = a node of them does not.

    Bytes are of one card, for that count, or for the largest one that was tried.
    """

    gpu: str
    form_factor: str
    vram_gib: int
    count: int | None
    need_bytes: int
    usable_bytes: int

    @property
    def headroom_bytes(self) -> int:
        """Left on one card; below zero where it does not fit."""
        return self.usable_bytes - self.need_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCards:
    """Equal cards of the user's own."""

    gpu: str
    form_factor: str
    vram_gib: int
    count: int


def check(use: Use) -> None:
    """Raises ConfigError for a use that no program offers."""
    if use.train == "full" and use.quant not in (*_TRAINABLE_WHOLE, STORED):
        raise ConfigError(
            f"--train full trains 16-bit weights, not {use.quant}: leave --quant out, or --train lora"
        )
    if use.train == "lora" and use.quant not in (*_LORA_BASES, STORED):
        raise ConfigError(f"LoRA trains on {', '.join(_LORA_BASES)}, not on GGUF's {use.quant}")
    if use.quant == STORED and not use.stored_bytes:
        raise ConfigError("the size of the stored weights is not known: say --quant")


def need(shape: Shape, use: Use, gpus: int = 1) -> Need:
    """The memory of each of `gpus` GPUs. Raises ConfigError as `check` does."""
    check(use)
    lines = _training(shape, use, gpus) if use.train else _serving(shape, use, gpus)
    return Need(gpus=gpus, lines=tuple(line for line in lines if line.bytes))


def _serving(shape: Shape, use: Use, gpus: int) -> list[Line]:
    most, advised_by = (
        (_GGUF_STEP_TOKENS, "llama.cpp's default") if _is_gguf(use) else (_STEP_TOKENS, "vLLM's advice")
    )
    step_tokens = min(use.batch * use.context, most)
    work = step_tokens * (2 * _up(shape.ffn, gpus) + 4 * shape.hidden) * 2
    logits = use.batch * shape.vocab * 4
    step = f"{step_tokens} tokens a step x (2 x {shape.ffn}{_share(gpus)} + 4 x {shape.hidden}) x 2 bytes"
    return [
        _weights(shape, use, gpus),
        _cache(shape, use, gpus),
        Line(
            item="activations",
            bytes=work + logits,
            how=f"{step} + logits {use.batch} x {shape.vocab} x 4 bytes",
            source=f"widest moment of a layer; at most {most} tokens a step, {advised_by}; {_ASSUMED}",
        ),
        *_framework(gpus),
    ]


def _is_gguf(use: Use) -> bool:
    return use.quant in QUANTS and QUANTS[use.quant].source == _LLAMA_CPP


def _weights(shape: Shape, use: Use, gpus: int) -> Line:
    if use.quant == STORED:
        stored = use.stored_bytes or 0
        return Line(
            item="weights",
            bytes=_up(stored, gpus),
            how=f"{stored} bytes as stored{_share(gpus)}",
            source="the model's own files",
        )
    quant = QUANTS[use.quant]
    inner, outer = shape.params - shape.embedding_params, shape.embedding_params
    bits = inner * quant.bits + outer * (quant.bits if quant.outer_bits is None else quant.outer_bits)
    return Line(
        item="weights",
        bytes=_up(int(bits / 8), gpus),
        how=f"{count_text(shape.params)} parameters in {quant.name}: {quant.how}{_share(gpus)}",
        source=f"{quant.source}; {shape.source}",
    )


def _cache(shape: Shape, use: Use, gpus: int) -> Line:
    bits = KV_BITS[use.kv]
    tokens = use.batch * shape.cached_tokens(use.context)
    split = min(gpus, shape.kv_splits)
    each = shape.kv_per_token
    what = f"latent of {each}" if shape.latent_kv else f"2 x {shape.kv_heads} KV heads x {shape.head_dim}"
    window = f", {shape.windowed_layers} layers at most {shape.window}" if shape.windowed_layers else ""
    return Line(
        item="KV cache",
        bytes=_up(tokens * each * bits // 8, split),
        how=f"{use.batch} x {use.context} tokens x {shape.layers} layers x {what} x {bits // 8} bytes"
        f"{window}{_share(split)}",
        source=f"{_KV}; {shape.source}",
    )


def _training(shape: Shape, use: Use, gpus: int) -> list[Line]:
    lines = [_weights(shape, use, gpus)]
    if use.train == "full":
        lines += _full_states(shape, use, gpus)
    else:
        adapters = use.lora_rank * shape.layers * _lora_widths(shape)
        lines.append(
            Line(
                item="adapters",
                bytes=adapters * _ADAPTER_BYTES,
                how=f"{count_text(adapters)} parameters of rank {use.lora_rank} on every linear layer"
                " x 16 bytes (weights, gradients, Adam)",
                source=f"LoRA, arXiv 2106.09685; {_ZERO}",
            )
        )
    if gpus > 1:
        gathered = 2 * shape.layer_params + shape.embedding_params
        lines.append(
            Line(
                item="gathered",
                bytes=gathered * 2,
                how=f"two layers and the embedding whole on each GPU: {count_text(gathered)} x 2 bytes",
                source=f"FSDP gathers one layer and prefetches the next, arXiv 2304.11277; {_ASSUMED}",
            )
        )
    return [*lines, *_training_activations(shape, use), *_framework(gpus)]


def _full_states(shape: Shape, use: Use, gpus: int) -> list[Line]:
    weight_bytes = 4 if use.quant == "fp32" else 2
    state_bytes = 16 - 2 * weight_bytes
    what = "momentum and variance" if weight_bytes == 4 else "fp32 weights, momentum and variance"
    params = count_text(shape.params)
    return [
        Line(
            item="gradients",
            bytes=_up(shape.params * weight_bytes, gpus),
            how=f"{params} x {weight_bytes} bytes{_share(gpus)}",
            source=_ZERO,
        ),
        Line(
            item="optimiser",
            bytes=_up(shape.params * state_bytes, gpus),
            how=f"{params} x {state_bytes} bytes of AdamW ({what}){_share(gpus)}",
            source=_ZERO,
        ),
    ]


def _training_activations(shape: Shape, use: Use) -> list[Line]:
    tokens = use.batch * use.context
    kept = tokens * shape.hidden * 2 * shape.layers
    one = 34 * tokens * shape.hidden
    return [
        Line(
            item="activations",
            bytes=kept + one,
            how=f"{use.batch} x {use.context} tokens x {shape.hidden} x (2 bytes x {shape.layers} layers kept"
            " + 34 bytes of the layer at work)",
            source=f"{_ACTIVATIONS}; gradient checkpointing and flash attention",
        ),
        Line(
            item="logits",
            bytes=2 * tokens * shape.vocab * 4,
            how=f"{tokens} tokens x {shape.vocab} words x 4 bytes, and their gradient",
            source=f"cross-entropy in fp32; {_ASSUMED}: a fused loss needs less",
        ),
    ]


def _lora_widths(shape: Shape) -> int:
    """In plus out of every linear layer of one block: an adapter has rank x (in + out) parameters."""
    heads = shape.heads * shape.head_dim
    cached = shape.kv_heads * shape.head_dim
    attention = 2 * (shape.hidden + heads) + 2 * (shape.hidden + cached)
    one = shape.hidden + shape.ffn
    experts = max(1, shape.ffn_all // max(1, shape.ffn))
    return attention + (3 if shape.is_gated else 2) * one * experts


def _framework(gpus: int) -> list[Line]:
    lines = [
        Line(
            item="framework",
            bytes=_FRAMEWORK_BYTES,
            how="CUDA context, kernels and the allocator's gaps: 1 GiB a GPU",
            source=f"transformers docs, model_memory_anatomy: 1.3 GB of kernels, less since CUDA loads them"
            f" lazily; {_ASSUMED}",
        )
    ]
    if gpus > 1:
        lines.append(
            Line(item="NCCL", bytes=_NCCL_BYTES, how="buffers between GPUs: 0.5 GiB a GPU", source=_ASSUMED)
        )
    return lines


def _up(total: int, parts: int) -> int:
    return -(-total // parts)


def _share(gpus: int) -> str:
    return f" / {gpus} GPUs" if gpus > 1 else ""


# Which cards


def usable_bytes(vram_gib: int) -> int:
    """What a program gets of a card's memory at worst, see _USABLE."""
    return int(vram_gib * GIB * _USABLE)


def can_split(shape: Shape, use: Use, gpus: int) -> bool:
    """Tensor parallelism splits by attention heads, KV heads whole or copied; ZeRO-3 splits anything."""
    if use.train:
        return True
    return shape.heads % gpus == 0 and (shape.kv_heads % gpus == 0 or gpus % shape.kv_heads == 0)


def fit(shape: Shape, use: Use, gpu: Gpu | OwnCards, counts: Sequence[int] = COUNTS) -> Fit:
    """The least of these counts of one card that holds the model."""
    name = gpu.name if isinstance(gpu, Gpu) else gpu.gpu
    devices = _DEVICES.get(name, 1)
    usable = usable_bytes(gpu.vram_gib) // devices
    most = _MOST_IN_NODE.get(name, counts[-1])
    found = None
    each = 0
    for count in counts:
        gpus = count * devices
        if count > most or not can_split(shape, use, gpus):
            continue
        each = need(shape, use, gpus).bytes
        if each <= usable:
            found = count
            break
    return Fit(
        gpu=name,
        form_factor=gpu.form_factor,
        vram_gib=gpu.vram_gib,
        count=found,
        need_bytes=(each or need(shape, use).bytes) * devices,
        usable_bytes=usable * devices,
    )


def fits(shape: Shape, use: Use, cards: Iterable[Gpu]) -> list[Fit]:
    """Every card, those that hold the model first: the least memory rented first, then fewer cards."""
    found = [fit(shape, use, card) for card in cards]
    return sorted(
        found,
        key=lambda f: (
            f.count is None,
            (f.count or 1) * f.vram_gib if f.count else -f.vram_gib,
            f.count or 0,
            f.gpu,
            f.form_factor,
        ),
    )


def own_fit(shape: Shape, use: Use, own: Iterable[OwnCards]) -> Fit | None:
    """The user's own cards that hold the model, the fewest first; None = they do not."""
    found = [
        fit(shape, use, cards, tuple(c for c in COUNTS if c <= cards.count))
        for cards in own
        if cards.count >= 1
    ]
    return min((f for f in found if f.count), key=lambda f: (f.count or 0, f.vram_gib), default=None)


# What a person reads

_COMMON_GIB = (24, 48, 80)


def gib_text(count: int) -> str:
    """41.2 GiB; whole from 1000 on."""
    gib = Decimal(count) / GIB
    return f"{gib:,.0f} GiB" if gib >= 1000 else f"{gib:.1f} GiB"


def advice(shape: Shape, use: Use, found: Sequence[Fit], own: Fit | None) -> str:
    """What to take, the user's own card first, and the common card that is too small."""
    holding = [f for f in found if f.count]
    parts = []
    if own is not None:
        parts.append(
            f"Your own {own.count}x {own.gpu} is enough: {gib_text(own.need_bytes)} of"
            f" {gib_text(own.usable_bytes)} a card"
        )
    elif holding:
        parts.append(_take(holding))
    else:
        parts.append("No card that was looked at holds it, however many one node has")
    alone = need(shape, use).bytes
    sizes = sorted({f.vram_gib for f in found})
    known = [gib for gib in _COMMON_GIB if gib in sizes] or sizes[:1]
    small = [gib for gib in known if usable_bytes(gib) < alone]
    if small:
        gib = small[-1]
        offload = "" if use.train else " without offload"
        several = min((f.count for f in holding if f.vram_gib == gib and f.count), default=None)
        parts.append(
            f"it does not fit on one {gib} GB card{offload}: {gib_text(alone)} are needed of"
            f" {gib_text(usable_bytes(gib))}" + (f", {several} of them do" if several else "")
        )
    return "; ".join(parts) + "."


def _take(holding: Sequence[Fit]) -> str:
    best = min(holding, key=lambda f: (f.count != 1, f.vram_gib if f.count == 1 else f.count, f.vram_gib))
    alike = [f.gpu for f in holding if (f.count, f.vram_gib) == (best.count, best.vram_gib)]
    names = list(dict.fromkeys(alike))
    some = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    what = (
        f"One card of {best.vram_gib} GB holds"
        if best.count == 1
        else f"{best.count} cards of {best.vram_gib} GB hold"
    )
    tight = ", which is tight" if best.headroom_bytes < _TIGHT_BYTES else ""
    return f"{what} it ({some}), with {gib_text(best.headroom_bytes)} a card to spare{tight}"


def ways_out(shape: Shape, use: Use, cards: Sequence[Gpu], every: Sequence[Gpu]) -> list[str]:
    """What would make it fit, each tried: smaller weights, a shorter context, LoRA, other cards."""

    def holds(changed: Use, among: Sequence[Gpu]) -> Fit | None:
        return next((f for f in fits(shape, changed, among) if f.count), None)

    ways: list[tuple[str, Use]] = []
    if use.train == "full":
        ways.append(("--train lora", replace(use, train="lora")))
        ways.append(("--train lora --quant nf4", replace(use, train="lora", quant="nf4")))
    elif use.quant not in ("int4", "nf4", "mxfp4"):
        ways += [(f"--quant {q}", replace(use, quant=q)) for q in ("int8", "int4")]
    if use.batch > 1:
        ways.append(("--batch 1", replace(use, batch=1)))
    shorter = next(
        (
            c
            for c in (use.context // 2**n for n in range(1, 24))
            if c and holds(replace(use, context=c), cards)
        ),
        None,
    )
    if shorter:
        ways.append((f"--context {shorter}", replace(use, context=shorter)))
    said = [
        f"{text} ({found.count}x {found.gpu})" for text, changed in ways if (found := holds(changed, cards))
    ]
    if len(every) > len(cards) and (other := holds(use, every)):
        said.append(f"another card: {other.count}x {other.gpu}")
    return said
