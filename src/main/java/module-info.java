// SPDX-License-Identifier: Apache-2.0

/** Int8 linear layers with live LoRA adapters. */
module io.octolora {
  requires com.fasterxml.jackson.core;
  requires info.picocli;
  requires transitive org.bytedeco.javacpp;
  // not transitive: who compiles against this module need not have them
  requires static org.jetbrains.annotations;

  exports io.octolora;
  exports io.octolora.adapter;
  exports io.octolora.checkpoint;
  exports io.octolora.mapping;
  exports io.octolora.quantize;
  exports io.octolora.runtime;

  // picocli sets the fields of the commands
  opens io.octolora.cli to info.picocli;
}
