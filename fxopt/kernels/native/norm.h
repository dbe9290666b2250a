// Layer norm of a sum, and its result as 8-bit codes besides, while the row is in the first cache.
//
// The norm takes two passes, as fxopt/kernels/layer_norm.py does; the codes are those of
// quantize.h, or of a scale given for all rows.

namespace fxopt {

struct Norm {
  const float* weight;
  const float* bias;
  float eps;
};

// One row of `x + other` into `row`, then normalised into `y`, which `take(column, value, lanes)`
// sees too.
template <class Take>
void normalize(const float* x, const float* other, const Norm& norm, int64_t size, float* row,
               float* y, const Take& take) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < size; j += kLanes) {
    const __mmask16 lanes = first_lanes(size - j);
    __m512 value = load(x + j, lanes);
    if (other) value = _mm512_add_ps(value, load(other + j, lanes));
    sum = _mm512_add_ps(sum, value);
    _mm512_store_ps(row + j, value);
  }
  const float share = 1.0f / static_cast<float>(size);
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * share);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < size; j += kLanes) {
    const __m512 centred =
        _mm512_maskz_sub_ps(first_lanes(size - j), _mm512_load_ps(row + j), mean);
    squares = _mm512_fmadd_ps(centred, centred, squares);
    _mm512_store_ps(row + j, centred);
  }
  const float variance = _mm512_reduce_add_ps(squares) * share;
  const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + norm.eps));
  for (int64_t j = 0; j < size; j += kLanes) {
    const __mmask16 lanes = first_lanes(size - j);
    __m512 value = _mm512_mul_ps(_mm512_load_ps(row + j), inverse);
    if (norm.weight) value = _mm512_mul_ps(value, load(norm.weight + j, lanes));
    if (norm.bias) value = _mm512_add_ps(value, load(norm.bias + j, lanes));
    store(y + j, value, lanes);
    take(j, value, lanes);
  }
}

struct NormRows {
  const float* x;
  const float* other;
  Norm norm;
  Columns columns;
  int64_t rows, size;
  float* y;

  // `finish(row number, the row as it is to be rounded)` after each; where no row is asked for,
  // `take` rounds as it goes.
  template <class Take, class Finish>
  void all(const Take& take, const Finish& finish) const {
    const int64_t grain = std::max<int64_t>(1, (1 << 13) / size);
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      const auto row = std::make_unique<float[]>(padded(size) + kLanes);
      auto* aligned =
          reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(row.get()) + 63) / 64 * 64);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * size;
        auto state = take(i);
        normalize(x + at, other ? other + at : nullptr, norm, size, aligned, y + at,
                  [&](int64_t j, __m512 value, __mmask16 lanes) {
                    value = columns(value, j, lanes);
                    _mm512_store_ps(aligned + j, value);
                    state.add(value, lanes);
                  });
        finish(i, state, aligned);
      }
    });
  }
};

template <bool affine>
void norm_to_tokens(const NormRows& rows, uint8_t* q, float* scale, int8_t* zero_point) {
  rows.all([](int64_t) { return RowRange<affine>(); },
           [&](int64_t i, const RowRange<affine>& range, const float* row) {
             const RowCodes codes(range);
             scale[i] = codes.step;
             if (affine) zero_point[i] = static_cast<int8_t>(codes.zero);
             for (int64_t j = 0; j < rows.size; j += kLanes) {
               const __mmask16 lanes = first_lanes(rows.size - j);
               codes.store(q + i * rows.size + j, _mm512_load_ps(row + j), lanes);
             }
           });
}

// What is rounded by a scale that is given needs no look at the row.
struct NoRange {
  void add(__m512, __mmask16) {}
};

template <class T>
void norm_to_codes(const NormRows& rows, T* q, const Quantizer& codes) {
  rows.all([](int64_t) { return NoRange(); },
           [&](int64_t i, const NoRange&, const float* row) {
             for (int64_t j = 0; j < rows.size; j += kLanes) {
               const __mmask16 lanes = first_lanes(rows.size - j);
               codes.store(q + i * rows.size + j, _mm512_load_ps(row + j), lanes);
             }
           });
}

inline bool is_plain(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat && t.is_contiguous();
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_layer_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& other,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps,
    const std::optional<at::Tensor>& factor, const std::optional<at::Tensor>& shift,
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& zero_point,
    bool affine) {
  const bool given = scale.has_value();
  bool well_formed =
      is_plain(x) && x.dim() >= 1 && x.numel() > 0 && given == zero_point.has_value();
  well_formed = well_formed && (!other || (is_plain(*other) && other->sizes() == x.sizes()));
  for (const auto* vector : {&weight, &bias, &factor, &shift}) {
    well_formed = well_formed && is_column_vector(*vector, x);
  }
  well_formed =
      well_formed && (!given || (is_number(*scale, at::kFloat) && zero_point->numel() == 1 &&
                                 (zero_point->scalar_type() == at::kByte ||
                                  zero_point->scalar_type() == at::kChar)));
  if (!well_formed) {
    static const auto by_library =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("fxopt::quantized_layer_norm_by_library", "")
            .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
                const at::Tensor&, const std::optional<at::Tensor>&,
                const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, double,
                const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool)>();
    return by_library.call(x, other, weight, bias, eps, factor, shift, scale, zero_point, affine);
  }
  const auto data = [](const std::optional<at::Tensor>& t) {
    return t ? t->const_data_ptr<float>() : nullptr;
  };
  const at::Tensor y = at::empty(x.sizes(), x.options());
  const NormRows rows{x.const_data_ptr<float>(),
                      data(other),
                      {data(weight), data(bias), static_cast<float>(eps)},
                      {data(factor), data(shift)},
                      x.numel() / x.size(-1),
                      x.size(-1),
                      y.mutable_data_ptr<float>()};
  const auto codes_of = [&](at::ScalarType dtype) {
    return at::empty(x.sizes(), x.options().dtype(dtype));
  };
  std::vector<int64_t> by_row = x.sizes().vec();
  by_row.back() = 1;
  if (given) by_row = {0};
  const at::Tensor scales = at::empty(by_row, x.options());
  if (!affine) by_row = {0};
  const at::Tensor zeros = at::empty(by_row, x.options().dtype(at::kChar));
  at::Tensor q;
  if (!given) {
    q = codes_of(at::kByte);
    const auto run = affine ? norm_to_tokens<true> : norm_to_tokens<false>;
    run(rows, q.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr<float>(),
        affine ? zeros.mutable_data_ptr<int8_t>() : nullptr);
  } else {
    const Quantizer codes = quantizer(*scale, *zero_point);
    q = codes_of(zero_point->scalar_type());
    if (zero_point->scalar_type() == at::kByte) {
      norm_to_codes(rows, q.mutable_data_ptr<uint8_t>(), codes);
    } else {
      norm_to_codes(rows, q.mutable_data_ptr<int8_t>(), codes);
    }
  }
  return {q, scales, zeros, y};
}

}  // namespace fxopt
