"""What a test does to a run's directory."""

import hashlib
import json
from pathlib import Path

from unipelt_cli.files import atomic, sealed
from unipelt_cli.runs.names import RECORDED, RESULT


def reseal(directory: Path) -> None:
    """Let a changed run's result vouch for its files again: what is behind the hashes is tried."""
    path = directory / RESULT
    result = json.loads(path.read_text())
    result["files"] = {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in RECORDED
        if (directory / name).is_file()
    }
    atomic.write_json(path, sealed.with_seal(result))
