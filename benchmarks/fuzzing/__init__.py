"""Coverage-guided fuzzing of what reads other people's bytes.

Usage: python -m benchmarks.fuzzing [--only NAME ...] [--minutes 30] [-o FILE]

Needs Atheris (pip install 'thanos-deploy[fuzz]'). Every parser of `benchmarks.fuzzing.parsers` is
called with inputs that Atheris makes of well-formed ones, led by which lines of this project they
reach, each parser in a process of its own. A finding is

- an exception that is not one of those by which that parser refuses an input,
- an answer 5xx of the server other than 503 and 504,
- an input that takes longer than 30 seconds or 2 GB, or ends the process.

Inputs that reached something new are kept in out/fuzzing/NAME, so that a later run goes on from
there. Prints for each parser how many inputs were tried, how many edges of its control flow they
reached and what was found, adds that to FILE (benchmarks/results/fuzzing.json) and to the table in
docs/reliability.md, and ends with exit code 1 if something was found. Found inputs are in
out/fuzzing/NAME.found; each becomes a test.
"""
