/* Consecutive big-endian fields of 1 to 32 bits, beside the 64-bit integers that they hold. */
#include <stdint.h>
#include <string.h>

/* Files are big-endian, whatever the processor is. */
static inline uint64_t big_endian(uint64_t word)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

static inline uint64_t load(const uint8_t *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, 8);
    return big_endian(word);
}

/* PLACES is a constant wherever this is inlined with one. */
static inline __attribute__((always_inline)) void pack(
    const int64_t *codes, int64_t frames, const int64_t PLACES, const int64_t *bits, uint8_t *packed)
{
    uint64_t word = 0;
    int64_t room = 64;
    for (int64_t frame = 0; frame < frames; frame++)
        for (int64_t place = 0; place < PLACES; place++) {
            uint64_t code = (uint64_t)*codes++;
            room -= bits[place];
            if (room > 0) {
                word |= code << room;
                continue;
            }
            word = big_endian(word | code >> -room);
            memcpy(packed, &word, 8);
            packed += 8;
            room += 64;
            word = room < 64 ? code << room : 0;
        }
    for (; room < 64; room += 8, word <<= 8)
        *packed++ = (uint8_t)(word >> 56);
}

/* Codes [frames, places], each below 2 to the power of its place's bits; what the last byte lacks is filled up with zeros. */
void zoo_pack_fields(const int64_t *codes, int64_t frames, int64_t places, const int64_t *bits, uint8_t *packed)
{
    int64_t width = bits[0];
    if (places == 1)
        pack(codes, frames, 1, &width, packed);
    else
        pack(codes, frames, places, bits, packed);
}

static inline __attribute__((always_inline)) void unpack(
    const uint8_t *packed, int64_t groups, const int64_t FIELDS, int64_t bytes, const int64_t *offset, const int64_t *before,
    const int64_t *beside, int64_t *codes)
{
    for (int64_t group = 0; group < groups; group++, packed += bytes, codes += FIELDS)
        for (int64_t field = 0; field < FIELDS; field++)
            codes[field] = (int64_t)(load(packed + offset[field]) << before[field] >> beside[field]);
}

/* Groups of so many fields and bytes. A field lies in the eight bytes at its offset, which must all be there: `before` bits
 * stand above it, and `beside` bits are not of the field. */
void zoo_unpack_fields(
    const uint8_t *packed, int64_t groups, int64_t fields, int64_t bytes, const int64_t *offset, const int64_t *before,
    const int64_t *beside, int64_t *codes)
{
    if (fields == 8)
        unpack(packed, groups, 8, bytes, offset, before, beside, codes);
    else
        unpack(packed, groups, fields, bytes, offset, before, beside, codes);
}
