"""For processes that tests start, through PYTHONPATH: no interpreter ends while gloo's threads still hold tensors.

A thread that gives up its tensor a moment too late aborts the process with "terminate called without an active
exception" (pytorch #179291; without dist_agc too, and after destroy_process_group() where a model keeps its group).
Asleep, this thread lets the others have the interpreter.
"""

import atexit
import time

atexit.register(time.sleep, 0.2)
