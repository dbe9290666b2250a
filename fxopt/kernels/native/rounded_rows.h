// Linear layers of a few rows that are rounded to int8, with a weight of int8 or int4: what lies in
// both is multiplied as integers, four products to an instruction.
//
//     y[m, n]  =  Σ_g s[n, g] t[m, g] (Σ_k (W[n, g, k] - z[n, g]) q[m, g, k]) + b[n]
//     t[m, g]  =  max_k |x[m, g, k]| / 127,     q = round(x / t)
//
// A 32-bit lane adds up the columns whose bytes lie in it, four of int8 and eight of int4, all of
// one group. Its instruction takes one side unsigned: a weight plus what makes it so, which the sum
// of the lane's q takes off again, as it does a zero point.

namespace fxopt {
namespace {

// Columns that are rounded at a time; a group is a whole number of these.
constexpr int64_t kRounded = 32;

#if FXOPT_LANES == 16

using Ints = __m512i;

inline Ints load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Ints load_bytes(const uint8_t* from, int64_t count) {
  return _mm512_maskz_loadu_epi8((uint64_t(1) << count) - 1, from);
}
inline Vec real(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints flipped(Ints x, int bits) { return _mm512_xor_si512(x, _mm512_set1_epi8(char(bits))); }
// The values of four bits in the halves of each byte, plus 8.
inline Ints low_halves(Ints x) {
  return flipped(_mm512_and_si512(x, _mm512_set1_epi8(15)), 8);
}
inline Ints high_halves(Ints x) { return low_halves(_mm512_srli_epi16(x, 4)); }
// sum + the products of unsigned and signed bytes, four to a lane; two of them fit 16 bits.
inline Ints dot(Ints sum, Ints positive, Ints x) {
#ifdef __AVX512VNNI__
  return _mm512_dpbusd_epi32(sum, positive, x);
#else
  const Ints pairs = _mm512_maddubs_epi16(positive, x);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
#ifdef __AVX512VNNI__
constexpr int kInt8Offset = 128;
inline Ints dot_int8(Ints weight, Ints x) {
  return dot(_mm512_setzero_si512(), flipped(weight, 0x80), x);
}
#else
constexpr int kInt8Offset = 0;
inline Ints dot_int8(Ints weight, Ints x) {
  const __mmask64 negative = _mm512_movepi8_mask(weight);
  const Ints turned = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
  return dot(_mm512_setzero_si512(), _mm512_abs_epi8(weight), turned);
}
#endif
// The group of each lane where each has so many lanes, a power of two.
inline Ints groups_of_lanes(int64_t lanes) {
  const Ints lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i shift = _mm_cvtsi32_si128(__builtin_ctzll(lanes));
  return _mm512_srl_epi32(lane, shift);
}
inline Vec spread(__m128 numbers, Ints groups) {
  return _mm512_permutexvar_ps(groups, _mm512_castps128_ps512(numbers));
}
inline Vec widened(__m128 numbers) { return _mm512_zextps128_ps512(numbers); }

#else

using Ints = __m256i;

inline Ints load_bytes(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Ints load_bytes(const uint8_t* from, int64_t count) {
  alignas(32) uint8_t bytes[32] = {};
  std::memcpy(bytes, from, count);
  return load_bytes(bytes);
}
inline Vec real(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints flipped(Ints x, int bits) { return _mm256_xor_si256(x, _mm256_set1_epi8(char(bits))); }
inline Ints low_halves(Ints x) {
  return flipped(_mm256_and_si256(x, _mm256_set1_epi8(15)), 8);
}
inline Ints high_halves(Ints x) { return low_halves(_mm256_srli_epi16(x, 4)); }
inline Ints dot(Ints sum, Ints positive, Ints x) {
  const Ints pairs = _mm256_maddubs_epi16(positive, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
constexpr int kInt8Offset = 0;
inline Ints dot_int8(Ints weight, Ints x) {
  return dot(_mm256_setzero_si256(), _mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
}
inline Ints groups_of_lanes(int64_t lanes) {
  const Ints lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m128i shift = _mm_cvtsi32_si128(__builtin_ctzll(lanes));
  return _mm256_srl_epi32(lane, shift);
}
inline Vec spread(__m128 numbers, Ints groups) {
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(numbers), groups);
}
inline Vec widened(__m128 numbers) { return _mm256_zextps128_ps256(numbers); }

#endif

// Four numbers from `at` on; those from `end` on are 0, and not read.
template <class S>
inline __m128 four_until(const S* from, int64_t at, int64_t end) {
  if (at + 4 <= end) return four_of(from + at);
  S few[4] = {};
  for (int64_t i = 0; at + i < end; ++i) few[i] = from[at + i];
  return four_of(few);
}

// The scale of `count` columns of x, and they in int8. One that isn't finite makes the scale NaN.
inline float round_group(const float* x, int64_t count, int8_t* q) {
  Vec most = zero(), poison = zero();
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vec some = load(x + k);
    most = larger(most, larger(some, sub(zero(), some)));
    poison = fmadd(some, zero(), poison);
  }
  const float scale = std::max(largest(most) / 127.0f, std::numeric_limits<float>::min());
  const Vec unit = all(1.0f / scale);
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vec near = rounded(mul(load(x + k), unit));
    const Vec within = smaller(larger(near, all(-127.0f)), all(127.0f));
#if FXOPT_LANES == 16
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(within));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), bytes);
#else
    const __m256i whole = _mm256_cvtps_epi32(within);
    const __m128i halves =
        _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + k), _mm_packs_epi16(halves, halves));
#endif
  }
  return scale + sum(poison);
}

// Groups that fall together with the vectors of every CPU and storage.
constexpr bool rounds_in(int64_t group) { return group == 32 || group == 64 || group % 128 == 0; }

// The first `count` of four numbers; the others are 0, whatever they were.
inline __m128 first_of(__m128 numbers, __m128i wanted) {
  return _mm_and_ps(numbers, _mm_castsi128_ps(wanted));
}
inline __m128i wanted_of(int64_t count) {
  return _mm_cmpgt_epi32(_mm_set1_epi32(int(count)), _mm_setr_epi32(0, 1, 2, 3));
}

// A weight in groups, `Int4` or `Int8Groups`, that rounded rows meet.
template <class Weight>
struct Rounded : Weight {
  int64_t outputs;

  using Weight::bytes;
  using Weight::data;
  using Weight::group;
  using Weight::inner;
  using Weight::scale;
  using Weight::zero_point;
  static constexpr bool four = Weight::kHalves;

  // Columns of a lane, and of a vector of W.
  static constexpr int64_t kColumns = four ? 8 : 4, kStep = kColumns * kLanes;
  // Of x, as floats: the bytes of a vector of W's columns, then four scales and sums of groups.
  static constexpr int64_t kBytes = (four ? 2 : 1) * kLanes, kPlace = kBytes + kLanes;
  static constexpr int kOffset = four ? 8 : kInt8Offset;
  static_assert(kLanes >= 8, "four scales and four sums");

  template <int M, int R>
  inline void multiply(const float* x, int64_t row, Vec (&sums)[R][M]) const {
    // What is too much in the products, since a weight had to be positive or has a zero point.
    __m128 excess[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[r][m] = zero();
        excess[r][m] = _mm_setzero_ps();
      }
    }
    const int64_t groups = inner / group, all_groups = outputs * groups;
    const int64_t lanes = std::min(group, kStep) / kColumns, step_groups = kStep / group;
    const Ints which = groups_of_lanes(lanes);
    const __m128i whole = wanted_of(std::max<int64_t>(1, step_groups));
    const __m128 offset = _mm_set1_ps(kOffset);
    const auto* from = reinterpret_cast<const uint8_t*>(data) + row * bytes();
    int64_t place = row * groups, within = 0;
    for (int64_t k = 0; k < inner; k += kStep, x += M * kPlace) {
      const int64_t left = inner - k;
      const __m128i wanted = left >= kStep ? whole : wanted_of(left / std::min(group, left));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t* at = from + r * bytes() + (four ? k / 2 : k);
        fetch_ahead<1>(at);
        const Ints weight = left >= kStep ? load_bytes(at) : load_bytes(at, four ? left / 2 : left);
        const int64_t first = place + r * groups;
        const __m128 factor = first_of(four_until(scale, first, all_groups), wanted);
        __m128 less = offset;
        if (zero_point) {
          less = _mm_add_ps(less, first_of(four_until(zero_point, first, all_groups), wanted));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const float* part = x + m * kPlace;
          const auto* q = reinterpret_cast<const uint8_t*>(part);
          Ints products;
          if constexpr (four) {
            products = dot(Ints{}, low_halves(weight), load_bytes(q));
            products = dot(products, high_halves(weight), load_bytes(q + 4 * kLanes));
          } else {
            products = dot_int8(weight, load_bytes(q));
          }
          const __m128 scales = _mm_mul_ps(factor, _mm_loadu_ps(part + kBytes));
          const __m128 too_much = _mm_mul_ps(less, _mm_loadu_ps(part + kBytes + 4));
          excess[r][m] = _mm_fmadd_ps(scales, too_much, excess[r][m]);
          sums[r][m] = fmadd(real(products), spread(scales, which), sums[r][m]);
        }
      }
      place += step_groups;
      if (step_groups == 0 && (within += kStep) == group) {
        within = 0;
        ++place;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[r][m] = sub(sums[r][m], widened(excess[r][m]));
    }
  }

  // The bytes of 32 columns with scale t, their sum and the scale to where W's lanes meet them.
  void place(const int8_t* q, float t, int64_t k, float* to) const {
    auto* bytes = reinterpret_cast<uint8_t*>(to) + k % kStep / (four ? 2 : 1);
    const __m256i all_q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    if constexpr (four) {
      const __m256i parity = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
                                              0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
      const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(all_q, parity), 0xd8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm256_castsi256_si128(sorted));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 4 * kLanes),
                       _mm256_extracti128_si256(sorted, 1));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), all_q);
    }
    int total = 0;
    for (int64_t i = 0; i < kRounded; ++i) total += q[i];
    float* numbers = to + kBytes + k % kStep / std::min(group, kStep);
    numbers[0] = t;
    numbers[4] += float(total);
  }

  // x [rows, K] as [K / step, M, places], zeros where rows and columns are filled up.
  template <class T>
  Floats laid_out(const T* x, int64_t rows) const {
    const int64_t filled = filled_up(rows);
    Floats room((inner + kStep - 1) / kStep * filled * kPlace);
    std::vector<float> row(group);
    std::vector<int8_t> q(group);
    for (int64_t m = 0; m < rows; ++m, x += inner) {
      for (int64_t first = 0; first < inner; first += group) {
        for (int64_t k = 0; k < group; ++k) row[k] = float(x[first + k]);
        const float t = round_group(row.data(), group, q.data());
        for (int64_t k = 0; k < group; k += kRounded) {
          const int64_t step = (first + k) / kStep;
          place(q.data() + k, t, first + k, room.data() + (step * filled + m) * kPlace);
        }
      }
    }
    return room;
  }
};

// A weight's bytes are unpacked, and x is loaded, once for the rows that go together.
template <class Weight>
struct Sharing<Rounded<Weight>> {
  static constexpr int together(int rows) {
    return rows <= 2 ? (Weight::kHalves ? 4 : 1) : rows <= 4 ? 2 : 1;
  }
  static bool pays(const Rounded<Weight>&, int) { return true; }
};

// x [rows, K] as it is once rounded, in float32.
inline Floats rounded_rows(const float* x, int64_t rows, int64_t inner, int64_t group) {
  Floats room(rows * inner);
  const int64_t groups = rows * (inner / group);
  parallel(0, groups, std::max<int64_t>(1, kLeastBytes / group), [&](int64_t begin, int64_t end) {
    std::vector<int8_t> q(group);
    for (int64_t g = begin; g < end; ++g) {
      const float t = round_group(x + g * group, group, q.data());
      float* to = room.data() + g * group;
      for (int64_t k = 0; k < group; k += kLanes) store(to + k, mul(load(q.data() + k), all(t)));
    }
  });
  return room;
}

template <class Weight>
void many_rows(const Rounded<Weight>& weight, const float* x, const Results& results) {
  const Floats room = rounded_rows(x, results.rows, weight.inner, weight.group);
  many_rows(static_cast<const Weight&>(weight), room.data(), results);
}

// The product of a weight in groups and x, rounded in the same, where the kernels have them.
inline auto grouped_product(const at::Tensor& x, const std::optional<at::Tensor>& bias) {
  return [&x, &bias](const auto& groups, int64_t outputs) {
    const Rounded<std::decay_t<decltype(groups)>> weight{groups, outputs};
    return rounds_in(groups.group) ? product_of(x, weight, outputs, at::Tensor(), bias)
                                   : at::Tensor();
  };
}

inline at::Tensor int8_grouped_linear(const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& weight_scale,
                                      const std::optional<at::Tensor>& bias) {
  const at::Tensor y = with_int8_groups(x, weight, weight_scale, bias, grouped_product(x, bias));
  if (y.defined()) return y;
  static const auto by_library =
      library_of(int8_grouped_linear, "fxopt::int8_grouped_linear_by_library");
  return by_library.call(x, weight, weight_scale, bias);
}

inline at::Tensor int4_grouped_linear(const at::Tensor& x, const at::Tensor& packed,
                                      const at::Tensor& scale,
                                      const std::optional<at::Tensor>& bias,
                                      const std::optional<at::Tensor>& zero_point) {
  const at::Tensor y = with_int4(x, packed, scale, bias, zero_point, grouped_product(x, bias));
  if (y.defined()) return y;
  static const auto by_library =
      library_of(int4_grouped_linear, "fxopt::int4_grouped_linear_by_library");
  return by_library.call(x, packed, scale, bias, zero_point);
}

}  // namespace
}  // namespace fxopt
