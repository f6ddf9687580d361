#!/usr/bin/env bash
# All tests, with all the set-up that a fresh machine needs:   bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup.sh
# With pytest-xdist (tests/requirements.txt) two processes share the files of tests, the longest first; one thread each.
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  set -- -n 2 --dist loadfile --no-loadscope-reorder "$@"
fi
exec "$PYTHON" -m pytest -q tests/test_pipeline.py tests/test_presets.py tests "$@"
