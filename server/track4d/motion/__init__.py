"""Stage Two: the motion of the mesh from a multi-view video."""
