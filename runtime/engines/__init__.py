"""One backend per file, which has `open_engine(bundle, provider=...)` and imports its library."""
