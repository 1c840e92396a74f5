/* Sums of bf16 products as tensor cores form them. A step adds STEP products to the accumulator at once: all are aligned to
   the largest exponent among them and cut, not rounded, to FRACTION bits behind its binary point. */
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 64, LONGEST_STEP = 32 };

static inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline int32_t exponent(float value) {
  int32_t biased = (bits_of(value) >> 23) & 255;
  return (biased ? biased : 1) - 127;
}

/* out (columns) = x (depth) w (depth, columns): x holds bf16 numbers in fp32, w the bits of bf16; depth is a multiple of step,
   columns one of LANES. */
void tensor_core_row(float *restrict out, const float *restrict x, const uint16_t *restrict w, long depth, long columns,
                     int fraction, int step) {
  int rounding = fegetround();
  fesetround(FE_TOWARDZERO);
  for (long first = 0; first < columns; first += LANES) {
    float sum[LANES] = {0};
    for (long k = 0; k < depth; k += step) {
      float product[LONGEST_STEP][LANES], scale[LANES];
      int32_t largest[LANES], total[LANES];
      for (int j = 0; j < LANES; j++) largest[j] = exponent(sum[j]);
      for (int i = 0; i < step; i++) {
        int32_t of_x = exponent(x[k + i]);
        const uint16_t *row = w + (k + i) * columns + first;
        for (int j = 0; j < LANES; j++) {
          int32_t bits = (int32_t)((uint32_t)row[j] << 16);
          int32_t of_w = (bits >> 23) & 255;
          of_w = of_w ? of_w - 127 : -300; /* 0 takes no part in the alignment */
          product[i][j] = float_of(bits) * x[k + i];
          largest[j] = of_x + of_w > largest[j] ? of_x + of_w : largest[j];
        }
      }
      for (int j = 0; j < LANES; j++) {
        if (largest[j] < -100) largest[j] = -100;
        scale[j] = float_of((fraction - largest[j] + 127) << 23);
        total[j] = (int32_t)(sum[j] * scale[j]);
      }
      for (int i = 0; i < step; i++)
        for (int j = 0; j < LANES; j++) total[j] += (int32_t)(product[i][j] * scale[j]);
      for (int j = 0; j < LANES; j++) sum[j] = (float)total[j] * float_of((largest[j] - fraction + 127) << 23);
    }
    memcpy(out + first, sum, sizeof sum);
  }
  fesetround(rounding);
}
