/* SPDX-License-Identifier: Apache-2.0 */
#include <octolora/octolora.h>
#include <stdio.h>

#define CHECK(call) \
  if ((call) != OCTOLORA_OK) return fprintf(stderr, "%s\n", octolora_last_error()), 1

int main(void) {
  const int8_t w[2 * 2] = {1, 2, 3, 4}; /* two output channels, two inputs */
  const float scale = 1.f, x[2] = {1.f, 2.f};
  float y[2];
  octolora_device* device;
  octolora_linear* linear;
  octolora_linear_desc desc = {.struct_size = sizeof desc, .n = 2, .k = 2, .mode = OCTOLORA_W8A16, .scale_count = 1,
                               .weight = w, .scale = &scale};
  size_t bytes;
  void* workspace;
  CHECK(octolora_device_create(OCTOLORA_CPU, &device));
  CHECK(octolora_linear_create(device, &desc, &linear));
  CHECK(octolora_linear_workspace(linear, NULL, 1, OCTOLORA_FLOAT32, &bytes));
  CHECK(octolora_device_alloc(device, bytes, &workspace));
  CHECK(octolora_linear_forward(linear, NULL, x, OCTOLORA_FLOAT32, y, OCTOLORA_FLOAT32, 1, workspace, bytes, NULL));
  printf("Octolora %s: y = %g %g\n", octolora_version(), y[0], y[1]);
  octolora_device_free(device, workspace);
  octolora_linear_destroy(linear);
  octolora_device_destroy(device);
  return 0;
}
