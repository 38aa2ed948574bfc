"""Which text a model is calibrated on, and how much of it: values that need no PyTorch."""

from dataclasses import dataclass

from thanos_deploy.calibration.texts import BUILTIN
from thanos_deploy.option import Options, option


@dataclass(frozen=True, slots=True)
class Data(Options):
    """Calibration data.

    Attributes:
        calib: "builtin" or the path of a text.
        text_field: the field of a JSON Lines row that holds the text.
        nsamples, seqlen: segments, and tokens of each.
        seed: for choosing the segments.
    """

    calib: str = option(
        BUILTIN,
        "--calib",
        "Calibration text: a .txt or .md, or a .jsonl, each also with .gz; or builtin, the Python "
        "language reference.",
    )
    text_field: str = option("text", "--text-field", "Field of a JSON Lines row with the text.")
    nsamples: int = option(32, "--nsamples", "Number of calibration segments.")
    seqlen: int = option(512, "--seqlen", "Tokens in each segment.")
    seed: int = option(0, "--seed", "Seed for choosing the segments.")
