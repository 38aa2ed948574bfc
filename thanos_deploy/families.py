"""Where each model family keeps its transformer blocks and their linear layers.

A family is one row of data. What differs between two models of a family is read from the model
itself: sizes from the configuration, optional parts (biases, tied heads) from the weights.
"""

from dataclasses import dataclass

from thanos_deploy.errors import ModelError


@dataclass(frozen=True, slots=True)
class Family:
    """The names that pruning needs to walk one kind of model.

    Attributes:
        model_types: values of `model_type` in config.json that this row describes.
        blocks: dotted name of the list of transformer blocks, seen from the causal model.
        inputs: the linear layers of one block, grouped by the activation that they read and in
            the order in which the forward pass reaches them. Layers of one group share one
            calibration statistic.
    """

    model_types: tuple[str, ...]
    blocks: str
    inputs: tuple[tuple[str, ...], ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all linear layers of one block, seen from the block."""
        return tuple(name for group in self.inputs for name in group)


FAMILIES = (
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        inputs=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        inputs=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
    ),
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        inputs=(
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
    ),
)


def family_of(model_type: str) -> Family:
    """The row that describes a model type.

    Raises:
        ModelError: no row names the model type.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ModelError(
        f"model type {model_type!r} is not supported; supported are {known}",
        fix="use a model of a supported type, or add a row to thanos_deploy/families.py",
    )
