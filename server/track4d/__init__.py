"""Track4D's server side: Track4DGen's two stages, from a captured mesh and a sentence to the mesh's motion. No bpy."""

import os

# Several thread pools share the cores. On a loaded machine idle OpenMP threads must sleep, not spin: a forward pass of the
# generator took 1116 ms instead of 7 ms otherwise. Has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
