/* Products of rows of packed signs: length - 2 * popcount(a xor b). */

#include <stdint.h>

#define LANES 32
#define WORDS 128
#define FEW_ROWS 16

static long least(long a, long b) { return a < b ? a : b; }

/* Few rows read every weight once, so the words of a row lie side by side in a vector. */
static void few_rows(const uint64_t *a, const uint64_t *b, int32_t *out, long first, long last, long rows, long outputs,
                     long words, int32_t length)
{
    for (long j = first; j < last; j += 4) {
        const uint64_t *weights[4];
        for (long c = 0; c < 4; c++)
            weights[c] = b + least(j + c, last - 1) * words;
        for (long i = 0; i < rows; i++) {
            const uint64_t *row = a + i * words;
            uint64_t count[4] = {0, 0, 0, 0};
            for (long w = 0; w < words; w++) {
                count[0] += __builtin_popcountll(row[w] ^ weights[0][w]);
                count[1] += __builtin_popcountll(row[w] ^ weights[1][w]);
                count[2] += __builtin_popcountll(row[w] ^ weights[2][w]);
                count[3] += __builtin_popcountll(row[w] ^ weights[3][w]);
            }
            for (long c = 0; c < least(4, last - j); c++)
                out[i * outputs + j + c] = length - 2 * (int32_t)count[c];
        }
    }
}

/* Products of a row of a with LANES rows of b, whose words lie side by side. */
static void lanes(const uint64_t *row, const uint64_t *tile, int32_t *results, long width, long words, int32_t length, int first)
{
    uint64_t count[LANES] = {0};
    for (long w = 0; w < words; w++)
        for (int c = 0; c < LANES; c++)
            count[c] += __builtin_popcountll(row[w] ^ tile[w * LANES + c]);
    for (long c = 0; c < width; c++)
        results[c] = (first ? length : results[c]) - 2 * (int32_t)count[c];
}

/* Many rows use tiles of weights that stay in the cache, one output in each lane: nothing is summed across lanes. Short rows
   take several tiles at a time, so that results are not written a few at a time to far places. */
static void many_rows(const uint64_t *a, const uint64_t *b, int32_t *out, long first, long last, long rows, long outputs,
                      long words, int32_t length)
{
    uint64_t tiles[WORDS * LANES] = {0};
    long span = LANES * (words < WORDS ? WORDS / words : 1);
    for (long j = first; j < last; j += span) {
        long width = least(span, last - j);
        for (long start = 0; start < words; start += WORDS) {
            long depth = least(WORDS, words - start);
            for (long c = 0; c < width; c++)
                for (long w = 0; w < depth; w++)
                    tiles[(c / LANES * depth + w) * LANES + c % LANES] = b[(j + c) * words + start + w];
            for (long i = 0; i < rows; i++)
                for (long c = 0; c < width; c += LANES)
                    lanes(a + i * words + start, tiles + c * depth, out + i * outputs + j + c, least(LANES, width - c), depth,
                          length, start == 0);
        }
    }
}

/* The products of all rows of a with the rows of b from first to last - 1; both have the same number of 64-bit words. */
void binary_matmul(long first, long last, const uint64_t *a, const uint64_t *b, int32_t *out, long rows, long outputs,
                   long words, int32_t length)
{
    if (rows < FEW_ROWS)
        few_rows(a, b, out, first, last, rows, outputs, words, length);
    else
        many_rows(a, b, out, first, last, rows, outputs, words, length);
}
