# SPDX-License-Identifier: Apache-2.0
#
# The GPU architectures of a build. A "real" entry is machine code for that architecture; "virtual" is PTX, which the
# driver compiles for architectures newer than this list. 90a has Hopper's wgmma; its code runs on 9.0 alone.

set(OCTOLORA_CUDA_ARCHS_RELEASE 80-real 86-real 89-real 90a-real 100-real 120-real 120-virtual)

# Turns OCTOLORA_CUDA_ARCHS into CMAKE_CUDA_ARCHITECTURES and into a text for octolora_version() ("sm_80 sm_90a"). A
# bare number such as 90a means machine code alone: what a developer's machine needs.
function(octolora_cuda_archs requested out_architectures out_text)
  if(requested STREQUAL "release")
    set(requested ${OCTOLORA_CUDA_ARCHS_RELEASE})
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
