"""What a transformer is made of, as far as memory goes: read from a model's files or estimated. Pure.

`hf` fills a Shape from a Hugging Face config; `estimated` makes one where only the number of parameters is
known. `size` turns it into bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise

from gpubroker.errors import ConfigError

MOST_PARAMS = 10**14
_FEWEST_PARAMS = 1000
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# "70b" means Llama 3.1 70B with its 70.6 billion: a published shape stands for sizes this near to it.
_AS_PUBLISHED = 0.05
_TIED_BELOW = 4 * 10**9
_LLAMA_VOCAB = 128_256
_LLAMA_KV_HEADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder. Counts are of numbers, not bytes; MoE experts count whole: all of them lie in memory."""

    params: int
    active_params: int  # what one token passes through; less than params only with experts
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # inner width that one token passes through in a layer: all its active experts together
    ffn_all: int  # of all experts; = ffn without experts
    vocab: int
    is_tied: bool  # one matrix is both embedding and output head
    is_gated: bool = True  # three matrices in the feed-forward part rather than two
    latent_kv: int = (
        0  # numbers a token and layer keeps with multi-head latent attention; 0 = keys and values
    )
    windowed_layers: int = 0  # layers that keep only the last `window` tokens
    window: int = 0
    cacheless_layers: int = 0  # linear attention: a state that does not grow
    source: str

    @property
    def embedding_params(self) -> int:
        """Embedding and output head, which most quantisations leave in 16 bits; never most of a model."""
        both = self.vocab * self.hidden * (1 if self.is_tied else 2)
        return min(both, self.params // 2)

    @property
    def layer_params(self) -> int:
        """Of one layer, on average."""
        return (self.params - self.embedding_params) // self.layers

    @property
    def kv_per_token(self) -> int:
        """Numbers that one token leaves in the cache of one layer."""
        return self.latent_kv or 2 * self.kv_heads * self.head_dim

    @property
    def kv_splits(self) -> int:
        """Over how many GPUs tensor parallelism can split the cache: neither head nor latent is cut."""
        return 1 if self.latent_kv else self.kv_heads

    def cached_tokens(self, context: int) -> int:
        """Token-layers of one sequence that stay in the cache."""
        full = self.layers - self.windowed_layers - self.cacheless_layers
        return full * context + self.windowed_layers * min(context, self.window)


def parse_params(text: str) -> int:
    """A number of parameters as people write it: 70b, 7.5B, 350m, 1.3t, 124000000. Raises ConfigError."""
    shown = text.strip()[:40]
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmbt]?)", text.strip().lower(), re.ASCII)
    if found is None:
        hint = ""
        if re.fullmatch(r"\d+x\d+(\.\d+)?b", shown.lower(), re.ASCII):
            hint = "; of a mixture of experts give the total (8x7b is 46.7b), or --config"
        raise ConfigError(f"{shown!r} is not a number of parameters such as 70b, 7.5b or 350m{hint}")
    params = int(Decimal(found[1]) * _SUFFIXES[found[2]])
    if not _FEWEST_PARAMS <= params <= MOST_PARAMS:
        raise ConfigError(f"{shown!r}: a model has between 1000 and 100t parameters")
    return params


def count_text(params: int) -> str:
    """Three digits: 70.6b, 350m."""
    suffix = next((s for s in ("t", "b", "m", "k") if params >= _SUFFIXES[s]), "")
    short = Decimal(f"{Decimal(params) / _SUFFIXES[suffix]:.3g}")
    return f"{short.normalize():f}{suffix}"


def _llama(name: str, params: int, layers: int, hidden: int, head_dim: int, ffn: int) -> Shape:
    return Shape(
        params=params,
        active_params=params,
        layers=layers,
        hidden=hidden,
        heads=hidden // head_dim,
        kv_heads=_LLAMA_KV_HEADS,
        head_dim=head_dim,
        ffn=ffn,
        ffn_all=ffn,
        vocab=_LLAMA_VOCAB,
        is_tied=params < _TIED_BELOW,
        source=name,
    )


# From the config.json that Meta published with each; a test counts their parameters from these figures.
PUBLISHED = (
    _llama("Llama 3.2 1B", 1_235_814_400, 16, 2048, 64, 8192),
    _llama("Llama 3.2 3B", 3_212_749_824, 28, 3072, 128, 8192),
    _llama("Llama 3.1 8B", 8_030_261_248, 32, 4096, 128, 14336),
    _llama("Llama 3.1 70B", 70_553_706_496, 80, 8192, 128, 28672),
    _llama("Llama 3.1 405B", 405_853_388_800, 126, 16384, 128, 53248),
)


def estimated(params: int) -> Shape:
    """The shape that a model of that size would have as a Llama 3: the published one, or between two.

    Layers and width grow as powers of the size between the published models, and beyond them as between the
    last two; grouped-query attention with 8 KV heads throughout.
    """
    nearest = min(PUBLISHED, key=lambda shape: abs(math.log(params / shape.params)))
    if abs(params - nearest.params) <= _AS_PUBLISHED * nearest.params:
        return replace(
            nearest, params=params, active_params=params, source=f"shape of {nearest.source}, assumed"
        )
    return _drawn(params)


def _drawn(params: int) -> Shape:
    small, large = _neighbours(params)
    share = math.log(params / small.params) / math.log(large.params / small.params)

    def between(low: int, high: int) -> float:
        return float(low * (high / low) ** share)

    head_dim = 128 if params > PUBLISHED[1].params else 64
    group = head_dim * _LLAMA_KV_HEADS
    hidden = max(1, round(between(small.hidden, large.hidden) / group)) * group
    way = "between" if 0 <= share <= 1 else "drawn on from"
    return _llama(
        f"shape {way} {small.source} and {large.source}, assumed",
        params,
        max(1, round(between(small.layers, large.layers))),
        hidden,
        head_dim,
        round(between(small.ffn, large.ffn)) if 0 <= share <= 1 else 7 * hidden // 2,
    )


def _neighbours(params: int) -> tuple[Shape, Shape]:
    """The published shapes around that size; beyond them a pair whose growth is drawn on."""
    if params < PUBLISHED[0].params:
        return PUBLISHED[0], PUBLISHED[2]
    pairs = list(pairwise(PUBLISHED))
    return next((pair for pair in pairs if params <= pair[1].params), pairs[-1])
