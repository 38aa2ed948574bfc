"""Where everything is in a bundle: the names of its folders and files, each written down once here.

    model/, layers.json, README.md                     the checkpoint, its layers, the model card
    own-text.jsonl                                     what the dense model wrote to train it on
    codes/                                             the codes of a quantised checkpoint
    eval/perplexity.json, tasks.json, ...              its quality
    eval/outputs.safetensors                           of a dense model: what others are beside
    bench/RUN.json, sample.json                        its speed, and what it writes
    report/                                            all of it on a page
    onnx/model.onnx, model.onnx.data, export.json      the graph, its weights, how it was exported
    onnx-DTYPE..., the same                            a graph of another kind, for engines
    genai/                                             a folder that ORT-GenAI loads
    gguf/model.gguf                                    one file for llama.cpp
    packed/                                            the checkpoint without the zeros of n:m
    triton/                                            a model repository
    vllm/                                              a folder that vLLM serves
    engines/STAGE/model.engine, build.json, ...        an engine and what is known of its build

A stage is called by the folder that it writes to, and the stage of an engine by its folder in
`engines/`.
"""

MANIFEST = "manifest.json"
CARD = "README.md"

# The stage prune.
PRUNE = "prune"
MODEL = "model"
LAYERS = "layers.json"
OWN_TEXT = "own-text.jsonl"  # that the dense model wrote for a model that was trained
CODES = "codes"  # of a quantised model, a file for each block
CONFIG = f"{MODEL}/config.json"
TOKENIZER = f"{MODEL}/tokenizer.json"

# The stages eval, by what runs the model.
EVAL = "eval"
PERPLEXITY = {"torch": f"{EVAL}/perplexity.json", "onnx": f"{EVAL}/perplexity-onnx.json"}
OUTPUTS = f"{EVAL}/outputs.safetensors"  # of a dense model
TASKS = {"torch": f"{EVAL}/tasks.json", "onnx": f"{EVAL}/tasks-onnx.json"}

# The folder that vLLM serves.
VLLM = "vllm"

# The graph that everything else is made from: its stage, its folder and the files there.
ONNX = "onnx"
GRAPH = "model.onnx"
GRAPH_DATA = "model.onnx.data"
GRAPH_RECORD = "export.json"

# The folder with a folder for each engine, and the files in one.
ENGINES = "engines"
ENGINE = "model.engine"
BUILD = "build.json"
BUILD_LOG = "build.log"
BUILD_FORMAT = "thanos-deploy/build/1"
ENGINE_LAYERS = "layers.json"  # as TensorRT's inspector lists them
TIMING_CACHE = "timing.cache"

# The stage bench.
BENCH = "bench"
SAMPLE = f"{BENCH}/sample.json"

# The stage report.
REPORT = "report"
REPORT_PAGE = f"{REPORT}/index.html"
REPORT_TEXT = f"{REPORT}/report.md"
REPORT_RECORD = f"{REPORT}/report.json"


def run(name: str) -> str:
    """The file with a run of bench."""
    return f"{BENCH}/{name}.json"


def interrupted_run(name: str) -> str:
    """The file with the rounds of a run of bench that was interrupted."""
    return f"{BENCH}/{name}.interrupted.json"


def engine_folder(stage: str) -> str:
    """The folder of an engine by the name of its stage."""
    return f"{ENGINES}/{stage}"


def read_as_a_whole(name: str) -> str | None:
    """The folder of a file that is loaded as one: a model, a graph, an engine, a repository.

    None for a file of the top folder, and for records: those are read one by one, by their names.
    """
    folder, *inner = name.split("/")
    if not inner or folder in (EVAL, BENCH, REPORT):
        return None
    return f"{folder}/{inner[0]}" if folder == ENGINES and inner[1:] else folder
