# SPDX-License-Identifier: Apache-2.0
#
# cmake -D BUILD= -D CONSUMER= -D WORK= -D C_COMPILER= -D VERSION= -P CheckConsumer.cmake
#
# Installs the build, moves the installed folder elsewhere (it must be relocatable), and lets a small C project outside
# the source tree find, link and run it: once through find_package, once through pkg-config.

cmake_minimum_required(VERSION 3.25)

function(run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${what} failed (${result}):\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

function(expect_product how)
  string(STRIP "${output}" output)
  if(NOT output MATCHES "Octolora ${VERSION}.*y = 5 11")
    message(FATAL_ERROR "${how}: the consumer printed '${output}'")
  endif()
  message(STATUS "${how}: ${output}")
endfunction()

file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})
run("install" ${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/first)
file(RENAME ${WORK}/first ${WORK}/moved)
file(COPY ${CONSUMER}/ DESTINATION ${WORK}/project)

run("configure" ${CMAKE_COMMAND} -S ${WORK}/project -B ${WORK}/project/build -D CMAKE_PREFIX_PATH=${WORK}/moved -D
    CMAKE_C_COMPILER=${C_COMPILER} -D WANTED_VERSION=${VERSION})
run("build" ${CMAKE_COMMAND} --build ${WORK}/project/build)
run("find_package consumer" ${WORK}/project/build/consumer)
expect_product("find_package")

find_program(pkg_config NAMES pkg-config pkgconf)
if(pkg_config)
  set(ENV{PKG_CONFIG_PATH} ${WORK}/moved/lib/pkgconfig)
  run("pkg-config" ${pkg_config} --cflags --libs octolora)
  separate_arguments(flags UNIX_COMMAND "${output}")
  run("cc" ${C_COMPILER} ${WORK}/project/consumer.c -o ${WORK}/by-pkg-config ${flags} -Wl,-rpath,${WORK}/moved/lib)
  run("pkg-config consumer" ${WORK}/by-pkg-config)
  expect_product("pkg-config")
else()
  message(STATUS "pkg-config: not checked, it is not installed")
endif()
