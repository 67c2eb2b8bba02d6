"""What lies under a text: bytes of a file or a pipe, unpacked where gzip packed them, as UTF-8.

A kilobyte of gzip can mean a gigabyte: what unpacks to more than text can is refused on the way.
"""

import codecs
import zlib
from collections.abc import Callable, Iterator
from encodings import normalize_encoding
from encodings.aliases import aliases
from itertools import chain

from unipelt_cli.data.parquet import UNPACKED_BYTES, UNPACKED_SHARE
from unipelt_cli.errors import ConfigError, DataError, nearest
from unipelt_cli.text import reason, short

PIECE = 2**18
GZIP = b"\x1f\x8b"
# The longer marks first: that of UTF-32 begins with one of UTF-16. UTF-8's own is seen later.
MARKS = {
    codecs.BOM_UTF32_LE: "utf_32_le",
    codecs.BOM_UTF32_BE: "utf_32_be",
    codecs.BOM_UTF16_LE: "utf_16_le",
    codecs.BOM_UTF16_BE: "utf_16_be",
}
_NO_TEXT = {"base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "rot_13", "uu_codec"}
_UNSAFE = {"zlib_codec", "mbcs", "utf_7"}  # a bomb, a machine's own, halves of surrogate pairs
_ENCODINGS = {*aliases.values(), "cp737", "cp874", "koi8_u", "utf_8_sig"} - _NO_TEXT - _UNSAFE
USUAL = ("utf-8", "utf-16", "windows-1252", "windows-1251", "latin-1", "gb18030", "shift-jis")


class NotInEncoding(ValueError):
    """The bytes are not text of the encoding that they are read in."""


def check_encoding(name: str) -> str:
    """Return an encoding's name in the library's own spelling; raise ConfigError for no such."""
    try:
        known = normalize_encoding(name).casefold()
        known = aliases.get(known, known)
    except (UnicodeError, ValueError):
        known = ""
    if known not in _ENCODINGS:
        raise ConfigError(f"data.encoding = {short(name)}: no such encoding", nearest(name, USUAL))
    return known


def as_utf8(origin: str, read: Callable[[], bytes], encoding: str | None = None) -> Iterator[bytes]:
    """Yield the pieces that `read` gives until an empty one, unpacked and in UTF-8.

    A byte-order mark says the encoding, then `encoding`, and without both it is UTF-8, which is
    handed on unchecked. Raises DataError for damaged gzip and for more than text packs to, and
    NotInEncoding, after what comes before, for bytes of another encoding than that.
    """
    known = None if encoding is None else check_encoding(encoding)
    return _recoded(_unpacked(origin, read), known)


def _begin(pieces: Iterator[bytes], marks: tuple[bytes, ...]) -> bytes:
    """Return the first bytes: as many as tell whether they are one of the marks, if there are."""
    first = next(pieces, b"")
    longest = max(map(len, marks))
    while first and len(first) < longest and any(mark.startswith(first) for mark in marks):
        more = next(pieces, b"")
        if not more:
            break
        first += more
    return first


def _unpacked(origin: str, read: Callable[[], bytes]) -> Iterator[bytes]:
    pieces = iter(read, b"")
    first = _begin(pieces, (GZIP,))
    if not first.startswith(GZIP):
        return chain([first] if first else [], pieces)
    return _gunzipped(origin, chain([first], pieces))


def _gunzipped(origin: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Unpack gzip's members, one after another, a piece at a time."""
    packed = unpacked = 0
    member = None
    for piece in pieces:
        packed += len(piece)
        while piece or member is not None:
            if member is None:
                piece = piece.lstrip(b"\0")  # what fills up the last block of a tape
                if not piece:
                    break
                member = zlib.decompressobj(31)
            try:
                text = member.decompress(piece, PIECE)
            except zlib.error as error:
                what = f"{origin}: damaged gzip ({reason(error)})"
                raise DataError(what, "pack it again, or give it unpacked") from error
            unpacked += len(text)
            if unpacked > UNPACKED_BYTES + UNPACKED_SHARE * packed:
                what = f"{origin}: it unpacks to {unpacked} bytes or more from {packed}"
                raise DataError(what, "unpack it with gzip -d if it is yours, and give that")
            if text:
                yield text
            piece = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
            elif not piece and len(text) < PIECE:
                break
    if member is not None:
        what = f"{origin}: damaged gzip (it ends before its end)"
        raise DataError(what, "fetch or pack it again")


def _recoded(pieces: Iterator[bytes], encoding: str | None) -> Iterator[bytes]:
    first = _begin(pieces, tuple(MARKS))
    mark = next((mark for mark in MARKS if first.startswith(mark)), b"")
    encoding = MARKS.get(mark, encoding)
    # Whatever else is said, three bytes of UTF-8's mark are no beginning of another text.
    if encoding in (None, "utf_8", "utf_8_sig") or first.startswith(codecs.BOM_UTF8):
        yield from chain([first] if first else [], pieces)
        return
    assert encoding is not None
    decoder, offset = codecs.getincrementaldecoder(encoding)(), len(mark)
    for piece in chain([first[len(mark) :]], pieces):
        state = decoder.getstate()
        try:
            text = decoder.decode(piece)
        except UnicodeDecodeError:
            decoder.setstate(state)
            yield from _usable(decoder, piece, encoding, offset)
            return
        offset += len(piece)
        if text:
            yield text.encode("utf-8")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise NotInEncoding(f"not {encoding.replace('_', '-')} (cut off at its end)") from error


def _usable(
    decoder: codecs.IncrementalDecoder, piece: bytes, encoding: str, offset: int
) -> Iterator[bytes]:
    """Yield what comes before the wrong byte, and raise NotInEncoding for it."""
    texts: list[str] = []
    for index in range(len(piece)):
        try:
            texts.append(decoder.decode(piece[index : index + 1]))
        except UnicodeDecodeError as error:
            yield "".join(texts).encode("utf-8")
            what = f"byte 0x{piece[index]:02x} at offset {offset + index}"
            raise NotInEncoding(f"not {encoding.replace('_', '-')} ({what})") from error
