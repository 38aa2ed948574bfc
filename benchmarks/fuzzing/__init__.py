"""Fuzz the parsers of untrusted input, guided by coverage.

Usage: python -m benchmarks.fuzzing [--only NAME ...] [--minutes 30] [--processes 1] [-o FILE]

Needs Atheris (pip install 'thanos-deploy[fuzz]'). Each parser of `benchmarks.fuzzing.parsers` runs
in a process of its own. Atheris mutates well-formed inputs, guided by the lines of this project
that they reach. A finding is

- an exception other than those with which the parser refuses an input,
- a 5xx response of the server other than 503 and 504,
- an input that takes more than 30 seconds or 2 GB of memory, or ends the process.

Inputs that reached new lines are kept in out/fuzzing/NAME, and a later run continues from them.
Prints the number of inputs of each parser, the number of control-flow edges that they reached, and
the findings. Adds these to FILE (benchmarks/results/fuzzing.json) and to the table in
docs/reliability.md. The exit code is 1 if something was found. A later call continues until every
parser has had its minutes without a finding. Inputs that led to a finding are in
out/fuzzing/NAME.found; each becomes a test.
"""
