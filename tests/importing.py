"""Imported first by the server of `tests.commands`: importing makes no garbage to look for.

`tests.preloaded`, which comes last, has it looked for again.
"""

import gc

gc.disable()
