"""The `quantization_config` of a folder with packed 2:4 weights, by which vLLM loads it.

This project's plugin adds the quantisation method `METHOD` to vLLM. Layers that the entry does not
name are dense.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import ModelError
from thanos_deploy.model import packed_folder

METHOD = "thanos-2of4"
PATTERN = "2:4"


def entry(layers: Iterable[str]) -> Json:
    """Return the entry for packed layers, which are given by their full names in the model."""
    return {"quant_method": METHOD, "pattern": PATTERN, "layers": sorted(layers)}


def layers_of(quantization: Json) -> frozenset[str]:
    """Return the full names of the packed layers in an entry.

    Raises:
        ModelError: the entry is not one of the method `METHOD`.
    """
    layers = quantization.get("layers")
    if (quantization.get("quant_method"), quantization.get("pattern")) != (METHOD, PATTERN) or not (
        isinstance(layers, list) and layers and all(isinstance(name, str) for name in layers)
    ):
        raise ModelError(
            f"quantization_config: {str(quantization)[:200]} does not name the method "
            f"{METHOD}, the pattern {PATTERN} and the packed layers",
            fix="export the model again with `thanos-deploy export OUT --target vllm`",
        )
    return frozenset(layers)


def require_intact(folder: Path, layers: Iterable[str]) -> None:
    """Refuse a packed folder that was changed, or whose config.json names other layers.

    Args:
        folder: the packed folder.
        layers: full names of the packed layers in config.json.

    Raises:
        IntegrityError: a file is not the one that was written.
        ModelError: weights of other layers are packed, or `packed.json` is missing or not readable.
    """
    weights = set(packed_folder.patterns_of(folder))
    # Names in files may lack the prefix of the base model.
    named = {layer: _stored_name(layer, weights) for layer in sorted(layers)}
    alone = [layer for layer, weight in named.items() if weight is None]
    if alone or len(named) != len(weights):
        alone += sorted(weights.difference(named.values()))
        raise ModelError(
            f"{folder}: config.json names {len(named)} packed layers and "
            f"{packed_folder.RECORD} {len(weights)}; only one of the two has {alone[0]}",
            fix="export the model again with `thanos-deploy export OUT --target vllm`",
        )


def _stored_name(layer: str, weights: Collection[str]) -> str | None:
    """Return the name of a layer's weight in the files; None if they have no such weight."""
    parts = f"{layer}.weight".split(".")
    names = (".".join(parts[start:]) for start in range(len(parts) - 1))
    return next((name for name in names if name in weights), None)
