"""A bundle as a handle: what the commands do to one, as methods.

More than half of the file is the documentation of these methods, so it is longer than others.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
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
    """A bundle: the folder that `prune` and `prune_export` make, and what can be done with it.

    A handle holds the path and nothing else: every method and property reads `manifest.json` again,
    so it sees what other processes did. Calling a method again does no work twice: it confirms what
    exists, or refuses other options unless `overwrite` is true.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """Open an existing bundle.

        Args:
            path: the bundle's folder.

        Raises:
            InputError: there is no bundle at this path, this version cannot read its format, or a
                file name in it leads out of its folder.
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
                file name in it leads out of its folder.
        """
        return cls(path)

    @property
    def path(self) -> Path:
        """The bundle's folder."""
        return self._path

    @property
    def model_path(self) -> Path:
        """The folder of the pruned model, an ordinary checkpoint; see `load_model`."""
        return self._path / "model"

    @property
    def stages(self) -> "Mapping[str, StageRecord]":
        """The records of the finished stages by name, in the order in which they finished."""
        from thanos_deploy.bundle import manifest

        return MappingProxyType(manifest.Bundle.open(self._path).stages)

    @property
    def pruned(self) -> "PruneResult":
        """The results of pruning, in numbers: what became of the model's layers.

        Raises:
            InputError: nothing has been pruned yet.
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
            overwrite: export again if the export was made with other options.
            progress: called with the progress; see `Progress`.
            options: see `ExportOptions`.

        Returns:
            the finished stage: its files by path, its seconds, and its result, a record that
            belongs to the target.

        Raises:
            UsageError: the options do not fit the target, or the export was made with other
                options.
            InputError: nothing has been pruned yet.
            PlatformError: the machine lacks what the target needs, or another process writes to
                the bundle.
            ResourceError: the disk or memory is full.
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
        """Measure the pruned model beside the dense one, and keep the results; the command `eval`.

        To measure one model by itself, see `evaluate`.

        Args:
            dense: the model that the bundle was made from.
            runtime: what runs the models: "torch", or "onnx" for their exported graphs.
            device: where PyTorch computes: "auto", "cpu" or "cuda[:N]"; ONNX graphs run on the CPU.
            text: text for perplexity: a path, or "builtin", the part of the built-in text that
                calibration never sees.
            text_field: field of a row that holds the text.
            segments: number of segments of the text.
            seqlen: tokens in each segment.
            questions: largest number of multiple-choice questions to make from the segments.
            tasks: names of tasks of lm-evaluation-harness, to run instead of perplexity.
            task_folder: a folder of task files that the harness does not have. They can name
                Python code that is run.
            limit: largest number of examples of each task; None for all.
            revision: branch, tag or commit of the dense model, if it comes from the hub.
            overwrite: replace results on another text or other tasks.
            progress: called with the progress; see `Progress`.

        Returns:
            the results of both models.

        Raises:
            UsageError: the options contradict each other or earlier results, or the bundle was made
                from another model.
            CalibrationError: the text cannot be read or is too short.
            InputError: nothing has been pruned yet, or, with "onnx", nothing exported.
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
        against: Sequence[str | PathLike[str]] = (),
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
            against: what to compare with: folders of bundles, or "dense"; the first is the
                baseline. Empty for the dense model.
            dense: the dense model; needed only if the cache has no export of it yet.
            aa: measure the bundle against itself: the ratios should be 1.
            allow_different_models: compare bundles of different base models or tokenizers.
            run: name of the run and its file; None for "full", or "aa".
            scenario: what to time.
            batch: batch sizes.
            prompt: tokens in each timed prompt; None for (32, 128).
            past: tokens in the kv cache before the timed decode steps; None for those of `prompt`
                if given, else (128, 512).
            new_tokens: number of decode steps, and of tokens in each answer.
            rounds: timed rounds of each model.
            sample_prompt: prompt of the sample text.
            requests: open-loop: requests in each round.
            rate: open-loop: requests a second; None for half of what the baseline can answer.
            driver: open-loop: "poisson", or "loadgen" for MLPerf LoadGen.
            provider: execution provider of ONNX Runtime.
            threads: number of threads on a CPU; None for one for each processor.
            gate: limits, like "decode.p50.ratio<0.8"; the command's help lists what they can name.
            overwrite: repeat a run of that name if it was made with other options.
            check: raise if a gate is missed; False to look at the run's `gates`.
            progress: called with the progress; see `Progress`.

        Returns:
            the run, without its raw samples, and the outcomes of the gates.

        Raises:
            UsageError: the options contradict each other, or a gate is not written as one.
            InputError: nothing has been exported to ONNX yet, or the cache has no dense export.
            PlatformError: the driver or the provider is not available.
            GateError: a gate was missed, and `check` is true.
        """
        from thanos_deploy.api._bench import bench

        done = bench(
            self._path,
            against=[str(other) for other in against],
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
            what is in `report/report.json`; `report/index.html` is the page.

        Raises:
            InputError: nothing has been pruned yet, or a record is not readable.
            IntegrityError: a record was changed since it was written.
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
        """Check the bundle from its files: hashes, patterns, sparse layers; the command `verify`.

        Args:
            require_sparse: the fraction of the linear layers that has to be proven to run on sparse
                tensor cores, in every engine; None to require nothing.
            check: raise for the first check that failed; False to look at the result.
            progress: called with the progress; see `Progress`.

        Raises:
            InputError: nothing has been pruned yet.
            IntegrityError: a file is missing or was changed, and `check` is true.
            GateError: a pattern does not hold or `require_sparse` is not met, and `check` is true.
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
        """Continue a prompt with the exported model; the command `generate`.

        Needs numpy, tokenizers and onnxruntime only.

        Args:
            prompt: passed to the model as it is, without a chat template.
            new_tokens: largest number of tokens to generate.
            temperature: 0 takes the most likely token each time; above 0, tokens are sampled.
            top_k: sample from this many of the most likely tokens; 0 for all tokens.
            top_p: sample from the most likely tokens whose probabilities add up to this.
            min_p: sample from tokens at least this fraction as likely as the most likely one.
            repetition_penalty: above 1, repetitions become less likely.
            seed: seed for sampling.
            stop: texts that end the answer.
            provider: execution provider of ONNX Runtime; "tensorrt" is its TensorRT provider.
            verify: check the hashes of the files first.
            on_text: called with each piece of the answer as soon as it is final.

        Returns:
            the answer, without the prompt.

        Raises:
            UsageError: a value is out of range, or the prompt is empty.
            InputError: nothing has been exported to ONNX yet.
            IntegrityError: a file was changed.
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
