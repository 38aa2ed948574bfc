"""What a tokenizer puts before a text, such as `<bos>`, and segments of a text that begin with it.

A model that was trained with a token in front of each text behaves differently without it. So
segments for calibration and evaluation begin as the tokenizer begins a text. What it puts behind a
text is left out: a segment is no whole text.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Texts to look at the frame around; a tokenizer may have no token for one of them.
_PROBES = ("a", "0", ".", " ", "\n")


@dataclass(frozen=True, slots=True)
class Frame:
    """The tokens in front of every text.

    Attributes:
        ids: empty for tokenizers that put nothing there.
        tokens: their spelling.
    """

    ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def before(self, contents: "Tensor") -> "Tensor":
        """Segments of contents, int64[count, tokens], each with the frame in front of it."""
        import torch  # not needed to read what is recorded of a frame

        frame = torch.tensor(self.ids, dtype=torch.int64).expand(len(contents), -1)
        return torch.cat([frame, contents], dim=1)

    @property
    def inputs(self) -> Json:
        """What a result depends on; nothing where there is no frame, as before there were any."""
        return {"frame": list(self.ids)} if self.ids else {}


NO_FRAME = Frame()


def frame_of(tokenizer: "PreTrainedTokenizerBase") -> Frame:
    """What a tokenizer puts before a text, seen by encoding one with and without special tokens.

    Raises:
        ModelError: it does not leave a text in one piece.
    """
    for probe in _PROBES:
        bare, framed = (
            list(tokenizer(probe, add_special_tokens=special)["input_ids"])
            for special in (False, True)
        )
        for start in range(len(framed) - len(bare) + 1 if bare else 0):
            if framed[start : start + len(bare)] == bare:
                ids = framed[:start]
                return Frame(tuple(ids), tuple(tokenizer.convert_ids_to_tokens(ids)))
    raise ModelError(
        f"{tokenizer.name_or_path}: the tokenizer changes a text when it adds special "
        "tokens, instead of adding them only before and after the text, so it is unknown "
        "which tokens a segment has to begin with",
        fix="use a model whose tokenizer.json adds special tokens only before and after a text",
    )
