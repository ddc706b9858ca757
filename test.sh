#!/usr/bin/env bash
# The tests, from a machine with nothing but Python 3.11: makes .venv if no environment is active,
# installs, runs.
#   bash test.sh --fast   formulas, the house and data: after every edit
#   bash test.sh          everything but what takes long: before every commit
#   bash test.sh --slow   all of it: model families, all planted bugs, kills
# What follows goes to pytest: bash test.sh --slow tests/test_layout.py -x
set -euo pipefail
cd "$(dirname "$0")"
chosen="not slow"
case "${1:-}" in
    --fast) chosen="fast and not slow"; shift ;;
    --slow) chosen=""; shift ;;
esac
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
# In two processes, each of which runs whole files, in their order.
python -m pytest -q -m "$chosen" --durations=10 -n 2 --dist loadfile --no-loadscope-reorder "$@"
