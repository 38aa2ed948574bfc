"""The numbers of feed-forward channels to which a block may be cut."""

import math

# Matrix sizes that tensor cores and sparse kernels take without padding.
FRIENDLY_MULTIPLE = 64


def channel_steps(channels: int, multiple: int | None) -> range:
    """Return the numbers of channels that can stay, in falling order and below `channels`.

    Args:
        channels: number of channels before the cut.
        multiple: every number is a multiple of this; None for the largest power of two that divides
            `channels`, at most `FRIENDLY_MULTIPLE`.
    """
    multiple = multiple or math.gcd(FRIENDLY_MULTIPLE, channels)
    return range((channels - 1) // multiple * multiple, 0, -multiple)
