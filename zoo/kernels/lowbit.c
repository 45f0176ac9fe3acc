/* Products of float32 rows with packed weights of 4, 6 or 8 bits, decoded in registers.
 *
 * y[b][o] = sum over blocks k of scale[o][k] * (sum over the columns of the block of x[b][c] * value(code[o][c]))
 *
 * Inputs are rearranged by the caller into chunks of 32 columns, of which 4-bit codes want the even columns first, because the
 * two codes of a byte then meet neighbouring vectors. A code of 4 bits looks its value up in one register, one of 6 bits in
 * two, one of 8 bits is shifted into the place of a float16 and converted.
 */
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)
#include <immintrin.h>

typedef struct {
    const float *table;      /* 16 values, or 32 of the magnitudes of 6-bit codes */
    int mantissa_bits;       /* of an 8-bit code */
    int bits;
} Format;

typedef struct {
    int64_t row_bytes, chunks, scales_per_row, chunks_per_scale, halves, tail_bytes, y_stride;
} Shape;

int zoo_lowbit_supported(void) { return 1; }

/* The values of 32 codes, as two vectors. */
static inline __attribute__((always_inline)) void decode_chunk(const uint8_t *code, Format format, __m512 *first, __m512 *second)
{
    if (format.bits == 4) {
        __m512 table = _mm512_loadu_ps(format.table);
        __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)code));
        /* The permutation reads the lowest four bits of an index only. */
        *first = _mm512_permutexvar_ps(pair, table);
        *second = _mm512_permutexvar_ps(_mm512_srli_epi32(pair, 4), table);
    } else if (format.bits == 6) {
        __m512 low = _mm512_loadu_ps(format.table), high = _mm512_loadu_ps(format.table + 16);
        /* Byte 3g + 0, 1, 2 of group g to each of its four lanes; the fourth byte of a lane is zero. */
        const __m512i spread = _mm512_setr_epi32(
            (int)0x80020100, (int)0x80020100, (int)0x80020100, (int)0x80020100, (int)0x80050403, (int)0x80050403,
            (int)0x80050403, (int)0x80050403, (int)0x80080706, (int)0x80080706, (int)0x80080706, (int)0x80080706,
            (int)0x800b0a09, (int)0x800b0a09, (int)0x800b0a09, (int)0x800b0a09);
        const __m512i shift = _mm512_setr_epi32(0, 6, 12, 18, 0, 6, 12, 18, 0, 6, 12, 18, 0, 6, 12, 18);
        const __m512i sign = _mm512_set1_epi32((int)0x80000000);
        for (int half = 0; half < 2; half++) {
            /* Bytes 0 to 15, of which 12 are wanted, and 8 to 23, of which the last 12 are: none beyond the chunk. */
            __m512i groups = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(code + 8 * half)));
            __m512i place = half ? _mm512_add_epi8(spread, _mm512_set1_epi32(0x00040404)) : spread;
            __m512i index = _mm512_srlv_epi32(_mm512_shuffle_epi8(groups, place), shift);
            __m512 magnitude = _mm512_permutex2var_ps(low, index, high);
            __m512i negative = _mm512_and_si512(_mm512_slli_epi32(index, 26), sign);
            __m512 value = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(magnitude), negative));
            *(half ? second : first) = value;
        }
    } else {
        __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)code));
        __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7f));
        magnitude = _mm512_sll_epi16(magnitude, _mm_cvtsi32_si128(10 - format.mantissa_bits));
        __m512i sign = _mm512_and_si512(_mm512_slli_epi16(wide, 8), _mm512_set1_epi16((short)0x8000));
        __m512i half = _mm512_or_si512(magnitude, sign);
        *first = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        *second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    }
}

/* ROWS outputs of BATCH inputs, both constants wherever this is inlined; every load of the inputs serves all rows. */
static inline __attribute__((always_inline)) void product(
    const uint8_t *codes, const float *scales, const float *x, float *y, const Shape *shape, const int ROWS, const int BATCH,
    Format format)
{
    __m512 total[2][8];
    uint8_t tails[2][32] = {{0}};
    const int chunk_bytes = 4 * format.bits;
    for (int r = 0; r < ROWS; r++) {
        if (shape->tail_bytes)
            memcpy(tails[r], codes + r * shape->row_bytes + (shape->chunks - 1) * chunk_bytes, shape->tail_bytes);
        for (int b = 0; b < BATCH; b++)
            total[r][b] = _mm512_setzero_ps();
    }
    for (int64_t chunk = 0; chunk < shape->chunks; chunk++) {
        __m512 first[2], second[2];
        for (int r = 0; r < ROWS; r++) {
            const uint8_t *code = codes + r * shape->row_bytes + chunk * chunk_bytes;
            const float *scale = scales + r * shape->scales_per_row;
            decode_chunk(shape->tail_bytes && chunk == shape->chunks - 1 ? tails[r] : code, format, &first[r], &second[r]);
            if (shape->chunks_per_scale) {
                __m512 factor = _mm512_set1_ps(scale[chunk / shape->chunks_per_scale]);
                first[r] = _mm512_mul_ps(first[r], factor);
                second[r] = _mm512_mul_ps(second[r], factor);
            } else if (shape->halves) {
                /* Two scales in a chunk: columns 0 to 15 and 16 to 31. */
                __m512 left = _mm512_set1_ps(scale[2 * chunk]), right = _mm512_set1_ps(scale[2 * chunk + 1]);
                __m512 mixed = _mm512_mask_blend_ps(0xff00, left, right);
                first[r] = _mm512_mul_ps(first[r], format.bits == 4 ? mixed : left);
                second[r] = _mm512_mul_ps(second[r], format.bits == 4 ? mixed : right);
            }
        }
        for (int b = 0; b < BATCH; b++) {
            const float *row = x + (chunk * BATCH + b) * 32;
            __m512 left = _mm512_loadu_ps(row), right = _mm512_loadu_ps(row + 16);
            for (int r = 0; r < ROWS; r++) {
                total[r][b] = _mm512_fmadd_ps(first[r], left, total[r][b]);
                total[r][b] = _mm512_fmadd_ps(second[r], right, total[r][b]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float factor = shape->chunks_per_scale || shape->halves ? 1.0f : scales[r * shape->scales_per_row];
        for (int b = 0; b < BATCH; b++)
            y[b * shape->y_stride + r] = _mm512_reduce_add_ps(total[r][b]) * factor;
    }
}

#define OF_ROWS(ROWS, BATCH, BITS)                                                                                        \
    for (; row + ROWS <= last; row += ROWS) {                                                                             \
        Format format = {table, mantissa_bits, BITS};                                                                     \
        product(codes + row * row_bytes, scale + row * scales_per_row, x, y + row, &shape, ROWS, BATCH, format);          \
    }
#define OF_BITS(BATCH, BITS) { OF_ROWS(2, BATCH, BITS) OF_ROWS(1, BATCH, BITS) }
#define OF_BATCH(BATCH)                                                                                                   \
    case BATCH:                                                                                                           \
        if (bits == 4) OF_BITS(BATCH, 4) else if (bits == 6) OF_BITS(BATCH, 6) else OF_BITS(BATCH, 8)                     \
        break;

/* Rows `first` to `last` of the weight times up to 8 inputs; x is [chunks, batch, 32], filled up with zeros. Of the last chunk
 * of a row, `tail_bytes` are there, or all if it is 0. */
void zoo_lowbit_product(
    int64_t first, int64_t last, const uint8_t *codes, const float *scale, const float *x, float *y, const float *table,
    int64_t row_bytes, int64_t chunks, int64_t scales_per_row, int64_t chunks_per_scale, int64_t halves, int64_t tail_bytes,
    int64_t y_stride, int64_t batch, int64_t bits, int64_t mantissa_bits)
{
    Shape shape = {row_bytes, chunks, scales_per_row, chunks_per_scale, halves, tail_bytes, y_stride};
    int64_t row = first;
    switch (batch) {
        OF_BATCH(1) OF_BATCH(2) OF_BATCH(3) OF_BATCH(4) OF_BATCH(5) OF_BATCH(6) OF_BATCH(7) OF_BATCH(8)
    }
}
#else
int zoo_lowbit_supported(void) { return 0; }
void zoo_lowbit_product(void) {}
#endif
