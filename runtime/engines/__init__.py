"""The backends, one per module; a module imports the library of its backend only when it needs it.

Every module has `open_engine(bundle, provider=..., threads=...)`; `folder(bundle)`, which returns
the name of the folder in a bundle that the backend reads; and `COMMAND`, the command that writes
this folder. A backend with several ways to run also takes `variant=`, one of its `VARIANTS`. A
backend with continuous batching has `open_slots(bundle, slots=..., provider=..., threads=...)`,
too.
"""
