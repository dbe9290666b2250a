// Float32 in a register of AVX2 or AVX-512, as FXOPT_LANES says, by the same names: 8 or 16 lanes.
// Loads convert what is stored narrower.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

// Two builds of these sources may live in one process: nothing in them is linked by name.
namespace fxopt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

#if FXOPT_LANES == 16

constexpr int kLanes = 16;
using Vec = __m512;

inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const at::BFloat16* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Vec load(const at::Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Vec load(const int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float largest(Vec x) { return _mm512_reduce_max_ps(x); }
inline Vec rounded(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// 2^n for a whole n from -127, which gives 0, to 127.
inline Vec whole_power(Vec n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

#else

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const at::BFloat16* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Vec load(const at::Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Vec load(const int8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline Vec rounded(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec whole_power(Vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

#endif

// Zeros that start at a cache line: a vector of 16 lanes across two takes twice as long.
class Floats {
  struct alignas(64) Line {
    float lanes[16];
  };
  std::vector<Line> lines_;
  int64_t count_;

 public:
  explicit Floats(int64_t count = 0) : lines_((count + 15) / 16), count_(count) {}
  float* data() { return reinterpret_cast<float*>(lines_.data()); }
  const float* data() const { return reinterpret_cast<const float*>(lines_.data()); }
  int64_t size() const { return count_; }
  // Room for `count`, none of which need be zeros.
  void grow(int64_t count) {
    if (count > count_) *this = Floats(count);
  }
};

// The first `count` lanes, fewer than all; the others are 0, and nothing beyond is touched.
template <class T>
inline Vec load_first(const T* from, int64_t count) {
  alignas(64) T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

inline Vec load_first(const float* from, int64_t count) {
#if FXOPT_LANES == 16
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lane));
#endif
}

inline __m128 four_of(const float* from) { return _mm_loadu_ps(from); }
inline __m128 four_of(const at::BFloat16* from) {
  const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
}
inline __m128 four_of(const at::Half* from) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

inline __m128 four_of(const int8_t* from) {
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(bytes)));
}

inline __m128 quarter_sums(__m256 x) {
  return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
#if FXOPT_LANES == 16
inline __m128 quarter_sums(__m512 x) {
  return quarter_sums(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
#endif

// The sums of the lanes of four vectors, side by side.
inline __m128 sums_of(const Vec (&x)[4]) {
  __m128 rows[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) rows[j] = quarter_sums(x[j]);
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  return _mm_add_ps(_mm_add_ps(rows[0], rows[1]), _mm_add_ps(rows[2], rows[3]));
}

// 2^x = 2^n 2^f with n = round(x), 2^f by its Taylor series of degree 6, below 2e-7 of the result.
// Below -127 it is 0, NaN stays one.
// Source: Cody, Waite, "Software Manual for the Elementary Functions" (1980), chapter 6.
inline Vec power_of_two(Vec x) {
  constexpr float series[] = {1.0f,           6.93147181e-1f, 2.40226507e-1f, 5.55041087e-2f,
                              9.61812911e-3f, 1.33335581e-3f, 1.54035304e-4f};
  // The order of the operands keeps a NaN.
  x = smaller(all(127.0f), larger(all(-127.0f), x));
  const Vec n = rounded(x), f = sub(x, n);
  Vec p = all(series[6]);
#pragma GCC unroll 8
  for (int k = 5; k >= 0; --k) p = fmadd(p, f, all(series[k]));
  return mul(p, whole_power(n));
}

// tanh(x) = 1 - 2 / (e^2x + 1), within 2e-7 absolutely.
inline Vec tanh(Vec x) {
  const Vec power = power_of_two(mul(x, all(2.0f * kLog2E)));
  return sub(all(1.0f), div(all(2.0f), add(power, all(1.0f))));
}

}  // namespace
}  // namespace fxopt
