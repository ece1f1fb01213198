"""Run scripts in forks of this process, which has imported the libraries: imports take most of a script's start.

Reads requests as lines of JSON and replies with the exit status of each. The package is imported in the fork.
"""

import importlib
import json
import os
import runpy
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # keeps messages of the libraries out of the replies

LIBRARIES = "datasets evaluate matplotlib.figure peft scipy.stats sklearn.metrics trl.trainer.sft_trainer wandb"
for library in LIBRARIES.split():
    importlib.import_module(library)


def fork_per_request():
    """Return the request, in the fork only."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    sys.exit()


request = fork_per_request()
for name, target in (("/dev/null", 0), (request["stdout"], 1), (request["stderr"], 2)):
    opened = os.open(name, os.O_RDWR)
    os.dup2(opened, target)
    os.close(opened)
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["environment"])
script, *_ = sys.argv = request["argv"]
sys.path[0] = os.path.dirname(script)
runpy.run_path(script, run_name="__main__")
