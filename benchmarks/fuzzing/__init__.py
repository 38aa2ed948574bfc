"""Fuzz the parsers of untrusted input, guided by coverage.

Usage: python -m benchmarks.fuzzing [--only NAME ...] [--minutes 30] [--processes 1] [-o FILE]

Needs Atheris (pip install 'thanos-deploy[fuzz]'). Every parser of `benchmarks.fuzzing.parsers` is
called with inputs that Atheris derives from well-formed ones, guided by the lines of this project
that they reach, each parser in a process of its own. A finding is

- an exception that is not one of those by which that parser refuses an input,
- an answer 5xx of the server other than 503 and 504,
- an input that takes longer than 30 seconds or 2 GB, or ends the process.

Inputs that reached new lines are kept in out/fuzzing/NAME, so that a later run continues from them.
Prints for each parser how many inputs were tried, how many edges of its control flow they reached
and what was found, adds that to FILE (benchmarks/results/fuzzing.json) and to the table in
docs/reliability.md, and ends with exit code 1 if something was found. A later call goes on until
every parser had its minutes without a finding. Found inputs are in out/fuzzing/NAME.found; each
becomes a test.
"""
