"""For processes that tests start, through PYTHONPATH."""

import atexit
import importlib.abc
import importlib.machinery
import sys
import time

# No interpreter ends while gloo's threads still hold tensors. A thread that gives up its tensor a moment too late ends
# the process with "terminate called without an active exception" (pytorch #179291; without dist_agc too, and after
# destroy_process_group() where a model keeps its group). Asleep, this thread lets the others have the interpreter.
atexit.register(time.sleep, 0.2)


class Untraced(importlib.abc.MetaPathFinder):
    """Coverage looks away while others' packages are imported: its tracer makes that half as slow again."""

    def find_spec(self, fullname, path=None, target=None):  # noqa: ANN001, ANN201
        if sys.gettrace() is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None or "site-packages" not in (spec.origin or ""):
            return None
        run = spec.loader.exec_module

        def exec_module(module):  # noqa: ANN001, ANN202
            trace = sys.gettrace()
            sys.settrace(None)
            try:
                run(module)
            finally:
                sys.settrace(trace)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Untraced())
