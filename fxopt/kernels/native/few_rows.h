// Linear layers of a few rows, whose time is that of reading the weight once, as it lies.
//
//     y[m, n]  =  s[n] (Σ_k W[n, k] x[m, k]) + b[n]              W float, bfloat16, float16 or int8
//     y[m, n]  =  Σ_g s[n, g] (Σ_k (W[n, g, k] - z[n, g]) x[m, g, k]) + b[n]
//                                                        W int8 or int4 in groups; z int4 alone
//
// Up to eight rows of x are multiplied with one row of W, which is converted to float32 on the way
// and added up in it. So a weight is one stream of memory, which the processor's own prefetching
// takes up; several short rows of it side by side are not, and took one and a half times as long.
// Where x itself overflows the first cache, four rows of W share what is read of it. Two
// neighbouring int4 columns share a byte: with the columns of x sorted into even and odd ones, a
// byte's halves need no sorting.

namespace fxopt {
namespace {

constexpr int64_t kFewRows = 8;
// Of a weight, what one thread reads at least.
constexpr int64_t kLeastBytes = 1 << 15;
constexpr int64_t kLine = 64;
// Bytes of x that stay in the first cache beside a weight that passes through it.
constexpr int64_t kInCache = 24 << 10;

// Fetch a line of a weight before it is needed. Of a single stream more than a page ahead, where a
// processor stops by itself; into the second cache where memory is slower than the product, since
// it has room for more lines on their way than the first. Of rows side by side, which are long,
// further on in each: lines that lie powers of two apart share a place in the cache.
template <int R, class T>
inline void fetch_ahead(const T* from) {
  const auto* at = reinterpret_cast<const char*>(from);
  if constexpr (R > 1) {
    _mm_prefetch(at + 1024, _MM_HINT_T0);
  } else if constexpr (sizeof(T) > 1) {
    _mm_prefetch(at + 8192, _MM_HINT_T1);
  } else {
    _mm_prefetch(at + 4096, _MM_HINT_T0);
  }
}

// Rows of W that go at once where they share a large x: the registers hold the sums of them all.
constexpr int together(int rows) {
  return kLanes == 16 ? (rows <= 4 ? 4 : 3) : (rows <= 2 ? 4 : rows <= 4 ? 2 : 1);
}

// Chains of additions for one row of x and of W: four and more in all hide how long each takes.
constexpr int chains(int rows, int together) {
  return together > 1 ? 1 : rows <= 2 ? 4 : rows <= 4 ? 2 : 1;
}

// Columns that lie in a vector's bytes.
constexpr int64_t kPairs = 2 * kLanes;

// Rows that are multiplied where there are `rows`; the others are zeros.
inline int64_t filled_up(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : kFewRows; }

// x [rows, K] as float32 [K / step, M, step], where rows and columns are filled up with zeros: what
// is read together lies together. Where they are sorted, even columns come ahead of odd ones.
template <bool sorted, class T>
Floats in_steps(const T* x, int64_t rows, int64_t inner) {
  const int64_t filled = filled_up(rows), step = sorted ? kPairs : kLanes;
  Floats room((inner + step - 1) / step * step * filled);
  for (int64_t m = 0; m < rows; ++m, x += inner) {
    for (int64_t k = 0; k < inner; k += step) {
      float* to = room.data() + k * filled + m * step;
      if (sorted) {
        for (int64_t i = 0; i < kLanes; ++i) {
          to[i] = float(x[k + 2 * i]);
          to[kLanes + i] = float(x[k + 2 * i + 1]);
        }
      } else {
        const int64_t count = std::min(step, inner - k);
        for (int64_t i = 0; i < count; ++i) to[i] = float(x[k + i]);
      }
    }
  }
  return room;
}

template <class T>
struct Plain {
  const T* data;
  int64_t inner;
  int64_t bytes() const { return inner * int64_t(sizeof(T)); }

  template <class X>
  Floats laid_out(const X* x, int64_t rows) const {
    return in_steps<false>(x, rows, inner);
  }

  // W[row, first : first + count] as float32.
  void dense(int64_t row, int64_t first, int64_t count, float* to) const {
    const T* from = data + row * inner + first;
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(to + k, load(from + k));
    for (; k < count; ++k) to[k] = float(from[k]);
  }

  // The products of R rows of W with M rows of x, still to be added up over the lanes.
  template <int M, int R>
  inline void multiply(const float* x, int64_t row, Vec (&sums)[R][M]) const {
    constexpr int parts = chains(M, R);
    constexpr int64_t step = parts * kLanes, line = kLine / int64_t(sizeof(T));
    Vec apart[R][M][parts];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int j = 0; j < parts; ++j) apart[r][m][j] = zero();
      }
    }
    const T* from = data + row * inner;
    int64_t k = 0;
    for (; k + step <= inner; k += step) {
      if (k % line == 0) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int64_t at = k; at < k + step; at += line) fetch_ahead<R>(from + r * inner + at);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < parts; ++j) {
        Vec weight[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) weight[r] = load(from + r * inner + k + j * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Vec column = load(x + (k + j * kLanes) * M + m * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) apart[r][m][j] = fmadd(weight[r], column, apart[r][m][j]);
        }
      }
    }
    for (; k < inner; k += kLanes) {
      const bool whole = k + kLanes <= inner;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const T* at = from + r * inner + k;
        const Vec weight = whole ? load(at) : load_first(at, inner - k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          apart[r][m][0] = fmadd(weight, load(x + k * M + m * kLanes), apart[r][m][0]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[r][m] = apart[r][m][0];
#pragma GCC unroll 4
        for (int j = 1; j < parts; ++j) sums[r][m] = add(sums[r][m], apart[r][m][j]);
      }
    }
  }
};

inline float number(float x) { return x; }
inline float number(at::Half x) { return _cvtsh_ss(x.x); }

// int8 [N, K] with scales [N, K / group], the group a whole number of vectors where rows are few.
template <class S>
struct Int8Groups {
  const int8_t* data;
  int64_t inner;
  const S* scale;
  int64_t group;
  // One value a byte, and never a zero point.
  static constexpr bool kHalves = false;
  static constexpr const S* zero_point = nullptr;
  int64_t bytes() const { return inner; }

  template <class X>
  Floats laid_out(const X* x, int64_t rows) const {
    return in_steps<false>(x, rows, inner);
  }

  void dense(int64_t row, int64_t first, int64_t count, float* to) const {
    const int8_t* from = data + row * inner;
    const S* scales = scale + row * (inner / group);
    for (int64_t k = first; k < first + count;) {
      const int64_t end = std::min(first + count, (k / group + 1) * group);
      const float factor = number(scales[k / group]);
      for (; k + kLanes <= end; k += kLanes) store(to + k - first, mul(load(from + k), all(factor)));
      for (; k < end; ++k) to[k - first] = float(from[k]) * factor;
    }
  }

  template <int M, int R>
  inline void multiply(const float* x, int64_t row, Vec (&sums)[R][M]) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[r][m] = zero();
    }
    const int64_t groups = inner / group;
    const int8_t* from = data + row * inner;
    const S* scales = scale + row * groups;
    for (int64_t first = 0; first < inner; first += group, ++scales) {
      Vec factor[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) factor[r] = all(number(scales[r * groups]));
      for (int64_t k = first; k < first + group; k += kLanes) {
        Vec weight[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int8_t* at = from + r * inner + k;
          if (k % kLine == 0) fetch_ahead<R>(at);
          weight[r] = mul(load(at), factor[r]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Vec column = load(x + k * M + m * kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sums[r][m] = fmadd(weight[r], column, sums[r][m]);
        }
      }
    }
  }
};

#if FXOPT_LANES == 16
// The values in the low and the high halves of 16 bytes, times a scale, plus what a zero is.
inline void halves(const uint8_t* from, float scale, float zero, Vec& even, Vec& odd) {
  const Vec values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const Vec scaled = fmadd(values, all(scale), all(zero));
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  // A look-up reads the lowest four bits alone.
  const __m512i low = _mm512_cvtepu8_epi32(bytes);
  even = _mm512_permutexvar_ps(low, scaled);
  odd = _mm512_permutexvar_ps(_mm512_srli_epi32(low, 4), scaled);
}
#else
inline void halves(const uint8_t* from, float scale, float zero, Vec& even, Vec& odd) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m256i wide = _mm256_cvtepi8_epi32(bytes);
  const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(wide, 28), 28);
  even = fmadd(_mm256_cvtepi32_ps(low), all(scale), all(zero));
  odd = fmadd(_mm256_cvtepi32_ps(_mm256_srai_epi32(wide, 4)), all(scale), all(zero));
}
#endif

// The values in 8 bytes, in order.
inline void in_order(const uint8_t* from, int8_t (&values)[16]) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i four = _mm_set1_epi8(15), sign = _mm_set1_epi8(8);
  const __m128i low = _mm_and_si128(bytes, four);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), four);
  const __m128i both = _mm_xor_si128(_mm_unpacklo_epi8(low, high), sign);
  _mm_store_si128(reinterpret_cast<__m128i*>(values), _mm_sub_epi8(both, sign));
}

// Values of four bits, two a byte, with a scale and, where there are any, a zero point a group.
template <class S>
struct Int4 {
  const uint8_t* data;
  int64_t inner;
  const S *scale, *zero_point;
  int64_t group;
  static constexpr bool kHalves = true;
  int64_t bytes() const { return inner / 2; }

  template <class X>
  Floats laid_out(const X* x, int64_t rows) const {
    return in_steps<true>(x, rows, inner);
  }

  // What a value of 0 stands for in a group.
  float zero_of(int64_t at) const {
    return zero_point ? -number(zero_point[at]) * number(scale[at]) : 0.0f;
  }

  void dense(int64_t row, int64_t first, int64_t count, float* to) const {
    const uint8_t* from = data + row * bytes();
    const int64_t groups = row * (inner / group);
    for (int64_t k = first; k < first + count;) {
      const int64_t end = std::min(first + count, (k / group + 1) * group);
      const float factor = number(scale[groups + k / group]), zero = zero_of(groups + k / group);
      for (; k + 16 <= end; k += 16) {
        alignas(16) int8_t values[16];
        in_order(from + k / 2, values);
#pragma GCC unroll 2
        for (int i = 0; i < 16; i += kLanes) {
          store(to + k - first + i, fmadd(load(values + i), all(factor), all(zero)));
        }
      }
      for (; k < end; k += 2) {
        const int8_t byte = int8_t(from[k / 2]);
        to[k - first] = float(int8_t(byte << 4) >> 4) * factor + zero;
        to[k - first + 1] = float(byte >> 4) * factor + zero;
      }
    }
  }

  template <int M, int R>
  inline void multiply(const float* x, int64_t row, Vec (&sums)[R][M]) const {
    // Sums of even and odd columns apart, where one row of W leaves registers for both.
    constexpr int parts = R > 1 ? 1 : 2;
    Vec apart[R][M][parts];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) apart[r][m][0] = apart[r][m][parts - 1] = zero();
    }
    const int64_t groups = inner / group;
    const uint8_t* from = data + row * bytes();
    int64_t place = row * groups;
    for (int64_t first = 0; first < inner; first += group, ++place) {
      float factor[R], zero[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        factor[r] = number(scale[place + r * groups]);
        zero[r] = zero_of(place + r * groups);
      }
      for (int64_t k = first; k < first + group; k += kPairs) {
        Vec even[R], odd[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const uint8_t* at = from + r * bytes() + k / 2;
          if (k / 2 % kLine == 0) fetch_ahead<R>(at);
          halves(at, factor[r], zero[r], even[r], odd[r]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const float* columns = x + k * M + m * kPairs;
          const Vec left = load(columns), right = load(columns + kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            apart[r][m][0] = fmadd(even[r], left, apart[r][m][0]);
            apart[r][m][parts - 1] = fmadd(odd[r], right, apart[r][m][parts - 1]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[r][m] = parts == 1 ? apart[r][m][0] : add(apart[r][m][0], apart[r][m][parts - 1]);
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

// Blocks of R rows of W from `begin` on; the first row that is left over.
template <int M, int R, class Weight>
int64_t blocks(const Weight& weight, const float* x, const Results& results, int64_t begin,
               int64_t end) {
  for (; begin + R <= end; begin += R) {
    Vec sums[R][M];
    weight.template multiply<M, R>(x, begin, sums);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) results.store(m, begin + r, sum(sums[r][m]));
    }
  }
  return begin;
}

// Which rows of a weight go together, and whether they do at all.
template <class Weight>
struct Sharing {
  static constexpr int together(int rows) { return fxopt::together(rows); }
  static bool pays(const Weight& weight, int rows) {
    return rows * weight.inner * int64_t(sizeof(float)) > kInCache;
  }
};

template <int M, class Weight>
void multiply_few(const Weight& weight, const float* x, const Results& results) {
  const int64_t grain = std::max<int64_t>(1, kLeastBytes / std::max<int64_t>(1, weight.bytes()));
  const bool shares = Sharing<Weight>::pays(weight, M);
  parallel(0, results.outputs, grain, [&](int64_t begin, int64_t end) {
    if (shares) begin = blocks<M, Sharing<Weight>::together(M)>(weight, x, results, begin, end);
    blocks<M, 1>(weight, x, results, begin, end);
  });
}

// One to eight rows of x [rows, K] with a weight.
template <class T, class Weight>
void multiply(const T* x, int64_t rows, const Weight& weight, const Results& results) {
  const Floats room = weight.laid_out(x, rows);
  switch (filled_up(rows)) {
    case 8:
      multiply_few<8>(weight, room.data(), results);
      break;
    case 4:
      multiply_few<4>(weight, room.data(), results);
      break;
    case 2:
      multiply_few<2>(weight, room.data(), results);
      break;
    default:
      multiply_few<1>(weight, room.data(), results);
  }
}

inline bool is_float(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 ||
         t.scalar_type() == at::kHalf;
}

// `many_rows.h`: y of more rows than a few.
template <class Weight>
void many_rows(const Weight& weight, const float* x, const Results& results);

// A weight [N, ...] that is read as it lies, for x [..., K] of 1 to 8 rows, or of more in float32.
inline bool is_product(const at::Tensor& x, const at::Tensor& weight, int64_t inner,
                         const std::optional<at::Tensor>& bias) {
  return x.is_cpu() && weight.is_cpu() && is_float(x) && x.dim() >= 1 && weight.dim() == 2 &&
         weight.numel() > 0 && weight.is_contiguous() && x.size(-1) == inner && x.numel() > 0 &&
         (x.numel() / inner <= kFewRows || x.scalar_type() == at::kFloat) &&
         (!bias || (bias->is_cpu() && is_float(*bias) && bias->numel() == weight.size(0)));
}

template <class Weight>
at::Tensor product_of(const at::Tensor& x, const Weight& weight, int64_t outputs,
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
  if (count > kFewRows) {
    many_rows(weight, given.const_data_ptr<float>(), results);
    return y;
  }
  if (x.scalar_type() == at::kBFloat16) {
    multiply(given.const_data_ptr<at::BFloat16>(), count, weight, results);
  } else if (x.scalar_type() == at::kHalf) {
    multiply(given.const_data_ptr<at::Half>(), count, weight, results);
  } else {
    multiply(given.const_data_ptr<float>(), count, weight, results);
  }
  return y.to(x.scalar_type());
}

// Groups of columns that have a number each in `scale` [N, groups], or 0 where it isn't that.
inline int64_t groups_of(const at::Tensor& scale, int64_t outputs, int64_t inner) {
  const int64_t groups = scale.numel() / outputs;
  const bool fits = scale.is_cpu() && scale.is_contiguous() && scale.dim() >= 2 && groups > 0 &&
                    scale.size(0) == outputs && scale.size(1) == groups &&
                    scale.numel() == outputs * groups && inner % groups == 0;
  const bool known = scale.scalar_type() == at::kFloat || scale.scalar_type() == at::kHalf;
  return fits && known ? groups : 0;
}

// What `use` makes of an int8 weight in groups and how many rows it has; nothing where there is no
// such weight, or nothing that it can be multiplied with.
template <class Use>
at::Tensor with_int8_groups(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                            const std::optional<at::Tensor>& bias, const Use& use) {
  const int64_t inner = weight.dim() == 2 ? weight.size(1) : 0;
  if (inner == 0 || !is_product(x, weight, inner, bias) || weight.scalar_type() != at::kChar) {
    return {};
  }
  const int64_t outputs = weight.size(0), groups = groups_of(scale, outputs, inner);
  const auto of = [&](auto like) {
    using S = decltype(like);
    const auto* data = weight.const_data_ptr<int8_t>();
    return use(Int8Groups<S>{data, inner, scale.const_data_ptr<S>(), inner / groups}, outputs);
  };
  if (!groups) return {};
  return scale.scalar_type() == at::kFloat ? of(0.0f) : of(at::Half());
}

// The same of an int4 weight.
template <class Use>
at::Tensor with_int4(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale,
                     const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& zero_point, const Use& use) {
  const int64_t inner = packed.dim() == 2 ? 2 * packed.size(1) : 0;
  if (inner == 0 || !is_product(x, packed, inner, bias) || packed.scalar_type() != at::kByte) {
    return {};
  }
  const int64_t outputs = packed.size(0), groups = groups_of(scale, outputs, inner);
  const bool alike = !zero_point || (zero_point->scalar_type() == scale.scalar_type() &&
                                     groups_of(*zero_point, outputs, inner) == groups);
  const auto of = [&](auto like) {
    using S = decltype(like);
    const S* zeros = zero_point ? zero_point->const_data_ptr<S>() : nullptr;
    const auto* data = packed.const_data_ptr<uint8_t>();
    return use(Int4<S>{data, inner, scale.const_data_ptr<S>(), zeros, inner / groups}, outputs);
  };
  if (!groups || !alike) return {};
  return scale.scalar_type() == at::kFloat ? of(0.0f) : of(at::Half());
}

inline at::Tensor int8_weight_only_linear(const at::Tensor& x, const at::Tensor& weight,
                                          const at::Tensor& weight_scale,
                                          const std::optional<at::Tensor>& bias) {
  const int64_t inner = weight.dim() == 2 ? weight.size(1) : 0;
  if (inner > 0 && is_product(x, weight, inner, bias) && weight.scalar_type() == at::kChar &&
      is_float(weight_scale) && weight_scale.numel() == weight.size(0)) {
    const Plain<int8_t> plain{weight.const_data_ptr<int8_t>(), inner};
    const at::Tensor scale = weight_scale.to(at::kFloat).contiguous();
    return product_of(x, plain, weight.size(0), scale, bias);
  }
  const auto grouped = [&](const auto& groups, int64_t outputs) {
    const bool whole = groups.group % kLanes == 0 || x.numel() / inner > kFewRows;
    return whole ? product_of(x, groups, outputs, at::Tensor(), bias) : at::Tensor();
  };
  const at::Tensor y = with_int8_groups(x, weight, weight_scale, bias, grouped);
  if (y.defined()) return y;
  static const auto by_library =
      library_of(int8_weight_only_linear, "fxopt::int8_weight_only_linear_by_library");
  return by_library.call(x, weight, weight_scale, bias);
}

inline at::Tensor int4_weight_only_linear(const at::Tensor& x, const at::Tensor& packed,
                                          const at::Tensor& scale,
                                          const std::optional<at::Tensor>& bias,
                                          const std::optional<at::Tensor>& zero_point) {
  const auto grouped = [&](const auto& groups, int64_t outputs) {
    const bool many = x.numel() / groups.inner > kFewRows;
    const bool whole = groups.group % (many ? 2 : kPairs) == 0;
    return whole ? product_of(x, groups, outputs, at::Tensor(), bias) : at::Tensor();
  };
  const at::Tensor y = with_int4(x, packed, scale, bias, zero_point, grouped);
  if (y.defined()) return y;
  static const auto by_library =
      library_of(int4_weight_only_linear, "fxopt::int4_weight_only_linear_by_library");
  return by_library.call(x, packed, scale, bias, zero_point);
}

inline at::Tensor half_weight_only_linear(const at::Tensor& x, const at::Tensor& weight,
                                          const std::optional<at::Tensor>& bias) {
  const bool fits = weight.dim() == 2 && is_product(x, weight, weight.size(1), bias);
  const auto of = [&](auto like) {
    using T = decltype(like);
    const Plain<T> plain{weight.const_data_ptr<T>(), weight.size(1)};
    return product_of(x, plain, weight.size(0), at::Tensor(), bias);
  };
  if (fits && weight.scalar_type() == at::kBFloat16) return of(at::BFloat16());
  if (fits && weight.scalar_type() == at::kHalf) return of(at::Half());
  static const auto by_library =
      library_of(half_weight_only_linear, "fxopt::half_weight_only_linear_by_library");
  return by_library.call(x, weight, bias);
}

}  // namespace
}  // namespace fxopt
