# Sourced by train_all.sh and test.sh: leaves in $PYTHON a Python that has the packages of requirements.txt.
# The current environment if it has them already, else .venv in this folder, made on the first call.
has_packages() { "$1" -c 'import sys, torch, tiktoken, numpy, tqdm, matplotlib, pytest, safetensors; sys.exit(sys.version_info < (3, 10) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))' 2>/dev/null; }

PYTHON=${PYTHON:-python3}
if ! has_packages "$PYTHON"; then
  if [ -x .venv/bin/python ] && has_packages .venv/bin/python; then
    PYTHON=$PWD/.venv/bin/python
  else
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed; set PYTHON=/path/to/python" >&2; exit 2; }
    echo "installing requirements.txt into .venv (once)"
    "$PYTHON" -m venv .venv
    PYTHON=$PWD/.venv/bin/python
    "$PYTHON" -m pip install --quiet -r requirements.txt
  fi
fi
# Threads that wait for each other spin for some microseconds and then sleep. The default is to spin on, and then one other
# busy process on two cores costs a factor of three; to sleep at once costs a third on an idle machine (small operations).
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-30000}
