"""Parse the full names of linear layers, such as "model.layers.3.mlp.experts.7.down_proj"."""

from thanos_deploy.model.families import EXPERT


def place_of(name: str) -> tuple[int, str]:
    """Split the full name of a layer into the number of its block and its name in the block."""
    parts = name.split(".")
    block = next(index for index, part in enumerate(parts) if part.isdigit())
    return int(parts[block]), ".".join(parts[block + 1 :])


def any_expert(name: str) -> str:
    """Return the name of a layer in its block with `EXPERT` for the number of its expert."""
    return ".".join(EXPERT if part.isdigit() else part for part in name.split("."))
