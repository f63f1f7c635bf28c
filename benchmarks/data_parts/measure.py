"""Runs a command, and prints what it took: wall seconds, CPU seconds of it and its children, memory of the largest."""

import json
import resource
import subprocess
import sys
import time

started = time.perf_counter()
run = subprocess.run(sys.argv[1:], stdout=sys.stderr, check=False)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(
    json.dumps(
        {
            "wall": round(time.perf_counter() - started, 2),
            "cpu": round(used.ru_utime + used.ru_stime, 2),
            "megabytes": round(used.ru_maxrss / 1024, 1),
        }
    )
)
sys.exit(run.returncode)
