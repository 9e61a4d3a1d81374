// A tile's inputs in their own number formats, brought into shared memory while the tile before is
// computed. There are two stages; the tiles take them in turn:
//
//     Stage   u, delta, z   [token][channel of the block]
//             B, C          [token][state]
//
// With ASYNC every row consists of whole 16-byte pieces, which come by asynchronous copies; else
// rows come element by element.
#pragma once
#include "scan.cuh"

struct Stage {
    __align__(16) U_T u[SCAN_TILE][BLOCK_CHANNELS];
    __align__(16) DELTA_T delta[SCAN_TILE][BLOCK_CHANNELS];
    __align__(16) Z_T z[SCAN_TILE][BLOCK_CHANNELS];
    __align__(16) B_T B[SCAN_TILE][STATES];
    __align__(16) C_T C[SCAN_TILE][STATES];
};
// A number of tokens: no token that a thread looks at is as far off, and counts of tokens that are
// left stop here.
constexpr int FAR = 1 << 30;
constexpr int C_AFTER_B = (SCAN_TILE * STATES * sizeof(B_T) + 15) / 16 * 16;  // bytes from a stage's B to its C

// A thread's part in copying the rows of one array, tile after tile. With ASYNC it is one piece of
// 16 bytes of every PER_ROUND-th row of the tile, from the thread's first row on.
template <int WIDTH, typename T>
struct Rows {
    static constexpr int PIECE = 16 / sizeof(T), PIECES = WIDTH >= PIECE ? WIDTH / PIECE : 1,
                         PER_ROUND = THREADS / PIECES;
    static constexpr int ROUNDS = (SCAN_TILE + PER_ROUND - 1) / PER_ROUND;
    const T* from;       // the thread's piece of the tile's first row; without ASYNC that row
    int64 row, step;     // elements from a token to the next in scan order; bytes from a tile to the next
    int thread, count;   // count: elements of a row that exist, used without ASYNC
    // token: the thread's first row, FAR if its piece does not exist. to: where the piece goes, in
    // bytes from the beginning of the stage's array.
    int token, to;

    // `row0` is the row of position 0, of which `columns` elements exist.
    __device__ __forceinline__ Rows(const T* row0, int64 row, int columns, int thread = threadIdx.x)
        : from(row0), row(row), step(pinned(row * SCAN_TILE * (int64)sizeof(T))), thread(thread), count(columns),
          token(0), to(0) {
        if (!ASYNC) return;
        const int column = thread % PIECES * PIECE, first = thread / PIECES;
        token = pinned(column < columns ? first : FAR);
        to = pinned((first * WIDTH + column) * (int)sizeof(T));
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
        return SCAN_TILE % PER_ROUND == 0 || thread / PIECES + round * PER_ROUND < SCAN_TILE;
    }

    __device__ __forceinline__ void copy(T (&rows)[SCAN_TILE][WIDTH], int tokens) {
        if (ASYNC) {
#pragma unroll
            for (int k = 0; k < ROUNDS; k++)
                if (owns(k))
                    copy16_async(past(&rows[k * PER_ROUND][0], to), from + k * PER_ROUND * row,
                        token + k * PER_ROUND < tokens ? 16 : 0);
        } else {
            for (int i = threadIdx.x; i < SCAN_TILE * WIDTH; i += THREADS) {
                int t = i / WIDTH, c = i % WIDTH;
                rows[t][c] = t < tokens && c < count ? from[t * row + c] : T();
            }
        }
        from = (const T*)((const char*)from + step);
    }
};

// The rows of B and C. Where one round of copies is enough for the two of them, half the threads
// copy B and half C.
struct StateRows {
    static constexpr int EACH = SCAN_TILE * Rows<STATES, B_T>::PIECES;
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

// All arrays that a block reads, tile after tile in scan order.
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

    // Asks for a tile's u, delta, B and C. `tokens` tokens exist from the tile's first one on; what
    // does not exist becomes zero.
    __device__ __forceinline__ void stage(Stage& to, int tokens) {
        u.copy(to.u, tokens);
        delta.copy(to.delta, tokens);
        states.copy(to, tokens);
    }
};

// A tile's rows of z under a reduction: those of its kept tokens; of the others zeros.
__device__ __forceinline__ void load_kept(
    Z_T (&rows)[SCAN_TILE][BLOCK_CHANNELS], const Problem& p, const Share& s, int64 first, int tokens) {
    const Z_T* z = p.z + s.batch * p.z_batch + s.channel;
    for (int i = threadIdx.x; i < SCAN_TILE * BLOCK_CHANNELS; i += THREADS) {
        const int t = i / BLOCK_CHANNELS, c = i % BLOCK_CHANNELS;
        const TokenEntry* own = p.map + s.token(first + (t < tokens ? t : 0));
        rows[t][c] = t < tokens && c < s.channels && own->cell >= 0
                         ? z[(p.z_kept ? own->kept : own->token) * p.z_row + c]
                         : Z_T();
    }
}
