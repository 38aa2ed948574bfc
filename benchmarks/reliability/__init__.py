"""A campaign against what the project promises: nothing lost, and nothing let in.

__main__    the command: which parts, how long, and what is done already
part        what a part is, and what it finds
record      the results as JSON, and as a table in docs/reliability.md
works       the commands that the parts "kills" and "disk-full" disturb
undisturbed what these make when they are left alone
kills       the part "kills": `kill -9` at random moments, then the same command
disk_full   the part "disk-full": a full disk at every write
server      the part "server": attacks on `thanos-deploy serve` while others use it
attacks     those attacks, one function each
"""
