# SPDX-License-Identifier: Apache-2.0
#
# cmake -D LOGS=<folder> -P CheckResourceUsage.cmake
#
# Reads what ptxas -v said about every kernel (the *.log files that log-compile.sh leaves below LOGS) and fails if one
# spills registers or needs a stack frame: either is a trip to memory in the middle of a main loop.

cmake_minimum_required(VERSION 3.25)
file(GLOB_RECURSE logs ${LOGS}/*.cu.o.log)
set(kernels 0)
set(bad)
foreach(log IN LISTS logs)
  file(STRINGS ${log} lines REGEX "ptxas info|bytes stack frame")
  set(function "?")
  set(arch "?")
  foreach(line IN LISTS lines)
    if(line MATCHES "Compiling entry function '([^']+)' for '([^']+)'")
      set(arch ${CMAKE_MATCH_2})
      math(EXPR kernels "${kernels} + 1")
    elseif(line MATCHES "Function properties for (.+)$")
      set(function ${CMAKE_MATCH_1})
    elseif(line MATCHES "([0-9]+) bytes stack frame, ([0-9]+) bytes spill stores, ([0-9]+) bytes spill loads")
      if(CMAKE_MATCH_1 GREATER 0 OR CMAKE_MATCH_2 GREATER 0 OR CMAKE_MATCH_3 GREATER 0)
        string(STRIP "${line}" line)
        list(APPEND bad "${arch} ${function}: ${line}")
      endif()
    endif()
  endforeach()
endforeach()

list(LENGTH logs files)
if(kernels EQUAL 0)
  message(FATAL_ERROR "no kernel found in ${files} compile logs below ${LOGS}")
endif()
list(LENGTH bad count)
if(count GREATER 0)
  list(JOIN bad "\n  " text)
  message(FATAL_ERROR "${count} of ${kernels} kernels spill or need a stack frame:\n  ${text}")
endif()
message(STATUS "${kernels} kernels in ${files} files: no spills, no stack frames")
