#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Compiler launcher: runs the command line it is given and keeps what it prints beside the object file, as OBJECT.log.
for argument; do
  if [ "$previous" = "-o" ]; then object=$argument; fi
  previous=$argument
done
"$@" >"${object:-compile}.log" 2>&1
status=$?
cat "${object:-compile}.log"
exit $status
