"""A handle of a bundle: the commands that work on one bundle, as methods.

This file is longer than others because more than half of it is documentation.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

from thanos_deploy.api import _requests
from thanos_deploy.api._checks import Positive, Range, public
from thanos_deploy.api.options import ExportOptions, ModelLike, Progress

if TYPE_CHECKING:
    from thanos_deploy.api.results import ExportResult
    from thanos_deploy.bundle.record import Exported, StageRecord
    from thanos_deploy.measure.gates import JudgedRun
    from thanos_deploy.measure.quality import Compared, TaskQuality, TextQuality
    from thanos_deploy.pruning.result import PruneResult
    from thanos_deploy.report.model import Report
    from thanos_deploy.stages.verify import Verification


class Bundle:
    """A bundle: the folder that `prune` and `prune_export` write.

    This handle holds only the path: every method and property reads `manifest.json` again, so it
    sees the changes of other processes. A stage that is finished is not made again: a repeated call
    checks and returns it, or refuses other options unless `overwrite` is true.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """Open an existing bundle.

        Args:
            path: the bundle's folder.

        Raises:
            InputError: there is no bundle at this path, this version cannot read its format, or a
                file name or link in it leads out of its folder.
        """
        from thanos_deploy.bundle import manifest

        self._path = Path(path)
        manifest.Bundle.open(self._path)

    @classmethod
    def open(cls, path: str | PathLike[str]) -> "Bundle":
        """Open an existing bundle; the same as `Bundle(path)`.

        Args:
            path: the bundle's folder.

        Raises:
            InputError: there is no bundle at this path, this version cannot read its format, or a
                file name or link in it leads out of its folder.
        """
        return cls(path)

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self._path

    @property
    def model_path(self) -> Path:
        """The folder of the pruned model, a Hugging Face checkpoint; see `load_model`."""
        return self._path / "model"

    @property
    def stages(self) -> "Mapping[str, StageRecord]":
        """The records of the finished stages by name, in the order in which they finished."""
        from thanos_deploy.bundle import manifest

        return MappingProxyType(manifest.Bundle.open(self._path).stages)

    @property
    def pruned(self) -> "PruneResult":
        """The figures of the stage prune, such as the sparsity and the errors of the layers.

        Raises:
            InputError: the bundle has no pruned model yet.
        """
        from thanos_deploy.bundle import manifest
        from thanos_deploy.pruning.result import PRUNE

        bundle = manifest.Bundle.open(self._path)
        bundle.require(PRUNE.name, "`thanos-deploy prune`")
        return bundle.result(PRUNE)

    def __repr__(self) -> str:
        return f"Bundle({str(self._path)!r})"

    @public
    def export(
        self,
        target: str = "onnx",
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
        **options: Unpack[ExportOptions],
    ) -> "Exported[ExportResult]":
        """Export the pruned model; the command `export`.

        Args:
            target: "onnx", "genai", "gguf", "packed", "triton", "vllm", "tensorrt" or
                "tensorrt-rtx".
            overwrite: replace an export that was made with other options.
            progress: see `Progress`.
            options: see `ExportOptions`.

        Returns:
            the finished stage: its files by path, its duration in seconds, and its result, a record
            of the target's own type.

        Raises:
            UsageError: the options do not fit the target, or an export with other options exists
                and `overwrite` is false.
            InputError: the bundle has no pruned model yet.
            GateError: the export does not pass the target's own checks.
            IntegrityError: a file of the existing export was changed, and `overwrite` is false.
            PlatformError: the machine lacks what the target needs, or another process is writing to
                the bundle.
            ResourceError: there is not enough memory or disk space.
        """
        from exporters import targets
        from thanos_deploy.bundle import manifest
        from thanos_deploy.stages.export import export

        chosen, asked = targets.get(target), _requests.export_request(options)
        with manifest.claim(self._path, manifest.Bundle.open(self._path).source) as bundle:
            return export(
                bundle,
                target=target,
                request=chosen.request(bundle, asked),
                overwrite=overwrite,
                announce=_requests.announce(progress),
            )

    @public
    def evaluate(
        self,
        dense: ModelLike,
        *,
        runtime: Literal["torch", "onnx"] = "torch",
        device: str = "auto",
        text: str | PathLike[str] = "builtin",
        text_field: str = "text",
        segments: int = 12,
        seqlen: int = 1024,
        questions: Annotated[int, Range(0)] = 100,
        tasks: Sequence[str] | None = None,
        task_folder: str | PathLike[str] | None = None,
        limit: Positive | None = None,
        revision: str | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> "Compared[TextQuality] | Compared[TaskQuality]":
        """Measure the quality of the pruned and the dense model; the command `eval`.

        The results are kept in the bundle. To measure a single model, see the function `evaluate`.

        Args:
            dense: the model that the bundle was made from.
            runtime: what runs the models: "torch", or "onnx" for their exported graphs.
            device: device on which PyTorch computes: "auto", "cpu" or "cuda[:N]". ONNX graphs run
                on the CPU.
            text: text to measure quality on: a path, or "builtin", the part of the built-in text
                that is never used for calibration.
            text_field: name of the field that holds the text in each row.
            segments: number of segments of the text.
            seqlen: number of tokens in each segment.
            questions: largest number of multiple-choice questions to make from the segments.
            tasks: names of lm-evaluation-harness tasks to run instead of measuring on a text.
            task_folder: folder of task files that the harness does not have. Task files can name
                Python code, which is then run.
            limit: largest number of examples of each task; None for all.
            revision: branch, tag or commit of the dense model, if it comes from the hub.
            overwrite: replace earlier results that were made with other options.
            progress: see `Progress`.

        Returns:
            the results of both models.

        Raises:
            UsageError: the options contradict each other or those of earlier results, the bundle
                was made from another model, or the pruned model was calibrated on this text.
            CalibrationError: the text cannot be read or is too short.
            InputError: the bundle has no pruned model yet, or, with "onnx", no exported graph.
        """
        from thanos_deploy.report.write import write_report
        from thanos_deploy.stages import evaluate as stage
        from thanos_deploy.stages.dense import reopen

        request = _requests.quality_request(
            runtime=runtime,
            device=device,
            text=text,
            text_field=text_field,
            segments=segments,
            seqlen=seqlen,
            questions=questions,
            tasks=tasks,
            task_folder=task_folder,
            limit=limit,
        )
        with reopen(self._path, _requests.model(dense), revision=revision) as (bundle, source):
            found = stage.evaluate(
                bundle,
                source,
                request,
                runtime=runtime,
                overwrite=overwrite,
                announce=_requests.announce(progress),
            )
            if "report" in bundle.stages:
                write_report(bundle)
        return found

    @public
    def bench(
        self,
        *,
        against: "Sequence[str | PathLike[str] | Bundle]" = (),
        dense: ModelLike | None = None,
        aa: bool = False,
        allow_different_models: bool = False,
        run: str | None = None,
        scenario: Sequence[Literal["prefill", "decode", "generate", "open-loop"]] = (
            "prefill",
            "decode",
            "generate",
            "open-loop",
        ),
        batch: Sequence[Positive] = (1,),
        prompt: Sequence[Positive] | None = None,
        past: Sequence[Positive] | None = None,
        new_tokens: Annotated[int, Range(2)] = 16,
        rounds: Annotated[int, Range(2)] = 10,
        sample_prompt: str = "The capital of France is",
        requests: Positive = 4,
        rate: Annotated[float, Range(0, open_low=True)] | None = None,
        driver: Literal["poisson", "loadgen"] = "poisson",
        provider: Literal["cpu", "cuda"] = "cpu",
        threads: Positive | None = None,
        gate: Sequence[str] = (),
        overwrite: bool = False,
        check: bool = True,
        progress: Progress | None = None,
    ) -> "JudgedRun":
        """Time the exported model beside others, each in a process of its own; the command `bench`.

        Args:
            against: models to compare with: bundles or their folders, or "dense" for the dense
                model. The first is the baseline. Empty for the dense model alone.
            dense: the dense model; needed only if the cache has no export of it yet.
            aa: measure the bundle against itself (an A/A test); all ratios should be 1.
            allow_different_models: compare bundles even if their base models or tokenizers differ.
            run: name of the run and of its file; None for "full", or for "aa" if `aa` is true.
            scenario: the scenarios to time.
            batch: batch sizes.
            prompt: number of tokens in each timed prompt; None for (32, 128).
            past: number of tokens in the KV cache before the timed decode steps; None for the
                values of `prompt` if it is given, else (128, 512).
            new_tokens: number of timed decode steps, and of tokens in each answer.
            rounds: number of timed rounds for each model.
            sample_prompt: prompt from which each model generates a sample text.
            requests: in open-loop, number of requests in each round.
            rate: in open-loop, requests per second; None for half of what the baseline can answer.
            driver: in open-loop, source of the requests: "poisson", or "loadgen" for MLPerf
                LoadGen.
            provider: execution provider of ONNX Runtime.
            threads: number of threads on a CPU; None for one per processor.
            gate: limits such as "decode.p50.ratio<0.8"; the command's help lists the metrics.
            overwrite: replace a run of the same name that was made with other options.
            check: raise an error if a gate is missed; False to inspect the run's `gates` instead.
            progress: see `Progress`.

        Returns:
            the run, without its raw samples, and the outcomes of the gates.

        Raises:
            UsageError: the options contradict each other, a gate cannot be parsed, or a run of the
                same name with other options exists and `overwrite` is false.
            InputError: the bundle has no ONNX graph yet, or the cache has no export of the dense
                model.
            PlatformError: the driver or the provider is not available.
            GateError: a gate was missed, and `check` is true.
        """
        from thanos_deploy.api._bench import bench

        done = bench(
            self._path,
            against=[
                str(other.path) if isinstance(other, Bundle) else fspath(other) for other in against
            ],
            dense=dense,
            aa=aa,
            different_models=allow_different_models,
            gates=gate,
            request={
                "run": run,
                "scenario": scenario,
                "batch": batch,
                "prompt": prompt,
                "past": past,
                "new_tokens": new_tokens,
                "rounds": rounds,
                "sample_prompt": sample_prompt,
                "requests": requests,
                "rate": rate,
                "driver": driver,
                "provider": provider,
                "threads": threads,
            },
            overwrite=overwrite,
            progress=progress,
        )
        return done.require() if check else done

    @public
    def report(self) -> "Report":
        """Write the report and the model card from the finished stages; the command `report`.

        Returns:
            the content of `report/report.json`. The page is `report/index.html`.

        Raises:
            InputError: the bundle has no pruned model yet, or a record is unreadable.
            IntegrityError: a record was changed after it was written.
        """
        from thanos_deploy.bundle import manifest
        from thanos_deploy.report.write import write_report

        with manifest.claim(self._path, manifest.Bundle.open(self._path).source) as bundle:
            return write_report(bundle)

    @public
    def verify(
        self,
        *,
        require_sparse: Annotated[float, Range(0, 1)] | None = None,
        check: bool = True,
        progress: Progress | None = None,
    ) -> "Verification":
        """Check the bundle's files: hashes, patterns and sparse layers; the command `verify`.

        Args:
            require_sparse: the fraction of the linear layers that must be proven to run on sparse
                tensor cores, in every engine; None to require nothing.
            check: raise an error for the first failed check; False returns the result instead.
            progress: see `Progress`.

        Returns:
            the checks, and the verdict on every linear layer of every engine.

        Raises:
            InputError: the bundle has no pruned model yet.
            IntegrityError: a file is missing or was changed, and `check` is true.
            GateError: another check failed, such as a pattern that does not hold or
                `require_sparse`, and `check` is true.
        """
        from thanos_deploy.bundle import manifest
        from thanos_deploy.stages import verify as stage

        bundle = manifest.Bundle.open(self._path)
        announce = _requests.announce(progress)
        checks = stage.verify(
            bundle, require_sparse=require_sparse, on_progress=announce("Check every file")
        )
        done = stage.verification(checks, bundle)
        return done.require() if check else done

    @public
    def generate(
        self,
        prompt: str,
        *,
        new_tokens: Positive = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        provider: Literal["cpu", "cuda", "tensorrt"] = "cpu",
        verify: bool = True,
        on_text: Callable[[str], object] | None = None,
    ) -> str:
        """Generate text from a prompt with the exported model; the command `generate`.

        This needs only the packages numpy, tokenizers and onnxruntime.

        Args:
            prompt: passed to the model as it is, without a chat template.
            new_tokens: largest number of tokens to generate.
            temperature: 0 always takes the most likely token; above 0, tokens are sampled.
            top_k: sample from this many of the most likely tokens; 0 for all tokens.
            top_p: sample from the most likely tokens whose probabilities add up to this value.
            min_p: sample from tokens at least this fraction as likely as the most likely one.
            repetition_penalty: values above 1 make repetitions less likely.
            seed: seed for sampling.
            stop: texts that end the answer.
            provider: execution provider of ONNX Runtime; "tensorrt" is its TensorRT provider.
            verify: compare the files with their recorded hashes first.
            on_text: called with each piece of the answer as soon as the piece is final.

        Returns:
            the answer, without the prompt.

        Raises:
            UsageError: a value is out of range, or the prompt is empty.
            InputError: the bundle has no ONNX graph yet.
            IntegrityError: a file was changed after it was written.
            PlatformError: the provider is not available.
        """
        from runtime.engine import open_engine
        from runtime.sampling import Sampling
        from runtime.text import open_tokenizer, stream

        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        tokenizer = open_tokenizer(self._path, verify=verify)
        engine = open_engine(self._path, provider=provider, verify=verify)
        answer = []
        for piece in stream(
            engine, tokenizer, prompt, new_tokens=new_tokens, sampling=sampling, stop=tuple(stop)
        ):
            answer.append(piece)
            if on_text is not None:
                on_text(piece)
        return "".join(answer)
