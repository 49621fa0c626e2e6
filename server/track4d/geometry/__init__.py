"""Meshes, cameras and their pictures."""
