"""Exports in processes of their own: forked from one that has imported everything and done nothing yet.

Threads do not outlive a fork, so the process of the tests is none to fork from.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext


def context() -> ForkServerContext:
    made = multiprocessing.get_context("forkserver")
    # There is one for all tests: the first who asks for it has it import these.
    made.set_forkserver_preload(["tutti.export.pipeline", "tutti.export.vision", "tutti.export.report", "transformers"])
    return made
