# SPDX-License-Identifier: Apache-2.0
#
# cmake -D WORK= -D CHECK= -P CheckResourceUsageTest.cmake
#
# CheckResourceUsage.cmake finds what it is there to find, in reports as ptxas of CUDA 13.0 writes them.

cmake_minimum_required(VERSION 3.25)

set(head "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'fast' for 'sm_90a'
ptxas info    : Function properties for fast\n")
set(clean "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n")
set(used "ptxas info    : Used 168 registers, used 9 barriers, 541 bytes cmem[0]\n")
set(serialized "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non \
wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the \
function 'slow'\n")

# expected: a regular expression of the failure, or "" where the report is to pass.
function(expect log accepted expected)
  file(REMOVE_RECURSE ${WORK})
  file(WRITE ${WORK}/kernel.cu.o.log "${log}")
  execute_process(COMMAND ${CMAKE_COMMAND} -D LOGS=${WORK} -D "SERIALIZED=${accepted}" -P ${CHECK}
                  RESULT_VARIABLE status OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(expected STREQUAL "" AND NOT status EQUAL 0)
    message(FATAL_ERROR "refused:\n${log}\n${said}")
  elseif(NOT expected STREQUAL "" AND (status EQUAL 0 OR NOT said MATCHES "${expected}"))
    message(FATAL_ERROR "passed, or refused for another reason than '${expected}':\n${log}\n${said}")
  endif()
endfunction()

expect("${head}${clean}${used}" "" "")
expect("" "" "no kernel found")
expect("${head}    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n${used}" "" "sm_90a fast: 16 bytes")
expect("${head}    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n${used}" "" "4 bytes spill stores")
expect("${head}    0 bytes stack frame, 0 bytes spill stores, 12 bytes spill loads\n${used}" "" "12 bytes spill loads")
expect("${head}${clean}ptxas info    : Used 32 registers, 8 bytes lmem, 541 bytes cmem[0]\n" "" "8 bytes lmem")
expect("${head}${clean}${used}${serialized}" "" "slow: its wgmma is serialized")
expect("${head}${clean}${used}${serialized}" "fas;as expected" "slow: its wgmma is serialized")
expect("${head}${clean}${used}${serialized}" "sl;as expected" "")
expect("${head}${clean}${used}" "sl;as expected" "no kernel is like 'sl' any more")
message(STATUS "spills, stack frames, local memory and serialized wgmma are found")
