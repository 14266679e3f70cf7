"""How a rank leaves: with its program's exit code, its words said, and nothing taken down in order."""

from __future__ import annotations

import subprocess
import sys

import pytest

LINE = "import sys; sys.path.insert(0, sys.argv[1]); from bench.launch.rank import run_and_leave; run_and_leave('program')"


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(75)", 75, ""),
        ("sys.exit()", 0, ""),
        ("pass", 0, ""),
        ("sys.exit('no device')", 1, "no device\n"),
        ("raise ValueError('a wrong turn')", 1, "ValueError: a wrong turn\n"),
    ],
)
def test_a_program_ends_with_its_own_code_and_its_last_words(tmp_path, end, code, said):
    (tmp_path / "program.py").write_text(f"import sys\nprint('last words', end='')\n{end}\n")
    done = subprocess.run([sys.executable, "-c", LINE, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "last words")
    assert done.stderr.endswith(said)


def test_the_interpreter_is_not_taken_down(tmp_path):
    (tmp_path / "program.py").write_text("import atexit\natexit.register(print, 'in order')\n")
    done = subprocess.run([sys.executable, "-c", LINE, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
