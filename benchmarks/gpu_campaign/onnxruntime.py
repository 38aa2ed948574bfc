"""Compare ONNX Runtime on CUDA with the CPU, on a tiny bundle.

The bundle is made here, which needs onnx and onnxscript in addition to PyTorch and transformers. An
image that has these may still need onnxruntime-gpu in place of onnxruntime.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from thanos_deploy.bundle.record import Source
from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.gpu.rows import Row
from thanos_deploy.gpu_check.steps import Task

_FIX = "pip install onnxruntime-gpu in place of onnxruntime"


def rows(task: Task) -> Iterator[Row]:
    """Yield the rows of the check of `gpu-check` for ONNX Runtime on CUDA.

    Raises:
        PlatformError: ONNX Runtime is missing, or is built for CPUs only.
    """
    require(task.device)
    from thanos_deploy.gpu_check import bundle

    path = task.bundle or make(task.folder)
    yield from bundle.onnxruntime_cuda(replace(task, bundle=path))


def require(device: str) -> None:
    """Refuse an ONNX Runtime that cannot run on a device.

    Raises:
        PlatformError: see `rows`.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise PlatformError(f"ONNX Runtime is not here ({error})", fix=_FIX) from error
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise PlatformError(
            f"ONNX Runtime {onnxruntime.__version__} here is built for CPUs only", fix=_FIX
        )


def make(folder: Path) -> Path:
    """Make a bundle with a random model of two blocks and its graph."""
    try:
        import exporters.onnx.graph
    except ImportError as error:
        raise _unmade(error) from error
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.byte_tokenizer import save_byte_tokenizer
    from thanos_deploy.bundle import files, manifest
    from thanos_deploy.model.checkpoint import Checkpoint

    def produce(partial: Path) -> files.Json:
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
        LlamaForCausalLM(config).save_pretrained(partial / "model")
        save_byte_tokenizer(partial / "model")
        (partial / "onnx").mkdir()
        exporters.onnx.graph.export(
            Checkpoint.open(partial / "model"), partial / "onnx", pattern=None
        )
        return {}

    try:
        with manifest.claim(folder / "bundle", Source("folder", "tiny", "", "")) as bundle:
            bundle.run("onnx", produce, options={}, inputs={})
    except DeployError as error:  # for example, versions that the exporter does not support
        raise _unmade(error.message) from error
    return folder / "bundle"


def _unmade(why: object) -> PlatformError:
    return PlatformError(
        f"the tiny bundle cannot be made here ({why})",
        fix="pip install onnx onnxscript onnxruntime-gpu, or give --bundle, made elsewhere",
    )
