"""Track4D's server side: Track4DGen's two stages, from a captured mesh and a sentence to the mesh's motion. No bpy."""

import os

# Two OpenMP runtimes share the cores (torch and Numba); on a loaded machine their idle threads must sleep, not spin:
# one forward pass took 1116 ms instead of 7 ms otherwise. Has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
