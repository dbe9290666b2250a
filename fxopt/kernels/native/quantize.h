// Rows of numbers as 8-bit codes, each row with a scale of its own, and a zero point if asked for.
// Numbers that are there, or those of an int8 linear layer, which then never leave the cache.
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

// Codes, scales and zero points of rows, to be filled.
struct Tokens {
  at::Tensor codes, scales, zero_points;

  Tokens(std::vector<int64_t> shape, const at::TensorOptions& options, bool affine) {
    codes = at::empty(shape, options.dtype(at::kByte));
    shape.back() = 1;
    scales = at::empty(shape, options.dtype(at::kFloat));
    if (!affine) shape = {0};
    zero_points = at::empty(shape, options.dtype(at::kChar));
  }

  template <bool affine>
  void round(const float* x, int64_t row) {
    const int64_t size = codes.size(-1);
    quantize_row<affine>(x, Columns(), size, codes.mutable_data_ptr<uint8_t>() + row * size,
                         scales.mutable_data_ptr<float>() + row,
                         affine ? zero_points.mutable_data_ptr<int8_t>() + row : nullptr);
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> all() const {
    return {codes, scales, zero_points};
  }
};

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
    static const auto by_library = library_of(quantize_tokens, "fxopt::quantize_tokens_by_library");
    return by_library.call(x, factor, shift, affine);
  }
  const at::Tensor rows = x.contiguous();
  Tokens tokens(x.sizes().vec(), x.options(), affine);
  const Columns columns{factor ? factor->const_data_ptr<float>() : nullptr,
                        shift ? shift->const_data_ptr<float>() : nullptr};
  const auto run =
      x.scalar_type() == at::kFloat ? quantize_rows<float> : quantize_rows<at::BFloat16>;
  run(rows, columns, tokens.codes.mutable_data_ptr<uint8_t>(),
      tokens.scales.mutable_data_ptr<float>(),
      affine ? tokens.zero_points.mutable_data_ptr<int8_t>() : nullptr);
  return tokens.all();
}

// Rows of a product that stay in half of a second-level cache in float32 until they are rounded.
constexpr int64_t kTokenRows = 4 * kTileRows;

// The rows of an int8 linear layer, rounded by the thread that made them as they are done.
template <bool affine, PostOp op, class Rows>
void linear_to_tokens(const int32_t* a, const int32_t* b, int64_t rows, int64_t steps,
                      const Int8Epilogue<float, Rows, true>& epilogue, Tokens& tokens) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t tiles = tiles_of(rows), columns = epilogue.columns;
  at::Tensor numbers =
      at::empty({threads, kTokenRows, columns}, tokens.codes.options().dtype(at::kFloat));
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const Part part{tiles * thread / threads * kTileRows,
                      std::min(rows, tiles * (thread + 1) / threads * kTileRows), 0,
                      panels_of(columns)};
      float* own = numbers.mutable_data_ptr<float>() + thread * kTokenRows * columns;
      const auto place = [&](int64_t row) {
        return own + (row - part.first_row) % kTokenRows * columns;
      };
      const auto finish = [&](const float* sum, int64_t row, int64_t column, __mmask16 lanes) {
        store(place(row) + column, epilogue.template value<op>(sum, row, column, lanes), lanes);
      };
      const auto round_rows = [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) tokens.round<affine>(place(row), row);
      };
      multiply_part<Int8>(a, b, columns, steps, part, kTokenRows, finish, round_rows);
    }
  });
}

// The same where the threads share the columns of too few rows: all of them are rounded at the end.
template <bool affine, PostOp op, class Rows>
void few_rows_to_tokens(const int32_t* a, const int32_t* b, int64_t rows, int64_t steps,
                        Int8Epilogue<float, Rows, true> epilogue, Tokens& tokens) {
  const int64_t columns = epilogue.columns;
  at::Tensor numbers = at::empty({rows, columns}, tokens.codes.options().dtype(at::kFloat));
  epilogue.out = numbers.mutable_data_ptr<float>();
  multiply_all<Int8>(a, b, rows, columns, steps,
                     [&](auto... vector) { epilogue.template finish<op>(vector...); });
  for (int64_t row = 0; row < rows; ++row) tokens.round<affine>(epilogue.out + row * columns, row);
}

template <class Rows>
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_tokens(
    const at::Tensor& q, const Rows& scales, const at::Tensor& weight, const at::Tensor& packed,
    const std::optional<at::Tensor>& bias, PostOp op, bool affine) {
  const at::Tensor codes = unsigned_rows(q);
  const int64_t columns = weight.size(0), steps = steps_of(weight);
  const int64_t rows = codes.numel() / codes.size(-1);
  const auto* a = static_cast<const int32_t*>(codes.const_data_ptr());
  const int32_t* b = packed.const_data_ptr<int32_t>();
  const float* added = bias ? bias->const_data_ptr<float>() : nullptr;
  const Int8Epilogue<float, Rows, true> epilogue{nullptr, scales, added, Quantizer(), columns};
  Tokens tokens(output_shape(q, weight), q.options(), affine);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const bool by_rows = threads_for_rows(threads, rows, columns) == threads;
  const auto run = [&](auto chosen, auto is_affine) {
    constexpr PostOp known = decltype(chosen)::value;
    constexpr bool zeros = decltype(is_affine)::value;
    if (by_rows) {
      linear_to_tokens<zeros, known>(a, b, rows, steps, epilogue, tokens);
    } else {
      few_rows_to_tokens<zeros, known>(a, b, rows, steps, epilogue, tokens);
    }
  };
  with_post_op(op, [&](auto chosen) {
    if (affine) return run(chosen, std::true_type());
    run(chosen, std::false_type());
  });
  return tokens.all();
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_int8_linear_tokens(
    const at::Tensor& q, const at::Tensor& scale, const at::Tensor& zero_point,
    const at::Tensor& weight, const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
    c10::string_view post_op, bool affine) {
  if (!takes_static_int8(q, scale, zero_point, weight, weight_scale, bias, post_op)) {
    static const auto by_library =
        library_of(packed_int8_linear_tokens, "fxopt::packed_int8_linear_tokens_by_library");
    return by_library.call(q, scale, zero_point, weight, weight_scale, bias, post_op, affine);
  }
  const at::Tensor packed = panels(weight);
  return linear_tokens(q, all_rows(q, scale, zero_point, weight, packed, weight_scale), weight,
                       packed, bias, post_op_named(post_op), affine);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> int8_linear_fused_tokens(
    const at::Tensor& q, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
    const at::Tensor& weight, const at::Tensor& weight_scale,
    const std::optional<at::Tensor>& weight_sums, const std::optional<at::Tensor>& bias,
    c10::string_view post_op, bool affine) {
  if (!takes_dynamic_int8(q, scale, zero_point, weight, weight_scale, bias, post_op)) {
    static const auto by_library =
        library_of(int8_linear_fused_tokens, "fxopt::int8_linear_fused_tokens_by_library");
    return by_library.call(q, scale, zero_point, weight, weight_scale, weight_sums, bias, post_op,
                           affine);
  }
  const at::Tensor packed = panels(weight);
  return linear_tokens(q, each_row(scale, zero_point, weight, packed, weight_scale), weight, packed,
                       bias, post_op_named(post_op), affine);
}

}  // namespace fxopt
