"""The keyword arguments that several functions share, each called as the command's option is.

`--block-size 64` on the command line is `block_size=64` here, with the same meaning and the same
default. What may be given often there is a sequence here.
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
    """Called with the progress: when a piece of work begins, and after its steps.

    Example:
        def progress(title: str, done: int, total: int) -> None:
            print(f"{title}: {done} of {total}")
    """

    def __call__(self, title: str, done: int, total: int, /) -> object:
        """Take note; the first call for a title has 0 done."""


class PruneOptions(TypedDict, total=False):
    """How to prune, with which calibration text, and which layers; see the command `prune`.

    Attributes:
        method: "thanos", "sparsegpt", "wanda" or "magnitude". Default: "thanos".
        preset: "best", "fast", "max" or "paper": defaults of other options, by what they cost; see
            the command. Default: "best".
        block_size: number of columns that are solved together (thanos, sparsegpt).
        damp: damping of the Hessian, as a fraction (thanos, sparsegpt).
        damp_mode: the scale that `damp` is a fraction of: "mean", "median" or "per-channel"
            (thanos, sparsegpt).
        score: score that chooses the weights to remove, "wanda" or "obs" (thanos).
        refit_steps: conjugate-gradient steps of the final fit of all kept weights of a layer
            (thanos).
        mask_passes: number of passes that choose the mask of every group of an n:m pattern again
            (thanos).
        outlier_rows: fraction of each layer's rows that stay dense (thanos).
        true_sequential: collect each layer's statistics after the layers before it in the block are
            pruned; False for those of all layers of a block at once. Default: the preset's.
        dense_target: from 0 to 1, how far each layer is fitted to its output in the dense model.
            Default: the preset's.
        tune_steps: optimisation steps that tune all kept weights of a block together. Default: the
            preset's.
        tune_nsamples: segments that these steps use, including those of `nsamples`. Default: the
            preset's.
        shrink: what to cut out with a structured pattern: "heads", "ffn" or "both", the default;
            for a model with experts "experts", which is the default there, or "ffn".
        ffn_multiple: the number of feed-forward channels left is a multiple of this.
        keep_shape: with a structured pattern, set columns to zero and keep all shapes. Default:
            False.
        allocation: how the sparsity is spread over layers or blocks: "uniform", "loss", "blocks" or
            "owl". Default: "uniform".
        owl_threshold: owl: a score of more than this many times the block's mean is an outlier.
            Default: 5.
        owl_spread: owl: largest difference between the sparsity of a block and of the pattern.
            Default: 0.08.
        include: prune only these layers: full names, or "re:" and a regular expression.
        ignore: leave these layers dense; they are named as for `include`.
        sparsity_file: path of a file with a JSON object that gives layers their own patterns.
        keep_dense: fraction of the weights that stays dense, in the layers whose pruning would
            change the model most for each weight that it removes. Default: 0.
        budget: "speed=1.2x": how many times as fast as the dense model the pruned model has to be;
            layers that need not be pruned for this stay dense. Default: none.
        budget_gpu: the GPU that `budget` is for: a name that `plan` takes.
        budget_step: the step that has to be that fast: "decode:BATCH" or "prefill:TOKENS". Default:
            "decode:1".
        budget_measured: path of a file with times of matrix products that were measured on that
            GPU. Default: the measurements published with this project, if they include that GPU.
        recover: number of segments to train the remaining weights on, with the dense model as the
            teacher, and the scales if the model is quantised. Default: the preset's, which is 0
            except for "max".
        recover_text: text that `recover` trains on: "calib", the calibration text; "own" or "chat",
            text that the dense model generates. Default: "calib".
        recover_rank: rank of the update of each weight matrix that `recover` trains in place of the
            weights themselves, which takes less memory. Default: 0, the weights themselves.
        quantize: what to quantise the linear layers of the blocks to: "int8" or "int4", optionally
            with ":GROUP" or ":row", and ":asym"; `tune_steps` then also tunes codes and scales.
            Default: "none".
        calib: calibration text: a path, a data set, several with weights, or "builtin", the
            default; see the command `prune`.
        text_field: field of a row that holds the text. Default: "text".
        calib_rows: number of rows to take from each data set, chosen at random by the seed.
            Default: all.
        calib_cut: "packed": rows are joined and cut into segments; "row": each segment is the
            beginning of one row. Default: "packed".
        nsamples: number of calibration segments. Default: 32.
        seqlen: tokens in each segment. Default: 512.
        seed: seed for choosing the segments. Default: 0.
        calib_forward: precision in which the blocks run on calibration data: "auto", "fp32" or
            "bf16". Default: "auto".
        device: where PyTorch computes: "auto", "cpu" or "cuda[:N]". Default: "auto".
        activations: where the activations of the calibration data are kept between two blocks:
            "auto", "device", "host" or "disk". Default: "auto".
        dtype: dtype of the stored checkpoint: "auto", "fp32", "fp16" or "bf16". Default: "auto",
            each tensor's own.
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
    """The options of the targets; see the command `export`. Each target takes some of them.

    Attributes:
        dtype: dtype of the graph's weights. Default: that of the existing graph, or "fp32"; for
            engines "fp16", for gguf the type that keeps the codes of `quantize`, or "q8_0".
        max_seq: longest sequence, prompt and answer together. Default: that of the existing graph,
            or the model's longest.
        logits: "all" computes logits after every token, "last" after the last token only. Default:
            those of the existing graph, or "all"; for engines "last".
        graph: "ort", with ONNX Runtime's own attention where it fits the model, or "neutral".
            Default: that of the existing graph, or "ort".
        batch: engines: the usual and the largest batch size. Default: (1, 8).
        seq: engines: the usual and the largest length of a prompt in tokens. Default: (128, 1024),
            or the model's longest.
        sm: engines: compute capabilities to build for, such as 89. Default: that of the GPU of this
            machine, or all that the library builds for ahead of time.
        sparse_form: engines: form of the linear layers; "auto" builds both forms on the GPU and
            keeps the faster one. Default: "matmul".
        engine_compat: engines: other GPUs or versions that the engine may run on, at a cost in
            speed. Default: "none".
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
        target: what to export to, in addition to ONNX; see `Bundle.export`. Default: "onnx".
        max_seq, logits, graph, seq, sm, sparse_form, engine_compat: options of the target; see
            `ExportOptions`.
        eval_text, eval_segments, eval_seqlen, eval_questions: what to measure quality on; see
            `evaluate`.
        batch, prompt, past, new_tokens, rounds, sample_prompt: what to time; see `Bundle.bench`.
            Defaults here: a batch of 1, a prompt of 128 tokens, 20 rounds.
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
