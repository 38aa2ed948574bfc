"""One backend per file; each module has `open_engine(bundle)` and imports its library inside."""
