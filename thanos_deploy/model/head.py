"""The output head of a model, which computes logits from the last hidden states.

A row of logits is as long as the vocabulary. Code that needs many rows keeps the hidden states,
which are a hundred times smaller, and computes the logits of a few tokens at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from thanos_deploy.errors import ModelError
from thanos_deploy.machine.devices import CPU
from thanos_deploy.model.checkpoint import Checkpoint

# Computes logits[tokens, vocabulary] from states[tokens, hidden].
Head = Callable[[Tensor], Tensor]


def last_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compute the input of the output head.

    Args:
        model: the causal model.
        ids: int64[segments, length].

    Returns:
        [segments * length, hidden].
    """
    states: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def head_of(model: PreTrainedModel) -> Head:
    """Return the head of a model in memory."""
    linear: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return _with_scale(linear, model.config)


def read_head(checkpoint: Checkpoint, device: torch.device = CPU) -> Head:
    """Read the head of a checkpoint in float32, without the rest of the model.

    Raises:
        ModelError: see `Checkpoint.skeleton`.
    """
    model = checkpoint.skeleton()
    outline: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def read(parameter: Tensor) -> nn.Parameter:
        stored = checkpoint.stored_name(names[id(parameter)])
        value = checkpoint.weights.read([stored])[stored].to(device, torch.float32)
        return nn.Parameter(value, requires_grad=False)

    bias: nn.Parameter | None = outline.bias
    linear = nn.Linear(outline.in_features, outline.out_features, bias=False, device="meta")
    linear.weight = read(outline.weight)
    if bias is not None:
        linear.bias = read(bias)
    return _with_scale(linear, model.config)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether `head_of` computes a model's logits from its last hidden states.

    This is true for every model type with a row in `families`. A model whose structure was found by
    a forward pass may scale its logits in some other way.
    """
    ids = torch.arange(4, device=model.device)[None] % int(model.config.vocab_size)
    expected: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    found = head_of(model)(last_states(model, ids)).float()
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def require_plain_head(model: PreTrainedModel) -> None:
    """Refuse a model without a plain head; see `has_plain_head`.

    Raises:
        ModelError: `head_of` does not give the model's logits.
    """
    if not has_plain_head(model):
        raise ModelError(
            f"a model of type {model.config.model_type}: the logits are not the output of "
            "the output head on the last hidden states, so the model cannot be trained "
            "towards them",
            fix="leave --recover out",
        )


def _with_scale(linear: nn.Module, config: PretrainedConfig) -> Head:
    """Return the head with the scaling or soft-capping that some model types apply to logits."""
    cap = getattr(config, "final_logit_softcapping", None)  # of Gemma 2
    divisor = getattr(config, "logits_scaling", None)  # of Granite

    def head(states: Tensor) -> Tensor:
        logits: Tensor = linear(states)
        if divisor is not None:
            logits = logits / divisor
        return logits if cap is None else cap * (logits / cap).tanh()

    return head
