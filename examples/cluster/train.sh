#!/bin/sh
# The command that every file of this folder starts, once on each of HOSTS hosts of DEVICES devices.
# RUN is a folder that all hosts see and that outlives them: a job that was stopped goes on from
# there, on another mesh as well (keep BATCH then).
set -eu
: "${RUN:=runs/chat}" "${MODEL:=meta-llama/Llama-3.1-8B}" "${DATA:=dialogues.jsonl}"
: "${HOSTS:=1}" "${DEVICES:=8}"
: "${MESH:=data=$HOSTS,fsdp=$DEVICES}" "${BATCH:=$((2 * HOSTS * DEVICES))}"
resume= distributed=
if [ -f "$RUN/config.yaml" ]; then resume=--resume; fi
if [ "$HOSTS" -gt 1 ]; then distributed=--distributed; fi
exec jaxlora train chat --model "$MODEL" --data "$DATA" --out "$RUN" --mesh "$MESH" \
  --batch-size "$BATCH" --dtype bfloat16 --param-dtype bfloat16 --remat all --scan-layers \
  --quiet $distributed $resume
