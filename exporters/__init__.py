"""Exporters: write a pruned model in the formats that other software runs.

`targets` has one file for each format; the other packages do the work for these files. Stages, the
report and the command line go through the contract in `exporters.target` and know no format by
name.
"""
