# SPDX-License-Identifier: Apache-2.0
#
# octolora_nvcc(NVCC REASON): the nvcc of CMAKE_CUDA_COMPILER, of CUDACXX or in PATH, if it is new enough and works; else
# NVCC is empty and REASON says in one line what is wrong with it.

set(OCTOLORA_NVCC_MINIMUM 12.8)  # the first that knows compute capability 10.0 and 12.0

# The first line that says "error", else the first line.
function(octolora_first_error text out)
  string(REGEX MATCH "[^\n]*[Ee]rror[^\n]*" line "${text}")
  if(NOT line)
    string(REGEX MATCH "[^\n]+" line "${text}")
  endif()
  string(STRIP "${line}" line)
  set(${out} "${line}" PARENT_SCOPE)
endfunction()

function(octolora_nvcc out_nvcc out_reason)
  set(${out_nvcc} "" PARENT_SCOPE)
  set(name nvcc)
  if(CMAKE_CUDA_COMPILER)
    set(name ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(name $ENV{CUDACXX})
  endif()
  unset(nvcc)
  find_program(nvcc ${name} NO_CACHE)
  if(NOT nvcc AND NOT name STREQUAL "nvcc")
    set(${out_reason} "${name}, which CUDACXX or CMAKE_CUDA_COMPILER names, is no program" PARENT_SCOPE)
    return()
  endif()
  if(NOT nvcc)
    set(${out_reason} "no nvcc was found (put it in PATH or set CUDACXX to its path)" PARENT_SCOPE)
    return()
  endif()

  execute_process(COMMAND ${nvcc} --version RESULT_VARIABLE status OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(NOT status EQUAL 0 OR NOT said MATCHES "release ([0-9]+\\.[0-9]+)")
    octolora_first_error("${said}" line)
    set(${out_reason} "${nvcc} --version fails (${status}): ${line}" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  if(version VERSION_LESS OCTOLORA_NVCC_MINIMUM)
    set(${out_reason} "${nvcc} is of CUDA ${version}, and ${OCTOLORA_NVCC_MINIMUM} or newer is needed" PARENT_SCOPE)
    return()
  endif()

  # Most often the host compiler is one that this nvcc does not take.
  set(probe ${CMAKE_CURRENT_BINARY_DIR}/octolora_nvcc_probe.cu)
  file(WRITE ${probe} "#include <cstdint>\n__global__ void probe(int32_t*) {}\nint main() {}\n")
  execute_process(COMMAND ${nvcc} ${probe} -o ${probe}.out RESULT_VARIABLE status OUTPUT_VARIABLE said
                  ERROR_VARIABLE said)
  file(REMOVE ${probe} ${probe}.out)
  if(NOT status EQUAL 0)
    octolora_first_error("${said}" line)
    set(${out_reason} "${nvcc} does not compile (${status}): ${line}" PARENT_SCOPE)
    return()
  endif()
  set(${out_nvcc} ${nvcc} PARENT_SCOPE)
endfunction()
