"""Which text a model is calibrated on, and how much of it: values that need no PyTorch."""

from dataclasses import dataclass
from typing import Literal

from thanos_deploy.calibration.texts import BUILTIN
from thanos_deploy.option import Options, option


@dataclass(frozen=True, slots=True)
class Data(Options):
    """Calibration data.

    Attributes:
        calib: the text: "builtin", or a file, data set or mixture as `mixture` describes.
        text_field: the field of a row that holds the text.
        calib_rows: number of rows to take from each data set, chosen by the seed; None for all.
        calib_cut: "packed" cuts segments from all rows joined; "row" takes each segment from the
            beginning of a row that is long enough.
        nsamples: number of segments.
        seqlen: number of tokens in each segment.
        seed: seed for choosing rows and segments.
    """

    calib: str = option(
        BUILTIN,
        "--calib",
        "Calibration text: a .txt or .md file, or rows in a .jsonl, .json or .parquet "
        "file (also compressed as .gz, except .parquet); wikitext, c4, ultrachat or "
        "hub:NAME[:CONFIG][:SPLIT] for a data set of the hub; several with weights, as in "
        "'3*chat.jsonl + c4'; or builtin, the Python language reference.",
    )
    text_field: str = option(
        "text",
        "--text-field",
        "Field of a row that holds the text. Rows without this field may have the fields "
        "messages, conversations, or prompt and completion instead; a conversation "
        "becomes text through the model's chat template.",
    )
    calib_rows: int | None = option(
        None,
        "--calib-rows",
        "Number of rows to take from each data set, chosen at random by --seed.  [default: all]",
        least=1,
    )
    calib_cut: Literal["packed", "row"] = option(
        "packed",
        "--calib-cut",
        "packed: rows are joined and cut into segments. row: each segment is the beginning of one "
        "row; rows that are too short are left out.",
    )
    nsamples: int = option(32, "--nsamples", "Number of calibration segments.")
    seqlen: int = option(512, "--seqlen", "Tokens in each segment.")
    seed: int = option(0, "--seed", "Seed for choosing the segments.")
