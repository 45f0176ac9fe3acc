/* Statistics and result of a group norm whose channels lie next to each other. Sums are exact to float32, in an order that no number
 * of threads changes. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { PIXELS = 32, CHANNELS = 128 };

static inline int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Of each channel of some pixels: the sum, and the sum of squares. Deviations from a mean nearby are what is added up in float32. */
static void add_pixels(const float *x, int64_t pixels, int64_t channels, int64_t width, double *sums, double *squares)
{
    float centre[CHANNELS] = {0}, moved[CHANNELS] = {0}, square[CHANNELS] = {0};
    for (int64_t pixel = 0; pixel < pixels; pixel++)
        for (int64_t c = 0; c < width; c++)
            centre[c] += x[pixel * channels + c];
    for (int64_t c = 0; c < width; c++)
        centre[c] /= (float)pixels;
    for (int64_t pixel = 0; pixel < pixels; pixel++)
        for (int64_t c = 0; c < width; c++) {
            float deviation = x[pixel * channels + c] - centre[c];
            moved[c] += deviation;
            square[c] += deviation * deviation;
        }
    for (int64_t c = 0; c < width; c++) {
        double middle = centre[c];
        sums[c] += pixels * middle + moved[c];
        squares[c] += square[c] + middle * (2.0 * moved[c] + pixels * middle);
    }
}

/* Blocks FIRST to LAST of BLOCK pixels each, of X [pixels, channels], to SUMS and SQUARES [blocks, channels], which are zero. */
void zoo_channel_sums(int64_t first, int64_t last, const float *x, int64_t pixels, int64_t channels, int64_t block, double *sums,
                      double *squares)
{
    for (int64_t number = first; number < last; number++) {
        int64_t end = smaller(pixels, (number + 1) * block);
        for (int64_t channel = 0; channel < channels; channel += CHANNELS)
            for (int64_t pixel = number * block; pixel < end; pixel += PIXELS)
                add_pixels(x + pixel * channels + channel, smaller(PIXELS, end - pixel), channels,
                           smaller(CHANNELS, channels - channel), sums + number * channels + channel,
                           squares + number * channels + channel);
    }
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

/* Blocks FIRST to LAST of X, scaled and shifted. */
void zoo_scale_and_shift(int64_t first, int64_t last, const float *x, int64_t pixels, int64_t channels, int64_t block,
                         const float *scale, const float *shift, float *out)
{
    int64_t end = smaller(pixels, last * block);
    for (int64_t pixel = first * block; pixel < end; pixel++)
        for (int64_t c = 0; c < channels; c++)
            out[pixel * channels + c] = x[pixel * channels + c] * scale[c] + shift[c];
}

/* All of it in one thread. SUMS and SQUARES are scratch of [blocks, channels], SCALE and SHIFT of [channels]. */
void zoo_group_norm(const float *x, int64_t items, int64_t pixels, int64_t channels, int64_t block, int64_t groups, double eps,
                    const float *weight, const float *bias, double *sums, double *squares, float *scale, float *shift, float *out)
{
    int64_t blocks = (pixels + block - 1) / block;
    for (int64_t item = 0; item < items; item++, x += pixels * channels, out += pixels * channels) {
        memset(sums, 0, blocks * channels * sizeof *sums);
        memset(squares, 0, blocks * channels * sizeof *squares);
        zoo_channel_sums(0, blocks, x, pixels, channels, block, sums, squares);
        zoo_group_scales(sums, squares, blocks, pixels, channels, groups, eps, weight, bias, scale, shift);
        zoo_scale_and_shift(0, blocks, x, pixels, channels, block, scale, shift, out);
    }
}
