"""What both sides of Track4D share: messages, their encoding, keys, errors and the geometry of the capture. No bpy, no torch."""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
