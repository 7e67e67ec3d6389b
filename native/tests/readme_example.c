/* SPDX-License-Identifier: Apache-2.0
 *
 * What lies between the markers is the C example of README.md, word for word; around it, numbers whose result is known.
 */
#include <math.h>
#include <octolora/octolora.h>
#include <stdio.h>

#define CHECK(call) \
  if ((call) != OCTOLORA_OK) return fprintf(stderr, "%s\n", octolora_last_error()), 1

static int run(int32_t n, int32_t k, const int8_t *w, const float *s_w, int32_t rank, const float *a, const float *b,
               int32_t rows, const float *x, float *y) {
  octolora_device *device;
  octolora_linear *linear;
  octolora_slots *slots;
  void *workspace;
  size_t bytes;
  /* README begin */
  octolora_linear_desc base = {.struct_size = sizeof base, .n = n, .k = k, .mode = OCTOLORA_W8A8_DYNAMIC,
                               .scale_count = n, .weight = w, .scale = s_w}; /* W int8 [n,k], s_w [n] */
  octolora_adapter_desc lora = {.struct_size = sizeof lora, .rank = rank, .a = a, .b = b}; /* A [rank,k], B [n,rank] */
  CHECK(octolora_device_create(OCTOLORA_CPU, &device)); /* or a CUDA ordinal */
  CHECK(octolora_linear_create(device, &base, &linear));
  CHECK(octolora_slots_create(linear, 1, &rank, OCTOLORA_LORA_16BIT, &slots));
  CHECK(octolora_slots_set(slots, 0, &lora, 0.8f, NULL));
  CHECK(octolora_linear_workspace(linear, slots, rows, OCTOLORA_FLOAT32, &bytes));
  CHECK(octolora_device_alloc(device, bytes, &workspace));
  CHECK(octolora_linear_forward(linear, slots, x, OCTOLORA_FLOAT32, y, OCTOLORA_FLOAT32, rows, workspace, bytes, NULL));
  /* README end */
  octolora_device_free(device, workspace);
  octolora_slots_destroy(slots);
  octolora_linear_destroy(linear);
  octolora_device_destroy(device);
  return 0;
}

int main(void) {
  const int8_t w[2 * 2] = {1, 2, 3, 4};
  const float s_w[2] = {1.f, 0.5f}, a[2] = {1.f, 0.f}, b[2] = {10.f, -10.f}, x[2] = {127.f, 1.f};
  float y[2] = {0.f, 0.f};
  if (run(2, 2, w, s_w, 1, a, b, 1, x, y)) return 1;
  /* The codes are x itself, s_x is 1, and y = s_w * (W x) + 0.8 * B (A x). */
  const double want[2] = {129 + 0.8 * 1270, 0.5 * 385 - 0.8 * 1270};
  for (int i = 0; i < 2; ++i) {
    if (fabs(y[i] - want[i]) > 1e-3) { /* six fp32 roundings of numbers below 2048: 6 * 2048 * 2^-24 */
      fprintf(stderr, "y[%d] = %.9g, expected %.9g\n", i, y[i], want[i]);
      return 1;
    }
  }
  return 0;
}
