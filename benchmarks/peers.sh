#!/usr/bin/env bash
# The peers that speed.py measures against, each in an environment of its own under .peers/: TRL 1.12.0, the last release
# with a PPO trainer, and TRL 1.16.0 for its SFT and reward trainers. torch and transformers are the ones that
# requirements.txt pins for the scripts, so that a ratio compares code and not library versions.
set -euo pipefail
cd "$(dirname "$0")/.."
for version in 1.12.0 1.16.0; do
    folder=".peers/trl-$version"
    [ -x "$folder/bin/python" ] || python3 -m venv "$folder"
    grep -E '^(torch|transformers|datasets)==' requirements.txt > "$folder/pins.txt"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "trl==$version" accelerate==1.15.0 -r "$folder/pins.txt"
    "$folder/bin/python" -c "import torch, transformers, trl; print('$folder:', 'trl', trl.__version__, 'transformers', \
transformers.__version__, 'torch', torch.__version__)"
done
