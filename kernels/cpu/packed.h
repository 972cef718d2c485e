/* How weights lie in memory once packed: strips of 64 output rows, each a run of blocks of 64 columns, so that a strip is read
 * as one stream. Rows past the matrix multiply to zero.
 *
 * An NF4 block is 2048 bytes of codes and then 64 float scales (bitsandbytes' absmax). Its codes lie in one of two orders,
 * whichever the kernels unpack fastest:
 *
 *   pairs   byte [r / 32][j][PLACE(r % 32)] is bitsandbytes' own byte of row r and columns 2j (high nibble) and 2j + 1. PLACE
 *           puts a row where AVX2's unpacking of bytes to floats, which works on halves of a register, makes it lane r of its
 *           vector.
 *   dwords  dword [g][r] holds columns 8g .. 8g + 7 of row r: byte i has column 8g + i low and 8g + 4 + i high. One shift
 *           and one permutation make sixteen floats (AVX-512).
 *
 * A block of plain weights is [64 columns][64 rows] of floats, or of their upper halves (bfloat16); or [32][64 rows] of pairs of
 * columns in bfloat16. */
#ifndef LORAPLEX_PACKED_H
#define LORAPLEX_PACKED_H

#include "cpu.h"

#define STRIP 64 /* rows of a strip */
#define HALF 32  /* rows whose codes lie together in pairs */
#define BLOCK 64 /* columns of a block: bitsandbytes' usual blocksize, and the only one that is packed */
#define NF4_CODES (STRIP * BLOCK / 2)
#define NF4_BYTES (NF4_CODES + STRIP * 4)
#define BF16_BYTES (STRIP * BLOCK * 2)
#define F32_BYTES (STRIP * BLOCK * 4)
#define PLACE(r) ((r) / 4 % 2 * 16 + ((r) < 16 ? (r) / 8 * 4 + (r) % 4 : 8 + (r) % 4 * 2 + (r) / 8 % 2))

/* What the codes stand for (Dettmers et al. 2023, QLoRA, appendix E). */
static const float NF4_VALUES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

#endif
