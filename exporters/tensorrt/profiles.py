"""The shapes that an engine takes, and those that it is tuned for.

TensorRT wants the smallest, the usual and the largest shape of every input (min, opt and max in its
terms). Prefill and decode each get a profile: prefill reads a whole prompt with an empty KV cache,
decode reads one token with all earlier tokens cached. A single profile for both would reserve
memory for the longest prompt on top of a full cache, which never occurs, and would be tuned for
neither.
"""

from collections.abc import Sequence

from thanos_deploy.bundle.engine_record import Profile, Span
from thanos_deploy.errors import UsageError

Shape = tuple[int, ...]


def shapes(profile: Profile, dims: Sequence[int | str]) -> tuple[Shape, Shape, Shape]:
    """Return the smallest, the usual and the largest shape of an input in a profile.

    Args:
        profile: the profile for prefill or decode.
        dims: dimensions of the input in the graph: each a number, or one of the names "batch",
            "sequence", "past" and "total".
    """
    batch, sequence, past = profile.batch, profile.sequence, profile.past

    def shape(batch: int, sequence: int, past: int) -> Shape:
        sizes = {
            "batch": batch,
            "sequence": sequence,
            "past": past,
            "total": min(sequence + past, profile.longest),
        }
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in dims)

    return (
        shape(batch.least, sequence.least, past.least),
        shape(batch.usual, sequence.usual, past.usual),
        shape(batch.most, sequence.most, past.most),
    )


def profiles(batch: Sequence[int], prompt: Sequence[int], longest: int) -> tuple[Profile, Profile]:
    """Return the profiles for prefill and decode.

    Args:
        batch: batch sizes: the first is the usual one, the maximum is the largest one.
        prompt: lengths of a prompt in tokens, likewise.
        longest: the most tokens of a sequence, prompt and answer together.

    Raises:
        UsageError: a number is not positive, or a prompt is longer than `longest`.
    """
    for option, values in (("--batch", batch), ("--seq", prompt)):
        if not values or min(values) < 1:
            raise UsageError(
                f"{option} {','.join(map(str, values))}: sizes have to be positive",
                fix="give the usual size and the largest, such as 1,8",
            )
    if max(prompt) > longest or longest < 2:
        raise UsageError(
            f"--seq {','.join(map(str, prompt))} with --max-seq {longest}: the longest sequence "
            f"has to have at least {max(2, *prompt)} tokens",
            fix="give a larger --max-seq, which counts prompt and answer together, or a "
            "shorter --seq",
        )
    sequences = Span(1, batch[0], max(batch))
    return (
        Profile("prefill", sequences, Span(1, prompt[0], max(prompt)), Span(0, 0, 0), longest),
        Profile(
            "decode",
            sequences,
            Span(1, 1, 1),
            Span(1, min(prompt[0], longest - 1), longest - 1),
            longest,
        ),
    )
