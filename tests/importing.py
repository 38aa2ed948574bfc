"""Disable garbage collection in the fork server of `tests.commands`, which imports this first.

Importing makes no garbage. `tests.preloaded`, which is imported last, enables collection again.
"""

import gc

gc.disable()
