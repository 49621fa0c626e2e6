"""The service: a broker that loses no job, and one worker process that does the work. It imports without torch."""

from .access import grant
from .broker import serve

__all__ = ["grant", "serve"]
