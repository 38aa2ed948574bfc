"""The table of model types, from the rows of the families and the types that tests cover."""

from collections.abc import Collection, Iterable, Iterator

from tests.model_types import CHANNEL_TYPES, CUT_TYPES, EVERY_TYPE, MIXTURES
from tests.test_published import REPOSITORIES
from thanos_deploy.model.families import FAMILIES, Family
from thanos_deploy.model.loaders import LOADERS, Loader
from thanos_deploy.model.text_part import WRAPPERS

_HEAD = """# Models

This page is written by `python -m docs.generate` from the rows of
`thanos_deploy/model/families.py` and from the list of model types that the tests cover. "Yes"
means that a test does it with a random model of two blocks.

- Zeros: a model is pruned to 2:4, saved, and loaded by transformers. The reported error of each
  layer is the error that the whole model shows. Other `n:m` patterns and `unstructured` work in
  the same way.
- Heads, channels, experts: they are cut out with `structured`, and the smaller model computes the
  same as a model in which they are masked. "As its family" means that another type is tested
  which is cut in the same way, "no test" that no such type is tested, and "-" that the type has
  no experts.
- ONNX: the model is exported, and ONNX Runtime agrees with PyTorch. `thanos-deploy serve` runs
  this graph, and the targets `genai`, `tensorrt`, `tensorrt-rtx` and `triton` are made from it.
- Other programs: whether their source code was read for this type, and whether a test serves it.
"""

_EXPERTS = """## Experts

- Zeros: the statistics of an expert's layer come from the tokens that the router sends to the
  expert. If a layer reads fewer tokens than it has inputs, it is only masked, by Wanda's score;
  if it reads none, by magnitude. The command and the report name such layers. Statistics are held
  for as many experts of a block at a time as fit into 1 GiB.
- Experts: `--pattern structured:FRACTION` drops the experts with the lowest REAP score ([arXiv
  2510.13999](https://arxiv.org/abs/2510.13999)). The score is the mean of router weight times
  Euclidean norm of the expert's output, over the tokens that are sent to the expert. The same
  number of experts stays in every block, at least as many as a token is sent to, and only that
  number changes in `config.json`.
- Channels: with `--shrink ffn`, the same number of channels is cut out of every expert. The layer
  that reads them is refitted if its expert read at least as many tokens as the layer has inputs.
- Heads of mixtures of experts are not cut.
- In an ONNX graph, every expert computes every token, because shapes cannot depend on the
  router's choice. The results are exact, at the cost of running all experts.
- gpt_oss is published in MXFP4. It is dequantised to bfloat16 in the cache when it is first read,
  and pruned models are written in bfloat16, without `quantization_config`. Its files keep the
  matrices of all experts in one tensor, so the targets `packed` and `compressed-tensors` refuse
  it.
"""

_DISCOVERED = """## Any other type

For a type of transformers that is not in this table, a forward pass that computes only shapes
finds the blocks, their linear layers, and which layers read the same input. Such a model can be
pruned to `n:m` and `unstructured`; the dry run says "(discovered)", and the manifest
`discovered`. `structured` is refused, because the pass does not show which rows belong to a head.
A model is refused, with the reason, if the pass fails, if something is computed between two
blocks, or if one parameter holds several matrices, as in most mixtures of experts. [Add a model
family](develop/add-a-family.md) says how to write a row.
"""

_IMAGES = """## Models of texts and images

Only the language model is taken; it is written as a model of its own type. On text it computes
the same as the whole model. The vision tower and the projection are left out.
"""

_PUBLISHED = """## Published repositories

A test writes repositories with exactly these files and tensor names, with tiny random weights,
and prunes them, exports them and generates text. Nothing is downloaded.
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
