"""Track4D's server side: Track4DGen's two stages, from a captured mesh and a sentence to the mesh's motion. No bpy."""

import os

# Several thread pools share the cores (torch, Numba, OpenBLAS). On a loaded machine their idle threads must sleep, not spin,
# and the small systems of the registration must stay on one core: a forward pass took 1116 ms instead of 7 ms otherwise, and
# the fit of a fox 52 s of CPU time instead of 8 s. Both have to be set before numpy and torch are imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
