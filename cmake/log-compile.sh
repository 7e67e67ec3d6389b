#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Compiler launcher: runs the command line it is given and keeps what it prints beside the object file, as OBJECT.log. A
# compilation that succeeds says nothing but its warnings; ptxas' reports are for the log.
for argument; do
  if [ "$previous" = "-o" ]; then object=$argument; fi
  previous=$argument
done
"$@" >"${object:-compile}.log" 2>&1
status=$?
if [ $status -ne 0 ]; then
  cat "${object:-compile}.log"
else
  grep -i "warning" "${object:-compile}.log"
fi
exit $status
