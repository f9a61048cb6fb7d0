"""The size of an image from its header, and whether the file is what it says, without decoding a pixel."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

#: Parts of a file that are looked at: PNG chunks or JPEG segments.  A 16 MB file of 8 KB chunks, libpng's, has 2,000.
PARTS = 4096
#: Scans of a progressive JPEG.  Each is a pass over all pixels, however few bytes it has; usual files have about 10.
SCANS = 64
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
#: Colour type to bit depths (PNG specification, 11.2.2).
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PNG_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
PNG_ANIMATED = {b"acTL", b"fcTL", b"fdAT"}
JPEG_MAGIC = b"\xff\xd8\xff"
SOS, EOI, DNL = 0xDA, 0xD9, 0xDC
#: Baseline, extended and progressive Huffman: what libjpeg decodes with 8 bits a sample (ITU-T T.81, table B.1).
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}
JPEG_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}


class ImageError(Exception):
    """A file that is not the image it says; both texts are for the sender."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}; found {found}")
        self.expected = expected
        self.found = found


def size(kind: str, data: bytes) -> tuple[int, int]:
    """Width and height in pixels of a ``PNG`` or ``JPEG``.  Raises ``ImageError``."""
    magic, read = {"PNG": (PNG_MAGIC, png_size), "JPEG": (JPEG_MAGIC, jpeg_size)}[kind]
    if not data.startswith(magic):
        raise ImageError(f"a {kind} file, as its data URL says", f"a file that begins with 0x{data[:8].hex()}")
    width, height = read(data)
    if not width or not height:
        raise ImageError("a size in pixels", f"{width} by {height}")
    return width, height


def png_size(data: bytes) -> tuple[int, int]:
    """One header, then pixels, then the end of the file: every chunk is walked (PNG specification, 5.3 and 11.2)."""
    width, height, pixels, kind = 0, 0, 0, b""
    for number, (kind, start, length) in enumerate(_png_chunks(data)):
        if (kind == b"IHDR") != (number == 0):
            raise ImageError("one IHDR, the first chunk of a PNG", f"{_name(kind)} as chunk {number + 1}")
        if kind == b"IHDR":
            width, height = _png_header(data, start, length)
        elif kind == b"IDAT":
            pixels += length
        elif kind in PNG_ANIMATED:
            raise ImageError("a PNG of one picture", f"an animated one ({_name(kind)})")
        elif kind not in PNG_CRITICAL and not kind[0] & 0x20:
            raise ImageError("chunks of the PNG specification", f"the critical chunk {_name(kind)}")
    if kind != b"IEND" or not pixels:
        raise ImageError("a PNG with pixels (IDAT) and an end (IEND)", f"{pixels} bytes of pixels, {_name(kind)} last")
    return width, height


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and length of the data of each chunk; ends with IEND, which must end the file."""
    at = len(PNG_MAGIC)
    for _ in range(PARTS):
        if at + 12 > len(data):
            raise ImageError("a complete PNG", f"a file that ends after {len(data)} bytes, before IEND")
        length, kind = struct.unpack_from(">I4s", data, at)
        start, at = at + 8, at + 12 + length
        if at > len(data):
            raise ImageError("chunks inside the file", f"{_name(kind)} of {length} bytes with {len(data) - start} left")
        yield kind, start, length
        if kind == b"IEND":
            if length or at != len(data):
                raise ImageError("nothing in and after IEND", f"{length} and {len(data) - at} bytes")
            return
    raise ImageError(f"at most {PARTS} chunks", "more")


def _png_header(data: bytes, start: int, length: int) -> tuple[int, int]:
    if length != 13:
        raise ImageError("an IHDR of 13 bytes", f"{length}")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(">IIBBBBB", data, start)
    if depth not in PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        found = f"depth {depth}, colour type {colour}, methods {compression}, {filtering}, {interlace}"
        raise ImageError("an IHDR of the PNG specification", found)
    if zlib.crc32(data[start - 4 : start + 13]) != struct.unpack_from(">I", data, start + 13)[0]:
        raise ImageError("an IHDR that its checksum confirms", "another checksum")
    return int(width), int(height)


def _name(kind: bytes) -> str:
    return kind.decode("ascii", "replace") if kind.isalpha() else f"0x{kind.hex()}"


def jpeg_size(data: bytes) -> tuple[int, int]:
    """One frame header, then a scan, and an end: segments are walked up to the first scan (ITU-T T.81, B.1 and B.2).

    What follows the first scan no longer changes the size that Pillow takes memory for.
    """
    frame: tuple[int, int, int] | None = None
    for marker, start, length in _jpeg_segments(data):
        if marker in JPEG_OTHER_FRAMES:
            raise ImageError("a baseline, extended or progressive JPEG", f"frame type 0x{marker:02x}")
        if marker in JPEG_FRAMES:
            if frame:
                raise ImageError("one frame header in a JPEG", "two")
            frame = (marker, *_jpeg_frame(data, start, length))
        if marker == SOS:
            if not frame:
                raise ImageError("a frame header before the first scan", "none")
            if data.rfind(b"\xff\xd9", start) < 0:
                raise ImageError("a complete JPEG", "a file without an end marker")
            if frame[0] == 0xC2 and (scans := data.count(b"\xff\xda", start)) > SCANS:
                raise ImageError(f"at most {SCANS} scans", f"{scans + 1}")
            return frame[1], frame[2]
    raise ImageError(f"a scan among the first {PARTS} segments", "none")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and length of the data of each segment, the first scan's header being the last."""
    at = 2
    for _ in range(PARTS):
        if data[at : at + 1] != b"\xff":
            raise ImageError("a JPEG marker", f"0x{data[at : at + 1].hex()} at byte {at}")
        while data[at + 1 : at + 2] == b"\xff":  # fill bytes
            at += 1
        if at + 4 > len(data):
            raise ImageError("a complete JPEG", f"a file that ends after {len(data)} bytes, before its first scan")
        marker, length = struct.unpack_from(">xBH", data, at)
        if marker in (0x00, 0x01, EOI, DNL) or 0xD0 <= marker <= 0xD8:
            raise ImageError("a segment before the first scan", f"marker 0x{marker:02x}")
        start, at = at + 4, at + 2 + length
        if length < 2 or at > len(data):
            raise ImageError("segments inside the file", f"{length} bytes with {len(data) - start + 2} left")
        yield marker, start, length - 2
        if marker == SOS:
            return


def _jpeg_frame(data: bytes, start: int, length: int) -> tuple[int, int]:
    if length < 6:
        raise ImageError("a frame header of 6 bytes and more", f"{length}")
    depth, height, width, components = struct.unpack_from(">BHHB", data, start)
    if depth != 8 or components not in (1, 3, 4) or length != 6 + 3 * components:
        raise ImageError("8 bits and 1, 3 or 4 components", f"{depth} bits, {components} components, {length} bytes")
    return int(width), int(height)
