"""The keyword arguments that several functions share, each named after the command's option.

`--block-size 64` on the command line is `block_size=64` here, with the same meaning and the same
default. An option that may be repeated on the command line takes a sequence here.
"""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypedDict

from thanos_deploy.api._checks import Positive, Range
from thanos_deploy.pattern import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PatternLike = Pattern | str
ModelLike = str | PathLike[str] | tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


class Progress(Protocol):
    """A function that is called when a task begins and again as its steps are finished.

    Args:
        title: the task.
        done: number of finished steps; in the first call for a title 0, or the number of steps
            that an interrupted run had finished.
        total: number of steps in all.

    Example:
        def progress(title: str, done: int, total: int) -> None:
            print(f"{title}: {done} of {total}")
    """

    def __call__(self, title: str, done: int, total: int, /) -> object:
        """Receive the progress of a task."""


class PruneOptions(TypedDict, total=False):
    """How to prune, with which calibration text, and which layers; see the command `prune`.

    Attributes:
        method: "thanos", "sparsegpt", "wanda" or "magnitude". Default: "thanos".
        preset: "best", "fast", "max" or "paper": selects the defaults of other options; see the
            command for the cost of each preset. Default: "best".
        block_size: number of columns that are solved together (thanos, sparsegpt).
        damp: damping of the Hessian, as a fraction of the scale that `damp_mode` names (thanos,
            sparsegpt).
        damp_mode: scale for `damp`: "mean", "median" or "per-channel" (thanos, sparsegpt).
        score: score that chooses the weights to remove: "wanda" or "obs" (thanos).
        refit_steps: number of conjugate-gradient steps in the final fit of all kept weights of a
            layer (thanos).
        mask_passes: number of passes that choose the mask of every group of an n:m pattern again
            (thanos).
        outlier_rows: fraction of each layer's rows that stay dense (thanos).
        true_sequential: collect the statistics of each layer after the layers before it in the
            block are pruned; False collects those of all layers of a block at once. Default: the
            preset's.
        dense_target: the output that each layer is fitted to: 1 is its output in the dense model, 0
            the output of its dense weights on the pruned model's activations; numbers between mix
            the two. Default: the preset's.
        tune_steps: number of optimisation steps that tune all kept weights of a block together.
            Default: the preset's.
        tune_nsamples: number of segments that the tuning steps use, including those of `nsamples`.
            Default: the preset's.
        shrink: what to cut out with a structured pattern: "heads", "ffn" or "both"; in a model with
            experts "experts", or "ffn" for channels of every expert. Default: "both", which means
            "experts" in a model with experts.
        ffn_multiple: with a structured pattern, the number of feed-forward channels that stay is a
            multiple of this. Default: 64, or the largest smaller power of two that divides the
            dense model's number of channels.
        keep_shape: with a structured pattern, set columns to zero instead of cutting heads and
            channels out, so that all shapes stay the same. Default: False.
        allocation: how the sparsity is spread over the blocks: "uniform", the same in all of them;
            for a structured pattern "loss", widths chosen for each block, or "blocks", whole blocks
            are dropped; for an unstructured pattern "owl", a sparsity chosen for each block.
            Default: "uniform".
        owl_threshold: with the allocation "owl", a Wanda score of more than this many times the
            block's mean is an outlier. Default: 5.
        owl_spread: with the allocation "owl", largest difference between the sparsity of a block
            and that of the pattern. Default: 0.08.
        include: prune only these layers: full names, or "re:" and a regular expression that matches
            the full name.
        ignore: leave these layers dense; they are named as for `include`.
        sparsity_file: path of a file with a JSON object that gives layers their own patterns.
        keep_dense: fraction of the weights to leave dense, in the layers whose pruning would change
            the model most for each weight that it removes. Default: 0.
        budget: "speed=1.2x": how many times as fast as the dense model the pruned model has to be.
            Layers that need not be pruned to reach this speed stay dense. Default: none.
        budget_gpu: name of the GPU that `budget` is for; see `gpu` of `plan`.
        budget_step: the step that has to be that fast: "decode:BATCH" or "prefill:TOKENS". Default:
            "decode:1".
        budget_measured: path of a file with times of matrix products measured on that GPU. Default:
            the measurements published with this project, if they include that GPU.
        recover: number of segments on which to train the remaining weights after pruning, with the
            dense model as the teacher. With `quantize`, the scales are trained on as many segments
            afterwards. Default: the preset's, which is 0 except for "max".
        recover_text: text that `recover` trains on: "calib", the calibration text; "own", text that
            the dense model generates; or "chat", questions and answers that it generates in its
            chat template. Default: "calib".
        recover_rank: rank of the low-rank updates that `recover` trains instead of the weight
            matrices themselves, which takes less memory. Default: 0, which trains the weights
            themselves.
        quantize: "int8" or "int4", optionally with ":GROUP" or ":row", and ":asym": quantise the
            linear layers of the blocks after pruning. GROUP inputs of an output share a scale, or
            all of its inputs with "row"; "asym" gives each group a zero point. `tune_steps` then
            also tunes codes and scales. Default: "none".
        calib: calibration text: a path, a data set, several of these with weights, or "builtin";
            see the command `prune`. Default: "builtin".
        text_field: name of the field that holds the text in each row. Default: "text".
        calib_rows: number of rows to take from each data set, chosen at random by the seed.
            Default: all.
        calib_cut: "packed" joins the rows and cuts them into segments; "row" takes the beginning of
            one row for each segment. Default: "packed".
        nsamples: number of calibration segments. Default: 32.
        seqlen: number of tokens in each calibration segment. Default: 512.
        seed: seed for choosing the segments. Default: 0.
        calib_forward: precision in which the blocks run on calibration data: "auto", "fp32" or
            "bf16". Default: "auto".
        device: device on which PyTorch computes: "auto", "cpu" or "cuda[:N]". Default: "auto".
        activations: where the activations of the calibration data are kept between two blocks:
            "auto", "device", "host" or "disk". Default: "auto".
        dtype: dtype of the stored checkpoint: "auto", "fp32", "fp16" or "bf16". Default: "auto",
            which keeps the dtype of each tensor.
    """

    method: str
    preset: Literal["best", "fast", "max", "paper"]
    block_size: int
    damp: float
    damp_mode: Literal["mean", "median", "per-channel"]
    score: Literal["wanda", "obs"]
    refit_steps: int
    mask_passes: int
    outlier_rows: float
    true_sequential: bool
    dense_target: float
    tune_steps: int
    tune_nsamples: int
    shrink: Literal["heads", "ffn", "both", "experts"]
    ffn_multiple: int
    keep_shape: bool
    allocation: Literal["uniform", "loss", "blocks", "owl"]
    owl_threshold: float
    owl_spread: float
    include: Sequence[str]
    ignore: Sequence[str]
    sparsity_file: str | PathLike[str]
    keep_dense: float
    budget: str
    budget_gpu: str
    budget_step: str
    budget_measured: str | PathLike[str]
    recover: int
    recover_text: Literal["calib", "own", "chat"]
    recover_rank: int
    quantize: str
    calib: str | PathLike[str]
    text_field: str
    calib_rows: int
    calib_cut: Literal["packed", "row"]
    nsamples: int
    seqlen: int
    seed: int
    calib_forward: Literal["auto", "fp32", "bf16"]
    device: str
    activations: Literal["auto", "device", "host", "disk"]
    dtype: Literal["auto", "fp32", "fp16", "bf16"]


class ExportOptions(TypedDict, total=False):
    """The options of the targets; each target takes some of them. See the command `export`.

    Attributes:
        dtype: dtype of the exported weights. Default: that of the existing graph, or "fp32"; for
            engines "fp16"; for gguf the type that keeps the codes of `quantize`, or "q8_0".
        max_seq: longest sequence in tokens, prompt and answer together. Default: that of the
            existing graph, or the model's longest.
        logits: "all" computes the logits after every token, "last" after the last token only.
            Default: those of the existing graph, or "all"; for engines "last".
        graph: "ort" uses ONNX Runtime's own attention operator where it fits the model; "neutral"
            uses only operators that every runtime has. Default: that of the existing graph, or
            "ort".
        batch: for engines, the usual and the largest batch size. Default: (1, 8).
        seq: for engines, the usual and the largest length of a prompt in tokens. Default:
            (128, 1024), or the model's longest.
        sm: for engines, compute capabilities to build for, such as 89. Default: that of this
            machine's GPU, or all that the library builds for ahead of time.
        sparse_form: for engines, form of the linear layers; "auto" builds both forms on the GPU
            and keeps the faster one. Default: "matmul".
        engine_compat: for engines, other GPUs or versions that the engine may run on as well, at a
            cost in speed. Default: "none".
    """

    dtype: Literal[
        "fp32", "fp16", "int8", "int4", "int8-qdq", "bf16", "q8_0", "q4_k_m", "q4_0", "q4_1"
    ]
    max_seq: int
    logits: Literal["all", "last"]
    graph: Literal["neutral", "ort"]
    batch: Sequence[Positive]
    seq: Sequence[Positive]
    sm: Sequence[Positive]
    sparse_form: Literal["matmul", "conv1x1", "auto"]
    engine_compat: Literal["none", "version", "same-sm", "ampere+"]


class PruneExportOptions(PruneOptions, total=False):
    """How to prune, export, evaluate and time; see the command `prune-export`.

    Attributes:
        target: target to export to in addition to ONNX; see `Bundle.export`. Default: "onnx", which
            adds none.
        max_seq, logits, graph, seq, sm, sparse_form, engine_compat: options of the target; see
            `ExportOptions`.
        eval_text, eval_segments, eval_seqlen, eval_questions: what to measure quality on; see
            `text`, `segments`, `seqlen` and `questions` of `Bundle.evaluate`.
        batch, prompt, past, new_tokens, rounds, sample_prompt: what to time; see `Bundle.bench`.
            The defaults differ: a batch of 1, a prompt of 128 tokens, 20 rounds.
    """

    target: str
    max_seq: int
    logits: Literal["all", "last"]
    graph: Literal["neutral", "ort"]
    seq: Sequence[Positive]
    sm: Sequence[Positive]
    sparse_form: Literal["matmul", "conv1x1", "auto"]
    engine_compat: Literal["none", "version", "same-sm", "ampere+"]
    eval_text: str | PathLike[str]
    eval_segments: int
    eval_seqlen: int
    eval_questions: Annotated[int, Range(0)]
    batch: Sequence[Positive]
    prompt: Sequence[Positive]
    past: Sequence[Positive]
    new_tokens: Annotated[int, Range(2)]
    rounds: Annotated[int, Range(2)]
    sample_prompt: str
