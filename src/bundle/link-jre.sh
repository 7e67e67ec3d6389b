#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# A Java runtime with what the library, JUnit and the tests use, and nothing else. Uncompressed: the archive around it
# compresses better than jlink does class by class.
#   link-jre.sh JAVA_HOME OUTPUT
set -e
if ! [ -d "$1/jmods" ]; then
  echo "octolora needs the modules of a JDK in $1/jmods: sudo apt-get install openjdk-17-jdk-headless" >&2
  exit 1
fi
rm -rf "$2"
"$1/bin/jlink" --output "$2" --strip-debug --no-header-files --no-man-pages --compress=0 --add-modules \
  java.base,java.logging,java.management,jdk.management,jdk.unsupported
# jlink leaves the symbols of native code to the distribution's own scheme
command -v strip >/dev/null && find "$2" -name '*.so' -exec strip --strip-unneeded {} + || true
