// Linear layers: the product of product.h with everything that follows it inside.
//
// Whatever does not fit (an odd row, another layout, an empty or an inference tensor) goes to the
// operator's namesake that the library serves, `..._by_library`.

namespace fxopt {

// A result of so many bytes leaves the caches before it is read again. Written past them, it spares
// reading what it overwrites, and the weights their place: 7 % of a product that gives 12 MB.
constexpr int64_t kPastCaches = 8 << 20;

inline std::vector<int64_t> output_shape(const at::Tensor& x, const at::Tensor& weight) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return shape;
}

inline bool fits(const at::Tensor& x, const at::Tensor& weight) {
  return x.dim() >= 1 && weight.dim() == 2 && x.size(-1) == weight.size(1) && x.numel() > 0 &&
         weight.numel() > 0 && steps_of(weight) > 0 && !weight.is_inference() &&
         weight.device().is_cpu() && weight.layout() == at::kStrided;
}

template <class T>
struct FloatEpilogue {
  T* out;
  const T* bias;
  const T* other;
  int64_t columns;
  bool past_caches;

  template <PostOp op>
  void finish(const float* sums, int64_t row, int64_t column, __mmask16 lanes) const {
    const int64_t at = row * columns + column;
    const __m512 added = bias ? load(bias + column, lanes) : _mm512_setzero_ps();
    __m512 x = _mm512_add_ps(_mm512_load_ps(sums), added);
    if constexpr (op == PostOp::kAdd) x = _mm512_add_ps(x, load(other + at, lanes));
    x = activated<op>(x);
    if constexpr (std::is_same_v<T, float>) {
      if (past_caches) return _mm512_stream_ps(out + at, x);
    }
    store(out + at, x, lanes);
  }
};

// What rounded activations stand for: (q - zero point) * scale, q shifted to unsigned.
struct Scale {
  float scale;
  int32_t zero_point;
};

// m = l + 128 h and z = z, 128 z as two numbers of 16 bits: what one instruction multiplies and
// adds up is z l + 128 z h = z m. For z of 8 bits and m a sum of fewer than 2^15 weights.
constexpr int64_t kMostInHalves = (1 << 15) - 1;
inline __m512i in_halves(__m512i m) {
  return _mm512_or_si512(_mm512_and_si512(m, _mm512_set1_epi32(127)),
                         _mm512_slli_epi32(_mm512_srai_epi32(m, 7), 16));
}
inline int32_t for_halves(int32_t zero) { return zero | (zero << 23); }

// What the integers of each column are worth, and what a zero point for all rows takes from them.
struct AllRows {
  std::unique_ptr<float[]> factor;
  std::unique_ptr<int32_t[]> offset;

  AllRows(const Scale& rows, const int32_t* sums, const float* weight_scale, int64_t columns)
      : factor(new float[padded(columns)]), offset(new int32_t[padded(columns)]) {
    const __m512 scale = _mm512_set1_ps(rows.scale);
    const __m512i zero_point = _mm512_set1_epi32(rows.zero_point);
    for (int64_t n = 0; n < columns; n += kLanes) {
      const __m512 of_weight = load(weight_scale + n, first_lanes(columns - n));
      _mm512_storeu_ps(factor.get() + n, _mm512_mul_ps(scale, of_weight));
      _mm512_storeu_si512(offset.get() + n,
                          _mm512_mullo_epi32(zero_point, _mm512_loadu_si512(sums + n)));
    }
  }

  __m512 numbers(__m512i total, int64_t, int64_t column, __m512 added) const {
    total = _mm512_sub_epi32(total, _mm512_loadu_si512(offset.get() + column));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_loadu_ps(factor.get() + column),
                           added);
  }
};

// The same with a scale and a zero point for each row.
struct EachRow {
  std::unique_ptr<float[]> factor;
  std::unique_ptr<int32_t[]> negative_sum;
  std::vector<Scale> rows;

  EachRow(std::vector<Scale> scales, const int32_t* sums, const float* weight_scale,
          int64_t columns)
      : factor(new float[padded(columns)]),
        negative_sum(new int32_t[padded(columns)]),
        rows(std::move(scales)) {
    for (Scale& row : rows) row.zero_point = for_halves(row.zero_point);
    for (int64_t n = 0; n < columns; n += kLanes) {
      const __m512i negative =
          _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(sums + n));
      _mm512_storeu_ps(factor.get() + n, load(weight_scale + n, first_lanes(columns - n)));
      _mm512_storeu_si512(negative_sum.get() + n, in_halves(negative));
    }
  }

  __m512 numbers(__m512i total, int64_t row, int64_t column, __m512 added) const {
    const Scale& of_row = rows[row];
    total = _mm512_dpwssd_epi32(total, _mm512_set1_epi32(of_row.zero_point),
                                _mm512_loadu_si512(negative_sum.get() + column));
    const __m512 scale =
        _mm512_mul_ps(_mm512_loadu_ps(factor.get() + column), _mm512_set1_ps(of_row.scale));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, added);
  }
};

// The integers of a product become numbers, and integers again where those are asked for, or come
// `for_codes` after it.
template <class T, class Rows, bool for_codes = kIsCode<T>>
struct Int8Epilogue {
  T* out;
  const Rows& rows;
  const float* bias;
  Quantizer codes;
  int64_t columns;

  template <PostOp op>
  __m512 value(const float* sum, int64_t row, int64_t column, __mmask16 lanes) const {
    const __m512 added = bias ? load(bias + column, lanes) : _mm512_setzero_ps();
    return activated<op, for_codes>(rows.numbers(_mm512_load_si512(sum), row, column, added));
  }

  template <PostOp op>
  void finish(const float* sum, int64_t row, int64_t column, __mmask16 lanes) const {
    const __m512 x = value<op>(sum, row, column, lanes);
    T* to = out + row * columns + column;
    if constexpr (kIsCode<T>) {
      codes.store(to, x, lanes);
    } else {
      store(to, x, lanes);
    }
  }
};

// `run` with `op` as a constant.
template <class Run>
void with_post_op(PostOp op, const Run& run) {
  switch (op) {
    case PostOp::kRelu:
      return run(std::integral_constant<PostOp, PostOp::kRelu>());
    case PostOp::kGelu:
      return run(std::integral_constant<PostOp, PostOp::kGelu>());
    case PostOp::kGeluTanh:
      return run(std::integral_constant<PostOp, PostOp::kGeluTanh>());
    case PostOp::kSilu:
      return run(std::integral_constant<PostOp, PostOp::kSilu>());
    default:
      return run(std::integral_constant<PostOp, PostOp::kNone>());
  }
}

// `epilogue` with `op` inside, for all of the product.
template <class Kind, class Epilogue>
void multiply_with(const int32_t* a, const int32_t* b, int64_t rows, int64_t columns, int64_t steps,
                   const Epilogue& epilogue, PostOp op) {
  const auto run = [&](auto chosen) {
    constexpr PostOp known = decltype(chosen)::value;
    multiply_all<Kind>(a, b, rows, columns, steps,
                       [&](auto... vector) { epilogue.template finish<known>(vector...); });
  };
  if constexpr (std::is_same_v<Epilogue, FloatEpilogue<float>> ||
                std::is_same_v<Epilogue, FloatEpilogue<at::BFloat16>>) {
    if (op == PostOp::kAdd) return run(std::integral_constant<PostOp, PostOp::kAdd>());
  }
  with_post_op(op, run);
}

template <class Kind, class T>
at::Tensor float_linear(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, PostOp op,
                        const std::optional<at::Tensor>& other) {
  const at::Tensor rows = x.contiguous(), packed = panels(weight);
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor residual = other ? other->contiguous() : at::Tensor();
  at::Tensor out = at::empty(output_shape(x, weight), x.options());
  const int64_t columns = weight.size(0);
  const FloatEpilogue<T> epilogue{
      out.mutable_data_ptr<T>(), bias ? added.const_data_ptr<T>() : nullptr,
      other ? residual.const_data_ptr<T>() : nullptr, columns,
      // By whole vectors at aligned addresses only.
      columns % kLanes == 0 && reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0 &&
          static_cast<int64_t>(out.nbytes()) >= kPastCaches};
  multiply_with<Kind>(static_cast<const int32_t*>(rows.const_data_ptr()),
                      packed.const_data_ptr<int32_t>(), rows.numel() / rows.size(-1), columns,
                      steps_of(weight), epilogue, op);
  return out;
}

inline at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, c10::string_view post_op,
                                const std::optional<at::Tensor>& other) {
  const auto alike = [&](const std::optional<at::Tensor>& t) {
    return !t || t->scalar_type() == x.scalar_type();
  };
  const PostOp op = post_op_named(post_op);
  const bool well_formed =
      fits(x, weight) && weight.scalar_type() == x.scalar_type() && alike(bias) && alike(other) &&
      (op == PostOp::kAdd) == other.has_value() && (op != PostOp::kNone || post_op == "none") &&
      (!bias || bias->numel() == weight.size(0)) &&
      (!other || other->sizes() == output_shape(x, weight));
  if (well_formed && x.scalar_type() == at::kFloat) {
    return float_linear<Float32, float>(x, weight, bias, op, other);
  }
  if (well_formed && x.scalar_type() == at::kBFloat16) {
    return float_linear<BFloat16, at::BFloat16>(x, weight, bias, op, other);
  }
  static const auto by_library = library_of(packed_linear, "fxopt::packed_linear_by_library");
  return by_library.call(x, weight, bias, post_op, other);
}

// Rows of unsigned integers: those of int8 shifted by 128.
inline at::Tensor unsigned_rows(const at::Tensor& q) {
  const at::Tensor rows = q.contiguous();
  if (rows.scalar_type() == at::kByte) return rows;
  at::Tensor shifted = at::empty(rows.sizes(), rows.options().dtype(at::kByte));
  const auto* from = rows.const_data_ptr<int8_t>();
  auto* to = shifted.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, rows.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += 64) {
      const __mmask64 bytes = end - at >= 64 ? ~0ull : (1ull << (end - at)) - 1;
      const __m512i q = _mm512_maskz_loadu_epi8(bytes, from + at);
      _mm512_mask_storeu_epi8(to + at, bytes, _mm512_xor_si512(q, _mm512_set1_epi8(-128)));
    }
  });
  return shifted;
}

inline at::Tensor int8_product(const at::Tensor& q, const at::Tensor& weight) {
  if (!fits(q, weight) || q.scalar_type() != at::kChar || weight.scalar_type() != at::kChar) {
    static const auto by_library = library_of(int8_product, "fxopt::int8_product_by_library");
    return by_library.call(q, weight);
  }
  const at::Tensor rows = unsigned_rows(q), packed = panels(weight);
  const int64_t columns = weight.size(0), steps = steps_of(weight);
  at::Tensor product = at::empty(output_shape(q, weight), q.options().dtype(at::kInt));
  const int32_t* b = packed.const_data_ptr<int32_t>();
  const int32_t* sums = b + padded(columns) * steps;
  int32_t* out = product.mutable_data_ptr<int32_t>();
  multiply_all<Int8>(
      static_cast<const int32_t*>(rows.const_data_ptr()), b, rows.numel() / rows.size(-1), columns,
      steps, [&](const float* sum, int64_t row, int64_t column, __mmask16 lanes) {
        const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(sums + column), 7);
        _mm512_mask_storeu_epi32(out + row * columns + column, lanes,
                                 _mm512_sub_epi32(_mm512_load_si512(sum), offset));
      });
  return product;
}

// `q` 8-bit; `rows` an AllRows or an EachRow for its unsigned codes.
template <class T, class Rows>
at::Tensor int8_linear(const at::Tensor& q, const Rows& rows, const at::Tensor& weight,
                       const at::Tensor& packed, const float* bias, PostOp op,
                       const Quantizer& codes) {
  const at::Tensor a = unsigned_rows(q);
  const int64_t columns = weight.size(0), steps = steps_of(weight);
  const auto options = q.options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor out = at::empty(output_shape(q, weight), options);
  const Int8Epilogue<T, Rows> epilogue{out.mutable_data_ptr<T>(), rows, bias, codes, columns};
  multiply_with<Int8>(static_cast<const int32_t*>(a.const_data_ptr()),
                      packed.const_data_ptr<int32_t>(), a.numel() / a.size(-1), columns, steps,
                      epilogue, op);
  return out;
}

// The sums of a weight's rows, which lie after its panels.
inline const int32_t* row_sums(const at::Tensor& weight, const at::Tensor& packed) {
  return packed.const_data_ptr<int32_t>() + padded(weight.size(0)) * steps_of(weight);
}

inline bool is_float_vector(const at::Tensor& t, int64_t size) {
  return t.scalar_type() == at::kFloat && t.numel() == size && t.is_contiguous();
}

// Whether the kernels take a product of activations with one scale and zero point.
inline bool takes_static_int8(const at::Tensor& q, const at::Tensor& scale,
                              const at::Tensor& zero_point, const at::Tensor& weight,
                              const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
                              c10::string_view post_op) {
  const PostOp op = post_op_named(post_op);
  const int64_t columns = weight.dim() == 2 ? weight.size(0) : -1;
  return fits(q, weight) && weight.scalar_type() == at::kChar &&
         (q.scalar_type() == at::kByte || q.scalar_type() == at::kChar) &&
         is_float_vector(scale, 1) && zero_point.numel() == 1 &&
         is_float_vector(weight_scale, columns) && (!bias || is_float_vector(*bias, columns)) &&
         op != PostOp::kAdd && (op != PostOp::kNone || post_op == "none");
}

// What the unsigned codes of `q` are worth.
inline AllRows all_rows(const at::Tensor& q, const at::Tensor& scale, const at::Tensor& zero_point,
                        const at::Tensor& weight, const at::Tensor& packed,
                        const at::Tensor& weight_scale) {
  const int32_t zero = integer(zero_point) + (q.scalar_type() == at::kChar ? 128 : 0);
  return AllRows({*scale.const_data_ptr<float>(), zero}, row_sums(weight, packed),
                 weight_scale.const_data_ptr<float>(), weight.size(0));
}

inline at::Tensor packed_int8_linear(
    const at::Tensor& q, const at::Tensor& scale, const at::Tensor& zero_point,
    const at::Tensor& weight, const at::Tensor& weight_scale, const std::optional<at::Tensor>& bias,
    c10::string_view post_op, const std::optional<at::Tensor>& out_scale,
    const std::optional<at::Tensor>& out_zero_point, at::ScalarType dtype) {
  const PostOp op = post_op_named(post_op);
  const bool requantizes = out_scale.has_value();
  const bool to_integers = dtype == at::kByte || dtype == at::kChar;
  const bool well_formed =
      takes_static_int8(q, scale, zero_point, weight, weight_scale, bias, post_op) &&
      requantizes == out_zero_point.has_value() &&
      (requantizes
           ? to_integers && is_number(*out_scale, at::kFloat) && is_number(*out_zero_point, dtype)
           : dtype == at::kFloat || dtype == at::kBFloat16);
  if (!well_formed) {
    static const auto by_library =
        library_of(packed_int8_linear, "fxopt::packed_int8_linear_by_library");
    return by_library.call(q, scale, zero_point, weight, weight_scale, bias, post_op, out_scale,
                           out_zero_point, dtype);
  }
  const at::Tensor packed = panels(weight);
  const AllRows rows = all_rows(q, scale, zero_point, weight, packed, weight_scale);
  const auto run = [&](auto like) {
    return int8_linear<decltype(like)>(
        q, rows, weight, packed, bias ? bias->const_data_ptr<float>() : nullptr, op,
        requantizes ? quantizer(*out_scale, *out_zero_point) : Quantizer());
  };
  switch (dtype) {
    case at::kByte:
      return run(uint8_t());
    case at::kChar:
      return run(int8_t());
    case at::kBFloat16:
      return run(at::BFloat16());
    default:
      return run(float());
  }
}

// One number for each row of `q`, in its shape but for the last axis of 1.
inline bool is_by_row(const at::Tensor& t, const at::Tensor& q, at::ScalarType dtype) {
  return t.scalar_type() == dtype && t.dim() == q.dim() && t.is_contiguous() && t.size(-1) == 1 &&
         std::equal(t.sizes().begin(), t.sizes().end() - 1, q.sizes().begin());
}

// Whether the kernels take a product of activations with a scale for each row.
inline bool takes_dynamic_int8(const at::Tensor& q, const at::Tensor& scale,
                               const std::optional<at::Tensor>& zero_point,
                               const at::Tensor& weight, const at::Tensor& weight_scale,
                               const std::optional<at::Tensor>& bias, c10::string_view post_op) {
  const PostOp op = post_op_named(post_op);
  const int64_t columns = weight.dim() == 2 ? weight.size(0) : -1;
  return fits(q, weight) && weight.scalar_type() == at::kChar && weight.size(1) <= kMostInHalves &&
         (q.scalar_type() == at::kChar || q.scalar_type() == at::kByte) &&
         is_by_row(scale, q, at::kFloat) && (!zero_point || is_by_row(*zero_point, q, at::kChar)) &&
         is_float_vector(weight_scale, columns) && (!bias || is_float_vector(*bias, columns)) &&
         op != PostOp::kAdd && (op != PostOp::kNone || post_op == "none");
}

// What the unsigned codes of each row are worth.
inline EachRow each_row(const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                        const at::Tensor& weight, const at::Tensor& packed,
                        const at::Tensor& weight_scale) {
  std::vector<Scale> rows(scale.numel());
  for (size_t row = 0; row < rows.size(); ++row) {
    const int32_t zero = zero_point ? zero_point->const_data_ptr<int8_t>()[row] : 0;
    rows[row] = {scale.const_data_ptr<float>()[row], zero + 128};
  }
  return EachRow(std::move(rows), row_sums(weight, packed), weight_scale.const_data_ptr<float>(),
                 weight.size(0));
}

inline at::Tensor int8_linear_fused(const at::Tensor& q, const at::Tensor& scale,
                                    const std::optional<at::Tensor>& zero_point,
                                    const at::Tensor& weight, const at::Tensor& weight_scale,
                                    const std::optional<at::Tensor>& weight_sums,
                                    const std::optional<at::Tensor>& bias, at::ScalarType dtype,
                                    c10::string_view post_op) {
  const PostOp op = post_op_named(post_op);
  const bool well_formed =
      takes_dynamic_int8(q, scale, zero_point, weight, weight_scale, bias, post_op) &&
      (dtype == at::kFloat || dtype == at::kBFloat16);
  if (!well_formed) {
    static const auto by_library =
        library_of(int8_linear_fused, "fxopt::int8_linear_fused_by_library");
    return by_library.call(q, scale, zero_point, weight, weight_scale, weight_sums, bias, dtype,
                           post_op);
  }
  const at::Tensor packed = panels(weight);
  const EachRow rows = each_row(scale, zero_point, weight, packed, weight_scale);
  const auto run = [&](auto like) {
    return int8_linear<decltype(like)>(
        q, rows, weight, packed, bias ? bias->const_data_ptr<float>() : nullptr, op, Quantizer());
  };
  return dtype == at::kFloat ? run(float()) : run(at::BFloat16());
}

}  // namespace fxopt
