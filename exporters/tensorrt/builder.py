"""Build one TensorRT engine; this module is the program of a subprocess.

    python -m exporters.tensorrt.builder ORDER.json

The library is native code that runs for minutes. In a subprocess it can be interrupted, a crash is
an exit code, and its memory is given back and can be measured. The packages `tensorrt` (10.13 and
later, 11.x) and `tensorrt_rtx` have the same Python interface, except for the attributes that are
looked up with `hasattr` or `getattr` here.

Progress goes to standard output, one JSON array [done, total] on each line. If the build fails, the
last line is a `Failure`. Whatever else is printed, by native code too, goes to standard error.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from exporters.packages import load
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import read_record, write_record
from thanos_deploy.bundle.layout import ENGINE_LAYERS
from thanos_deploy.machine import environment

# The file with the `Result`, in the working directory.
RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class Order:
    """The input of a build; every path is relative to the working directory.

    Attributes:
        module: the Python package of the library.
        graph: the ONNX file.
        engine, log, timing_cache: files to write; an existing timing cache is used.
        sparse: let the builder use sparse kernels (the flag SPARSE_WEIGHTS).
        compatibility: one of `exporters.options.Compatibility`.
        architectures: GPUs to build for, such as "sm86"; empty for the GPU of this machine.
        profiles: for each optimisation profile, the smallest, the usual and the largest shape of
            every input, by name.
    """

    module: str
    graph: str
    engine: str
    log: str
    timing_cache: str
    sparse: bool
    compatibility: str
    architectures: tuple[str, ...]
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a successful build.

    Attributes:
        library: version of the library.
        network_layers: number of layers of the network that the library parsed from the graph.
        peak_memory_bytes: peak memory of the builder's process.
    """

    library: str
    network_layers: int
    peak_memory_bytes: int


Kind = Literal["machine", "memory", "graph", "usage"]


@dataclass(frozen=True, slots=True)
class Failure:
    """The outcome of a failed build, which the caller turns into an error for the user.

    Attributes:
        kind: "machine" (it lacks something), "memory" (it ran out), "graph" (it cannot be built) or
            "usage" (the library does not support an option).
        message: what failed.
    """

    kind: Kind
    message: str


class _BuildError(Exception):
    """Raised inside the builder; `main` prints it as a `Failure`."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def main(order_path: str) -> int:
    """Build the engine that an order describes, and return the exit code."""
    order = read_record(Path(order_path), Order)
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8") as told:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        try:
            result = _build(order, told)
        except _BuildError as error:
            print(json.dumps(encode(Failure(error.kind, str(error)))), file=told)
            return 1
    write_record(Path(RESULT), result)
    return 0


def _build(order: Order, told: TextIO) -> Result:
    try:
        trt: Any = load(order.module)
    except (ImportError, OSError) as error:
        raise _BuildError("machine", f"{order.module}: {error}") from error
    with Path(order.log).open("w", encoding="utf-8") as log:
        logger = _logger(trt, log)
        try:
            builder = trt.Builder(logger)
        except TypeError as error:  # pybind11 raises this if the library returns a null pointer
            raise _BuildError(
                "machine",
                "TensorRT could not create a builder, most likely because there is no NVIDIA "
                "driver or GPU",
            ) from error
        network = builder.create_network(_network_flags(trt))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(order.graph):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise _BuildError(
                "graph",
                "; ".join(
                    f"{error.node_operator()} {error.node_name()}: {error.desc()}"
                    for error in errors
                ),
            )
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = _monitor(trt, told)
        if order.sparse:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        _set_compatibility(trt, config, order.compatibility)
        _set_architectures(trt, config, order.architectures)
        for shapes in order.profiles:
            profile = builder.create_optimization_profile()
            for name, (least, usual, most) in shapes.items():
                profile.set_shape(name, least, usual, most)
            config.add_optimization_profile(profile)
        stored = Path(order.timing_cache)
        cache = config.create_timing_cache(stored.read_bytes() if stored.exists() else b"")
        # A cache of another GPU or version is no error: the library does not use it.
        config.set_timing_cache(cache, False)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            reason = _last_error(order.log)
            raise _BuildError(_kind(reason), reason)
        Path(order.engine).write_bytes(plan)
        stored.write_bytes(config.get_timing_cache().serialize())
        inspected = _inspect(trt, logger, plan)
    if inspected is not None:
        Path(ENGINE_LAYERS).write_text(inspected, encoding="utf-8")
    return Result(
        library=trt.__version__,
        network_layers=network.num_layers,
        peak_memory_bytes=environment.peak_memory_bytes(),
    )


def _logger(trt: Any, log: Any) -> Any:
    severities = {
        getattr(trt.ILogger, name): name[0]
        for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    }

    class Logger(trt.ILogger):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.write(f"[{severities[severity]}] {message}\n")
            log.flush()

    return Logger()


def _monitor(trt: Any, told: TextIO) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                print(json.dumps([step + 1, self._steps[phase]]), file=told)
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


def _network_flags(trt: Any) -> int:
    """Flags for a strongly typed network, whose dtypes come from the graph.

    Where the library has no such flag, all networks are strongly typed.
    """
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _set_compatibility(trt: Any, config: Any, wanted: str) -> None:
    levels = getattr(trt, "HardwareCompatibilityLevel", None)
    if wanted == "version":
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    elif wanted != "none":
        name = {"same-sm": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}[wanted]
        if not hasattr(levels, name):
            raise _BuildError("usage", f"this version has no compatibility {wanted!r}")
        config.hardware_compatibility_level = getattr(levels, name)


def _set_architectures(trt: Any, config: Any, architectures: tuple[str, ...]) -> None:
    if not architectures:
        return
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise _BuildError("usage", "this library builds for the GPU of this machine only")
    missing = [name for name in architectures if not hasattr(known, name.upper())]
    if missing:
        raise _BuildError(
            "usage",
            f"{', '.join(missing)}: the library builds for "
            + ", ".join(sorted(name.lower() for name in dir(known) if name.startswith("SM"))),
        )
    config.num_compute_capabilities = len(architectures)
    for index, name in enumerate(architectures):
        config.set_compute_capability(getattr(known, name.upper()), index)


def _inspect(trt: Any, logger: Any, plan: Any) -> str | None:
    """JSON of the engine inspector; None where no GPU can load the engine."""
    try:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    except TypeError:  # without a driver there is no runtime; see the builder in `_build`
        return None
    if engine is None:
        return None
    text: str = engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON
    )
    return text


def _last_error(log: str) -> str:
    errors = [
        line[4:].strip()
        for line in Path(log).read_text(encoding="utf-8").splitlines()
        if line.startswith("[E]")
    ]
    return errors[-1] if errors else "the library gave no reason"


def _kind(reason: str) -> Kind:
    """Classify an error message of the library."""
    if "Unable to load library" in reason:  # the lean runtime, for engines of any version
        return "machine"
    return "memory" if "OutOfMemory" in reason or "out of memory" in reason else "graph"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
