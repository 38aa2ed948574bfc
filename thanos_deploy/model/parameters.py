"""The parameters of a model, and the tensors of its files that store them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.errors import ModelError
from thanos_deploy.model.families import HEAD, Family
from thanos_deploy.model.tensorfile import Entry

# Names of weights and biases. Files may also hold masks and rotary frequencies that older versions
# of the library saved; those have other names, or more dimensions than a weight or a bias.
_WEIGHT = re.compile(r"\.(weight|bias)$")

# Most names shown in an error message.
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Parameters:
    """The names and shapes of a model's parameters.

    Attributes:
        shapes: maps all names of a parameter to its shape. A tied parameter has several names; the
            first one stands for it everywhere else.
        family: the row that says how names in files differ from these.
        ignored: regular expressions for names of further tensors that files of this model may hold.
    """

    shapes: Mapping[tuple[str, ...], tuple[int, ...]]
    family: Family
    ignored: tuple[str, ...] = ()

    def stored(self, found: Iterable[str]) -> dict[str, list[str]]:
        """Find the stored tensors of each parameter; all other tensors are left out.

        Args:
            found: the names of the tensors in the files.

        Returns:
            maps the first name of a parameter to the names of its stored tensors.
        """
        first = {name: same[0] for same in self.shapes for name in same}
        tensors: dict[str, list[str]] = {}
        for name in found:
            if (own := self._own_name(name, first)) is not None:
                tensors.setdefault(first[own], []).append(name)
        return tensors

    def _own_name(self, stored: str, known: Mapping[str, str]) -> str | None:
        """Return the model's name of a stored tensor; None if it has none.

        The prefix of the base model is removed or added if that gives a name of the model.

        Source: `rename_source_key` of the library's loader.
        """
        base = self.family.base
        for part, own in self.family.renamed.items():
            stored = stored.replace(part, own)
        bare = stored.removeprefix(f"{base}.")
        candidates = ([] if bare == stored else [bare]) + [f"{base}.{stored}", stored]
        return next((name for name in candidates if name in known), None)

    def require(
        self, folder: Path, found: Mapping[str, Entry], tensors: Mapping[str, list[str]]
    ) -> None:
        """Refuse files that do not belong to this model.

        The library would initialise missing parameters and ignore unknown tensors, so a classifier
        would become a language model without a trained head.

        Args:
            folder: folder of the files.
            found: the entries of the files, by name.
            tensors: see `stored`.

        Raises:
            ModelError: the files lack a parameter, hold a weight or a bias that the model does not
                have, or hold a parameter with another shape.
        """
        missing = [same[0] for same in self.shapes if same[0] not in tensors]
        known = {name for same in tensors.values() for name in same}
        others = [
            name
            for name, entry in found.items()
            if name not in known
            and _WEIGHT.search(name)
            and len(entry.shape) in (1, 2)
            and not any(re.search(pattern, name) for pattern in self.ignored)
        ]
        said = [
            *([f"lack {_listed(missing, len(self.shapes))}"] if missing else []),
            *([f"hold {_listed(others, len(found))}, which it does not have"] if others else []),
        ]
        if said:
            blocks = f".{self.family.blocks.rpartition('.')[2]}."
            head = all(name.startswith(f"{HEAD}.") for name in missing) and all(
                blocks not in f".{name}" for name in others
            )
            raise ModelError(
                f"{folder}: the weights are not those of a language model as config.json describes "
                f"it: they {'; and '.join(said)}",
                fix="use the checkpoint of the language model: one with another head, such as a "
                "reward model, a classifier or an embedding model, generates no text"
                if head
                else "use the config.json and the weights of one checkpoint, and all of its files",
            )
        shapes = {same[0]: shape for same, shape in self.shapes.items()}
        for name, same in tensors.items():
            if found[same[0]].shape != shapes[name]:
                raise ModelError(
                    f"{folder}: {same[0]} has shape {found[same[0]].shape}, config.json says "
                    f"{shapes[name]}",
                    fix="use the config.json and the weights of the same checkpoint",
                )


def _listed(names: list[str], count: int) -> str:
    """Say how many of all tensors the names are, and list the first of them."""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} of {count} tensors ({', '.join(names[:_SHOWN])}{more})"
