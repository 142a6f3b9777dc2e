#!/usr/bin/env bash
# Starts a training on one node of several, under torchrun; the same command on every node. Any node may die, the first
# one included, as long as the store is on none of them:
#
#   dtrain store                                                        on some machine that stays
#   STORE=thatmachine:29400 NODES=2:4 NPROC=8 launch/node.sh train.py [arguments]       on every node
#
# STORE   HOST:PORT of `dtrain store`
# NODES   how many nodes the training needs, and how many it takes (MIN:MAX); more than MAX wait as spares
# NPROC   processes on a node: one for each GPU (1)
# JOB     tells jobs apart that use the same store (dtrain). Once a training has come to its end, its name is used up for
#         as long as the store is there: torchrun has closed the rendezvous of that name
# ADDRESS of this node, where the others can't reach it by its hostname
set -euo pipefail

: "${STORE:?HOST:PORT of the store, see above}" "${NODES:?MIN:MAX, see above}"

# The repository's own environment if it was made (make venv), else the python that is active.
python="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
[[ -x "$python" ]] || python=python3

# torchrun waits for it for a minute without a word.
timeout 5 bash -c ": </dev/tcp/${STORE%:*}/${STORE##*:}" 2>/dev/null ||
    echo "node.sh: nobody answers at STORE=$STORE yet: start 'dtrain store' there; torchrun waits for a minute" >&2

# dtrain's processes meet at the same store as torchrun's agents. The one that torchrun would share with them lives in the
# agent of the first node, and a node that comes later never learns its address.
export DTRAIN_STORE="$STORE" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# An agent that wasn't heard of for 4 x 1 s is taken for dead; with 2 s, two groups have each believed to be the only one.
# Once there are MIN nodes, the others get another second to come (torchrun's default is 30).
rendezvous="is_host=0,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=4"

# dtrain itself counts failures (max_failures_per_hour, max_stalled); torchrun's limit must not come before.
exec "$python" -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "${NPROC:-1}" --max-restarts 1000 \
    --rdzv-backend c10d --rdzv-endpoint "$STORE" --rdzv-id "${JOB:-dtrain}" --rdzv-conf "$rendezvous" \
    ${ADDRESS:+--local-addr "$ADDRESS"} "$@"
