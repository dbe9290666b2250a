// Sixteen float32 in a register of AVX-512: loads and stores that convert, and the functions that
// run in a product's epilogue.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace fxopt {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 load(const float* from, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, from);
}

inline __m512 load(const at::BFloat16* from, __mmask16 lanes) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(float* to, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, x); }

// Rounded to nearest, ties to even.
inline __m256i round_to_bfloat16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline void store(at::BFloat16* to, __m512 x, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(to, lanes, round_to_bfloat16(x));
}

// 2^x = 2^n 2^f with n = round(x), 2^f by its Taylor series: |f| <= 0.5. Of degree 6 the error is
// below 2e-7 of the result, of degree 4 below 5e-5. -inf gives 0, NaN stays one.
// Source: Cody, Waite, "Software Manual for the Elementary Functions" (1980), chapter 6.
template <int degree>
inline __m512 power_of_two(__m512 x) {
  constexpr float series[] = {1.0f,           6.93147181e-1f, 2.40226507e-1f, 5.55041087e-2f,
                              9.61812911e-3f, 1.33335581e-3f, 1.54035304e-4f};
  // The order of the operands keeps a NaN.
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(series[degree]);
#pragma GCC unroll 8
  for (int k = degree - 1; k >= 0; --k) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(series[k]));
  return _mm512_scalef_ps(p, n);
}

constexpr float kLog2E = 1.44269504f;

// The coefficients of fxopt/kernels/gelu.py: z p(z^2) / q(z^2) for |z| < 4, error below 4e-7.
inline __m512 erf(__m512 z) {
  const __m512 edge = _mm512_set1_ps(4.0f);
  const __m512 inside =
      _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), edge), _mm512_min_ps(edge, z));
  const __m512 square = _mm512_mul_ps(inside, inside);
  __m512 p = _mm512_set1_ps(-2.72614225801306e-10f);
  for (float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                  -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f}) {
    p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(c));
  }
  __m512 q = _mm512_set1_ps(-1.45660718464996e-05f);
  for (float c : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                  -1.42647390514189e-02f}) {
    q = _mm512_fmadd_ps(q, square, _mm512_set1_ps(c));
  }
  return _mm512_div_ps(_mm512_mul_ps(inside, p), q);
}

inline __m512 gelu(__m512 x) {
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  return _mm512_fmadd_ps(half, erf(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f))), half);
}

// x (1/2 + z p(z^2)), z = x within +-4.25, where the sum reaches 0 and 1: within 1.5e-5 |x|, which
// is a two-hundredth of a step of 8 bits. The division of the rational form costs as much as all
// this. The coefficients are the minimax ones, under that condition on the ends.
inline __m512 gelu_for_codes(__m512 x) {
  const __m512 edge = _mm512_set1_ps(4.25f), half = _mm512_set1_ps(0.5f);
  const __m512 z = _mm512_max_ps(_mm512_set1_ps(-4.25f), _mm512_min_ps(edge, x));
  const __m512 square = _mm512_mul_ps(z, z), fourth = _mm512_mul_ps(square, square);
  // Even and odd powers apart: half the wait.
  __m512 even = _mm512_set1_ps(6.021764337e-11f), odd = _mm512_set1_ps(-5.692001981e-09f);
  for (float c : {2.375946764e-07f, 9.561395564e-05f, 9.858817793e-03f, 3.989379406e-01f}) {
    even = _mm512_fmadd_ps(even, fourth, _mm512_set1_ps(c));
  }
  for (float c : {-5.840317499e-06f, -1.121637295e-03f, -6.641180068e-02f}) {
    odd = _mm512_fmadd_ps(odd, fourth, _mm512_set1_ps(c));
  }
  const __m512 p = _mm512_fmadd_ps(odd, square, even);
  return _mm512_mul_ps(x, _mm512_fmadd_ps(z, p, half));
}

// x / (1 + e^-z) for z = x (SiLU) and for z = 2 sqrt(2/pi) (x + 0.044715 x^3) (GELU by tanh).
template <int degree>
inline __m512 sigmoid_weighted(__m512 x, __m512 z) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 below = power_of_two<degree>(_mm512_mul_ps(z, _mm512_set1_ps(-kLog2E)));
  return _mm512_div_ps(x, _mm512_add_ps(one, below));
}

template <int degree>
inline __m512 gelu_tanh(__m512 x) {
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 factor =
      _mm512_fmadd_ps(square, _mm512_set1_ps(0.0713548162726f), _mm512_set1_ps(1.59576912161f));
  return sigmoid_weighted<degree>(x, _mm512_mul_ps(x, factor));
}

enum class PostOp { kNone, kRelu, kGelu, kGeluTanh, kSilu, kAdd };

inline PostOp post_op_named(c10::string_view name) {
  if (name == "relu") return PostOp::kRelu;
  if (name == "gelu") return PostOp::kGelu;
  if (name == "gelu_tanh") return PostOp::kGeluTanh;
  if (name == "silu") return PostOp::kSilu;
  if (name == "add") return PostOp::kAdd;
  return PostOp::kNone;
}

// What becomes codes of 8 bits needs no more than 16.
template <PostOp op, bool for_codes = false>
inline __m512 activated(__m512 x) {
  constexpr int degree = for_codes ? 4 : 6;
  // The order of the operands keeps a NaN.
  if constexpr (op == PostOp::kRelu) return _mm512_max_ps(_mm512_setzero_ps(), x);
  if constexpr (op == PostOp::kGelu) return for_codes ? gelu_for_codes(x) : gelu(x);
  if constexpr (op == PostOp::kGeluTanh) return gelu_tanh<degree>(x);
  if constexpr (op == PostOp::kSilu) return sigmoid_weighted<degree>(x, x);
  return x;
}

template <class T>
constexpr bool kIsCode = std::is_same_v<T, uint8_t> || std::is_same_v<T, int8_t>;

// Numbers as codes of 8 bits, x / scale rounded to nearest, plus a zero point, saturated: at `low`
// and `high`, the least and the largest code less the zero point.
struct Quantizer {
  float inverse_scale = 1.0f, low = 0.0f, high = 0.0f;
  int32_t zero_point = 0;

  template <class T>
  void store(T* to, __m512 x, __mmask16 lanes) const {
    x = _mm512_mul_ps(x, _mm512_set1_ps(inverse_scale));
    // Saturated before the conversion, which knows no integer for what is too large.
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(low)), _mm512_set1_ps(high));
    const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(zero_point));
    _mm_mask_storeu_epi8(to, lanes, _mm512_cvtepi32_epi8(q));
  }
};

// One number, a scale or a zero point, of an operator's arguments.
inline bool is_number(const at::Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype && t.numel() == 1;
}

inline int32_t integer(const at::Tensor& t) {
  return t.scalar_type() == at::kByte ? *t.const_data_ptr<uint8_t>() : t.item<int32_t>();
}

inline Quantizer quantizer(const at::Tensor& scale, const at::Tensor& zero_point) {
  const int32_t zero = integer(zero_point);
  const bool is_unsigned = zero_point.scalar_type() == at::kByte;
  const int32_t low = is_unsigned ? 0 : -128, high = is_unsigned ? 255 : 127;
  return {1.0f / *scale.const_data_ptr<float>(), static_cast<float>(low - zero),
          static_cast<float>(high - zero), zero};
}

}  // namespace fxopt
