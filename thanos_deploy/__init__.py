"""Prune language models, export them, and measure the result.

    import thanos_deploy as td

    bundle = td.prune("model", pattern="2:4", out="out/model")
    bundle.export("onnx")
    print(bundle.evaluate("model").pruned.value)

The names in `__all__` are the Python API, which mirrors the commands; see `thanos_deploy.api`. Each
name is imported when it is first used: every other package imports this one, the light runtime
included, so importing it must cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "CalibrationError",
    "Check",
    "Compared",
    "DeployError",
    "Diagnosis",
    "DryRun",
    "ExportOptions",
    "Exported",
    "Forecast",
    "GateError",
    "HessianError",
    "InputError",
    "IntegrityError",
    "JudgedRun",
    "ModelError",
    "PatternError",
    "PlatformError",
    "Progress",
    "PruneExportOptions",
    "PruneOptions",
    "PruneResult",
    "Report",
    "ResourceError",
    "SemiStructured",
    "StageRecord",
    "Structured",
    "TaskQuality",
    "TextQuality",
    "Unstructured",
    "UsageError",
    "Verification",
    "compare",
    "doctor",
    "dry_run_prune",
    "dry_run_prune_export",
    "evaluate",
    "export",
    "load_model",
    "plan",
    "prune",
    "prune_export",
]

if TYPE_CHECKING:
    from thanos_deploy.api.bundle import Bundle
    from thanos_deploy.api.functions import (
        compare,
        doctor,
        dry_run_prune,
        dry_run_prune_export,
        evaluate,
        export,
        load_model,
        plan,
        prune,
        prune_export,
    )
    from thanos_deploy.api.options import (
        ExportOptions,
        Progress,
        PruneExportOptions,
        PruneOptions,
    )
    from thanos_deploy.api.results import Diagnosis
    from thanos_deploy.bundle.record import Exported, StageRecord
    from thanos_deploy.check import Check
    from thanos_deploy.errors import (
        CalibrationError,
        DeployError,
        GateError,
        HessianError,
        InputError,
        IntegrityError,
        ModelError,
        PatternError,
        PlatformError,
        ResourceError,
        UsageError,
    )
    from thanos_deploy.forecast.forecast import Forecast
    from thanos_deploy.measure.gates import JudgedRun
    from thanos_deploy.measure.quality import Compared, TaskQuality, TextQuality
    from thanos_deploy.pattern import SemiStructured, Structured, Unstructured
    from thanos_deploy.pruning.result import PruneResult
    from thanos_deploy.report.model import Report
    from thanos_deploy.stages.plan import DryRun
    from thanos_deploy.stages.verify import Verification
else:
    # Modules that define the names of `__all__`, the cheapest to import first.
    _HOMES = (
        *("errors", "pattern", "check", "api.options", "api.results", "api.functions"),
        *("bundle.record", "measure.quality", "measure.gates", "pruning.result"),
        *("report.model", "forecast.forecast", "stages.plan", "stages.verify"),
    )

    def __getattr__(name: str) -> object:
        if name in __all__:
            for home in _HOMES:
                module = import_module(f"{__name__}.{home}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
