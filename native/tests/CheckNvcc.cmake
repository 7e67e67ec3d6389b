# SPDX-License-Identifier: Apache-2.0
#
# cmake -D WORK= -P CheckNvcc.cmake
#
# What is said about an nvcc that is not there, too old or broken, with shell scripts in its place.

cmake_minimum_required(VERSION 3.25)
include(${CMAKE_CURRENT_LIST_DIR}/../../cmake/CudaCompiler.cmake)
file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})

# script: the body of the stand-in; expected: a regular expression of the reason, or "" where it is to be taken.
function(expect name script expected)
  set(ENV{CUDACXX} ${WORK}/${name})
  file(WRITE ${WORK}/${name} "#!/bin/sh\n${script}\n")
  file(CHMOD ${WORK}/${name} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
  set(reason "")
  octolora_nvcc(nvcc reason)
  if(expected STREQUAL "" AND NOT nvcc STREQUAL "${WORK}/${name}")
    message(FATAL_ERROR "${name} was not taken: ${reason}")
  elseif(NOT expected STREQUAL "" AND (nvcc OR NOT reason MATCHES "${expected}" OR reason MATCHES "\n"))
    message(FATAL_ERROR "${name}: '${nvcc}' for '${reason}', expected '${expected}'")
  endif()
endfunction()

set(version [[if [ "$1" = --version ]; then echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit 0; fi]])
expect(good "${version}" "")
expect(old "echo 'Cuda compilation tools, release 12.4, V12.4.131'"
       "^${WORK}/old is of CUDA 12.4, and 12.8 or newer is needed$")
expect(broken "echo 'cannot execute binary file' >&2; exit 126"
       "^${WORK}/broken --version fails \\(126\\): cannot execute binary file$")
expect(host "${version}\necho 'In file included from probe.cu:1:'\necho 'error: unsupported GNU version' >&2; exit 1"
       "^${WORK}/host does not compile \\(1\\): error: unsupported GNU version$")
file(REMOVE ${WORK}/good)
set(ENV{CUDACXX} ${WORK}/good)
octolora_nvcc(nvcc reason)
if(nvcc OR NOT reason MATCHES "^${WORK}/good, which CUDACXX .*is no program$")
  message(FATAL_ERROR "missing: '${nvcc}' for '${reason}'")
endif()
unset(ENV{CUDACXX})
set(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH OFF)
set(ENV{PATH} ${WORK})
octolora_nvcc(nvcc reason)
if(nvcc OR NOT reason MATCHES "^no nvcc was found")
  message(FATAL_ERROR "none: '${nvcc}' for '${reason}'")
endif()
message(STATUS "old, broken and missing compilers are named as such")
