"""Read Parquet files and Arrow streams of strangers without unpacking more than they can mean.

A kilobyte of Parquet can declare a thousand million rows, or a page that unpacks to gigabytes; the
library believes both. Here the pages' own headers are added up before a page is unpacked, columns
are read one by one and in pieces, and whatever is not text or a number is not read at all.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unipelt_cli.files.strict import parse_json

# Text packs to a fifth, where it repeats itself to a thirtieth; a row of it takes a byte at least.
UNPACKED_BYTES = 16 * 2**20
UNPACKED_SHARE = 100
FEW_ROWS = 100_000
MOST_COLUMNS = 100_000
MOST_BATCH_ROWS = 2**16
DELTA_BYTE_ARRAY = 7
# What anything in a reader's or a parser's hands can raise over bytes it does not understand.
ERRORS = (
    *(OSError, ValueError, ArithmeticError, MemoryError, LookupError, struct.error),
    pa.ArrowException,
)


class ParquetColumns(Mapping[str, pa.ChunkedArray]):
    """The columns of a Parquet file, each read when it is asked for.

    Making one and asking it raise one of `ERRORS` for a file that is damaged, unpacks to more than
    its size can mean, or holds something else than texts and numbers where those are asked for.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._file = pq.ParquetFile(
            pa.BufferReader(content),
            thrift_string_size_limit=max(1, len(content)),
            thrift_container_size_limit=max(1, min(len(content), MOST_COLUMNS)),
        )
        self.names: list[str] = self._file.schema_arrow.names
        self.rows: int = self._file.metadata.num_rows
        self._read: dict[str, pa.ChunkedArray] = {}
        if self.rows > FEW_ROWS + len(content):
            raise ValueError(f"it declares {self.rows} rows in {len(content)} bytes")

    @cached_property
    def class_names(self) -> dict[str, list[str]]:
        """What the numbers of a column are called, where `datasets` wrote it into the file."""
        written = (self._file.schema_arrow.metadata or {}).get(b"huggingface")
        try:
            features = parse_json(written or b"{}")["info"]["features"]
            named = {name: _names_of(feature) for name, feature in features.items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            return {}
        return {name: names for name, names in named.items() if names and name in self.names}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        if name not in self._read:
            self._read[name] = self._column(name)
        return self._read[name]

    def _column(self, name: str) -> pa.ChunkedArray:
        pieces = [piece for batch in self.batches([name]) for piece in batch[name].chunks]
        kind = self._file.schema_arrow.field(name).type
        return pa.chunked_array(pieces, None if pieces else kind)

    def batches(
        self, names: Sequence[str], most: int = MOST_BATCH_ROWS
    ) -> Iterator[dict[str, pa.ChunkedArray]]:
        """Yield some columns, at most so many rows of them at a time."""
        largest = UNPACKED_BYTES + UNPACKED_SHARE * len(self._content)
        for name in names:
            check_type(self._file.schema_arrow.field(name).type)
            longest = max(1, self._longest(name, largest))
            most = min(most, max(1, largest // (len(names) * longest)))
        rows, unpacked = 0, dict.fromkeys(names, 0)
        for batch in self._file.iter_batches(most, columns=[*names], use_threads=False):
            columns = {}
            for name in names:
                piece = batch.column(batch.schema.names.index(name))
                piece.validate(full=True)
                plain = _plain(piece)
                unpacked[name] += plain.nbytes
                if unpacked[name] > largest:
                    raise ValueError(_bomb(unpacked[name], len(self._content)))
                columns[name] = pa.chunked_array([plain])
            rows += len(batch)
            yield columns
        if rows != self.rows:
            raise ValueError(f"it holds {rows} of {self.rows} rows")

    def _longest(self, name: str, largest: int) -> int:
        """Return how long one text can be at most; raise ValueError for pages above `largest`."""
        total, longest = 0, 1
        for page in self._pages(name):
            total += page.unpacked
            longest = max(longest, total if page.is_delta else page.unpacked)
            if total > largest:
                raise ValueError(_bomb(total, len(self._content)))
        return longest

    def _pages(self, name: str) -> Iterator["Page"]:
        """Yield the pages of a column and of those below its name, which are read with it."""
        metadata = self._file.metadata
        paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        places = [i for i, path in enumerate(paths) if f"{path}.".startswith(f"{name}.")]
        for group in range(metadata.num_row_groups):
            for index in places:
                chunk = metadata.row_group(group).column(index)
                first, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
                start = min(first, dictionary) if dictionary else first
                stop = start + chunk.total_compressed_size
                if not 0 <= start <= stop <= len(self._content):
                    raise ValueError("a column is outside of the file")
                yield from _walk(self._content, start, stop, chunk.num_values)


def check_type(kind: pa.DataType) -> None:
    """Raise ValueError for a column that holds neither texts nor numbers, whatever is in it."""
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):  # a label may be a list of one
        inner = kind.value_type
        if pa.types.is_string_view(inner) or pa.types.is_binary_view(inner):
            inner = kind
    readable = (
        *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
        *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null),
        pa.types.is_decimal,
    )
    if not any(check(inner) for check in readable):
        raise ValueError(f"it holds {str(kind)[:60]}, not texts or numbers")


def _names_of(feature: Any) -> list[str]:
    """Return the names of a ClassLabel, or of a list of them; [] for any other feature."""
    inner = feature.get("feature", feature)
    names = inner["names"] if inner.get("_type") == "ClassLabel" else []
    return names if all(isinstance(name, str) for name in names) else []


def _plain(piece: pa.Array) -> pa.Array:
    """Write out what is stored once and pointed at, so that its size is that of its rows."""
    if pa.types.is_dictionary(piece.type):
        piece = piece.dictionary_decode()
    if pa.types.is_string_view(piece.type):
        return piece.cast(pa.large_string())
    if pa.types.is_binary_view(piece.type):
        return piece.cast(pa.large_binary())
    return piece


def _bomb(unpacked: int, size: int) -> str:
    return f"it unpacks to {unpacked} bytes or more from a file of {size}"


@dataclass(frozen=True)
class Page:
    """What a page of a Parquet column says of itself before it is unpacked."""

    packed: int
    unpacked: int
    values: int
    is_delta: bool


def _walk(content: bytes, start: int, stop: int, values: int) -> Iterator[Page]:
    """Yield a column chunk's pages as the library would meet them: until all values are there."""
    position = start
    while values > 0:
        if position >= stop:
            raise ValueError("a column ends before its values")
        header, position = _thrift(content, position, stop)
        # Version 1 keeps a data page's number of values and encoding in field 5, version 2 in 8.
        data = header.get(5, header.get(8))
        data = data if isinstance(data, dict) else {}
        encoding = data.get(2 if 5 in header else 4)
        packed, unpacked, count = header.get(3, -1), header.get(2, -1), data.get(1, 0)
        if not all(isinstance(size, int) and size >= 0 for size in (packed, unpacked, count)):
            raise ValueError("a page's header is damaged")
        page = Page(packed, unpacked, count, encoding == DELTA_BYTE_ARRAY)
        yield page
        position += page.packed
        values -= page.values


def _thrift(content: bytes, start: int, stop: int) -> tuple[dict[int, Any], int]:
    """Read one struct of Thrift's compact protocol, in which the pages' headers are written."""
    reader = _Thrift(content, start, stop)
    return reader.struct(), reader.position


class _Thrift:
    """Thrift's compact protocol, as far as page headers use it; ValueError for anything else."""

    def __init__(self, content: bytes, start: int, stop: int) -> None:
        self.content, self.position, self.stop = content, start, stop

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > 8:
            raise ValueError("a page's header is damaged")
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._integer()
            fields[number] = self._value(kind & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._varint())
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError("a page's header is damaged")

    def _skip(self, count: int) -> None:
        self.position += count

    def _byte(self) -> int:
        if self.position >= self.stop:
            raise ValueError("a page's header is cut off")
        self.position += 1
        return self.content[self.position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a page's header is damaged")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
