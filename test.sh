#!/usr/bin/env bash
# Every test, from a machine with nothing but Python 3.11: makes .venv if no environment is active, installs, runs.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
fi
installed="$VIRTUAL_ENV/.installed-$(cat requirements.txt requirements-dev.txt | sha256sum | cut -c1-16)"
if [ ! -e "$installed" ]; then
    echo "test.sh: installing requirements.txt and requirements-dev.txt into $VIRTUAL_ENV"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
    touch "$installed"
fi
ruff check .
ruff format --check .
python -m pytest -q --durations=10 -n 2 --dist loadfile --no-loadscope-reorder "$@"  # two processes
