// Rows of numbers as 8-bit codes, each row with a scale of its own, and a zero point if asked for.
//
// The codes are given plus 128, unsigned, as the product takes them.
// The equations are those of fxopt/kernels/quantization.py. A row is read twice, the second time
// out of the first cache.

namespace fxopt {

// What each column is multiplied by, and what is subtracted from it then; none where null.
struct Columns {
  const float* factor = nullptr;
  const float* shift = nullptr;

  __m512 operator()(__m512 x, int64_t column, __mmask16 lanes) const {
    if (factor) x = _mm512_mul_ps(x, load(factor + column, lanes));
    if (shift) x = _mm512_sub_ps(x, load(shift + column, lanes));
    return x;
  }
};

// The range of a row, which zero belongs to.
template <bool affine>
struct RowRange {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  // As integers, magnitudes stand in the order of the numbers, infinity and NaN above all.
  __m512i largest = _mm512_setzero_si512();

  void add(__m512 value, __mmask16 lanes) {
    value = _mm512_maskz_mov_ps(lanes, value);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(value), magnitude));
    if constexpr (affine) {
      low = _mm512_min_ps(low, value);
      high = _mm512_max_ps(high, value);
    }
  }
};

// How a row is rounded: what its scale and zero point are.
struct RowCodes {
  float step, zero = 0.0f;

  template <bool affine>
  explicit RowCodes(const RowRange<affine>& range) {
    const int32_t bits = _mm512_reduce_max_epi32(range.largest);
    float most;
    std::memcpy(&most, &bits, sizeof most);
    constexpr float least = std::numeric_limits<float>::min();
    step = most / 127.0f;
    if (affine && std::isfinite(most)) {
      const float bottom = _mm512_reduce_min_ps(range.low), top = _mm512_reduce_max_ps(range.high);
      step = std::max((top / 2 - bottom / 2) / 127.5f, least);
      zero = std::min(std::max(std::nearbyint(-128.0f - bottom / step), -128.0f), 127.0f);
    }
    // The order of the operands keeps a NaN.
    step = step < least ? least : step;
  }

  void store(uint8_t* to, __m512 x, __mmask16 lanes) const {
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(1.0f / step)));
    const __m512i added = _mm512_set1_epi32(static_cast<int32_t>(zero));
    const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_add_epi32(code, added));
    _mm_mask_storeu_epi8(to, lanes, _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
  }
};

template <bool affine, class T>
void quantize_row(const T* x, const Columns& columns, int64_t size, uint8_t* q, float* scale,
                  int8_t* zero_point) {
  const auto value = [&](int64_t j, __mmask16 lanes) {
    return columns(load(x + j, lanes), j, lanes);
  };
  RowRange<affine> range;
  for (int64_t j = 0; j < size; j += kLanes) {
    const __mmask16 lanes = first_lanes(size - j);
    range.add(value(j, lanes), lanes);
  }
  const RowCodes codes(range);
  *scale = codes.step;
  if (affine) *zero_point = static_cast<int8_t>(codes.zero);
  for (int64_t j = 0; j < size; j += kLanes) {
    const __mmask16 lanes = first_lanes(size - j);
    codes.store(q + j, value(j, lanes), lanes);
  }
}

template <class T>
void quantize_rows(const at::Tensor& x, const Columns& columns, uint8_t* q, float* scale,
                   int8_t* zero_point) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  const T* from = x.const_data_ptr<T>();
  // Too little for a second thread: below this it takes longer to wake than to do it.
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / size);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * size;
      if (zero_point) {
        quantize_row<true>(from + at, columns, size, q + at, scale + row, zero_point + row);
      } else {
        quantize_row<false>(from + at, columns, size, q + at, scale + row, nullptr);
      }
    }
  });
}

inline bool is_column_vector(const std::optional<at::Tensor>& t, const at::Tensor& x) {
  return !t || (t->scalar_type() == at::kFloat && t->dim() == 1 && t->is_contiguous() &&
                t->numel() == x.size(-1) && x.scalar_type() == at::kFloat);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_tokens(
    const at::Tensor& x, const std::optional<at::Tensor>& factor,
    const std::optional<at::Tensor>& shift, bool affine) {
  const bool known = x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16;
  if (!known || x.dim() < 1 || !x.numel() || !is_column_vector(factor, x) ||
      !is_column_vector(shift, x)) {
    static const auto by_library = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("fxopt::quantize_tokens_by_library", "")
                                       .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                                           const at::Tensor&, const std::optional<at::Tensor>&,
                                           const std::optional<at::Tensor>&, bool)>();
    return by_library.call(x, factor, shift, affine);
  }
  const at::Tensor rows = x.contiguous();
  std::vector<int64_t> by_row = x.sizes().vec();
  by_row.back() = 1;
  const at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kByte));
  const at::Tensor scale = at::empty(by_row, x.options().dtype(at::kFloat));
  if (!affine) by_row = {0};
  const at::Tensor zero_point = at::empty(by_row, x.options().dtype(at::kChar));
  const Columns columns{factor ? factor->const_data_ptr<float>() : nullptr,
                        shift ? shift->const_data_ptr<float>() : nullptr};
  const auto run =
      x.scalar_type() == at::kFloat ? quantize_rows<float> : quantize_rows<at::BFloat16>;
  run(rows, columns, q.mutable_data_ptr<uint8_t>(), scale.mutable_data_ptr<float>(),
      affine ? zero_point.mutable_data_ptr<int8_t>() : nullptr);
  return {q, scale, zero_point};
}

}  // namespace fxopt
