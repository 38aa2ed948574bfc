"""A campaign against what the project promises: nothing lost, and nothing let in.

__main__       the command: which parts, how long, and what is done already
part           what a part is, and what it finds
record         the results as JSON, and as a table in docs/reliability.md
works          the commands that are disturbed
undisturbed    what these make when they are left alone
kills          the part "kills": `kill -9` at random moments, then the same command
power_cuts     the part "power-cuts": what was not flushed is lost or torn, then the same command
disk_log       what a process did to a folder, and what a power cut leaves of it
disk_full      the part "disk-full": a full disk at every write
memory         the part "memory": limits from enough to far too little
two_processes  the part "two-processes": two commands, or two machines, and one folder
mutations      the part "mutations": damaged files of every kind
victims        those files, and what reads them
damage         what is done to them
traps          what a process touches that it is not to touch
server         the part "server": attacks on `thanos-deploy serve` while others use it
attacks        those attacks, one function each
soaked         the part "soak": everything at once, and replicas that come and go
"""
