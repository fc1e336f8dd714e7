"""`gpubroker size`: what a model needs to serve or to train, and which cards hold it, your own first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gpubroker import config
from gpubroker.cli.options import GpuName, format_option
from gpubroker.cli.render import console, print_csv, print_json, say, table
from gpubroker.doors import SystemClock, ThreadPool
from gpubroker.errors import BrokerError, ConfigError, NoFeasibleOffer
from gpubroker.gpus import GpuRequest, catalogue
from gpubroker.model import OfferQuery
from gpubroker.plan import hf
from gpubroker.plan.rank import OWN
from gpubroker.plan.shape import Shape, count_text, estimated, parse_params
from gpubroker.plan.size import (
    DEFAULT_QUANT,
    GIB,
    KV_BITS,
    QUANTS,
    STORED,
    Fit,
    Need,
    OwnCards,
    Train,
    Use,
    advice,
    check,
    fits,
    gib_text,
    need,
    own_fit,
    ways_out,
)

_CSV = (
    "gpu", "form_factor", "vram_gib", "count",
    "need_bytes_per_card", "usable_bytes_per_card", "headroom_bytes_per_card",
)  # fmt: skip
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_MOST_CONFIG_BYTES = 10_000_000
_MOST_SHARDS = 2000
_OWN_S = 3.0


class Params(click.ParamType[int]):
    """70b, 7.5b, 350m -> a number of parameters."""

    name = "params"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click."""
        if isinstance(value, int):
            return value
        try:
            return parse_params(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command(
    context_settings={"max_content_width": 100},
    epilog="""\b
Examples:
  gpubroker size --params 70b --quant int4 --context 8192
  gpubroker size --params 8b --train lora --quant nf4 --context 2048 --gpu 4090
  gpubroker size --config ./Llama-3.1-8B --batch 16 --format json""",
)
@click.option("--params", type=Params(), help="Parameters in all: 70b, 7.5b, 350m.")
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="A Hugging Face model's config.json, safetensors file or index, or its folder.",
)
@click.option(
    "--quant",
    type=click.Choice([*QUANTS], case_sensitive=False),
    metavar="FORMAT",
    help=f"Of the weights: {', '.join(QUANTS)}.  [default: what --config says, else {DEFAULT_QUANT}]",
)
@click.option(
    "--context",
    type=click.IntRange(1, 100_000_000),
    default=4096,
    show_default=True,
    help="Tokens a sequence.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 100_000),
    default=1,
    show_default=True,
    help="Sequences at once; training: on each GPU.",
)
@click.option(
    "--kv",
    type=click.Choice([*KV_BITS], case_sensitive=False),
    default="fp16",
    show_default=True,
    help="Format of the KV cache.",
)
@click.option("--train", type=click.Choice(["lora", "full"]), help="Train it rather than serve it.")
@click.option(
    "--lora-rank", type=click.IntRange(1, 65_536), default=16, show_default=True, help="Of every adapter."
)
@click.option("--gpu", "gpus", type=GpuName(), multiple=True, help="Only this card. Repeat for several.")
@click.option("--explain", is_flag=True, help="Where every figure is from, and every card.")
@format_option("table", "json", "csv")
def size(
    *,
    params: int | None,
    path: Path | None,
    quant: str | None,
    context: int,
    batch: int,
    kv: str,
    train: Train | None,
    lora_rank: int,
    gpus: tuple[GpuRequest, ...],
    explain: bool,
    output: str,
) -> None:
    """GPU memory of a model: weights, KV cache, activations, optimiser; which cards hold it, how many.

    An estimate from published formulas. Without --config the shape is that of a Llama of the size. Cards come
    in 1, 2, 4 or 8 of a kind in one node; 93% of a card's memory is taken to be usable.
    """
    if (params is None) == (path is None):
        raise click.UsageError("say how large the model is: --params 70b, or --config with its files")
    stored = hf.Stored(params=params) if path is None else read_model(path)
    shape = _shape_of(stored)
    use = Use(
        quant=quant or _quant_of(stored, train),
        context=context,
        batch=batch,
        kv=kv,
        train=train or "",
        lora_rank=lora_rank,
        stored_bytes=stored.weights_bytes,
    )
    check(use)
    every = list(catalogue().values())
    cards = [g for g in every if _is_asked(g.name, g.form_factor, gpus)]
    found = fits(shape, use, cards)
    own = own_fit(shape, use, [c for c in own_cards() if _is_asked(c.gpu, c.form_factor, gpus)])
    alone = need(shape, use)
    text = advice(shape, use, found, own)
    if output == "json":
        print_json(_json(shape, use, alone, found, own, text))
    elif output == "csv":
        print_csv(_CSV, ([*_record(f).values()] for f in found))
    else:
        _print(shape, use, alone, found, text, explain)
    if own is None and not any(f.count for f in found):
        ways = ways_out(shape, use, cards, every)
        would = f"; what would: {'; '.join(ways)}" if ways else ""
        raise NoFeasibleOffer(f"nothing holds it: {gib_text(alone.bytes)} are needed{would}")


def _is_asked(name: str, form_factor: str, gpus: Sequence[GpuRequest]) -> bool:
    return not gpus or any(g.matches(name, form_factor) for g in gpus)


def _shape_of(stored: hf.Stored) -> Shape:
    params = stored.params or (stored.weights_bytes or 0) // 2
    if stored.shape is None:
        shape = estimated(params)
        assumed = "" if stored.params else "; parameters taken to be 2 bytes each"
        return replace(shape, source=shape.source + assumed)
    if params == stored.shape.params:
        return stored.shape
    active = stored.shape.active_params if stored.shape.active_params < stored.shape.params else params
    return replace(stored.shape, params=params, active_params=min(active, params))


def _quant_of(stored: hf.Stored, train: str | None) -> str:
    """What the files say, as long as nothing is trained whole: that takes 16-bit weights."""
    if train == "full":
        return DEFAULT_QUANT
    return STORED if stored.weights_bytes else stored.quant or DEFAULT_QUANT


def read_model(path: Path) -> hf.Stored:
    """What the files of a Hugging Face model say: one file, or a folder with them. Reads headers alone.

    Raises ConfigError naming the file.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        return _read_file(path)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path} cannot be read: {said or error}") from error


def _read_folder(folder: Path) -> hf.Stored:
    shards = sorted(folder.glob("*.safetensors"))[: _MOST_SHARDS + 1]
    if len(shards) > _MOST_SHARDS:
        raise ConfigError(f"{folder}: more than {_MOST_SHARDS} safetensors files are no model")
    weights = shards or [p for p in [folder / _INDEX] if p.exists()]
    files = [*(p for p in [folder / _CONFIG] if p.exists()), *weights]
    if not files:
        raise ConfigError(f"{folder} holds no {_CONFIG} and no safetensors file")
    return hf.together([_read_file(file) for file in files])


def _read_file(path: Path) -> hf.Stored:
    if not path.is_file():
        raise ConfigError(f"{path} is no file" if path.exists() else f"{path} does not exist")
    name = path.name
    if name.endswith(".safetensors"):
        return _read_header(path)
    is_index = name.endswith(".index.json")
    data = _bounded(path, hf.MOST_HEADER_BYTES if is_index else _MOST_CONFIG_BYTES)
    return hf.parse_index(data, name) if is_index else hf.parse_config(data, name)


def _read_header(path: Path) -> hf.Stored:
    with path.open("rb") as file:
        length = hf.header_bytes(file.read(8), path.stat().st_size, path.name)
        return hf.parse_header(file.read(length), path.name)


def _bounded(path: Path, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ConfigError(f"{path.name} is longer than {most_bytes:,} bytes: it is not what it is called")
    return data


class _NothingRemote:
    """The limiter of a provider that asks nobody."""

    def wait(self, provider: str, endpoint: str, interval_s: float, deadline_s: float) -> None:
        """At once."""

    def block(self, provider: str, endpoint: str, seconds: float, reason: str) -> None:
        """Nobody."""


def own_cards() -> list[OwnCards]:
    """The cards of this machine and those declared in the config, as the local provider lists them.

    Without the price database: sizing must not wait for it. Trouble is said and costs only this.
    """
    from gpubroker.guard import guarded
    from gpubroker.provider import ProviderContext

    settings = config.load()
    if OWN in settings.disabled_providers:
        return []
    context = ProviderContext(
        env=os.environ, settings=settings, clock=SystemClock(), pool=ThreadPool(), limiter=_NothingRemote()
    )
    try:
        parsed = guarded(OWN, context).offers(OfferQuery(), _OWN_S)
    except BrokerError as error:
        say(f"your own GPUs: {error}")
        return []
    for note in parsed.notes:
        say(f"your own GPUs: {note}")
    most: dict[tuple[str, str, int], int] = {}
    for offer in parsed.offers:
        kind = (offer.gpu, offer.form_factor, offer.vram_gib)
        most[kind] = max(most.get(kind, 0), offer.gpu_count)
    return [
        OwnCards(gpu=gpu, form_factor=form_factor, vram_gib=vram_gib, count=count)
        for (gpu, form_factor, vram_gib), count in most.items()
    ]


def _print(shape: Shape, use: Use, alone: Need, found: Sequence[Fit], text: str, explain: bool) -> None:
    out = console()
    active = f", {count_text(shape.active_params)} active" if shape.active_params < shape.params else ""
    out.print(f"{count_text(shape.params)} parameters{active}: {shape.source}.", style="dim")
    made = table("on one GPU", "GiB", "how", right=("GiB",), whole=("on one GPU",))
    for line in alone.lines:
        made.add_row(
            line.item, f"{line.bytes / GIB:,.1f}", f"{line.how}  [{line.source}]" if explain else line.how
        )
    made.add_row("in all", f"{alone.bytes / GIB:,.1f}", "")
    out.print(made)
    out.print()
    if any(f.count for f in found):
        out.print(_cards_table(found, explain))
    small = sorted({f.vram_gib for f in found if not f.count} - {f.vram_gib for f in found if f.count})
    if small:
        out.print(f"Too small, however many a node has: {', '.join(map(str, small))} GB.", style="dim")
    out.print()
    out.print(text)


_GROUPS = 10


def _cards_table(found: Sequence[Fit], explain: bool) -> Any:
    """Cards of equal memory in one row."""
    made = table(
        "cards", "memory", "needs", "to spare", "which", right=("cards", "memory", "needs", "to spare")
    )
    groups: dict[tuple[int | None, int, int, int], list[str]] = {}
    for f in found:
        if f.count:
            key = (f.count, f.vram_gib, f.need_bytes, f.usable_bytes)
            names = groups.setdefault(key, [])
            if f.gpu not in names:
                names.append(f.gpu)
    for (count, vram_gib, need_bytes, usable), names in list(groups.items())[: None if explain else _GROUPS]:
        shown = names if explain else names[:4]
        made.add_row(
            f"{count}x",
            f"{vram_gib} GB",
            gib_text(need_bytes),
            gib_text(usable - need_bytes),
            ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""),
        )
    return made


def _json(
    shape: Shape, use: Use, alone: Need, found: Sequence[Fit], own: Fit | None, text: str
) -> dict[str, Any]:
    return {
        "model": {
            "params": shape.params,
            "active_params": shape.active_params,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "source": shape.source,
        },
        "asked": {
            "quant": use.quant,
            "context": use.context,
            "batch": use.batch,
            "kv": use.kv,
            "train": use.train or None,
        },
        "bytes": alone.bytes,
        "lines": [
            {"item": line.item, "bytes": line.bytes, "how": line.how, "source": line.source}
            for line in alone.lines
        ],
        "cards": [_record(f) for f in found],
        "own": None if own is None else _record(own),
        "advice": text,
    }


def _record(f: Fit) -> dict[str, Any]:
    values = (f.gpu, f.form_factor, f.vram_gib, f.count, f.need_bytes, f.usable_bytes, f.headroom_bytes)
    return dict(zip(_CSV, values, strict=True))
