# SPDX-License-Identifier: Apache-2.0
#
# cmake -D LOGS=<folder> -P CheckResourceUsage.cmake
#
# Reads what ptxas -v said about every kernel (the *.log files that log-compile.sh leaves below LOGS) and fails if one
#   - spills registers, needs a stack frame or has local memory: each is a trip to memory in the middle of a main loop;
#   - has its wgmma serialized (C7510 to C7515): the tensor cores then wait between the instructions of one stage.

cmake_minimum_required(VERSION 3.25)

# Kernels whose wgmma may be serialized: pairs of a regular expression of the mangled name and why it is accepted. None.
if(NOT DEFINED SERIALIZED)
  set(SERIALIZED "")
endif()

file(GLOB_RECURSE logs ${LOGS}/*.cu.o.log)
set(kernels 0)
set(bad)
set(serialized)
set(hopper FALSE)
foreach(log IN LISTS logs)
  file(STRINGS ${log} lines REGEX "ptxas (info|warning)|bytes stack frame|bytes lmem")
  set(function "?")
  set(arch "?")
  foreach(line IN LISTS lines)
    if(line MATCHES "Compiling entry function '([^']+)' for '([^']+)'")
      set(function ${CMAKE_MATCH_1})
      set(arch ${CMAKE_MATCH_2})
      math(EXPR kernels "${kernels} + 1")
      if(arch STREQUAL "sm_90a")
        set(hopper TRUE)
      endif()
    elseif(line MATCHES "Function properties for (.+)$")
      set(function ${CMAKE_MATCH_1})
    elseif(line MATCHES "[1-9][0-9]* bytes (stack frame|spill stores|spill loads|lmem)")
      string(STRIP "${line}" line)
      list(APPEND bad "${arch} ${function}: ${line}")
    elseif(line MATCHES "\\(C751[0-5]\\).*'([^']+)'")
      list(APPEND serialized ${CMAKE_MATCH_1})
    endif()
  endforeach()
endforeach()

list(LENGTH logs files)
if(kernels EQUAL 0)
  message(FATAL_ERROR "no kernel found in ${files} compile logs below ${LOGS}")
endif()

set(accepted ${SERIALIZED})
while(accepted)
  list(POP_FRONT accepted pattern reason)
  set(found ${serialized})
  list(FILTER found INCLUDE REGEX "${pattern}")
  list(FILTER serialized EXCLUDE REGEX "${pattern}")
  list(LENGTH found count)
  if(count GREATER 0)
    message(STATUS "${count} kernels with serialized wgmma, accepted: ${reason}")
  elseif(hopper)
    list(APPEND bad "no kernel is like '${pattern}' any more: take it off the list in CheckResourceUsage.cmake")
  endif()
endwhile()
list(TRANSFORM serialized APPEND ": its wgmma is serialized, see the log")
list(APPEND bad ${serialized})

list(LENGTH bad count)
if(count GREATER 0)
  list(JOIN bad "\n  " text)
  message(FATAL_ERROR "${count} findings in ${kernels} kernels:\n  ${text}")
endif()
message(STATUS "${kernels} kernels in ${files} files: no spills, no stack frames, no serialized wgmma but those accepted")
