/* Statistics and result of a group norm whose channels lie next to each other. Sums are exact to float32, in an order that no number
 * of threads changes. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PIXELS = 32, CHANNELS = 128, GROUP = 64 };

static inline int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* A number of X, which holds float32 or the upper halves of float32. */
static inline __attribute__((always_inline)) float number(const void *x, int64_t place, int half)
{
    if (!half)
        return ((const float *)x)[place];
    union { uint32_t bits; float value; } wide = {(uint32_t)((const uint16_t *)x)[place] << 16};
    return wide.value;
}

/* The same the other way, rounded to the nearest even one. */
static inline __attribute__((always_inline)) void put(void *out, int64_t place, int half, float value)
{
    if (!half) {
        ((float *)out)[place] = value;
        return;
    }
    union { float value; uint32_t bits; } narrow = {value};
    uint32_t rounded = (narrow.bits + 0x7fff + (narrow.bits >> 16 & 1)) >> 16;
    ((uint16_t *)out)[place] = value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* e to the power of X, which is at most 88, to about two units of float32. */
static inline float exponential(float x)
{
    float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    float rest = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)whole + 127) << 23};
    return series * power.value;
}

/* X times its logistic function. */
static inline float silu(float x)
{
    float opposite = -x > 88.0f ? 88.0f : -x;
    return x / (1.0f + exponential(opposite < -87.0f ? -87.0f : opposite));
}

/* Of each channel of some pixels: the sum, and the sum of squares. Deviations from a mean nearby are what is added up in float32. */
static inline __attribute__((always_inline)) void add_pixels(const void *x, int64_t start, int half, int64_t pixels, int64_t channels,
                                                             int64_t width, double *sums, double *squares)
{
    float held[PIXELS * CHANNELS], centre[CHANNELS] = {0}, moved[CHANNELS] = {0}, square[CHANNELS] = {0};
    for (int64_t pixel = 0; pixel < pixels; pixel++)
        for (int64_t c = 0; c < width; c++) {
            held[pixel * CHANNELS + c] = number(x, start + pixel * channels + c, half);
            centre[c] += held[pixel * CHANNELS + c];
        }
    for (int64_t c = 0; c < width; c++)
        centre[c] /= (float)pixels;
    for (int64_t pixel = 0; pixel < pixels; pixel++)
        for (int64_t c = 0; c < width; c++) {
            float deviation = held[pixel * CHANNELS + c] - centre[c];
            moved[c] += deviation;
            square[c] += deviation * deviation;
        }
    for (int64_t c = 0; c < width; c++) {
        double middle = centre[c];
        sums[c] += pixels * middle + moved[c];
        squares[c] += square[c] + middle * (2.0 * moved[c] + pixels * middle);
    }
}

static inline __attribute__((always_inline)) void add_blocks(int half, int64_t first, int64_t last, const void *x, int64_t pixels,
                                                             int64_t channels, int64_t block, double *sums, double *squares)
{
    for (int64_t number = first; number < last; number++) {
        int64_t end = smaller(pixels, (number + 1) * block);
        for (int64_t channel = 0; channel < channels; channel += CHANNELS) {
            double *own = sums + number * channels + channel, *own_squares = squares + number * channels + channel;
            for (int64_t pixel = number * block; pixel < end; pixel += PIXELS) {
                int64_t start = pixel * channels + channel, count = smaller(PIXELS, end - pixel);
                if (channels - channel >= CHANNELS)
                    add_pixels(x, start, half, count, channels, CHANNELS, own, own_squares);
                else
                    add_pixels(x, start, half, count, channels, channels - channel, own, own_squares);
            }
        }
    }
}

/* Blocks FIRST to LAST of BLOCK pixels each, of X [pixels, channels], to SUMS and SQUARES [blocks, channels], which are zero. X is
 * bfloat16 where HALF is not 0, and float32 otherwise. */
void zoo_channel_sums(int64_t first, int64_t last, const void *x, int64_t half, int64_t pixels, int64_t channels, int64_t block,
                      double *sums, double *squares)
{
    if (half)
        add_blocks(1, first, last, x, pixels, channels, block, sums, squares);
    else
        add_blocks(0, first, last, x, pixels, channels, block, sums, squares);
}

/* What each channel is multiplied with, and what is added then. */
void zoo_group_scales(const double *sums, const double *squares, int64_t blocks, int64_t pixels, int64_t channels, int64_t groups,
                      double eps, const float *weight, const float *bias, float *scale, float *shift)
{
    int64_t width = channels / groups;
    for (int64_t group = 0; group < groups; group++) {
        double sum = 0, square = 0;
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t c = group * width; c < (group + 1) * width; c++) {
                sum += sums[block * channels + c];
                square += squares[block * channels + c];
            }
        double count = (double)pixels * width, mean = sum / count, variance = square / count - mean * mean;
        double factor = 1 / sqrt((variance > 0 ? variance : 0) + eps);
        for (int64_t c = group * width; c < (group + 1) * width; c++) {
            scale[c] = (float)(factor * weight[c]);
            shift[c] = (float)(bias[c] - mean * factor * weight[c]);
        }
    }
}

/* Some neighbouring numbers. What is held in between lets OUT be X. */
static inline __attribute__((always_inline)) void change(int half, int active, int64_t start, int64_t count, const void *x,
                                                         const float *scale, const float *shift, void *out)
{
    float held[GROUP];
    for (int64_t i = 0; i < count; i++)
        held[i] = number(x, start + i, half) * scale[i] + shift[i];
    if (active)
        for (int64_t i = 0; i < count; i++)
            held[i] = silu(held[i]);
    for (int64_t i = 0; i < count; i++)
        put(out, start + i, half, held[i]);
}

static inline __attribute__((always_inline)) void change_pixels(int half, int active, int64_t start, int64_t end, const void *x,
                                                                int64_t channels, const float *scale, const float *shift, void *out)
{
    for (int64_t pixel = start; pixel < end; pixel++) {
        int64_t c = 0;
        for (; c + GROUP <= channels; c += GROUP)
            change(half, active, pixel * channels + c, GROUP, x, scale + c, shift + c, out);
        if (c < channels)
            change(half, active, pixel * channels + c, channels - c, x, scale + c, shift + c, out);
    }
}

/* Blocks FIRST to LAST of X, scaled and shifted, and times their logistic function where ACTIVE is not 0. OUT may be X. */
void zoo_scale_and_shift(int64_t first, int64_t last, const void *x, int64_t half, int64_t pixels, int64_t channels, int64_t block,
                         const float *scale, const float *shift, int64_t active, void *out)
{
    int64_t start = first * block, end = smaller(pixels, last * block);
    if (half && active)
        change_pixels(1, 1, start, end, x, channels, scale, shift, out);
    else if (half)
        change_pixels(1, 0, start, end, x, channels, scale, shift, out);
    else if (active)
        change_pixels(0, 1, start, end, x, channels, scale, shift, out);
    else
        change_pixels(0, 0, start, end, x, channels, scale, shift, out);
}

/* All of it in one thread. SUMS and SQUARES are scratch of [blocks, channels], SCALE and SHIFT of [channels]. */
void zoo_group_norm(const void *x, int64_t items, int64_t half, int64_t pixels, int64_t channels, int64_t block, int64_t groups,
                    double eps, const float *weight, const float *bias, double *sums, double *squares, float *scale, float *shift,
                    int64_t active, void *out)
{
    int64_t blocks = (pixels + block - 1) / block;
    for (int64_t item = 0; item < items; item++) {
        const char *from = (const char *)x + item * pixels * channels * (half ? 2 : 4);
        char *to = (char *)out + item * pixels * channels * (half ? 2 : 4);
        memset(sums, 0, blocks * channels * sizeof *sums);
        memset(squares, 0, blocks * channels * sizeof *squares);
        zoo_channel_sums(0, blocks, from, half, pixels, channels, block, sums, squares);
        zoo_group_scales(sums, squares, blocks, pixels, channels, groups, eps, weight, bias, scale, shift);
        zoo_scale_and_shift(0, blocks, from, half, pixels, channels, block, scale, shift, active, to);
    }
}
