#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# sanitize_cuda.sh [FOLDER]: the test programs of FOLDER (this script's own, if not given) on cuda:0 under each tool of
# compute-sanitizer, with small shapes. Exit status 0 if every run is clean. Calls that fail on purpose, such as an
# allocation of 2^60 bytes, are no findings. Racecheck gets one host thread: it looks for races within a kernel, and loses
# track of what several threads launch at once ("Internal Sanitizer Error: ... failure to track a kernel launch").
folder=${1:-$(dirname "$0")}
if ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer is not in PATH; it comes with the CUDA toolkit" >&2
  exit 2
fi
status=0
for tool in memcheck racecheck initcheck synccheck; do
  for test in oracle_test slots_test stream_test error_test; do
    echo "== $tool $test"
    threads=
    [ $tool = racecheck ] && threads=--one-thread
    timeout 240 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 99 \
      "$folder/$test" --device cuda:0 --quick $threads || status=1
  done
done
exit $status
