// A tile's inputs as they lie in memory, brought into shared memory while the tile before is
// computed. With ASYNC every row is made of whole 16-byte pieces and comes by asynchronous copies;
// else element by element.
#pragma once
#include "scan.cuh"

struct Stage {
    __align__(16) U_T u[TILE][BLOCK_CHANNELS];
    __align__(16) DELTA_T delta[TILE][BLOCK_CHANNELS];
    __align__(16) Z_T z[TILE][BLOCK_CHANNELS];
    __align__(16) B_T B[TILE][STATES];
    __align__(16) C_T C[TILE][STATES];
};
// Tokens: no token is as far off as this, and no count of tokens that are left says more.
constexpr int FAR = 1 << 30;
constexpr int C_AFTER_B = (TILE * STATES * sizeof(B_T) + 15) / 16 * 16;  // bytes

// `p` and a number of bytes: offsets that a thread uses tile after tile are `held` in registers.
template <typename T>
__device__ __forceinline__ T* past(T* p, int bytes) {
    return (T*)((char*)p + bytes);
}
template <typename T>
__device__ __forceinline__ const T* past(const T* p, int bytes) {
    return (const T*)((const char*)p + bytes);
}

// A thread's part in copying the rows of one array, tile after tile: with ASYNC 16 bytes of its row
// and of every PER_ROUND-th after it.
template <int WIDTH, typename T>
struct Rows {
    static constexpr int PIECE = 16 / sizeof(T), PIECES = WIDTH >= PIECE ? WIDTH / PIECE : 1,
                         PER_ROUND = THREADS / PIECES;
    static constexpr int ROUNDS = (TILE + PER_ROUND - 1) / PER_ROUND;
    const T* from;       // the thread's piece of the tile's first row; without ASYNC that row
    int64 row, step;     // elements from a token to the next in scan order; bytes from a tile to the next
    int thread, count;   // without ASYNC `count` elements of a row exist
    int token, to;       // the thread's first row, far off if its piece does not exist; where the piece goes in bytes

    // `row0` is the row of position 0, of which `columns` elements exist.
    __device__ __forceinline__ Rows(const T* row0, int64 row, int columns, int thread = threadIdx.x)
        : from(row0), row(row), step(held(row * TILE * (int64)sizeof(T))), thread(thread), count(columns),
          token(0), to(0) {
        if (!ASYNC) return;
        const int column = thread % PIECES * PIECE, first = thread / PIECES;
        token = held(column < columns ? first : FAR);
        to = held((first * WIDTH + column) * (int)sizeof(T));
        from += first * row + column;
    }
    __device__ __forceinline__ void seek(const T* row0) {
        from = row0 + (ASYNC ? thread / PIECES * row + thread % PIECES * PIECE : 0);
    }
    // Rows as wide as `other`'s are copied by the same threads.
    template <typename V>
    __device__ __forceinline__ void share(const Rows<WIDTH, V>& other) {
        if (sizeof(V) != sizeof(T)) return;
        token = other.token;
        to = other.to;
    }
    __device__ __forceinline__ bool owns(int round) const {
        return TILE % PER_ROUND == 0 || thread / PIECES + round * PER_ROUND < TILE;
    }

    __device__ __forceinline__ void copy(T (&rows)[TILE][WIDTH], int tokens) {
        if (ASYNC) {
#pragma unroll
            for (int k = 0; k < ROUNDS; k++)
                if (owns(k))
                    copy16_async(past(&rows[k * PER_ROUND][0], to), from + k * PER_ROUND * row,
                        token + k * PER_ROUND < tokens ? 16 : 0);
        } else {
            for (int i = threadIdx.x; i < TILE * WIDTH; i += THREADS) {
                int t = i / WIDTH, c = i % WIDTH;
                rows[t][c] = t < tokens && c < count ? from[t * row + c] : T();
            }
        }
        from = (const T*)((const char*)from + step);
    }
};

// B and C: where one round of copies does for both, half the threads copy each.
struct StateRows {
    static constexpr int EACH = TILE * Rows<STATES, B_T>::PIECES;
    static constexpr bool TOGETHER = sizeof(B_T) == sizeof(C_T) && 2 * EACH <= THREADS;
    Rows<STATES, B_T> B;
    Rows<STATES, C_T> C;

    __device__ __forceinline__ StateRows(const B_T* B0, int64 B_row, const C_T* C0, int64 C_row)
        : B(B0, B_row, D_STATE), C(C0, C_row, D_STATE) {
        if (!TOGETHER || !ASYNC) return;
        const bool second = threadIdx.x >= EACH;
        B = Rows<STATES, B_T>(second ? (const B_T*)C0 : B0, second ? C_row : B_row, D_STATE, threadIdx.x % EACH);
        if (second) B.to += C_AFTER_B;
    }
    __device__ __forceinline__ void copy(Stage& to, int tokens) {
        if (!TOGETHER || !ASYNC) {
            B.copy(to.B, tokens);
            C.copy(to.C, tokens);
        } else if (2 * EACH == THREADS || threadIdx.x < 2 * EACH) {
            B.copy(to.B, tokens);
        }
    }
};

// All the arrays of a block's share, tile after tile in order.
struct Inputs {
    Rows<BLOCK_CHANNELS, U_T> u;
    Rows<BLOCK_CHANNELS, DELTA_T> delta;
    Rows<BLOCK_CHANNELS, Z_T> z;
    StateRows states;

    template <typename T>
    static __device__ __forceinline__ const T* first_row(const T* array, int64 batch, int64 row, const Share& s) {
        return array + s.batch * batch + s.token(0) * row + s.channel;
    }
    __device__ __forceinline__ Inputs(const Problem& p, const Direction& d, const Share& s)
        : u(first_row(d.u, d.u_batch, d.u_row, s), s.reverse ? -d.u_row : d.u_row, s.channels),
          delta(first_row(d.delta, d.delta_batch, d.delta_row, s), s.reverse ? -d.delta_row : d.delta_row,
              s.channels),
          z(first_row(p.z, p.z_batch, REDUCED ? 0 : p.z_row, s), s.reverse ? -p.z_row : p.z_row, s.channels),
          states(first_row(d.B, d.B_batch, d.B_row, s) + s.group * d.B_group - s.channel,
              s.reverse ? -d.B_row : d.B_row,
              first_row(d.C, d.C_batch, d.C_row, s) + s.group * d.C_group - s.channel,
              s.reverse ? -d.C_row : d.C_row) {
        delta.share(u);
        z.share(u);
    }

    // Everything but z: `tokens` of this tile and those after it exist, as far as they matter.
    __device__ __forceinline__ void stage(Stage& to, int tokens) {
        u.copy(to.u, tokens);
        delta.copy(to.delta, tokens);
        states.copy(to, tokens);
    }
};

// The rows of z under a reduction: those of a tile's kept tokens, wherever they lie.
__device__ __forceinline__ void load_kept(
    Z_T (&rows)[TILE][BLOCK_CHANNELS], const Problem& p, const Share& s, int64 first, int tokens) {
    const Z_T* z = p.z + s.batch * p.z_batch + s.channel;
    for (int i = threadIdx.x; i < TILE * BLOCK_CHANNELS; i += THREADS) {
        const int t = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
        const TokenEntry* own = p.map + s.token(first + (t < tokens ? t : 0));
        rows[t][c] = t < tokens && c < s.channels && own->cell >= 0
                         ? z[(p.z_kept ? own->kept : own->token) * p.z_row + c]
                         : Z_T();
    }
}
