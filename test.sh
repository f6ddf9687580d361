#!/usr/bin/env bash
# The tests, with the set-up that a fresh machine needs:   bash test.sh [core] [pytest arguments]
#   bash test.sh core     tests/core: the mathematics, one tiny run of each stage, exact resume, the rules of the house
#   bash test.sh          tests/extras, too: minutes (with tests/requirements.txt installed fewer tests are skipped)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# The longest files first, so that two processes end at the same time.
files="tests/extras/test_pipeline.py tests/extras/test_presets.py tests/core/test_resume.py tests/core tests/extras"
if [ "${1:-}" = core ]; then
  files="tests/core/test_resume.py tests/core"
  shift
fi

# A Python with the packages, as in train_all.sh: $PYTHON or python3 if it has them, else .venv, made on the first call.
has_packages() { "$1" -c 'from importlib.util import find_spec as has
assert all(map(has, "torch tiktoken numpy tqdm matplotlib safetensors pytest".split()))' 2>/dev/null; }
PYTHON=${PYTHON:-python3}
has_packages "$PYTHON" || {
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  PYTHON=$PWD/.venv/bin/python
  has_packages "$PYTHON" || {
    echo "installing requirements.txt into .venv (once)"
    "$PYTHON" -m pip install --quiet -r requirements.txt
  }
}
# For models this small threads only wait for each other. With pytest-xdist two processes share the files instead.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  set -- -n 2 --dist loadfile --no-loadscope-reorder "$@"
fi
exec "$PYTHON" -m pytest -q $files "$@"
