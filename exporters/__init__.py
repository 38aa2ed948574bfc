"""Exporters: what writes a pruned model in the formats that other software runs.

`targets` has one file for each format; the other packages are what these files call. Stages, the
report and the command line ask `exporters.target` for them and know none by name.
"""
