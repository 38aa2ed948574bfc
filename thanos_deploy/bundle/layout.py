"""Where everything is in a bundle: the names of its folders and files, each written down once here.

    onnx/model.onnx, model.onnx.data, export.json      the graph, its weights, how it was exported
    onnx-DTYPE..., the same                            a graph of another kind, for engines
    genai/                                             a folder that ORT-GenAI loads
    packed/                                            the checkpoint without the zeros of n:m
    triton/                                            a model repository
    engines/STAGE/model.engine, build.json, ...        an engine and what is known of its build

A stage is called by the folder that it writes to, and the stage of an engine by its folder in
`engines/`.
"""

MODEL = "model"  # the folder with the pruned checkpoint

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


def engine_folder(stage: str) -> str:
    """The folder of an engine by the name of its stage."""
    return f"{ENGINES}/{stage}"
