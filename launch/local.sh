#!/usr/bin/env bash
# Starts the demo's training on this machine under plain torchrun. A trainer that dies is replaced at
# once by its supervisor, a supervisor that dies by torchrun. What follows is handed to the training; --help lists what it takes.
#
#   launch/local.sh [training arguments]
#   NPROC=4 MAX_RESTARTS=3 launch/local.sh
#
# NPROC         workers to start (2)
# MAX_RESTARTS  times that torchrun may start them again before the run is given up (10)
set -euo pipefail

# The repository's own environment if it was made (make venv), else the python that is active.
python="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
[[ -x "$python" ]] || python=python3

# Each worker would otherwise start a thread for every core, and they'd fight over them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec "$python" -m torch.distributed.run --standalone \
    --nproc-per-node "${NPROC:-2}" --max-restarts "${MAX_RESTARTS:-10}" \
    -m dtrain.examples.gpt "$@"
