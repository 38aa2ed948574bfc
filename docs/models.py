"""The table of model types, from the rows of the families and the types that tests cover."""

from collections.abc import Collection, Iterable, Iterator

from tests.model_types import CHANNEL_TYPES, CUT_TYPES, EVERY_TYPE, MIXTURES
from tests.test_published import REPOSITORIES
from thanos_deploy.model.families import FAMILIES, Family
from thanos_deploy.model.loaders import LOADERS, Loader
from thanos_deploy.model.text_part import WRAPPERS

_HEAD = """# Models

This page is written by `python -m docs.generate` from the rows of
`thanos_deploy/model/families.py` and from what the tests go over: "yes" stands where a test does it
with a random model of two blocks.

- Zeros: pruned to 2:4, saved, and loaded by transformers; the error that was reported for each
  layer is the one that the whole model shows. Other `n:m` and `unstructured` go the same way.
- Heads, channels, experts: cut out with `structured`; the smaller model computes what the masked
  one does. "As its family" means that another type, which is cut in the same way, is tested; "no
  test" that none is tested; and "-" that the type has no experts.
- ONNX: exported, and ONNX Runtime agrees with PyTorch. `thanos-deploy serve` runs this graph,
  and the targets `genai`, `tensorrt`, `tensorrt-rtx` and `triton` are made from it.
- The other programs: whether their sources were read for this type, and whether a test serves it.
"""

_EXPERTS = """## Experts

- Zeros: statistics of a layer of an expert count the tokens that the router sends to it. A layer
  that read fewer tokens than it has inputs gets the mask of Wanda and no update, and one that read
  none the mask of magnitude; the command and the report name them. Statistics are held for as
  many experts of a block at a time as fit into 1 GiB.
- Experts: `--pattern structured:FRACTION` drops those with the lowest score of REAP
  ([arXiv 2510.13999](https://arxiv.org/abs/2510.13999)): the mean, over the tokens that are sent to
  an expert, of its weight times the Euclidean norm of its output. The same number stays in every
  block, at least as many as a token is sent to, and only that number changes in `config.json`.
- Channels: with `--shrink ffn` channels of every expert are cut out, the same number of each, and
  the layer that reads them is refitted, if its expert read as many tokens as it has inputs.
- Heads of mixtures of experts are not cut.
- In an ONNX graph every expert computes every token, because shapes cannot depend on what the
  router chooses: the results are exact, and the work is that of all experts.
- gpt_oss in MXFP4, as it is published, is dequantised to bfloat16 when it is read, into the cache.
  What is written is bfloat16 too, without `quantization_config`. Its files keep the matrices of all
  experts in one tensor, so that the targets `packed` and `compressed-tensors` refuse it.
"""

_DISCOVERED = """## Any other type

For a type that transformers has, and this table has not, one forward pass that computes shapes
alone shows the blocks, their linear layers, and which of them read the same input. Such a model can
be pruned to `n:m` and `unstructured`; the dry run says "(discovered)", and the manifest
`discovered`. `structured` is refused, because the pass does not show which rows are a head. A model
is refused, with the reason, if the pass fails, if it computes something between two blocks, or if
several matrices are in one parameter, as with most mixtures of experts.
[Add a model family](develop/add-a-family.md) says how to write a row.
"""

_IMAGES = """## Models of texts and images

The language model is taken out, and goes by its own type; on text it computes what the whole does.
The tower for images and the projection are left out.
"""

_PUBLISHED = """## Published repositories

A test writes the exact files and tensor names of these repositories, with tiny random weights, and
prunes, exports and generates. Nothing is downloaded.
"""


def page() -> str:
    """Return the text of models.md."""
    loaders = [loader.name for loader in LOADERS]
    head = ["model type", "zeros", "heads", "channels", "experts", "ONNX", *loaders]
    rows = [row for family in FAMILIES for row in _rows(family)]
    wrapped = [(f"`{name}`", f"`{its.text}`") for name, its in sorted(WRAPPERS.items())]
    parts = [
        _HEAD,
        _table(head, sorted(rows)),
        _EXPERTS,
        _DISCOVERED,
        _IMAGES,
        _table(("model type", "its language model"), wrapped),
        _PUBLISHED,
        "\n".join(f"- `{name}`" for name in REPOSITORIES) + "\n",
    ]
    return "\n".join(parts)


def _rows(family: Family) -> Iterator[tuple[str, ...]]:
    """Yield the row of the table for each model type of a family."""
    for name in family.model_types:
        pruned = name in EVERY_TYPE or name in MIXTURES
        heads = "no" if family.experts or family.heads.fixed else _cut(family, name, CUT_TYPES)
        channels = _cut(family, name, (*CUT_TYPES, *CHANNEL_TYPES, *MIXTURES))
        experts = _cut(family, name, MIXTURES) if family.experts else "-"
        said = "yes" if pruned else "no test"
        others = (_loader(family, name, loader) for loader in LOADERS)
        yield (f"`{name}`", said, heads, channels, experts, said, *others)


def _cut(family: Family, name: str, tested: Collection[str]) -> str:
    """Say whether a test cuts this model type, or another type of its family."""
    if name in tested:
        return "yes"
    return "as its family" if any(one in tested for one in family.model_types) else "no test"


def _loader(family: Family, name: str, loader: Loader) -> str:
    """Say what is known about loading a model type in another program."""
    read = [one for one in family.readings if one.loader == loader.name and name in one.model_types]
    if any(one.demand == "another model" for one in read):
        return "no"
    if loader.tested is not None and name in loader.tested.model_types:
        return "served"
    return "read" if read else "not read"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
