"""The claims of records of benchmarks: a cell is written whole or not at all, and is not run again."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FULL_DISK = """
import resource
import sys
from pathlib import Path

from records import cell

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
cell(Path(sys.argv[1]), lambda: {"accuracy": 0.5, "losses": [1.0] * 1000})
"""


def test_a_record_that_could_not_be_written_whole_is_not_there(tmp_path: Path) -> None:
    words = [sys.executable, "-c", FULL_DISK, tmp_path / "cell.json"]
    done = subprocess.run(words, cwd=BENCHMARKS, capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert not list(tmp_path.iterdir())
