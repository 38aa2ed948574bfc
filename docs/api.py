"""The reference of the Python API, generated from `thanos_deploy.__all__`."""

import inspect
import re
from collections.abc import Iterator
from typing import Unpack, get_args, get_origin, is_typeddict

import thanos_deploy

_HEAD = """# Python API

This page is written by `python -m docs.generate`, from the docstrings of the names in
`thanos_deploy.__all__`.
"""
_NOTHING = (
    "There is no public Python API yet: the promised interface is the command `thanos-deploy`.\n"
)

_SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Source|Yields):$", re.MULTILINE)
_LONGEST = 88  # characters of a signature on one line


def page() -> str:
    """Return the text of reference/api.md."""
    names = sorted(getattr(thanos_deploy, "__all__", ()))
    parts = [_HEAD]
    for name in names:
        parts += section(name, getattr(thanos_deploy, name))
    return "\n".join(parts if names else [_HEAD, _NOTHING])


def section(name: str, value: object) -> Iterator[str]:
    """Yield heading, signature and docstring of a name, and the public methods of a class."""
    yield f"## {name}\n"
    if callable(value) and not is_typeddict(value):
        yield f"```python\n{signature(name, value)}\n```\n"
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        yield from docstring(inspect.getdoc(value) or "")
    if not inspect.isclass(value):
        return
    for method, function in vars(value).items():
        if method.startswith("_"):
            continue
        if isinstance(function, property):
            yield f"### {name}.{method}\n"
            yield from docstring(inspect.getdoc(function) or "")
        elif isinstance(function, classmethod | staticmethod) or inspect.isfunction(function):
            bound = getattr(value, method)
            yield f"### {name}.{method}\n"
            yield f"```python\n{signature(f'{name}.{method}', bound)}\n```\n"
            yield from docstring(inspect.getdoc(bound) or "")


def signature(name: str, value: object) -> str:
    """Return `name(parameters) -> result`, on one line or with one line per parameter."""
    assert callable(value)
    # The signature of a callback protocol is that of its `__call__`.
    called = value.__call__ if getattr(value, "_is_protocol", False) else value
    try:
        found = inspect.signature(called)
    except ValueError:  # some classes of the standard library have no signature
        return name
    parameters = [_parameter(one) for one in found.parameters.values() if one.name != "self"]
    kinds = [one.kind for one in found.parameters.values() if one.name != "self"]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = ""
    if found.return_annotation not in (inspect.Signature.empty, None) and not inspect.isclass(
        value
    ):
        result = f" -> {_annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= _LONGEST:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in parameters) + f"){result}"


def docstring(text: str) -> Iterator[str]:
    """Yield a docstring as Markdown.

    Paragraphs stay as they are. Each Google-style section gets its name as a heading; the entries
    of Args, Attributes and Raises become a list.
    """
    first, *rest = _SECTION.split(text)
    if first.strip():
        yield f"{first.strip()}\n"
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        content = inspect.cleandoc(f"\n{body}")
        if title == "Example":
            yield f"```python\n{content}\n```\n"
            continue
        yield f"**{title}**\n"
        if title in ("Args", "Attributes", "Raises"):
            # An entry begins at the margin; its further lines are indented.
            entries = re.split(r"\n(?=\S)", content)
            items = (re.match(r"(?s)([^:]+): (.*)", " ".join(one.split())) for one in entries)
            yield "\n".join(f"- `{item[1]}`: {item[2]}" for item in items if item) + "\n"
        else:
            yield f"{content}\n"


def _parameter(parameter: inspect.Parameter) -> str:
    text = parameter.name
    if parameter.kind is parameter.VAR_POSITIONAL:
        text = f"*{text}"
    if parameter.kind is parameter.VAR_KEYWORD:
        text = f"**{text}"
    typed = parameter.annotation is not parameter.empty
    if typed:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    default = parameter.default
    named = inspect.isroutine(default) or inspect.isclass(default)
    spelled = default.__name__ if named else repr(default)
    return f"{text} = {spelled}" if typed else f"{text}={spelled}"


def _annotation(annotation: object) -> str:
    """Return a type annotation without the names of modules."""
    if get_origin(annotation) is Unpack:
        return f"Unpack[{_annotation(get_args(annotation)[0])}]"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
