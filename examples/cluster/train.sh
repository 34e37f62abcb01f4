#!/bin/sh
# The command that every file of this folder starts, on one host with 8 devices.
# RUN is a folder that outlives the host: a job that was stopped goes on from there.
set -eu
: "${RUN:=runs/chat}" "${MODEL:=meta-llama/Llama-3.1-8B}" "${DATA:=dialogues.jsonl}"
: "${MESH:=fsdp=8}"
resume=
if [ -d "$RUN/last" ]; then resume=--resume; fi
exec jaxlora train chat --model "$MODEL" --data "$DATA" --out "$RUN" --mesh "$MESH" \
  --batch-size 16 --dtype bfloat16 --quiet $resume
