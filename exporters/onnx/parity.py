"""Compare the written graph with the model: ONNX Runtime beside PyTorch, case by case."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from exporters.onnx.trace import WithFlatCache, empty_cache
from thanos_deploy.bundle.graph_record import ParityCase
from thanos_deploy.errors import GateError, boundary

# Largest accepted difference between ONNX Runtime and PyTorch (in float32, on the same weights),
# relative to the range of the expected values.
LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "int8": 1e-4, "int4": 1e-4, "int8-qdq": 5e-3}


def compare(
    path: Path, model: PreTrainedModel, limit: float, *, graph: str = "neutral"
) -> Iterator[ParityCase]:
    """Run ONNX Runtime beside PyTorch: prefill, chunked prefill, decode, and a padded batch.

    Args:
        path: the ONNX file.
        model: the model, in float32.
        limit: the largest accepted error, relative to the range of the expected values; a case
            names the first output beyond it.
        graph: "neutral", with padding on the left, or "ort", with padding on the right; the padded
            batch of the latter is run with the cache in place. See `exporters.onnx.graph`.
    """
    run = _Session(path)
    text = _sample(model, rows=3, length=12)
    wrapped = WithFlatCache(model).eval()

    def case(
        name: str, sequence: int, past: list[Tensor], mask: Tensor, *, in_place: bool = False
    ) -> tuple[ParityCase, list[Tensor]]:
        batch, total = mask.shape
        ids = text[:batch, total - sequence : total]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -sequence:]
        with torch.inference_mode():
            expected = wrapped(ids, mask, positions, past)
        given = (ids.numpy(), mask.numpy(), positions.numpy(), [one.numpy() for one in past])
        if graph == "ort":
            actual = run.padded_on_the_right(*given, in_place=in_place)
        else:
            actual = run(*given)
        real = mask.bool()
        # The graph may give the logits after the last token only; PyTorch gives all.
        kept = actual[0].shape[1]
        seen = real[:, -kept:]
        errors = {"logits": _relative(expected[0][:, -kept:][seen], actual[0][seen.numpy()])}
        for output, want, got in zip(run.present, expected[1:], actual[1:], strict=True):
            # [batch, heads, total, dim]: bring the token axis beside the batch axis.
            errors[output] = _relative(want.transpose(1, 2)[real], got.swapaxes(1, 2)[real.numpy()])
        # `not <=` instead of `>`, so that NaN counts as beyond the limit.
        beyond = [output for output in (*run.present, "logits") if not errors[output] <= limit]
        compared = ParityCase(
            name,
            batch,
            past[0].shape[2],
            sequence,
            logits_error=errors["logits"],
            cache_error=float(np.max([errors[output] for output in run.present])),
            first_differing=beyond[0] if beyond else None,
        )
        return compared, [tensor.clone() for tensor in expected[1:]]

    compared, cache = case(
        "prefill", 7, empty_cache(model, 1, 0), torch.ones(1, 7, dtype=torch.long)
    )
    yield compared
    compared, cache = case("chunked prefill", 4, cache, torch.ones(1, 11, dtype=torch.long))
    yield compared
    yield case("decode", 1, cache, torch.ones(1, 12, dtype=torch.long))[0]
    padded = torch.ones(3, 6, dtype=torch.long)
    padded[1, :2] = 0
    padded[2, :5] = 0
    compared, cache = case("padded batch", 6, empty_cache(model, 3, 0), padded, in_place=True)
    yield compared
    longer = nn.functional.pad(padded, (0, 1), value=1)
    yield case("decode of that batch", 1, cache, longer, in_place=True)[0]


Array = NDArray[Any]


class _Session:
    """A graph on ONNX Runtime's CPU provider.

    Attributes:
        present: names of the outputs that hold the cache.
    """

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # ONNX Runtime turns int8 weights behind a DequantizeLinear into its own MatMulNBits, and
        # would round the activations to int8 on its own account.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        with boundary(
            GateError,
            f"{path}: ONNX Runtime cannot load the exported graph",
            fix="export with another --dtype or --graph, or run `model` in the bundle with "
            "transformers: it is an ordinary folder",
        ):
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        logits, *present = self._session.get_outputs()
        self.present = [value.name for value in present]
        self._stored = np.float16 if logits.type == "tensor(float16)" else np.float32

    def __call__(
        self, ids: Array, mask: Array, positions: Array, past: Sequence[Array]
    ) -> list[Array]:
        """Return the logits, then the cache with the new tokens appended."""
        cache = [one.astype(self._stored) for one in past]
        feeds = dict(zip(self._inputs, (ids, mask, positions, *cache), strict=True))
        outputs: list[Array] = self._session.run(None, feeds)
        return outputs

    def padded_on_the_right(
        self,
        ids: Array,
        mask: Array,
        positions: Array,
        past: Sequence[Array],
        *,
        in_place: bool,
    ) -> list[Array]:
        """Run a graph that needs padding on the right; arguments and results have it on the left.

        Args:
            ids, mask, positions, past: as for `__call__`.
            in_place: let past and present be one buffer, with more room than is needed.
        """
        sizes = (mask == 0).sum(axis=1)
        ids, positions = (
            _rolled(one, -np.minimum(sizes, one.shape[1] - 1), axis=1) for one in (ids, positions)
        )
        mask = _rolled(mask, -sizes, axis=1)
        past = [_rolled(one, -sizes, axis=2) for one in past]
        if in_place:
            logits, *present = self._in_place(ids, mask, positions, past)
        else:
            logits, *present = self(ids, mask, positions, past)
        if logits.shape[1] > 1:
            logits = _rolled(logits, sizes, axis=1)
        return [logits, *(_rolled(one, sizes, axis=2) for one in present)]

    def _in_place(
        self, ids: Array, mask: Array, positions: Array, past: Sequence[Array]
    ) -> list[Array]:
        total = mask.shape[1]
        binding = self._session.io_binding()
        for name, array in zip(self._inputs, (ids, mask, positions), strict=False):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits", "cpu")
        buffers = []
        for before, after, one in zip(self._inputs[3:], self.present, past, strict=True):
            batch, heads, length, dim = one.shape
            # NaN wherever no token lies: the graph must not read there.
            buffer = np.full((batch, heads, total + 3, dim), np.nan, self._stored)
            buffer[:, :, :length] = one
            bound = ("cpu", 0, self._stored, buffer.shape, buffer.ctypes.data)
            binding.bind_input(before, *bound)
            binding.bind_output(after, *bound)
            buffers.append(buffer)
        self._session.run_with_iobinding(binding)
        return [binding.get_outputs()[0].numpy(), *(buffer[:, :, :total] for buffer in buffers)]


def _rolled(array: Array, by: NDArray[np.integer[Any]], *, axis: int) -> Array:
    """Roll every row of a batch by its own number of tokens along an axis."""
    rows = [np.roll(row, int(shift), axis - 1) for row, shift in zip(array, by, strict=True)]
    return np.stack(rows)


def _sample(model: PreTrainedModel, *, rows: int, length: int) -> Tensor:
    """Sample token ids from the model itself, with a fixed seed: int64[rows, length].

    Tokens drawn evenly from the vocabulary are unlike any text that a trained model has seen: with
    some of them, float32 rounding alone moves the logits by 1e-5.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (rows, 1), generator=generator)
    with torch.inference_mode():
        while ids.shape[1] < length:
            odds = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], dim=1)
    return ids


def _relative(want: Tensor, got: NDArray[np.floating]) -> float:
    expected = want.numpy()
    spread = float(expected.max() - expected.min())
    return float(np.abs(expected - got).max()) / (spread or 1.0)


def require(path: Path, cases: Sequence[ParityCase], limit: float) -> None:
    """Refuse a graph that does not compute what the model computes.

    Args:
        path: path of the graph, for the message.
        cases: the results of `compare`.
        limit: the limit that `compare` was called with, for the message.

    Raises:
        GateError: in some case an output differs by more than the limit.
    """
    for case in cases:
        if case.first_differing is not None:
            raise GateError(
                f"{path}: {case.name} (batch {case.batch}, past {case.past}, sequence "
                f"{case.sequence}): {case.first_differing} is the first output that differs from "
                f"PyTorch's by more than {limit:g} of its range (logits by "
                f"{case.logits_error:.2g}, the KV cache by up to {case.cache_error:.2g})",
                fix="report the model and the versions of torch and onnxruntime",
            )
