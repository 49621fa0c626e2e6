"""The service: a broker that never loses a job, and one worker process that does the work. Importing it is quick: no torch."""

from .access import grant
from .broker import serve

__all__ = ["grant", "serve"]
