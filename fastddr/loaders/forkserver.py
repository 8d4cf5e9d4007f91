"""Imported by the process that the `torchvision` loader's workers are forked from, and by no other.

A signal that is meant for the trainer may come to all its processes: a terminal and a launcher of several ranks send it
to the whole group. Were the workers to end by it, or the process that the trainer asks whether they live, the batches
on their way would be missing, and the run could not save. The trainer's end ends them all.
"""

import signal

for number in (signal.SIGTERM, signal.SIGHUP):  # SIGINT is ignored by multiprocessing itself
    signal.signal(number, signal.SIG_IGN)
