"""A zip's members: that they fit into the file, and where their bytes are to be mapped."""

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

# Trained numbers hardly compress, a start at zero does. A file that grows more than this when it
# is read was made to fill the memory.
LARGEST_RATIO = 64


def check_members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The members of an archive, which may overlap or expand to any size.

    Raises:
        ValueError: they are larger than such a file can be.
    """
    members, file_bytes = archive.infolist(), path.stat().st_size
    content_bytes = sum(member.file_size for member in members)
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if content_bytes > (1 if stored else LARGEST_RATIO) * file_bytes:
        raise ValueError(f"{content_bytes} bytes in a file of {file_bytes}")
    return members


def data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """The offset of a member's content, after a local header whose length only it states.

    Raises:
        zipfile.BadZipFile: the header is cut off.
    """
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30:
        raise zipfile.BadZipFile("a member's header is cut off")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + 30 + name_bytes + extra_bytes)
