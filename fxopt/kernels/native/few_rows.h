// Linear layers of a few rows, whose time is that of reading the weight once, as it lies.
//
//     y[m, n]  =  s[n] (Σ_k W[n, k] x[m, k]) + b[n]              W float, bfloat16, float16 or int8
//     y[m, n]  =  Σ_g s[n, g] (Σ_k W[n, g, k] x[m, g, k]) + b[n]             W int4 in groups
//
// Up to eight rows of x are multiplied with some rows of W at once, which are converted to float32
// on the way and added up in it. Narrow weights fill the reorder buffer before a line of the cache
// is through, so lines are fetched ahead. Two neighbouring int4 columns share a byte: with the
// columns of x sorted into even and odd ones, a byte's halves need no sorting.

namespace fxopt {
namespace {

constexpr int64_t kFewRows = 8;
// Of a weight, what one thread reads at least.
constexpr int64_t kLeastBytes = 1 << 15;
constexpr int64_t kLine = 64, kPage = 4096;

// How far ahead of a row's bytes its cache lines are fetched: at the rows of the next block, or,
// where rows are long, further on in the row itself. Lines that lie powers of two apart share a
// place in the cache, and those of two blocks of long rows would push each other out.
inline int64_t ahead_of(int64_t bytes, int rows) {
  return bytes < kPage ? std::max<int64_t>(rows * bytes, kPage / 2) : kPage / 4;
}

// Rows of W that go at once: the registers hold the sums of them all.
constexpr int together(int rows) {
  return kLanes == 16 ? (rows <= 4 ? 4 : 3) : (rows <= 2 ? 4 : rows <= 4 ? 2 : 1);
}

// A weight of `bytes` a row. `multiply` adds to the sums of M rows of x and R of W.
template <class T>
struct Plain {
  const T* data;
  int64_t inner;
  int64_t bytes() const { return inner * int64_t(sizeof(T)); }

  template <int M, int R>
  inline __attribute__((always_inline)) void multiply(const float* x, int64_t first,
                                                      Vec (&sums)[M][R]) const {
    const T* from = data + first * inner;
    const auto* ahead = reinterpret_cast<const char*>(from) + ahead_of(bytes(), R);
    int64_t k = 0;
    for (; k + kLanes <= inner; k += kLanes) {
      if (k * int64_t(sizeof(T)) % kLine == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          _mm_prefetch(ahead + r * bytes() + k * int64_t(sizeof(T)), _MM_HINT_T0);
        }
      }
      Vec weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weight[r] = load(from + r * inner + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec row = load(x + k * M + m * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[m][r] = fmadd(weight[r], row, sums[m][r]);
      }
    }
    if (k == inner) return;
    for (int r = 0; r < R; ++r) {
      const Vec weight = load_first(from + r * inner + k, inner - k);
      for (int m = 0; m < M; ++m) {
        sums[m][r] = fmadd(weight, load(x + k * M + m * kLanes), sums[m][r]);
      }
    }
  }
};

// Columns that lie in a vector's bytes.
constexpr int64_t kPairs = 2 * kLanes;

#if FXOPT_LANES == 16
// The values in the low and the high halves of 16 bytes, times a scale.
inline void halves(const uint8_t* from, float scale, Vec& even, Vec& odd) {
  const Vec values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const Vec scaled = mul(values, all(scale));
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  // A look-up reads the lowest four bits alone.
  const __m512i low = _mm512_cvtepu8_epi32(bytes);
  even = _mm512_permutexvar_ps(low, scaled);
  odd = _mm512_permutexvar_ps(_mm512_srli_epi32(low, 4), scaled);
}
#else
inline void halves(const uint8_t* from, float scale, Vec& even, Vec& odd) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m256i wide = _mm256_cvtepi8_epi32(bytes);
  const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(wide, 28), 28);
  even = mul(_mm256_cvtepi32_ps(low), all(scale));
  odd = mul(_mm256_cvtepi32_ps(_mm256_srai_epi32(wide, 4)), all(scale));
}
#endif

struct Int4 {
  const uint8_t* data;
  int64_t inner;
  const float* scale;
  int64_t group;
  int64_t bytes() const { return inner / 2; }

  template <int M, int R>
  inline __attribute__((always_inline)) void multiply(const float* x, int64_t first,
                                                      Vec (&sums)[M][R]) const {
    const uint8_t* from = data + first * bytes();
    const auto* ahead = reinterpret_cast<const char*>(from) + ahead_of(bytes(), R);
    const int64_t groups = inner / group;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t k = g * group; k < (g + 1) * group; k += kPairs) {
        if (k / 2 % kLine == 0) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) _mm_prefetch(ahead + r * bytes() + k / 2, _MM_HINT_T0);
        }
        Vec even[R], odd[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          halves(from + r * bytes() + k / 2, scale[(first + r) * groups + g], even[r], odd[r]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const float* row = x + k * M + m * kPairs;
          const Vec left = load(row), right = load(row + kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            sums[m][r] = fmadd(odd[r], right, fmadd(even[r], left, sums[m][r]));
          }
        }
      }
    }
  }
};

// Where the sums go: times a scale for each row of W, plus a bias.
struct Results {
  float* data;
  int64_t rows, outputs;
  const float *scale, *bias;

  void store(int64_t row, int64_t column, float x) const {
    if (row >= rows) return;
    if (scale) x *= scale[column];
    if (bias) x += bias[column];
    data[row * outputs + column] = x;
  }
};

template <int M, int R, class Weight>
inline void block(const Weight& weight, const float* x, int64_t first, const Results& results) {
  Vec sums[M][R];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[m][r] = zero();
  }
  weight.template multiply<M, R>(x, first, sums);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    if constexpr (R == 4) {
      alignas(16) float four[4];
      _mm_store_ps(four, sums_of(sums[m]));
      for (int r = 0; r < R; ++r) results.store(m, first + r, four[r]);
    } else {
      for (int r = 0; r < R; ++r) results.store(m, first + r, sum(sums[m][r]));
    }
  }
}

template <int M, class Weight>
void multiply_few(const Weight& weight, const float* x, const Results& results) {
  constexpr int R = together(M);
  const int64_t grain = std::max<int64_t>(1, kLeastBytes / std::max<int64_t>(1, weight.bytes()));
  at::parallel_for(0, results.outputs, grain, [&](int64_t begin, int64_t end) {
    int64_t n = begin;
    for (; n + R <= end; n += R) block<M, R>(weight, x, n, results);
    for (; n < end; ++n) block<M, 1>(weight, x, n, results);
  });
}

// Rows that are multiplied where there are `rows`; the others are zeros.
inline int64_t filled_up(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : kFewRows; }

// x [rows, K] as float32 [K / step, M, step], where rows and columns are filled up with zeros: what
// is read together lies together. The columns of pairs are sorted into even and odd ones.
inline const float* as_floats(const at::Tensor& x, int64_t inner, bool pairs,
                              std::vector<float>& room) {
  const int64_t rows = x.numel() / inner, filled = filled_up(rows), step = pairs ? kPairs : kLanes;
  if (x.scalar_type() == at::kFloat && !pairs && filled == 1 && inner % step == 0) {
    return x.const_data_ptr<float>();
  }
  room.assign((inner + step - 1) / step * step * filled, 0.0f);
  const auto fill = [&](const auto* from) {
    for (int64_t m = 0; m < rows; ++m, from += inner) {
      for (int64_t k = 0; k < inner; k += step) {
        float* to = room.data() + k * filled + m * step;
        if (pairs) {
          for (int64_t i = 0; i < kLanes; ++i) {
            to[i] = float(from[k + 2 * i]);
            to[kLanes + i] = float(from[k + 2 * i + 1]);
          }
        } else {
          const int64_t count = std::min(step, inner - k);
          for (int64_t i = 0; i < count; ++i) to[i] = float(from[k + i]);
        }
      }
    }
  };
  if (x.scalar_type() == at::kFloat) fill(x.const_data_ptr<float>());
  if (x.scalar_type() == at::kBFloat16) fill(x.const_data_ptr<at::BFloat16>());
  if (x.scalar_type() == at::kHalf) fill(x.const_data_ptr<at::Half>());
  return room.data();
}

inline bool is_float(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 ||
         t.scalar_type() == at::kHalf;
}

// A weight [N, ...] that is read as it lies, for 1 to 8 rows of x [..., K].
inline bool are_few_rows(const at::Tensor& x, const at::Tensor& weight, int64_t inner,
                         const std::optional<at::Tensor>& bias) {
  return x.is_cpu() && weight.is_cpu() && is_float(x) && x.dim() >= 1 && weight.dim() == 2 &&
         weight.numel() > 0 && weight.is_contiguous() && x.size(-1) == inner && x.numel() > 0 &&
         x.numel() / inner <= kFewRows &&
         (!bias || (bias->is_cpu() && is_float(*bias) && bias->numel() == weight.size(0)));
}

template <class Weight>
at::Tensor few_rows(const at::Tensor& x, const Weight& weight, int64_t outputs, bool pairs,
                    const at::Tensor& scale, const std::optional<at::Tensor>& bias) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor y = at::empty(shape, x.options().dtype(at::kFloat));
  const at::Tensor given = x.contiguous();
  const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const int64_t count = x.numel() / weight.inner;
  const Results results{y.mutable_data_ptr<float>(), count, outputs,
                        scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                        bias ? added.const_data_ptr<float>() : nullptr};
  std::vector<float> room;
  const float* from = as_floats(given, weight.inner, pairs, room);
  switch (filled_up(count)) {
    case 8:
      multiply_few<8>(weight, from, results);
      break;
    case 4:
      multiply_few<4>(weight, from, results);
      break;
    case 2:
      multiply_few<2>(weight, from, results);
      break;
    default:
      multiply_few<1>(weight, from, results);
  }
  return y.to(x.scalar_type());
}

inline at::Tensor int8_weight_only_linear(const at::Tensor& x, const at::Tensor& weight,
                                          const at::Tensor& weight_scale,
                                          const std::optional<at::Tensor>& bias) {
  const bool fits = weight.dim() == 2 && are_few_rows(x, weight, weight.size(1), bias) &&
                    weight.scalar_type() == at::kChar && is_float(weight_scale) &&
                    weight_scale.numel() == weight.size(0);
  if (!fits) {
    static const auto by_library =
        library_of(int8_weight_only_linear, "fxopt::int8_weight_only_linear_by_library");
    return by_library.call(x, weight, weight_scale, bias);
  }
  const Plain<int8_t> plain{weight.const_data_ptr<int8_t>(), weight.size(1)};
  const at::Tensor scale = weight_scale.to(at::kFloat).contiguous();
  return few_rows(x, plain, weight.size(0), false, scale, bias);
}

inline at::Tensor int4_weight_only_linear(const at::Tensor& x, const at::Tensor& packed,
                                          const at::Tensor& scale,
                                          const std::optional<at::Tensor>& bias) {
  const int64_t inner = packed.dim() == 2 ? 2 * packed.size(1) : 0;
  const int64_t groups = scale.dim() >= 2 ? scale.size(1) : 0;
  const bool fits = inner > 0 && are_few_rows(x, packed, inner, bias) &&
                    packed.scalar_type() == at::kByte && scale.scalar_type() == at::kFloat &&
                    scale.is_contiguous() && groups > 0 && inner % groups == 0 &&
                    inner / groups % kPairs == 0 && scale.size(0) == packed.size(0) &&
                    scale.numel() == packed.size(0) * groups;
  if (!fits) {
    static const auto by_library =
        library_of(int4_weight_only_linear, "fxopt::int4_weight_only_linear_by_library");
    return by_library.call(x, packed, scale, bias);
  }
  const Int4 weight{packed.const_data_ptr<uint8_t>(), inner, scale.const_data_ptr<float>(),
                    inner / groups};
  return few_rows(x, weight, packed.size(0), true, at::Tensor(), bias);
}

inline at::Tensor half_weight_only_linear(const at::Tensor& x, const at::Tensor& weight,
                                          const std::optional<at::Tensor>& bias) {
  const bool fits = weight.dim() == 2 && are_few_rows(x, weight, weight.size(1), bias);
  const auto of = [&](auto like) {
    using T = decltype(like);
    const Plain<T> plain{weight.const_data_ptr<T>(), weight.size(1)};
    return few_rows(x, plain, weight.size(0), false, at::Tensor(), bias);
  };
  if (fits && weight.scalar_type() == at::kBFloat16) return of(at::BFloat16());
  if (fits && weight.scalar_type() == at::kHalf) return of(at::Half());
  static const auto by_library =
      library_of(half_weight_only_linear, "fxopt::half_weight_only_linear_by_library");
  return by_library.call(x, weight, bias);
}

}  // namespace
}  // namespace fxopt
