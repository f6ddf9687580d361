#!/usr/bin/env bash
# All tests, with all the set-up that a fresh machine needs:   bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup.sh
exec "$PYTHON" -m pytest -q tests "$@"
