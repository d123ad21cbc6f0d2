"""Grids of runs out of named schemes, and what a run of a grid costs."""

import json
from collections.abc import Mapping
from typing import Any

from vfm.errors import UserError, unknown

Schemes = Mapping[str, Mapping[str, Any]]


def seeded(settings: Mapping[str, Any], schemes: Schemes, variations: Schemes) -> list[dict[str, Any]]:
    """The overrides of all schemes with `settings.seeds` seeds, seed by seed, so that an interrupted study has whole
    comparisons; then of the variations with `settings.variation_seeds`.

    settings.schemes: the names of those that are wanted; (): all. Raises `UserError` for an unknown name, and for no
    seeds.
    """
    known = {**schemes, **variations}
    for name in settings["schemes"]:
        if name not in known:
            raise unknown("scheme", name, known, "config.study.schemes")
    for field in ("seeds", "variation_seeds"):
        if settings[field] < 1:
            raise UserError(f"config.study.{field}={settings[field]} must be at least 1")
    found = []
    for group, seeds in ((schemes, settings["seeds"]), (variations, settings["variation_seeds"])):
        chosen = [name for name in group if not settings["schemes"] or name in settings["schemes"]]
        found += [{**group[name], "seed": seed} for seed in range(seeds) for name in chosen]
    return found


def scheme(record: Mapping[str, Any], schemes: Schemes) -> str:
    """The name of the scheme whose overrides a record has, but for the seed; the overrides as JSON if there is none."""
    plain = lambda values: json.loads(json.dumps({k: v for k, v in values.items() if k != "seed"}))
    for name, overrides in schemes.items():
        if plain(overrides) == plain(record["overrides"]):
            return name
    return json.dumps(plain(record["overrides"]))


def flops_per_token(backbone: Mapping[str, Any], length: int, vocab_size: int) -> float:
    """Training FLOPs of a token in matrix products, as `vfm.flops` counts them on the program; of the section
    model.backbone of a config, decoder-only with a gated MLP and as many heads for keys as for queries.

    Of attention half is computed where a row has many chunks of queries (see `dot_product_attention`), also in a
    window, whose mask saves nothing.
    """
    width, depth, mlp = (backbone[name] for name in ("width", "depth", "mlp_dim"))
    chunk = max(64, -(-length // 8))
    keys = sum(min(chunk, length - i) * min(i + chunk, length) for i in range(0, length, chunk)) / length
    mixer = 3 * width**2 if backbone.get("mixer") == "convolution" else 4 * width**2 + 2 * keys * width
    return 6.0 * (depth * (mixer + 3 * width * mlp) + width * vocab_size)
