# SPDX-License-Identifier: Apache-2.0
#
# Writes the linker's version script: the functions that a header marks with OCTOLORA_API are global, all else is local.

function(octolora_export_map header map)
  file(READ ${header} text)
  string(REGEX MATCHALL "OCTOLORA_API [^;(]*[ *]octolora_[a-z0-9_]+\\(" declarations "${text}")
  set(script "{\n  global:\n")
  foreach(declaration IN LISTS declarations)
    string(REGEX REPLACE ".*[ *](octolora_[a-z0-9_]+)\\($" "\\1" name "${declaration}")
    string(APPEND script "    ${name};\n")
  endforeach()
  string(APPEND script "  local:\n    *;\n};\n")
  file(CONFIGURE OUTPUT ${map} CONTENT "${script}" @ONLY)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${header})
endfunction()
