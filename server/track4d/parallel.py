"""One lock for every parallel Numba kernel of the process."""

import threading

# Numba's 'workqueue' layer (the only one without an OpenMP or TBB runtime) aborts the process when two Python threads
# launch parallel kernels at once. Every call of a `parallel=True` kernel holds this lock.
KERNEL_LOCK = threading.RLock()
