"""Training of the shipped generator on procedural objects."""
