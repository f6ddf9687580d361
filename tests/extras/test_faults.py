"""The short form of faults.py: real processes that really die."""
import subprocess
import sys
from pathlib import Path


def test_killed_at_any_moment_a_run_resumes(tmp_path):
    """A file that is half written, a state that lags behind the log or the model, a signal that loses work."""
    result = subprocess.run([sys.executable, Path(__file__).with_name("faults.py")], capture_output=True, text=True)
    assert result.returncode == 0 and "every resumed run equals the unbroken one" in result.stdout, (
        result.stdout + result.stderr[-2000:])
