#!/usr/bin/env bash
# The peers, each in an environment of its own under .peers/: TRL 1.12.0, the last release with a PPO
# trainer, and TRL 1.16.0 for its SFT and reward trainers. torch, transformers and datasets are the
# very builds of the environment that `python` belongs to, so that a ratio compares code and not
# library versions, and so that a machine without CUDA gets no package of CUDA.
set -euo pipefail
cd "$(dirname "$0")/../.."
for version in 1.12.0 1.16.0; do
    folder=".peers/trl-$version"
    [ -x "$folder/bin/python" ] || python -m venv "$folder"
    python -m pip list --format=freeze | grep -E '^(torch|transformers|datasets)==' > "$folder/pins.txt"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        "trl==$version" accelerate==1.15.0 --requirement "$folder/pins.txt"
    "$folder/bin/python" -m pip list --format=freeze | grep -E '^(trl|torch|transformers|datasets)=='
done
