// Packed linear layers on the CPU: what the objects of the instruction sets share with the dispatcher.
//
// Everything is plain C: no torch, no Python. A layer is described by `Layer`, a call by `Job`.
//
// THE LAYOUT. A layer is a stack of bit planes, repacked once from the checkpoint's codes. The unit is a block of 64
// bytes: 16 rows, one 32-bit word each, so that a vector register holds a block and its lanes are rows: no sums across
// lanes, no tails, and the scales of 16 rows are a vector.
//
//     kind phase: a block is 16 complex rows x 8 complex columns x 4 planes (p and q of U, p and q of W) of one stage,
//                 where (p, q) are the sign bits of the code: re = (sp + sq) / 2, im = (sp - sq) / 2.
//     kind real:  a block is 16 rows x 32 columns of one plane. Binary has one plane; ternary has two, and its level
//                 is (sp + sq) / 2 as well: +1 = (+,+), 0 = (+,-), -1 = (-,-).
//
// Blocks follow each other as [32 rows][stage][columns][16 rows], so a thread reads memory straight through, and what is
// loaded of the activations serves two blocks; where 16 rows are left at the end, they are [stage][columns]. The columns
// are cut into segments of at most 256 that do not cross a tile of scales; the last block of a segment is padded.
//
// The bits of a word differ between the two modes (group: 4 neighbouring columns; plane: 0..3; real: one plane only):
//     exact: nibble group * 4 + plane holds the signs of 4 columns, as an index into a table of 16 sums +-x0+-x1+-x2+-x3.
//            Bit 3 says that x3 is subtracted; bits 0..2 are then inverted, so entry i + 8 is minus entry i.
//     int8:  byte j is column j of each group, bit group * 4 + plane its sign (1 is +): a masked block is an operand of
//            the instruction that multiplies and adds four bytes at a time.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { KIND_PHASE = 0, KIND_REAL = 1 };
enum { MODE_EXACT = 0, MODE_INT8 = 1 };
enum { BY_TENSOR = 0, BY_ROW = 1, BY_TILE = 2 };
enum { DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2 };
enum { LANES = 16, SEGMENT = 256 };

struct Layer {
    int32_t kind, stages;      // phase: residual stages; real: planes, 1 or 2
    int64_t rows, cols;        // of the codes: complex for phase
    int32_t granularity, mode;
    int64_t tile;
    const uint32_t* codes;     // repacked
    const float* scales;       // as in the checkpoint: (stages, 2, 2, *group) or (*group)
    int64_t rotation;          // width of the Hadamard blocks that the activations go through first; 0 or 1: none
};

struct Segment {
    int64_t begin, end;        // columns
    int64_t block, blocks;     // first block and number of blocks in a row of blocks
    int64_t tile;              // column of tiles
};

struct Job {
    struct Layer layer;
    const void* x;             // (tokens, in_features), contiguous, in dtype
    void* y;                   // (tokens, out_features), contiguous, in dtype
    const float* bias;         // (out_features) or null
    int64_t tokens;
    int32_t dtype;
    // derived, by the dispatcher:
    const struct Segment* segments;
    int64_t n_segments, row_blocks, blocks;
    int64_t token_block, n_token_blocks, n_ranges;
    int64_t next;              // the next item of work, taken atomically
    int32_t failed;
};

// The columns of a block.
static inline int64_t block_columns(int32_t kind) { return kind == KIND_PHASE ? 8 : 32; }
