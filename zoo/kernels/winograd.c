/* The two ends of a Winograd convolution of 3x3 over maps whose channels lie next to each other: tiles of a map to the places of a
 * product, and the product to pixels. All sums have the order of the form in PyTorch, so that both give the same numbers. */
#include <stdint.h>

/* Channels that are taken at a time, and at most; inputs of a kernel that are taken at a time. */
enum { LANES = 16, MOST = 2048, GROUP = 4 };
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static const float nothing[MOST];

static inline lanes load(const float *x)
{
    return *(const lanes *)x;
}

static inline void store(float *out, lanes value)
{
    *(lanes *)out = value;
}

/* Four numbers of an input to the four places of 2 outputs. */
static inline void into_4(const lanes *d, int64_t step, lanes *out, int64_t next)
{
    out[0 * next] = d[0] - d[2 * step];
    out[1 * next] = d[step] + d[2 * step];
    out[2 * next] = d[2 * step] - d[step];
    out[3 * next] = d[step] - d[3 * step];
}

/* Six numbers of an input to the six places of 4 outputs. */
static inline void into_6(const lanes *d, int64_t step, lanes *out, int64_t next)
{
    lanes d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    lanes even = d4 - d2 * 4, odd = d3 - d1 * 4, near = d4 - d2, far = (d3 - d1) * 2;
    out[0 * next] = d0 * 4 - d2 * 5 + d4;
    out[1 * next] = even + odd;
    out[2 * next] = even - odd;
    out[3 * next] = near + far;
    out[4 * next] = near - far;
    out[5 * next] = d1 * 4 - d3 * 5 + d5;
}

/* Four places to 2 outputs. */
static inline void from_4(const lanes *m, int64_t step, lanes *out, int64_t next)
{
    out[0 * next] = m[0] + m[step] + m[2 * step];
    out[1 * next] = m[step] - m[2 * step] - m[3 * step];
}

/* Six places to 4 outputs. */
static inline void from_6(const lanes *m, int64_t step, lanes *out, int64_t next)
{
    lanes sum = m[step] + m[2 * step], apart = m[step] - m[2 * step];
    lanes wide = m[3 * step] + m[4 * step], far = m[3 * step] - m[4 * step];
    out[0 * next] = m[0] + sum + wide;
    out[1 * next] = apart + far * 2;
    out[2 * next] = sum + wide * 4;
    out[3 * next] = apart + far * 8 + m[5 * step];
}

/* Three numbers of a kernel to the places of 2 outputs, and to those of 4. */
static inline void kernel_4(const lanes *g, int64_t step, lanes *out, int64_t next)
{
    lanes ends = (g[0] + g[2 * step]) * 0.5f, middle = g[step] * 0.5f;
    out[0 * next] = g[0];
    out[1 * next] = ends + middle;
    out[2 * next] = ends - middle;
    out[3 * next] = g[2 * step];
}

static inline void kernel_6(const lanes *g, int64_t step, lanes *out, int64_t next)
{
    lanes ends = (g[0] + g[2 * step]) * (-1.0f / 6), middle = g[step] * (1.0f / 6);
    lanes far = g[0] * (1.0f / 24) + g[2 * step] * (1.0f / 6), wide = g[step] * (1.0f / 12);
    out[0 * next] = g[0] * 0.25f;
    out[1 * next] = ends - middle;
    out[2 * next] = ends + middle;
    out[3 * next] = far + wide;
    out[4 * next] = far - wide;
    out[5 * next] = g[2 * step];
}

/* INPUTS from FIRST to LAST of a kernel [outputs, inputs, 3, 3], which has these strides, to PLACES [side * side, inputs, outputs]. */
static inline __attribute__((always_inline)) void kernels_in(int side, int64_t first, int64_t last, const float *kernel,
                                                             int64_t by_output, int64_t by_input, int64_t by_row, int64_t by_column,
                                                             int64_t inputs, int64_t outputs, float *places)
{
    /* What is read far apart is written side by side first. */
    float taps[GROUP * 9 * MOST];
    for (int64_t group = first; group < last; group += GROUP) {
        int64_t count = last - group < GROUP ? last - group : GROUP;
        for (int64_t o = 0; o < outputs; o += LANES)
            for (int64_t input = 0; input < count; input++)
                for (int tap = 0; tap < 9; tap++)
                    for (int lane = 0; lane < LANES; lane++)
                        taps[(input * 9 + tap) * outputs + o + lane] =
                            kernel[(o + lane) * by_output + (group + input) * by_input + tap / 3 * by_row + tap % 3 * by_column];
        for (int64_t input = 0; input < count; input++)
            for (int64_t o = 0; o < outputs; o += LANES) {
                lanes own[9], middle[18];
                for (int tap = 0; tap < 9; tap++)
                    own[tap] = load(taps + (input * 9 + tap) * outputs + o);
                for (int column = 0; column < 3; column++)
                    if (side == 4)
                        kernel_4(own + column, 3, middle + column, 3);
                    else
                        kernel_6(own + column, 3, middle + column, 3);
                for (int i = 0; i < side; i++) {
                    lanes row[6];
                    if (side == 4)
                        kernel_4(middle + i * 3, 1, row, 1);
                    else
                        kernel_6(middle + i * 3, 1, row, 1);
                    for (int j = 0; j < side; j++)
                        store(places + ((i * side + j) * inputs + group + input) * outputs + o, row[j]);
                }
            }
    }
}

void zoo_kernels_4(int64_t first, int64_t last, const float *kernel, int64_t by_output, int64_t by_input, int64_t by_row,
                   int64_t by_column, int64_t inputs, int64_t outputs, float *places)
{
    kernels_in(4, first, last, kernel, by_output, by_input, by_row, by_column, inputs, outputs, places);
}

void zoo_kernels_6(int64_t first, int64_t last, const float *kernel, int64_t by_output, int64_t by_input, int64_t by_row,
                   int64_t by_column, int64_t inputs, int64_t outputs, float *places)
{
    kernels_in(6, first, last, kernel, by_output, by_input, by_row, by_column, inputs, outputs, places);
}

/* TILES of X [rows, columns, channels], each SIDE - 2 pixels wide, to PLACES [SIDE * SIDE, slab, channels]. ROWS and COLUMNS are those
 * of the result: with a SHIFT of 1 every pixel of X stands for four of them. */
static inline __attribute__((always_inline)) void tiles_in(int side, int64_t first, int64_t last, const float *x, int64_t rows,
                                                           int64_t columns, int64_t channels, int64_t shift, int64_t start,
                                                           int64_t slab, float *places)
{
    int64_t across = (columns + side - 3) / (side - 2), stride = columns >> shift;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t top = (start + tile) / across * (side - 2) - 1, left = (start + tile) % across * (side - 2) - 1;
        const float *at[36];
        for (int i = 0; i < side; i++)
            for (int j = 0; j < side; j++) {
                int64_t row = top + i, column = left + j;
                int inside = row >= 0 && row < rows && column >= 0 && column < columns;
                at[i * side + j] = inside ? x + ((row >> shift) * stride + (column >> shift)) * channels : nothing;
            }
        float *out = places + tile * channels;
        for (int64_t c = 0; c < channels; c += LANES) {
            lanes middle[36];
            for (int j = 0; j < side; j++) {
                lanes column[6];
                for (int i = 0; i < side; i++)
                    column[i] = load(at[i * side + j] + c);
                if (side == 4)
                    into_4(column, 1, middle + j, side);
                else
                    into_6(column, 1, middle + j, side);
            }
            for (int i = 0; i < side; i++) {
                lanes row[6];
                if (side == 4)
                    into_4(middle + i * side, 1, row, 1);
                else
                    into_6(middle + i * side, 1, row, 1);
                for (int j = 0; j < side; j++)
                    store(out + (i * side + j) * slab * channels + c, row[j]);
            }
        }
    }
}

/* PLACES to pixels of OUT, with BIAS, and with ADDED, which is laid out as OUT, if there is any. */
static inline __attribute__((always_inline)) void tiles_out(int side, int64_t first, int64_t last, const float *places, int64_t rows,
                                                            int64_t columns, int64_t channels, int64_t start, int64_t slab,
                                                            const float *bias, const float *added, float *out)
{
    int size = side - 2;
    int64_t across = (columns + size - 1) / size;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t top = (start + tile) / across * size, left = (start + tile) % across * size;
        const float *from = places + tile * channels;
        for (int64_t c = 0; c < channels; c += LANES) {
            lanes middle[24], shift = load(bias + c);
            for (int j = 0; j < side; j++) {
                lanes column[6];
                for (int i = 0; i < side; i++)
                    column[i] = load(from + (i * side + j) * slab * channels + c);
                if (side == 4)
                    from_4(column, 1, middle + j, side);
                else
                    from_6(column, 1, middle + j, side);
            }
            for (int i = 0; i < size && top + i < rows; i++) {
                lanes row[4];
                if (side == 4)
                    from_4(middle + i * side, 1, row, 1);
                else
                    from_6(middle + i * side, 1, row, 1);
                for (int j = 0; j < size && left + j < columns; j++) {
                    int64_t place = ((top + i) * columns + left + j) * channels + c;
                    store(out + place, added ? load(added + place) + (row[j] + shift) : row[j] + shift);
                }
            }
        }
    }
}

void zoo_tiles_in_4(int64_t first, int64_t last, const float *x, int64_t rows, int64_t columns, int64_t channels, int64_t shift,
                    int64_t start, int64_t slab, float *places)
{
    tiles_in(4, first, last, x, rows, columns, channels, shift, start, slab, places);
}

void zoo_tiles_in_6(int64_t first, int64_t last, const float *x, int64_t rows, int64_t columns, int64_t channels, int64_t shift,
                    int64_t start, int64_t slab, float *places)
{
    tiles_in(6, first, last, x, rows, columns, channels, shift, start, slab, places);
}

void zoo_tiles_out_4(int64_t first, int64_t last, const float *places, int64_t rows, int64_t columns, int64_t channels, int64_t start,
                     int64_t slab, const float *bias, const float *added, float *out)
{
    tiles_out(4, first, last, places, rows, columns, channels, start, slab, bias, added, out);
}

void zoo_tiles_out_6(int64_t first, int64_t last, const float *places, int64_t rows, int64_t columns, int64_t channels, int64_t start,
                     int64_t slab, const float *bias, const float *added, float *out)
{
    tiles_out(6, first, last, places, rows, columns, channels, start, slab, bias, added, out);
}
