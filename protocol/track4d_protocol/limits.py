"""Every limit of the service in one place: what is larger is refused with a code, never tried."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Limits:
    """What one message, one request and one server may hold.

    Attributes:
        header_bytes: of one message's header.
        frame_bytes: of one array; the transport drops a peer that sends more.
        message_bytes: of all arrays of one message.
        arrays: in one message or file.
        dimensions: of one array.
        vertices: of one request.
        faces: triangles of one request.
        frames: of one request or result.
        views: cameras of one request.
        pixels: width and height of one picture.
        prompt: characters.
        objects: names in one request.
        queued: jobs that wait at one time.
        chunk_bytes: of a result that travel in one message.
        free_disk_bytes: that stay free on the server's disk.
    """

    header_bytes: int = 1 << 20
    frame_bytes: int = 512 << 20
    message_bytes: int = 512 << 20
    arrays: int = 512
    dimensions: int = 6
    vertices: int = 1_000_000
    faces: int = 2_000_000
    frames: int = 600
    views: int = 16
    pixels: int = 2048
    prompt: int = 2000
    objects: int = 256
    queued: int = 64
    chunk_bytes: int = 4 << 20
    free_disk_bytes: int = 256 << 20

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


LIMITS = Limits()
FILE_LIMITS = replace(LIMITS, frame_bytes=4 << 30, message_bytes=8 << 30)  # a result on disk; it travels in chunks
