"""Where the bytes of a zip's members are, so that uncompressed ones can be mapped."""

import io
import struct
import zipfile


def data_offset(file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
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
