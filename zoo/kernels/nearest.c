/* Nearest codes of short vectors: scores of groups of codes in matrix units or vector registers, their maximum beside the best one
 * so far, and exact distances within the groups that can win. `zoo.kernels.codebook` has the bound on the error of the scores.
 *
 * Scores of a group for 16 queries are a register, so what is done once per group and query is one comparison. A group that passes
 * is noted for its query; where too many are, the query is given up and answered with -1.
 */
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

/* Queries at a time, groups noted for one of them, and numbers of the longest query. */
enum { LANES = 16, QUERIES = 128, VECTORS = QUERIES / LANES, NOTED = 24, LONGEST = 256 };

typedef struct {
    float score;
    int32_t first; /* code of the group */
} Group;

typedef struct {
    float best[QUERIES], window[QUERIES], least[QUERIES];
    int32_t counts[QUERIES]; /* of groups noted, -1 when given up */
    Group groups[QUERIES][NOTED];
} State;

static void start(State *state, const float *window, int64_t queries)
{
    for (int q = 0; q < QUERIES; q++) {
        int used = q < queries && isfinite(window[q]);
        state->best[q] = -INFINITY;
        state->window[q] = used ? window[q] : 0;
        state->least[q] = used ? -INFINITY : INFINITY;
        state->counts[q] = used ? 0 : -1;
    }
}

/* Forget the groups that cannot win any more. */
static void forget(State *state, int q)
{
    int kept = 0;
    for (int n = 0; n < state->counts[q]; n++)
        if (state->groups[q][n].score >= state->least[q])
            state->groups[q][kept++] = state->groups[q][n];
    state->counts[q] = kept;
}

/* Note a group for the queries of a vector to whom it may hold the nearest code; HIGHEST are its best scores. */
static __attribute__((noinline)) void note(State *state, int vector, __mmask16 passing, __m512 highest, int32_t first)
{
    float scores[LANES];
    _mm512_storeu_ps(scores, highest);
    for (unsigned mask = passing; mask; mask &= mask - 1) {
        int lane = __builtin_ctz(mask), q = vector * LANES + lane;
        float score = scores[lane];
        if (score > state->best[q]) {
            state->best[q] = score;
            state->least[q] = score - state->window[q];
        }
        if (state->counts[q] == NOTED)
            forget(state, q);
        if (state->counts[q] == NOTED) {
            state->counts[q] = -1;
            state->least[q] = INFINITY;
        } else {
            state->groups[q][state->counts[q]++] = (Group){score, first};
        }
    }
}

static inline void consider(State *state, int vector, __m512 highest, int32_t first)
{
    __mmask16 passing = _mm512_cmp_ps_mask(highest, _mm512_loadu_ps(state->least + vector * LANES), _CMP_GE_OQ);
    if (__builtin_expect(passing != 0, 0))
        note(state, vector, passing, highest, first);
}

/* Squared distance or negative product in float64, summed by halves. */
static double distance(const float *x, const float *y, int64_t dim, int dot)
{
    double terms[LONGEST];
    for (int64_t d = 0; d < dim; d++) {
        double a = x[d], b = y[d];
        terms[d] = dot ? -(a * b) : (a - b) * (a - b);
    }
    for (int64_t width = dim; width > 1;) {
        int64_t half = (int64_t)1 << (63 - __builtin_clzll((unsigned long long)(width - 1)));
        for (int64_t d = half; d < width; d++)
            terms[d - half] += terms[d];
        width = half;
    }
    return terms[0];
}

/* The nearest code of each query, the first of several; -1 for those that were given up. */
static void finish(State *state, int64_t queries, const float *x, const float *codes, int64_t count, int64_t dim, int size, int dot,
                   int64_t *found)
{
    for (int q = 0; q < queries; q++) {
        double shortest = INFINITY;
        found[q] = -1;
        if (state->counts[q] < 0)
            continue;
        forget(state, q);
        for (int n = 0; n < state->counts[q]; n++) {
            int64_t first = state->groups[q][n].first, end = first + size < count ? first + size : count;
            for (int64_t code = first; code < end; code++) {
                double length = distance(x + q * dim, codes + code * dim, dim, dot);
                if (length < shortest) {
                    shortest = length;
                    found[q] = code;
                }
            }
        }
    }
}

/* ---- float32 in vector registers */

enum { ROWS = 8 };

/* Blocks FIRST to LAST of QUERIES queries. FACTORS [queries, columns] and OPERAND [rows, columns] are the sides of the product, with
 * rows a multiple of 64; WINDOW is how far below the best score a winner's can be. */
void zoo_nearest_float32(int64_t first, int64_t last, const float *factors, const float *operand, const float *window, const float *x,
                         const float *codes, int64_t *found, int64_t queries, int64_t rows, int64_t columns, int64_t count,
                         int64_t dim, int64_t dot)
{
    State state;
    float turned[LONGEST][2 * LANES];
    for (int64_t begin = first * QUERIES; begin < last * QUERIES && begin < queries; begin += QUERIES) {
        int64_t here = queries - begin < QUERIES ? queries - begin : QUERIES;
        start(&state, window + begin, here);
        for (int vector = 0; vector * LANES < here; vector += 2) {
            for (int q = 0; q < 2 * LANES; q++)
                for (int64_t c = 0; c < columns; c++)
                    turned[c][q] = vector * LANES + q < here ? factors[(begin + vector * LANES + q) * columns + c] : 0;
            for (int64_t row = 0; row < rows; row += ROWS) {
                const float *code = operand + row * columns;
                __m512 left[ROWS], right[ROWS];
                for (int r = 0; r < ROWS; r++)
                    left[r] = right[r] = _mm512_setzero_ps();
                for (int64_t c = 0; c < columns; c++) {
                    __m512 a = _mm512_loadu_ps(turned[c]), b = _mm512_loadu_ps(turned[c] + LANES);
                    for (int r = 0; r < ROWS; r++) {
                        __m512 number = _mm512_set1_ps(code[r * columns + c]);
                        left[r] = _mm512_fmadd_ps(number, a, left[r]);
                        right[r] = _mm512_fmadd_ps(number, b, right[r]);
                    }
                }
                for (int half = ROWS / 2; half; half /= 2)
                    for (int r = 0; r < half; r++) {
                        left[r] = _mm512_max_ps(left[r], left[r + half]);
                        right[r] = _mm512_max_ps(right[r], right[r + half]);
                    }
                consider(&state, vector, left[0], (int32_t)row);
                consider(&state, vector + 1, right[0], (int32_t)row);
            }
        }
        finish(&state, here, x + begin * dim, codes, count, dim, ROWS, (int)dot, found + begin);
    }
}

int zoo_nearest_longest(void) { return LONGEST; }
#else
void zoo_nearest_float32(void) {}
int zoo_nearest_longest(void) { return 0; }
#endif

/* ---- bfloat16 in matrix units */

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 16, STEP = 32 }; /* rows of a tile, and numbers of one of its rows */

/* Whether the system lets this process use the matrix units. */
int zoo_nearest_matrix_units(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILES = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILES) == 0;
}

static inline __m512 highest_of(const float *tile)
{
    __m512 a = _mm512_load_ps(tile), b = _mm512_load_ps(tile + LANES);
    __m512 c = _mm512_load_ps(tile + 2 * LANES), d = _mm512_load_ps(tile + 3 * LANES);
    for (int row = 4; row < SIDE; row += 4) {
        a = _mm512_max_ps(a, _mm512_load_ps(tile + row * LANES));
        b = _mm512_max_ps(b, _mm512_load_ps(tile + (row + 1) * LANES));
        c = _mm512_max_ps(c, _mm512_load_ps(tile + (row + 2) * LANES));
        d = _mm512_max_ps(d, _mm512_load_ps(tile + (row + 3) * LANES));
    }
    return _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d));
}

/* Scores of 32 codes for 32 queries, to OUT as four tiles of codes by queries: the first codes for all queries, then the second. */
static inline void scores_of(const uint16_t *code, int64_t columns, const uint16_t *left, const uint16_t *right, int64_t steps,
                             float *out)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, code + step * STEP, (int)(2 * columns));
        _tile_loadd(5, code + SIDE * columns + step * STEP, (int)(2 * columns));
        _tile_loadd(6, left + step * SIDE * STEP, 2 * STEP);
        _tile_loadd(7, right + step * SIDE * STEP, 2 * STEP);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, 4 * LANES);
    _tile_stored(1, out + SIDE * LANES, 4 * LANES);
    _tile_stored(2, out + 2 * SIDE * LANES, 4 * LANES);
    _tile_stored(3, out + 3 * SIDE * LANES, 4 * LANES);
}

/* As `zoo_nearest_float32`, with both sides in bfloat16 and columns a multiple of 32. */
void zoo_nearest_bfloat16(int64_t first, int64_t last, const uint16_t *factors, const uint16_t *operand, const float *window,
                          const float *x, const float *codes, int64_t *found, int64_t queries, int64_t rows, int64_t columns,
                          int64_t count, int64_t dim, int64_t dot)
{
    State state;
    struct __attribute__((aligned(64))) {
        uint8_t palette, start;
        uint8_t reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    _Static_assert(sizeof shapes == 64, "the layout of the processor");
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = SIDE;
    }
    int64_t steps = columns / STEP, pairs = columns / 2;
    /* Queries as the units want them: pairs of numbers of 16 queries side by side. */
    uint32_t turned[VECTORS][LONGEST / 2][LANES] __attribute__((aligned(64)));
    float scores[2][4 * SIDE * LANES] __attribute__((aligned(64)));
    _tile_loadconfig(&shapes);
    for (int64_t begin = first * QUERIES; begin < last * QUERIES && begin < queries; begin += QUERIES) {
        int64_t here = queries - begin < QUERIES ? queries - begin : QUERIES;
        int vectors = (int)((here + 2 * LANES - 1) / (2 * LANES)) * 2;
        start(&state, window + begin, here);
        for (int64_t q = 0; q < vectors * LANES; q++) {
            uint32_t row[LONGEST / 2] = {0};
            if (q < here)
                memcpy(row, factors + (begin + q) * columns, 2 * columns);
            for (int64_t p = 0; p < pairs; p++)
                turned[q / LANES][p][q % LANES] = row[p];
        }
        /* The scores of one round are looked at while the units work on the next. */
        int64_t rounds = rows / (2 * SIDE) * (vectors / 2);
        for (int64_t round = 0; round <= rounds; round++) {
            if (round < rounds) {
                int64_t row = round / (vectors / 2) * 2 * SIDE, vector = round % (vectors / 2) * 2;
                scores_of(operand + row * columns, columns, (const uint16_t *)turned[vector], (const uint16_t *)turned[vector + 1],
                          steps, scores[round & 1]);
            }
            if (round > 0) {
                int64_t row = (round - 1) / (vectors / 2) * 2 * SIDE, vector = (round - 1) % (vectors / 2) * 2;
                const float *tiles = scores[(round - 1) & 1];
                for (int tile = 0; tile < 4; tile++)
                    consider(&state, (int)vector + tile % 2, highest_of(tiles + tile * SIDE * LANES),
                             (int32_t)row + tile / 2 * SIDE);
            }
        }
        finish(&state, here, x + begin * dim, codes, count, dim, SIDE, (int)dot, found + begin);
    }
    _tile_release();
}
#else
int zoo_nearest_matrix_units(void) { return 0; }
void zoo_nearest_bfloat16(void) {}
#endif
