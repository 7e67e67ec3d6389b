# SPDX-License-Identifier: Apache-2.0
#
# The GPU architectures of a build. A "real" entry is machine code for that architecture; "virtual" is PTX, which the
# driver compiles for architectures newer than this list. 90a has Hopper's wgmma; its code runs on 9.0 alone.

set(OCTOLORA_CUDA_ARCHS_RELEASE 80-real 86-real 89-real 90a-real 100-real 120-real 120-virtual)

# The release list without what this nvcc is too old for, ending with PTX of the newest that is left.
function(octolora_release_archs nvcc out)
  execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE known ERROR_VARIABLE known)
  set(kept)
  set(left_out)
  foreach(arch IN LISTS OCTOLORA_CUDA_ARCHS_RELEASE)
    string(REGEX MATCH "^[0-9]+" number ${arch})  # the list names no variants such as 90a
    if(known MATCHES "sm_${number}[^0-9a-z]")
      list(APPEND kept ${arch})
      set(newest ${number})
    else()
      list(APPEND left_out ${arch})
    endif()
  endforeach()
  if(NOT kept)
    message(FATAL_ERROR "${nvcc} --list-gpu-code names none of ${OCTOLORA_CUDA_ARCHS_RELEASE}; it says:\n${known}")
  endif()
  if(left_out)
    if(OCTOLORA_CUDA STREQUAL "ON")
      message(FATAL_ERROR "${nvcc} is too old for ${left_out}")
    endif()
    message(STATUS "Octolora: ${nvcc} is too old for ${left_out}, which are left out; PTX of ${newest} instead")
    list(APPEND kept ${newest}-virtual)
  endif()
  set(${out} ${kept} PARENT_SCOPE)
endfunction()

# Turns OCTOLORA_CUDA_ARCHS into CMAKE_CUDA_ARCHITECTURES and into a text for octolora_version() ("sm_80 sm_90a"). A
# bare number such as 90a means machine code alone: what a developer's machine needs.
function(octolora_cuda_archs requested nvcc out_architectures out_text)
  if(requested STREQUAL "release")
    octolora_release_archs(${nvcc} requested)
  endif()
  set(architectures)
  set(names)
  foreach(arch IN LISTS requested)
    if(NOT arch MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
      message(FATAL_ERROR "OCTOLORA_CUDA_ARCHS: '${arch}' is none of 90, 90a, 90-real, 90-virtual or 'release'")
    endif()
    set(number ${CMAKE_MATCH_1})
    if(CMAKE_MATCH_2 STREQUAL "-virtual")
      list(APPEND architectures ${number}-virtual)
      list(APPEND names compute_${number})
    else()
      list(APPEND architectures ${number}-real)
      list(APPEND names sm_${number})
    endif()
  endforeach()
  list(JOIN names " " text)
  set(${out_architectures} ${architectures} PARENT_SCOPE)
  set(${out_text} ${text} PARENT_SCOPE)
endfunction()
