"""Test the project's promises with faults and attacks: no data is lost, and no attack succeeds.

__main__       the command: chooses parts, shares the time, continues earlier results
part           interface and results of a part
record         the results as JSON, and as a table in docs/reliability.md
works          the commands under test
undisturbed    what these commands write when they are not disturbed
kills          the part "kills": `kill -9` at random moments, then the same command
power_cuts     the part "power-cuts": unflushed data is lost or torn, then the same command
disk_log       a log of what a process does to a folder, and what a power cut leaves of the folder
disk_full      the part "disk-full": a full disk at every write
memory         the part "memory": limits from enough to far too little
two_processes  the part "two-processes": two commands, or two machines, and one folder
mutations      the part "mutations": damaged files of every kind
victims        the files that are damaged, and the code that reads them
damage         the kinds of damage
traps          detection of accesses to files that must not be touched
server         the part "server": attacks on `thanos-deploy serve` while others use it
attacks        the attacks, one function each
soaked         the part "soak": mixed traffic while replicas are ended and started
"""
