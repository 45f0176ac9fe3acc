/* What decoders of sound do to frames between their products: each frame's result in one pass, in float32. Frames are rows of channels;
 * those of an item follow each other. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

static inline uint16_t rounded(float value)
{
    union {
        float number;
        uint32_t bits;
    } u = {value};
    uint32_t near = (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16, nan = u.bits >> 16 | 0x40;
    return (uint16_t)((u.bits & 0x7fffffff) > 0x7f800000 ? nan : near);
}

static inline float widened(uint16_t value)
{
    union {
        uint32_t bits;
        float number;
    } u = {(uint32_t)value << 16};
    return u.number;
}

static inline float total(const float *parts)
{
    float sum[LANES];
    for (int lane = 0; lane < LANES; lane++)
        sum[lane] = parts[lane];
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++)
            sum[lane] += sum[lane + half];
    return sum[0];
}

/* Rows FIRST to LAST: a depth-wise convolution over the FRAMES of an item, zero outside and where INSIDE is 0, then layer norm. WEIGHT
 * is [kernel, channels], OUT float32 or, if HALF, bfloat16. */
void zoo_depthwise_norm(int64_t first, int64_t last, const float *x, const uint8_t *inside, const float *weight, const float *bias,
                        const float *scale, const float *shift, void *out, int64_t frames, int64_t channels, int64_t kernel,
                        int64_t half, double eps)
{
    float row[channels];
    int64_t whole = channels / LANES * LANES;
    for (int64_t number = first; number < last; number++) {
        int64_t frame = number % frames;
        for (int64_t c = 0; c < channels; c++)
            row[c] = bias[c];
        for (int64_t tap = 0; tap < kernel; tap++) {
            int64_t offset = tap - kernel / 2;
            if (frame + offset < 0 || frame + offset >= frames || (inside && !inside[number + offset]))
                continue;
            const float *input = x + (number + offset) * channels, *factor = weight + tap * channels;
            for (int64_t c = 0; c < channels; c++)
                row[c] += input[c] * factor[c];
        }
        float parts[LANES] = {0};
        for (int64_t c = 0; c < whole; c += LANES)
            for (int lane = 0; lane < LANES; lane++)
                parts[lane] += row[c + lane];
        for (int64_t c = whole; c < channels; c++)
            parts[c - whole] += row[c];
        float mean = total(parts) / (float)channels;
        for (int lane = 0; lane < LANES; lane++)
            parts[lane] = 0;
        for (int64_t c = 0; c < whole; c += LANES)
            for (int lane = 0; lane < LANES; lane++)
                parts[lane] += (row[c + lane] - mean) * (row[c + lane] - mean);
        for (int64_t c = whole; c < channels; c++)
            parts[c - whole] += (row[c] - mean) * (row[c] - mean);
        float factor = (float)(1 / sqrt(total(parts) / (double)channels + eps));
        if (half)
            for (int64_t c = 0; c < channels; c++)
                ((uint16_t *)out)[number * channels + c] = rounded((row[c] - mean) * factor * scale[c] + shift[c]);
        else
            for (int64_t c = 0; c < channels; c++)
                ((float *)out)[number * channels + c] = (row[c] - mean) * factor * scale[c] + shift[c];
    }
}

/* Rows FIRST to LAST of X + SCALE * Y, where Y is bfloat16. */
void zoo_add_scaled(int64_t first, int64_t last, const float *x, const uint16_t *y, const float *scale, float *out, int64_t channels)
{
    for (int64_t number = first; number < last; number++) {
        const float *left = x + number * channels;
        const uint16_t *right = y + number * channels;
        float *sum = out + number * channels;
        for (int64_t c = 0; c < channels; c++)
            sum[c] = left[c] + scale[c] * widened(right[c]);
    }
}

/* e to the power of a number from -87 to 87, to 2 units of float32; of one beyond, that of the nearest of these. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;
    /* Adding this rounds to a whole number, which then lies in the lowest bits. */
    const float shift = 12582912.0f;
    union {
        float number;
        int32_t bits;
    } turns = {x * 1.44269504f + shift}, power;
    float whole = turns.number - shift;
    /* log 2 in two parts, the first of few digits. */
    float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float sum = 1.0f / 5040;
    sum = sum * rest + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    power.bits = (int32_t)((uint32_t)(turns.bits + 127) << 23);
    return sum * power.number;
}

/* Times its sigmoid; -87 stands for what is below, whose result is as good as 0. */
static inline float silu(float x)
{
    x = x < -87.0f ? -87.0f : x;
    return x / (1.0f + exponential(-x));
}

/* Rows FIRST to LAST of the items' FRAMES, scaled, shifted and through SiLU, zero where INSIDE is 0; SCALE and SHIFT are [items,
 * channels]. */
void zoo_scaled_silu(int64_t first, int64_t last, const float *x, const uint8_t *inside, const float *scale, const float *shift,
                     void *out, int64_t frames, int64_t channels, int64_t half, int64_t item_stride, int64_t out_frames, int64_t out_first)
{
    for (int64_t number = first; number < last; number++) {
        int64_t item = number / frames, frame = number % frames;
        int64_t place = (item * out_frames + out_first + frame) * channels;
        const float *input = x + item * item_stride + frame * channels;
        const float *factor = scale + item * channels, *addend = shift + item * channels;
        if (inside && !inside[number]) {
            /* Not a product with zero: what lies behind an item's end may be anything. */
            memset((char *)out + place * (half ? 2 : 4), 0, channels * (half ? 2 : 4));
            continue;
        }
        if (half)
            for (int64_t c = 0; c < channels; c++)
                ((uint16_t *)out)[place + c] = rounded(silu(input[c] * factor[c] + addend[c]));
        else
            for (int64_t c = 0; c < channels; c++)
                ((float *)out)[place + c] = silu(input[c] * factor[c] + addend[c]);
    }
}

/* Rows FIRST to LAST of the items' FRAMES through an exponential linear unit; items lie X_STRIDE and OUT_STRIDE numbers apart. */
void zoo_elu(int64_t first, int64_t last, const float *x, float *out, int64_t frames, int64_t channels, int64_t x_stride,
             int64_t out_stride)
{
    for (int64_t number = first; number < last;) {
        int64_t item = number / frames, frame = number % frames;
        int64_t rows = frames - frame < last - number ? frames - frame : last - number;
        const float *input = x + item * x_stride + frame * channels;
        float *result = out + item * out_stride + frame * channels;
        for (int64_t n = 0; n < rows * channels; n++) {
            float below = input[n] < 0.0f ? input[n] : 0.0f, curved = exponential(below) - 1.0f;
            result[n] = input[n] <= 0.0f ? curved : input[n];
        }
        number += rows;
    }
}
