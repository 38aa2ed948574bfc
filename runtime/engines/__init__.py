"""One backend per file, which imports its library inside.

Each has `open_engine(bundle, provider=..., threads=...)`, `folder(bundle)`, the part of a bundle
that it reads, and the `COMMAND` that makes it. One with several ways to run takes `variant=`, one
of its `VARIANTS`. One that requests may join and leave between steps has
`open_slots(bundle, slots=..., provider=..., threads=...)` too.
"""
