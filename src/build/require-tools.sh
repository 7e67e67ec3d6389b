#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Names what the build lacks in one line, with the command that installs it, before anything is compiled.
#   require-tools.sh JAVA_HOME JAVA_VERSION NATIVE_SKIP REPORT
# REPORT is a file that holds the line afterwards, and does not exist where nothing is lacking: Maven stops at the file,
# because a failing exec would bury the line under a stack trace.
java_home=$1 java_version=${2#1.} native_skip=$3 report=$4
rm -f "$report"
missing= debian= fedora= arch=
lack() { # what, then its package on Debian, Fedora, Arch
  missing="$missing${missing:+, }$1" debian="$debian $2" fedora="$fedora $3" arch="$arch $4"
}
jdk="openjdk-17-jdk-headless java-17-openjdk-devel jdk17-openjdk"
has() { command -v "$1" >/dev/null 2>&1; }

if [ "$java_version" -lt 17 ]; then
  lack "JDK 17+ (Maven runs on $java_version from $java_home)" $jdk
elif ! [ -x "$java_home/bin/javac" ]; then
  lack "javac ($java_home is a runtime without the compiler)" $jdk
fi
if [ "$native_skip" != true ]; then
  cmake_version=$(cmake --version 2>/dev/null | sed -n 's/^cmake version \([0-9]*\.[0-9]*\).*/\1/p')
  case $cmake_version in
    '') lack "cmake 3.25+" cmake cmake cmake ;;
    [012].* | 3.[0-9] | 3.1[0-9] | 3.2[0-4]) lack "cmake 3.25+ (this is $cmake_version)" cmake cmake cmake ;;
  esac
  has g++ || lack "C++ compiler g++" g++ gcc-c++ gcc
  has make || lack make make make make
fi
[ -z "$missing" ] && exit 0

if has dnf; then
  install="sudo dnf install$fedora"
elif has pacman; then
  install="sudo pacman -S$arch"
else
  install="sudo apt-get install$debian"
fi
case $missing in
  *"(this is "*) install="$install, or a newer one through pip install cmake" ;;
esac
mkdir -p "$(dirname "$report")"
echo "octolora needs $missing: $install" | tee "$report" >&2
