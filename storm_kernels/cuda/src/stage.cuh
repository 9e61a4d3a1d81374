// A tile's inputs as they lie in memory, brought into shared memory while the tile before is computed.
// With ASYNC every row is aligned and comes by asynchronous 16-byte copies; else element by element.
#pragma once
#include "scan.cuh"

struct Stage {
    __align__(16) U_T u[TILE][BLOCK_CHANNELS];
    __align__(16) DELTA_T delta[TILE][BLOCK_CHANNELS];
    __align__(16) Z_T z[TILE][BLOCK_CHANNELS];
    __align__(16) B_T B[TILE][STATES];
    __align__(16) C_T C[TILE][STATES];
};

// A thread's part in copying the rows of one array, tile after tile: with ASYNC `token` and every PER_ROUND-th after it, 16 bytes of each.
template <int WIDTH, typename T>
struct Rows {
    static constexpr int PIECE = 16 / sizeof(T), PIECES = WIDTH >= PIECE ? WIDTH / PIECE : 1, PER_ROUND = THREADS / PIECES;
    static constexpr int ROUNDS = (TILE + PER_ROUND - 1) / PER_ROUND;
    const T* from;       // the thread's piece of the tile's first token; without ASYNC that token's row
    int64 row;           // elements from a token to the next in scan order
    int token, column, count;

    // `row0` is the row of position 0, of which `columns` elements exist.
    __device__ __forceinline__ Rows(const T* row0, int64 step, int columns) : from(row0), row(step), token(0), column(0), count(columns) {
        if (!ASYNC) return;
        token = threadIdx.x / PIECES;
        column = threadIdx.x % PIECES * PIECE;
        from += token * row + column;
        count = columns - column < 0 ? 0 : columns - column < PIECE ? columns - column : PIECE;
    }
    __device__ __forceinline__ void copy(T (&to)[TILE][WIDTH], int tokens) {
        if (ASYNC) {
#pragma unroll
            for (int k = 0; k < ROUNDS; k++) {
                int t = token + k * PER_ROUND;
                if (TILE % PER_ROUND == 0 || t < TILE)
                    copy16_async(&to[t][column], from + k * PER_ROUND * row, t < tokens ? count * (int)sizeof(T) : 0);
            }
        } else {
            for (int i = threadIdx.x; i < TILE * WIDTH; i += THREADS) {
                int t = i / WIDTH, c = i % WIDTH;
                to[t][c] = t < tokens && c < count ? from[t * row + c] : T();
            }
        }
        from += TILE * row;
    }
};

// Where the tile's tokens go, needed a tile before it is staged.
__device__ __forceinline__ void stage_map(TokenEntry (&to)[TILE], const Problem& p, const Share& s, int64 first) {
    int t = threadIdx.x;
    if (REDUCED && t < TILE && first + t < s.length) copy16_async(&to[t], p.map + s.token(first + t), 16);
}

// The rows of z under a reduction: those of the tokens that are kept, wherever they lie.
__device__ __forceinline__ void stage_kept(Z_T (&to)[TILE][BLOCK_CHANNELS], const Problem& p, const Share& s, const TokenEntry (&map)[TILE], int64 first,
                                           int tokens) {
    constexpr int PIECE = 16 / sizeof(Z_T), PIECES = BLOCK_CHANNELS / PIECE;
    const Z_T* z = p.z + s.batch * p.z_batch + s.channel;
    for (int i = threadIdx.x; i < TILE * PIECES; i += THREADS) {
        int t = i / PIECES, c = i % PIECES * PIECE;
        bool kept = t < tokens && map[t].cell >= 0;
        const Z_T* row = z + (!kept ? 0 : p.z_kept ? map[t].kept : s.token(first + t)) * p.z_row;
        if (ASYNC) {
            int count = s.channels - c < PIECE ? s.channels - c : PIECE;
            copy16_async(&to[t][c], row + c, kept && count > 0 ? count * (int)sizeof(Z_T) : 0);
        } else {
#pragma unroll
            for (int k = 0; k < PIECE; k++) to[t][c + k] = kept && c + k < s.channels ? row[c + k] : Z_T();
        }
    }
}

// All the arrays of a block's share.
struct Inputs {
    Rows<BLOCK_CHANNELS, U_T> u;
    Rows<BLOCK_CHANNELS, DELTA_T> delta;
    Rows<BLOCK_CHANNELS, Z_T> z;
    Rows<STATES, B_T> B;
    Rows<STATES, C_T> C;

    template <typename T>
    static __device__ __forceinline__ const T* first_row(const T* array, int64 batch, int64 row, const Share& s) {
        return array + s.batch * batch + s.token(0) * row;
    }
    __device__ __forceinline__ Inputs(const Problem& p, const Direction& d, const Share& s)
        : u(first_row(d.u, d.u_batch, d.u_row, s) + s.channel, s.reverse ? -d.u_row : d.u_row, s.channels),
          delta(first_row(d.delta, d.delta_batch, d.delta_row, s) + s.channel, s.reverse ? -d.delta_row : d.delta_row, s.channels),
          z(first_row(p.z, p.z_batch, p.z_row, s) + s.channel, s.reverse ? -p.z_row : p.z_row, s.channels),
          B(first_row(d.B, d.B_batch, d.B_row, s) + s.group * d.B_group, s.reverse ? -d.B_row : d.B_row, D_STATE),
          C(first_row(d.C, d.C_batch, d.C_row, s) + s.group * d.C_group, s.reverse ? -d.C_row : d.C_row, D_STATE) {}

    // Tiles are asked for in order.
    __device__ __forceinline__ void stage(Stage& to, const Problem& p, const Share& s, const TokenEntry (&map)[TILE], int64 first) {
        const int tokens = (int)smaller(TILE, s.length - first);
        u.copy(to.u, tokens);
        delta.copy(to.delta, tokens);
        B.copy(to.B, tokens);
        C.copy(to.C, tokens);
        if (GATED && REDUCED) stage_kept(to.z, p, s, map, first, tokens);
        if (GATED && !REDUCED) z.copy(to.z, tokens);
    }
};
