// The matrix product A Bᵀ: a tile of eight rows by three vectors of columns in the registers,
// summed over all of K without a stop, then handed to an epilogue, which runs between the steps of
// the next tile.
//
// Four bytes of a row are one step of K: a float32, two bfloat16 or four 8-bit integers, whose
// instruction multiplies and adds up all of them. So A stays as it lies, and B is laid out in
// panels of 48 rows, [panel][step][row], the last one narrower. Eight by three leaves 24 chains of
// additions, which hide the four cycles of each; with 4 registers for B and A that is what 32 hold.
// Per step 24 multiplications stand against 11 loads and 3 prefetches. Source: Goto, van de Geijn,
// "Anatomy of High-Performance Matrix Multiplication" (2008), without the blocking of K: a panel of
// B comes from the second-level cache as fast as it is used.

namespace fxopt {

constexpr int kTileRows = 8;
constexpr int kTileVectors = 3;
constexpr int kPanel = kTileVectors * kLanes;
// Rows of A that stay in half of a second-level cache while all panels pass by.
constexpr int64_t kBlockBytes = 512 << 10;

// How the elements of a step multiply. `kAhead` steps of B are fetched before they are needed: at
// the end of each page of memory the processor's own prefetching stops.
struct Float32 {
  using Sum = __m512;
  static constexpr int kStep = 1, kAhead = 16;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add_product(Sum sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static void keep(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
};

struct BFloat16 {
  using Sum = __m512;
  static constexpr int kStep = 2, kAhead = 16;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add_product(Sum sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static void keep(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
};

struct Int8 {
  using Sum = __m512i;
  static constexpr int kStep = 4, kAhead = 64;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add_product(Sum sum, __m512i unsigned_a, __m512i signed_b) {
    // As an instruction: for the intrinsic, GCC 12 moves each sum to another register and back, and
    // spills them, at half the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_a), "v"(signed_b));
    return sum;
  }
  static void keep(float* to, Sum sum) { _mm512_storeu_si512(to, sum); }
};

// Work in pieces that goes on between the steps of a product: none.
struct Alone {
  int pieces() const { return 0; }
  void operator()(int) const {}
};

// Rows of A, `stride` steps apart, against one panel of B, `pitch` steps from one to the next, into
// `to` [rows, 48]. The pieces of `meanwhile` are spread over the steps.
template <class Kind, int rows, int vectors, class Meanwhile = Alone>
inline __attribute__((always_inline)) void multiply_tile(const int32_t* a, int64_t stride,
                                                         const int32_t* b, int64_t pitch,
                                                         int64_t steps, float* to,
                                                         const Meanwhile& meanwhile = {}) {
  typename Kind::Sum sum[rows][vectors];
  // Unrolled, so that the sums need no memory.
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j] = Kind::zero();
  }
  int64_t step = 0;
  const auto run_to = [&](int64_t end) __attribute__((always_inline)) {
    for (; step < end; ++step) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const int32_t* ahead = b + (step + Kind::kAhead) * pitch + j * kLanes;
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
      }
      __m512i column[vectors];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        column[j] = _mm512_loadu_si512(b + step * pitch + j * kLanes);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const __m512i row = _mm512_set1_epi32(a[i * stride + step]);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) sum[i][j] = Kind::add_product(sum[i][j], row, column[j]);
      }
    }
  };
  const int pieces = meanwhile.pieces();
  const int64_t between = pieces ? std::max<int64_t>(1, steps / pieces) : steps;
  for (int piece = 0; piece < pieces; ++piece) {
    run_to(std::min(steps, (piece + 1) * between));
    meanwhile(piece);
  }
  run_to(steps);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) Kind::keep(to + i * kPanel + j * kLanes, sum[i][j]);
  }
}

template <class Kind, int vectors>
void multiply_rows(int rows, const int32_t* a, int64_t stride, const int32_t* b, int64_t pitch,
                   int64_t steps, float* to) {
  switch (rows) {
    case 8:
      return multiply_tile<Kind, 8, vectors>(a, stride, b, pitch, steps, to);
    case 7:
      return multiply_tile<Kind, 7, vectors>(a, stride, b, pitch, steps, to);
    case 6:
      return multiply_tile<Kind, 6, vectors>(a, stride, b, pitch, steps, to);
    case 5:
      return multiply_tile<Kind, 5, vectors>(a, stride, b, pitch, steps, to);
    case 4:
      return multiply_tile<Kind, 4, vectors>(a, stride, b, pitch, steps, to);
    case 3:
      return multiply_tile<Kind, 3, vectors>(a, stride, b, pitch, steps, to);
    case 2:
      return multiply_tile<Kind, 2, vectors>(a, stride, b, pitch, steps, to);
    default:
      return multiply_tile<Kind, 1, vectors>(a, stride, b, pitch, steps, to);
  }
}

template <class Kind>
void multiply(int rows, int vectors, const int32_t* a, int64_t stride, const int32_t* b,
              int64_t pitch, int64_t steps, float* to) {
  switch (vectors) {
    case 3:
      return multiply_rows<Kind, 3>(rows, a, stride, b, pitch, steps, to);
    case 2:
      return multiply_rows<Kind, 2>(rows, a, stride, b, pitch, steps, to);
    default:
      return multiply_rows<Kind, 1>(rows, a, stride, b, pitch, steps, to);
  }
}

inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t vectors_of(int64_t columns) { return (columns + kLanes - 1) / kLanes; }

// A thread with so many tiles of rows has laid B's panels out in its cache for enough of them.
constexpr int64_t kManyTiles = 8;

// How many threads share the rows; the others of `threads` share the panels. Of the grids whose
// largest part is least, the one with the most parts of many rows, since what comes before and
// after is shared by rows too, and stays in the cache of its thread; else the one that reads least.
inline int64_t threads_for_rows(int64_t threads, int64_t rows, int64_t columns) {
  const int64_t tiles = tiles_of(rows), panels = panels_of(columns);
  int64_t best = 1, least_work = INT64_MAX, least_read = INT64_MAX;
  for (int64_t down = 1; down <= threads; ++down) {
    if (threads % down) continue;
    const int64_t across = threads / down;
    const int64_t work = ((tiles + down - 1) / down) * ((panels + across - 1) / across);
    const int64_t read = tiles >= kManyTiles * down ? -down : rows * across + columns * down;
    if (work < least_work || (work == least_work && read < least_read)) {
      best = down, least_work = work, least_read = read;
    }
  }
  return best;
}

// A product's tile at `row` and `column`, as it is finished, vector by vector.
template <class Finish>
struct Tile {
  const Finish& finish;
  const float* sums;
  int64_t row, column;

  // Of a whole tile, between the steps of the next one's product, whose multiplications leave the
  // units for additions, conversions and stores idle.
  int pieces() const { return kTileRows * kTileVectors; }
  void operator()(int piece) const {
    const int i = piece % kTileRows, j = piece / kTileRows * kLanes;
    finish(sums + i * kPanel + j, row + i, column + j, 0xffff);
  }

  void finish_all(int rows, int64_t columns) const {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const __mmask16 lanes = first_lanes(columns - j);
      for (int i = 0; i < rows; ++i) finish(sums + i * kPanel + j, row + i, column + j, lanes);
    }
  }
};

// One thread's share of a product: rows and panels from a first to a last.
struct Part {
  int64_t first_row, last_row, first_panel, last_panel;
};

// Nothing is to be done after a block of rows: its last tile may be finished in the next block.
struct Continues {
  void operator()(int64_t, int64_t) const {}
};

// `finish(16 sums, row, first column, lanes)` for each vector of a part of A Bᵀ, A [rows, steps]
// and B [columns, steps] in panels, by blocks of so many rows; `rows_done(first, end)` after each.
template <class Kind, class Finish, class RowsDone>
void multiply_part(const int32_t* a, const int32_t* b, int64_t columns, int64_t steps,
                   const Part& part, int64_t block, const Finish& finish,
                   const RowsDone& rows_done) {
  alignas(64) float sums[2][kTileRows * kPanel];
  Tile<Finish> last{finish, sums[1], 0, 0};
  bool is_last_open = false;
  for (int64_t start = part.first_row; start < part.last_row; start += block) {
    const int64_t end = std::min(part.last_row, start + block);
    for (int64_t panel = part.first_panel; panel < part.last_panel; ++panel) {
      const int64_t column = panel * kPanel, wide = std::min<int64_t>(kPanel, columns - column);
      const int64_t pitch = vectors_of(wide) * kLanes;
      for (int64_t row = start; row < end; row += kTileRows) {
        const int high = static_cast<int>(std::min<int64_t>(kTileRows, end - row));
        const int32_t *rows_of_a = a + row * steps, *rows_of_b = b + column * steps;
        float* to = last.sums == sums[0] ? sums[1] : sums[0];
        const Tile<Finish> tile{finish, to, row, column};
        const bool is_whole = high == kTileRows && wide == kPanel;
        if (is_whole && is_last_open) {
          multiply_tile<Kind, kTileRows, kTileVectors>(rows_of_a, steps, rows_of_b, kPanel, steps,
                                                       to, last);
        } else {
          if (is_last_open) last.finish_all(kTileRows, kPanel);
          multiply<Kind>(high, static_cast<int>(vectors_of(wide)), rows_of_a, steps, rows_of_b,
                         pitch, steps, to);
          if (!is_whole) tile.finish_all(high, wide);
        }
        last.sums = to, last.row = row, last.column = column;
        is_last_open = is_whole;
      }
    }
    if constexpr (!std::is_same_v<RowsDone, Continues>) {
      if (is_last_open) last.finish_all(kTileRows, kPanel);
      is_last_open = false;
      rows_done(start, end);
    }
  }
  if (is_last_open) last.finish_all(kTileRows, kPanel);
  // What was written past the caches must be there before another thread is told.
  _mm_sfence();
}

// The same for all of it, by all threads.
template <class Kind, class Finish>
void multiply_all(const int32_t* a, const int32_t* b, int64_t rows, int64_t columns, int64_t steps,
                  const Finish& finish) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t down = threads_for_rows(threads, rows, columns), across = threads / down;
  const int64_t tiles = tiles_of(rows), panels = panels_of(columns);
  const int64_t block =
      std::max<int64_t>(4 * kTileRows, kBlockBytes / (4 * steps) / kTileRows * kTileRows);
  const auto run = [&](int64_t thread) {
    const int64_t d = thread / across, c = thread % across;
    const Part part{tiles * d / down * kTileRows,
                    std::min(rows, tiles * (d + 1) / down * kTileRows), panels * c / across,
                    panels * (c + 1) / across};
    multiply_part<Kind>(a, b, columns, steps, part, block, finish, Continues());
  };
  if (threads == 1) return run(0);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) run(thread);
  });
}

}  // namespace fxopt
