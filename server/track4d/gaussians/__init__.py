"""Gaussians on a mesh's surface, and their pictures."""
