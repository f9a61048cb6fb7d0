#!/bin/sh
# As vllm-ascend's entry point: prepare the environment, then become the command.
set -eu
exec "$@"
