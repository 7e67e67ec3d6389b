# SPDX-License-Identifier: Apache-2.0
#
# The warnings that our own C, C++ and CUDA code is held to. All of them are errors.

function(octolora_warnings target)
  set(gnu -Wall -Wextra -Werror)
  target_compile_options(
    ${target}
    ${ARGN}
    $<$<COMPILE_LANGUAGE:C,CXX>:${gnu}>
    "$<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
endfunction()
