"""What config.json says of a folder with packed 2:4 weights, for vLLM: its `quantization_config`.

vLLM has a method by the name of `METHOD` when this project's plugin is installed; the layers that
the entry does not name are dense.
"""

from collections.abc import Iterable
from pathlib import Path

from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import ModelError
from thanos_deploy.model import packed_folder

METHOD = "thanos-2of4"
PATTERN = "2:4"


def entry(layers: Iterable[str]) -> Json:
    """The entry for some packed layers, by their full names in the model."""
    return {"quant_method": METHOD, "pattern": PATTERN, "layers": sorted(layers)}


def layers_of(quantization: Json) -> frozenset[str]:
    """The layers that an entry names.

    Raises:
        ModelError: it is not an entry of this method.
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
    """Refuse a packed folder that was changed, or is of other layers than its config.json says.

    Args:
        folder: where the weights are.
        layers: that config.json names.

    Raises:
        IntegrityError: a file is not the one that was written.
        ModelError: the packed weights are those of other layers, or nothing says what was written.
    """
    weights = sorted(packed_folder.patterns_of(folder))
    named = sorted(layers)
    # Files may leave out the beginning of a name, which is the base model's.
    if len(weights) != len(named) or not all(
        f".{layer}.weight".endswith(f".{weight}")
        for layer, weight in zip(named, weights, strict=True)
    ):
        other = sorted({f"{layer}.weight" for layer in named} ^ set(weights))
        raise ModelError(
            f"{folder}: config.json names {len(named)} packed layers and "
            f"{packed_folder.RECORD} {len(weights)}; only one of the two has {other[0]}",
            fix="export the model again with `thanos-deploy export OUT --target vllm`",
        )
