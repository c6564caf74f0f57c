"""Reading back the pictures that the package draws."""

from pathlib import Path


def png_size(path):
    """Width and height of a PNG file that is whole."""
    content = Path(path).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
