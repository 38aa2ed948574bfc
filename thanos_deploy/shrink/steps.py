"""How many feed-forward channels may stay."""

import math

# Matrix sizes that tensor cores and sparse kernels take without padding.
FRIENDLY_MULTIPLE = 64


def channel_steps(channels: int, multiple: int | None) -> range:
    """Numbers of feed-forward channels that can stay, falling, from the most down.

    Args:
        channels: that there are.
        multiple: the number is a multiple of this; None for the largest power of two that divides
            the model's own number, at most `FRIENDLY_MULTIPLE`.
    """
    multiple = multiple or math.gcd(FRIENDLY_MULTIPLE, channels)
    return range((channels - 1) // multiple * multiple, 0, -multiple)
