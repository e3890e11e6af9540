"""Runs scripts, and torchrun, in forked processes, each a real one that may be killed, without importing torch anew.

A line of JSON, {"script", "flags", "output", "max_bytes"}, starts one and is answered by its process id; the line
`wait` then is answered by its exit status. A process that has ended keeps its id until then.
"""

import importlib
import json
import os
import resource
import signal
import sys

from engine.script import run_script

SCRIPTS = ("transferLearning", "metaLearning", "associative_alignment")
TORCHRUN = "torch.distributed.run"


def run_child(command: dict) -> None:
    output = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # A shell starts its background jobs, of which the tests may be one, with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [command["script"] + ".py", *command["flags"]]
    if command["max_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["max_bytes"],) * 2)
    status = 1
    try:
        main = importlib.import_module(command["script"]).main
        main() if command["script"] == TORCHRUN else run_script(main)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


for name in (*SCRIPTS, TORCHRUN):
    importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run_child(json.loads(line))
    print(pid, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
