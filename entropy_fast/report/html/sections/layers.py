"""The forecast by layer and kind of module, from its shares by parameter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from entropy_fast.estimates.attribution import layer_of
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.report.html.heat import HeatMap, heat_map
from entropy_fast.report.html.intervals import side_of
from entropy_fast.report.html.numbers import signed
from entropy_fast.report.text import printable

__all__ = ["LayersSection", "ModuleShare", "kind_of", "layers_section"]

# What ends a parameter's name and does not say which module it is of: adapters' own modules, and the parameter.
_ENDS = re.compile(
    r"(\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|ia3_l|base_layer|modules_to_save|original_module))?(\.default)?"
    r"(\.(weight|bias))?$"
)
NAME = 30  # characters of a name
OTHER = 8  # modules outside of layers that are named


@dataclasses.dataclass(frozen=True)
class ModuleShare:
    """Share of a kind of module, or of one outside of layers, in all layers together."""

    name: str
    share: str
    side: str


@dataclasses.dataclass(frozen=True)
class LayersSection:
    """Of a result whose shares by parameter are known.

    Attributes:
        figures: title and map, of the direct part and of the whole; kinds of modules in rows, layers in columns.
        kinds: shares of the kinds in the forecast, the largest first; others: of modules outside of layers.
    """

    figures: tuple[tuple[str, HeatMap], ...]
    kinds: tuple[ModuleShare, ...]
    others: tuple[ModuleShare, ...]


def layers_section(result: DeltaH1Result) -> LayersSection | None:
    """None where the engine did not take its sums apart."""
    whole = result.by_parameter
    if not whole:
        return None
    parts: dict[str, Mapping[str, float] | None] = {}
    if result.split is not None:
        parts["Direct part"] = result.split.direct.by_parameter
    if result.split is None or result.estimate_options.wanted_parts != ("direct",):
        parts["In all"] = whole
    figures = [
        (title, found) for title, shares in parts.items() if shares and (found := _map(shares, result.unit, title))
    ]
    kinds: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, share in whole.items():
        layer, kind = layer_of(name), kind_of(name)
        held, key = (kinds, kind) if kind else (others, layer)
        held[key] = held.get(key, 0.0) + share
    return LayersSection(tuple(figures), _ranked(kinds), _ranked(others)[:OTHER])


def kind_of(name: str) -> str:
    """The module within its layer, ``mlp.up_proj`` of ``model.layers.3.mlp.up_proj.lora_A.default.weight``.

    Empty for what is in no layer.
    """
    layer = layer_of(name)
    if not name.startswith(f"{layer}.") or not layer.rpartition(".")[2].isdigit():
        return ""
    return _ENDS.sub("", name[len(layer) + 1 :]) or "layer"


def _map(shares: Mapping[str, float], unit: str, title: str) -> HeatMap | None:
    inside = {name: share for name, share in shares.items() if kind_of(name)}
    layers = list(dict.fromkeys(layer_of(name) for name in inside))
    kinds = list(dict.fromkeys(kind_of(name) for name in inside))
    if not inside:
        return None
    table = np.full((len(kinds), len(layers)), np.nan)
    for name, share in inside.items():
        place = kinds.index(kind_of(name)), layers.index(layer_of(name))
        table[place] = share + (0.0 if np.isnan(table[place]) else table[place])
    numbers = [layer.rpartition(".")[2] for layer in layers]
    if len(set(numbers)) < len(numbers):  # two stacks of layers, as of an encoder and a decoder
        numbers = [printable(layer, NAME) for layer in layers]
    rows = [printable(kind, NAME) for kind in kinds]
    figure = heat_map(
        table, rows, [f"layer {n}" for n in numbers], unit=unit, title=f"{title}, by layer and kind of module"
    )
    columns = tuple(
        dataclasses.replace(label, text=label.text.removeprefix("layer ")) for label in figure.column_labels
    )
    return dataclasses.replace(figure, column_labels=columns)


def _ranked(shares: Mapping[str, float]) -> tuple[ModuleShare, ...]:
    ranked = sorted(shares.items(), key=lambda item: -abs(item[1]))
    return tuple(ModuleShare(printable(name, NAME), signed(share), side_of(share)) for name, share in ranked)
