// Linear layers of more rows than a few, with a narrow weight: it becomes float32 some rows at a
// time, once a call, and is multiplied out of the cache.
//
//     y[m, n]  =  s[n] Σ_k W[n, k] x[m, k] + b[n]
//
// A vector holds one column of several rows of x, which lies in panels for it; the numbers of W are
// what is broadcast, and so are read as they lie. Sums are [N, M] and turned on the way to y.

namespace fxopt {
namespace {

// Rows of W that go at once, with two vectors of rows of x: the registers hold the sums of all.
constexpr int kTile = kLanes == 16 ? 12 : 6;
constexpr int64_t kBlock = 4 * kTile;
// Columns of W, of which a tile stays in the first cache, and rows of x that are multiplied before
// the next.
constexpr int64_t kMostDepth = 640, kMostRows = 512;
// Between rows of W in float32: a number that the compiler knows, and that spreads them over a cache.
constexpr int64_t kStride = kMostDepth + 16;

// Four by four numbers, turned.
inline void turn(const float* from, int64_t stride, float* to, int64_t to_stride) {
  __m128 rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_ps(from + i * stride);
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_stride, rows[i]);
}

// [rows, columns] turned to [columns, rows]: what is written next lies next.
inline void turn_all(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to,
                     int64_t to_stride) {
  for (int64_t j = 0; j < columns; j += 4) {
    int64_t i = 0;
    if (j + 4 <= columns) {
      for (; i + 4 <= rows; i += 4) {
        turn(from + i * stride + j, stride, to + j * to_stride + i, to_stride);
      }
    }
    for (int64_t k = j; k < std::min(j + 4, columns); ++k) {
      for (int64_t r = i; r < rows; ++r) to[k * to_stride + r] = from[r * stride + k];
    }
  }
}

// c [R, V vectors] += W [R, depth] times x [depth, V vectors], or = at the first columns.
template <int R, int V>
inline void multiply_tile(const float* weight, const float* x, int64_t depth, float* c,
                          int64_t c_stride, bool first) {
  Vec sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = first ? zero() : load(c + r * c_stride + v * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(x + (k * V + v) * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec number = all(weight[r * kStride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = fmadd(number, column[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

// Rows of x [rows, K] as panels [rows / panel, K, panel], filled up with zeros.
inline void lay_panels(const float* x, int64_t rows, int64_t inner, int64_t panel, float* to) {
  parallel(0, (rows + panel - 1) / panel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * panel, count = std::min(panel, rows - first);
      if (count < panel) std::fill_n(to + first * inner, panel * inner, 0.0f);
      turn_all(x + first * inner, inner, count, inner, to + first * inner, panel);
    }
  });
}

// Some rows of W as float32, and the sums that they make where K is multiplied in parts.
struct Block {
  int64_t depth, rows;
  Floats weight, sums;

  Block(int64_t inner, int64_t padded) : depth(depth_of(inner)), rows(padded),
        weight(kBlock * kStride), sums(kBlock * rows) {}

  // Equal parts of K, each a whole number of vectors.
  static int64_t depth_of(int64_t inner) {
    const int64_t parts = (inner + kMostDepth - 1) / kMostDepth;
    return ((inner + parts - 1) / parts + kPairs - 1) / kPairs * kPairs;
  }
};

// Sums [count, panel] of the rows of W from `begin` on, for the rows of x from `m` on, into y.
inline void finish(float* sums, int64_t stride, int64_t panel, const Results& results, int64_t m,
                   int64_t begin, int64_t count) {
  const int64_t rows = std::min(panel, results.rows - m);
  for (int64_t n = 0; n < count && (results.scale || results.bias); ++n) {
    const float factor = results.scale ? results.scale[begin + n] : 1.0f;
    const float added = results.bias ? results.bias[begin + n] : 0.0f;
    for (int64_t i = 0; i < panel; ++i) sums[n * stride + i] = sums[n * stride + i] * factor + added;
  }
  turn_all(sums, stride, count, rows, results.data + m * results.outputs + begin, results.outputs);
}

// y of the rows of W from `begin` on, `count` of them, for x in panels.
template <int V, class Weight>
void multiply_block(const Weight& weight, const float* x, const Results& results, int64_t begin,
                    int64_t count, Block& block) {
  constexpr int64_t panel = V * kLanes;
  for (int64_t first = 0; first < weight.inner; first += block.depth) {
    const int64_t depth = std::min(block.depth, weight.inner - first);
    for (int64_t n = 0; n < count; ++n) {
      weight.dense(begin + n, first, depth, block.weight.data() + n * kStride);
    }
    for (int64_t m = 0; m < block.rows; m += panel) {
      const float* columns = x + m * weight.inner + first * panel;
      for (int64_t n = 0; n < count; n += kTile) {
        float* sums = block.sums.data() + n * block.rows + m;
        multiply_tile<kTile, V>(block.weight.data() + n * kStride, columns, depth, sums,
                                block.rows, first == 0);
        if (first + depth == weight.inner) {
          finish(sums, block.rows, panel, results, m, begin + n, std::min<int64_t>(kTile, count - n));
        }
      }
    }
  }
}

template <int V, class Weight>
void multiply_many(const Weight& weight, const float* x, Results results) {
  constexpr int64_t panel = V * kLanes;
  const auto padded = [&](int64_t rows) { return (rows + panel - 1) / panel * panel; };
  const int64_t whole = results.rows, blocks = (results.outputs + kBlock - 1) / kBlock;
  Floats room(padded(std::min(kMostRows, whole)) * weight.inner);
  float* to = results.data;
  for (int64_t first = 0; first < whole; first += kMostRows) {
    results.rows = std::min(kMostRows, whole - first);
    results.data = to + first * results.outputs;
    lay_panels(x + first * weight.inner, results.rows, weight.inner, panel, room.data());
    parallel(0, blocks, 1, [&](int64_t begin, int64_t end) {
      Block block(weight.inner, padded(results.rows));
      for (int64_t b = begin; b < end; ++b) {
        const int64_t count = std::min(kBlock, results.outputs - b * kBlock);
        multiply_block<V>(weight, room.data(), results, b * kBlock, count, block);
      }
    });
  }
}

template <class Weight>
void many_rows(const Weight& weight, const float* x, const Results& results) {
  // A few vectors of an odd number, one at a time: two would leave half of the last pair empty.
  if (results.rows <= 4 * kLanes && (results.rows - 1) / kLanes % 2 == 0) {
    multiply_many<1>(weight, x, results);
  } else {
    multiply_many<2>(weight, x, results);
  }
}

}  // namespace
}  // namespace fxopt
