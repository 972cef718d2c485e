"""Times kernels and the engine in process.

Several engines share a process here, each with its helpers. OpenMP counts those of idle ones too, and where they
outnumber the cores sends all to sleep between any two products, 4 to 6 ms a step on 2 cores. The server keeps one
engine's helpers and no others; here they are told to wait awake, before torch brings OpenMP: 1,000 turns where
they outnumber the cores, and where they do not as many as without that policy, which are not for ever.
"""

import os

from server.libraries import quiet_libraries

os.environ.setdefault("OMP_WAIT_POLICY", "active")
os.environ.setdefault("GOMP_SPINCOUNT", "300000")
quiet_libraries()  # here too they would speak of what does not matter, between a benchmark's lines
