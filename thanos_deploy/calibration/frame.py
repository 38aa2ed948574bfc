"""The special tokens that a tokenizer puts before a text, such as `<bos>`.

A model that was trained with a token in front of each text behaves differently without it. So
segments for calibration and evaluation begin with the same tokens as a text does. Special tokens
behind a text are left out, because a segment is not a whole text.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Texts to encode with and without special tokens; a tokenizer may have no token for one of them.
_PROBES = ("a", "0", ".", " ", "\n")


@dataclass(frozen=True, slots=True)
class Frame:
    """The special tokens in front of every text.

    Attributes:
        ids: their token ids; empty for tokenizers that put nothing there.
        tokens: their spellings.
    """

    ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def before(self, contents: "Tensor") -> "Tensor":
        """Put the frame in front of each segment of int64[count, tokens]."""
        import torch  # imported here, so that records with a frame can be read without PyTorch

        frame = torch.tensor(self.ids, dtype=torch.int64).expand(len(contents), -1)
        return torch.cat([frame, contents], dim=1)

    @property
    def inputs(self) -> Json:
        """The frame's entry in the record of a result's inputs; empty without a frame.

        It is empty then because older records, from before there were frames, have no entry.
        """
        return {"frame": list(self.ids)} if self.ids else {}


NO_FRAME = Frame()


def frame_of(tokenizer: "PreTrainedTokenizerBase") -> Frame:
    """Find a tokenizer's frame by encoding a text with and without special tokens.

    Raises:
        ModelError: the tokens of the text are not contiguous among those with special tokens.
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
