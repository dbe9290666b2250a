// Attention in one pass: eight queries at a time against all keys, or blocks of them.
//
//     attention(q, k, v, mask)  =  softmax(s q kᵀ + mask) v
//
// Keys and values are laid out once a head, as the product wants them. The scores of eight queries
// stay in the first cache between the two products. Where there are more keys than a block holds,
// the output so far is scaled down whenever a larger score comes up. The division by the sum of the
// weights waits until the end. A query that may see no key gets 0, as aten gives.
// Source: Dao et al., "FlashAttention" (2022); Milakov, Gimelshein, "Online normalizer calculation
// for softmax" (2018).

namespace fxopt {

// Keys of a block: eight panels, whose scores for eight queries take 12 KiB.
constexpr int64_t kKeys = 8 * kPanel;
// Queries of a head that one thread takes at least, since each lays the keys out anew.
constexpr int64_t kLeastQueries = 64;

// What is added to the scores, by strides in elements; kind none, bool (false hides) or float.
struct Mask {
  const void* data = nullptr;
  bool is_bool = false;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

// What the mask adds to a vector of scores; `lanes` are those of keys.
inline __m512 bias_at(const Mask& mask, int64_t at, __mmask16 lanes) {
  const __m512 hidden = _mm512_set1_ps(-kInfinity);
  if (!mask.data) return _mm512_mask_mov_ps(hidden, lanes, _mm512_setzero_ps());
  alignas(64) float spread[kLanes];
  if (mask.is_bool) {
    const auto* seen = static_cast<const uint8_t*>(mask.data) + at;
    if (mask.key == 1) {
      const __m128i bytes = _mm_maskz_loadu_epi8(lanes, seen);
      return _mm512_mask_mov_ps(hidden, _mm_test_epi8_mask(bytes, bytes), _mm512_setzero_ps());
    }
    for (int j = 0; j < kLanes; ++j) {
      spread[j] = (lanes >> j & 1) && seen[j * mask.key] ? 0.0f : -kInfinity;
    }
    return _mm512_load_ps(spread);
  }
  const auto* bias = static_cast<const float*>(mask.data) + at;
  if (mask.key == 1) return _mm512_mask_mov_ps(hidden, lanes, load(bias, lanes));
  for (int j = 0; j < kLanes; ++j) spread[j] = (lanes >> j & 1) ? bias[j * mask.key] : -kInfinity;
  return _mm512_load_ps(spread);
}

// Whether the mask that starts at `row` is the same for all queries, as one of padding is.
inline bool hides_alike(const Mask& mask, int64_t row, int64_t queries, int64_t keys) {
  if (!mask.data || mask.query == 0 || queries == 1) return true;
  if (mask.key != 1) return false;
  const int64_t size = mask.is_bool ? 1 : 4;
  const auto* first = static_cast<const char*>(mask.data) + row * size;
  for (int64_t query = 1; query < queries; ++query) {
    if (std::memcmp(first, first + query * mask.query * size, keys * size)) return false;
  }
  return true;
}

// Values [keys, size] as steps of keys: [step][column], the columns filled up to whole vectors.
inline void lay_out_values(const float* from, int64_t stride, int64_t keys, int64_t size,
                           int32_t* to) {
  const int64_t pitch = padded(size);
  for (int64_t key = 0; key < keys; ++key) {
    for (int64_t j = 0; j < pitch; j += kLanes) {
      const __m512 values = load(from + key * stride + j, first_lanes(size - j));
      _mm512_storeu_si512(to + key * pitch + j, _mm512_castps_si512(values));
    }
  }
}

inline void lay_out_values(const at::BFloat16* from, int64_t stride, int64_t keys, int64_t size,
                           int32_t* to) {
  const int64_t pitch = padded(size);
  for (int64_t key = 0; key < keys; key += 2) {
    const at::BFloat16 *low = from + key * stride, *high = low + stride;
    for (int64_t j = 0; j < pitch; j += kLanes) {
      const __mmask16 lanes = first_lanes(size - j), next = key + 1 < keys ? lanes : 0;
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, low + j));
      const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next, high + j));
      _mm512_storeu_si512(to + key / 2 * pitch + j,
                          _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
  }
}

struct Shape {
  int64_t batch, heads, queries, keys, size, value_size, heads_a_key;
  bool is_causal;
  float scale;
};

// The buffers of one thread.
template <class T>
struct Workspace {
  std::vector<int32_t> keys, values;
  // What the mask adds, where it is the same for all queries.
  std::vector<float> bias;
  std::vector<float> output;
  alignas(64) float scores[kTileRows * kKeys];
  alignas(64) T weights[kTileRows * kKeys];
  alignas(64) float tile[kTileRows * kPanel];
  alignas(64) float top[kTileRows * kLanes];
  float largest[kTileRows], total[kTileRows];
  bool alike = true;

  Workspace(const Shape& shape, int64_t step)
      : keys(padded(shape.keys) * (shape.size / step)),
        values((shape.keys + step - 1) / step * padded(shape.value_size)),
        bias(padded(shape.keys)),
        output(kTileRows * padded(shape.value_size)) {}
};

// Where the output goes: in the inputs' dtype, or as codes of what it would be in that.
template <class T, class Out>
struct Output {
  Out* data;
  Quantizer codes;

  void store(int64_t at, __m512 x, __mmask16 lanes) const {
    if constexpr (!kIsCode<Out>) {
      fxopt::store(data + at, x, lanes);
    } else if constexpr (std::is_same_v<T, at::BFloat16>) {
      const __m512i wide = _mm512_cvtepu16_epi32(round_to_bfloat16(x));
      codes.store(data + at, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)), lanes);
    } else {
      codes.store(data + at, x, lanes);
    }
  }
};

// A head as one thread works on it: its queries and its output, rows apart, and its place in the
// mask.
template <class T>
struct Head {
  const T* queries;
  int64_t query_row;
  int64_t output;
  int64_t output_row;
  const Mask& mask;
  int64_t mask_row;
};

// Scores of `rows` queries from `query` on for the keys of the panel at `column`, in base 2, into
// `scores` [rows, kKeys], and the largest of each lane.
template <class T>
inline void score(const Shape& shape, const Head<T>& head, Workspace<T>& work, int64_t query,
                  int rows, int64_t column, int64_t wide, float* scores) {
  const __m512 scale = _mm512_set1_ps(shape.scale * kLog2E), base = _mm512_set1_ps(kLog2E);
  for (int i = 0; i < rows; ++i) {
    __m512 top = _mm512_load_ps(work.top + i * kLanes);
    for (int64_t j = 0; j < wide; j += kLanes) {
      const int64_t key = column + j;
      __m512 bias;
      if (work.alike) {
        bias = _mm512_loadu_ps(work.bias.data() + key);
      } else {
        const int64_t at = head.mask_row + (query + i) * head.mask.query + key * head.mask.key;
        bias = _mm512_mul_ps(bias_at(head.mask, at, first_lanes(shape.keys - key)), base);
      }
      __m512 x = _mm512_fmadd_ps(_mm512_load_ps(work.tile + i * kPanel + j), scale, bias);
      if (shape.is_causal && key + kLanes > query + i) {
        const __mmask16 kept = first_lanes(std::max<int64_t>(0, query + i + 1 - key));
        x = _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), kept, x);
      }
      _mm512_store_ps(scores + i * kKeys + j, x);
      top = _mm512_max_ps(top, x);
    }
    _mm512_store_ps(work.top + i * kLanes, top);
  }
}

// The weights 2^(score - largest) of each row as the next product takes them, and their sum. What a
// block before has left of sum and output fades by what the largest has grown.
template <class T>
inline void weigh(Workspace<T>& work, int rows, int64_t keys, int64_t value_pitch, bool is_first) {
  constexpr int degree = std::is_same_v<T, float> ? 6 : 4;
  for (int i = 0; i < rows; ++i) {
    const float before = is_first ? -kInfinity : work.largest[i];
    const float largest =
        std::max(before, _mm512_reduce_max_ps(_mm512_load_ps(work.top + i * kLanes)));
    // A row of -inf alone must not become NaN: -inf - (-inf).
    const __m512 shift = _mm512_set1_ps(largest == -kInfinity ? 0.0f : largest);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < keys; key += kLanes) {
      const __m512 x = _mm512_sub_ps(_mm512_load_ps(work.scores + i * kKeys + key), shift);
      const __m512 weight = power_of_two<degree>(x);
      sum = _mm512_add_ps(sum, weight);
      store(work.weights + i * kKeys + key, weight, 0xffff);
    }
    const float faded = before == -kInfinity ? 0.0f : std::exp2(before - largest);
    work.total[i] = _mm512_reduce_add_ps(sum) + (is_first ? 0.0f : faded * work.total[i]);
    work.largest[i] = largest;
    if (is_first) continue;
    float* output = work.output.data() + i * value_pitch;
    for (int64_t j = 0; j < value_pitch; j += kLanes) {
      _mm512_storeu_ps(output + j,
                       _mm512_mul_ps(_mm512_loadu_ps(output + j), _mm512_set1_ps(faded)));
    }
  }
}

// The block's weights times its values, added to the output of the blocks before.
template <class Kind, class T>
inline void gather(Workspace<T>& work, int rows, int64_t block, int64_t keys, int64_t value_pitch) {
  const auto* weights = reinterpret_cast<const int32_t*>(work.weights);
  const int32_t* values = work.values.data() + block / Kind::kStep * value_pitch;
  const int64_t steps = (keys + Kind::kStep - 1) / Kind::kStep, vectors = value_pitch / kLanes;
  for (int64_t first = 0; first < vectors;) {
    // No vector is left alone at the end: it would keep the multipliers waiting for loads.
    const int64_t left = vectors - first,
                  take = left == 4 ? 2 : std::min<int64_t>(left, kTileVectors);
    multiply<Kind>(rows, static_cast<int>(take), weights, kKeys / Kind::kStep,
                   values + first * kLanes, value_pitch, steps, work.tile);
    for (int i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < take; ++j) {
        float* to = work.output.data() + i * value_pitch + (first + j) * kLanes;
        const __m512 sum = _mm512_load_ps(work.tile + i * kPanel + j * kLanes);
        _mm512_storeu_ps(to, block ? _mm512_add_ps(sum, _mm512_loadu_ps(to)) : sum);
      }
    }
    first += take;
  }
}

// Rows of the head that a thread works on next, too far apart for the processor to fetch them ahead
// by itself: without this, attention waits for the third-level cache a fifth of its time.
struct Ahead {
  const char* data = nullptr;
  int64_t row = 0, size = 0, count = 0;

  void fetch(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < std::min(end, count); ++i) {
      for (int64_t at = 0; at < size; at += 64) _mm_prefetch(data + i * row + at, _MM_HINT_T0);
    }
  }
};

template <class T>
Ahead rows_of_head(const at::Tensor& t, int64_t batch, int64_t head) {
  const T* data = t.const_data_ptr<T>() + batch * t.stride(0) + head * t.stride(1);
  constexpr int64_t bytes = sizeof(T);
  return {reinterpret_cast<const char*>(data), t.stride(2) * bytes, t.size(3) * bytes, t.size(2)};
}

// One head's queries from `begin` to `end`.
template <class Kind, class T, class Out>
void attend(const Shape& shape, const Head<T>& head, int64_t begin, int64_t end, Workspace<T>& work,
            const Output<T, Out>& output, const std::array<Ahead, 3>& ahead) {
  const int64_t steps = shape.size / Kind::kStep, value_pitch = padded(shape.value_size);
  for (int64_t query = begin; query < end; query += kTileRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, end - query));
    const auto* a = reinterpret_cast<const int32_t*>(head.queries + query * head.query_row);
    const int64_t seen = shape.is_causal ? std::min(shape.keys, query + rows) : shape.keys;
    for (const Ahead& next : ahead) next.fetch(query, query + rows);
    for (int64_t block = 0; block < seen; block += kKeys) {
      const int64_t keys = std::min(kKeys, seen - block);
      for (int i = 0; i < rows; ++i) {
        _mm512_store_ps(work.top + i * kLanes, _mm512_set1_ps(-kInfinity));
      }
      for (int64_t key = 0; key < keys; key += kPanel) {
        const int64_t column = block + key, panel = std::min<int64_t>(kPanel, shape.keys - column);
        multiply<Kind>(rows, static_cast<int>(vectors_of(panel)), a, head.query_row / Kind::kStep,
                       work.keys.data() + column * steps, padded(panel), steps, work.tile);
        score(shape, head, work, query, rows, column, std::min(panel, keys - key),
              work.scores + key);
      }
      // The keys that only fill a vector up weigh nothing.
      weigh(work, rows, padded(keys), value_pitch, block == 0);
      gather<Kind>(work, rows, block, keys, value_pitch);
    }
    for (int i = 0; i < rows; ++i) {
      const float total = work.total[i];
      const __m512 share = _mm512_set1_ps(total == 0.0f ? 0.0f : 1.0f / total);
      for (int64_t j = 0; j < shape.value_size; j += kLanes) {
        const __m512 sum = _mm512_loadu_ps(work.output.data() + i * value_pitch + j);
        output.store(head.output + (query + i) * head.output_row + j, _mm512_mul_ps(sum, share),
                     first_lanes(shape.value_size - j));
      }
    }
  }
}

template <class Kind, class T, class Out>
at::Tensor attention_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const Mask& mask, bool is_causal, float scale, const Quantizer& codes) {
  const Shape shape{
      q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), v.size(3), q.size(1) / k.size(1),
      is_causal, scale};
  at::Tensor out = at::empty({shape.batch, shape.queries, shape.heads, shape.value_size},
                             q.options().dtype(c10::CppTypeToScalarType<Out>::value));
  const Output<T, Out> output{out.mutable_data_ptr<Out>(), codes};
  const int64_t out_row = shape.heads * shape.value_size;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t all = shape.batch * shape.heads;
  const int64_t most = std::max<int64_t>(1, shape.queries / kLeastQueries);
  // A few parts for each thread even out what a causal mask or another process makes uneven.
  const int64_t parts = std::min(most, std::max<int64_t>(1, 4 * threads / all));
  const int64_t tiles = (shape.queries + kTileRows - 1) / kTileRows;
  const auto head_of = [&](int64_t batch, int64_t head) {
    return Head<T>{q.const_data_ptr<T>() + batch * q.stride(0) + head * q.stride(1),
                   q.stride(2),
                   batch * shape.queries * out_row + head * shape.value_size,
                   out_row,
                   mask,
                   batch * mask.batch + head * mask.head};
  };
  const auto lay_out_head = [&](Workspace<T>& work, int64_t batch, int64_t key_head) {
    const T* keys = k.const_data_ptr<T>() + batch * k.stride(0) + key_head * k.stride(1);
    lay_out(reinterpret_cast<const int32_t*>(keys), k.stride(2) / Kind::kStep, shape.keys,
            shape.size / Kind::kStep, work.keys.data());
    const T* values = v.const_data_ptr<T>() + batch * v.stride(0) + key_head * v.stride(1);
    lay_out_values(values, v.stride(2), shape.keys, shape.value_size, work.values.data());
  };
  const auto rows_of = [&](int64_t task) -> std::array<Ahead, 3> {
    const int64_t batch = task / shape.heads, head = task % shape.heads;
    const int64_t key_head = head / shape.heads_a_key;
    return {rows_of_head<T>(q, batch, head), rows_of_head<T>(k, batch, key_head),
            rows_of_head<T>(v, batch, key_head)};
  };
  const auto spread_mask = [&](Workspace<T>& work, int64_t row) {
    work.alike = hides_alike(mask, row, shape.queries, shape.keys);
    for (int64_t key = 0; work.alike && key < shape.keys; key += kLanes) {
      const __m512 bias = bias_at(mask, row + key * mask.key, first_lanes(shape.keys - key));
      _mm512_storeu_ps(work.bias.data() + key, _mm512_mul_ps(bias, _mm512_set1_ps(kLog2E)));
    }
  };
  at::parallel_for(0, all * parts, 1, [&](int64_t begin, int64_t end) {
    const auto work = std::make_unique<Workspace<T>>(shape, Kind::kStep);
    int64_t laid_out = -1, spread = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / parts / shape.heads, index = task / parts % shape.heads;
      const int64_t key_head = index / shape.heads_a_key, part = task % parts;
      const Head<T> head = head_of(batch, index);
      if (laid_out != batch * k.size(1) + key_head) {
        lay_out_head(*work, batch, key_head);
        laid_out = batch * k.size(1) + key_head;
      }
      if (spread != head.mask_row) {
        spread_mask(*work, head.mask_row);
        spread = head.mask_row;
      }
      const int64_t first = tiles * part / parts * kTileRows;
      const int64_t last = std::min(shape.queries, tiles * (part + 1) / parts * kTileRows);
      const bool is_last = task + 1 == end || parts > 1;
      const auto ahead = is_last ? std::array<Ahead, 3>() : rows_of(task + 1);
      attend<Kind>(shape, head, first, last, *work, output, ahead);
    }
  });
  return out.transpose(1, 2);
}

// A last axis whose elements lie side by side, and rows that start at whole steps.
inline at::Tensor by_steps(const at::Tensor& t, int64_t step) {
  const bool fits = t.stride(3) == 1 && t.stride(0) % step == 0 && t.stride(1) % step == 0 &&
                    t.stride(2) % step == 0 && t.storage_offset() % step == 0;
  return fits ? t : t.contiguous();
}

inline Mask mask_of(const at::Tensor& expanded) {
  return {expanded.const_data_ptr(), expanded.scalar_type() == at::kBool,
          expanded.stride(0),        expanded.stride(1),
          expanded.stride(2),        expanded.stride(3)};
}

// Nothing where the inputs are not what the kernels take.
template <class Out>
std::optional<at::Tensor> attention_to(const at::Tensor& q, const at::Tensor& k,
                                       const at::Tensor& v, const std::optional<at::Tensor>& given,
                                       bool is_causal, double scale, const Quantizer& codes) {
  const bool same = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 &&
                    q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                    q.numel() > 0 && k.numel() > 0 && v.numel() > 0 && q.size(0) == k.size(0) &&
                    k.size(0) == v.size(0) && k.size(1) == v.size(1) &&
                    q.size(1) % k.size(1) == 0 && k.size(2) == v.size(2) && q.size(3) == k.size(3);
  const bool masks =
      !given ||
      (!is_causal && (given->scalar_type() == at::kBool || given->scalar_type() == at::kFloat) &&
       given->dim() <= 4);
  if (!same || !masks) return std::nullopt;
  const at::Tensor expanded =
      given ? given->expand({q.size(0), q.size(1), q.size(2), k.size(2)}) : at::Tensor();
  const Mask mask = given ? mask_of(expanded) : Mask();
  const auto factor = static_cast<float>(scale);
  if (q.scalar_type() == at::kFloat) {
    using To = std::conditional_t<kIsCode<Out>, Out, float>;
    return attention_of<Float32, float, To>(by_steps(q, 1), by_steps(k, 1), by_steps(v, 1), mask,
                                            is_causal, factor, codes);
  }
  if (q.scalar_type() == at::kBFloat16 && q.size(3) % 2 == 0) {
    using To = std::conditional_t<kIsCode<Out>, Out, at::BFloat16>;
    return attention_of<BFloat16, at::BFloat16, To>(by_steps(q, 2), by_steps(k, 2), by_steps(v, 1),
                                                    mask, is_causal, factor, codes);
  }
  return std::nullopt;
}

inline at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& mask, bool is_causal, double scale) {
  const auto out = attention_to<float>(q, k, v, mask, is_causal, scale, Quantizer());
  if (out) return *out;
  static const auto by_library = library_of(attention, "fxopt::attention_by_library");
  return by_library.call(q, k, v, mask, is_causal, scale);
}

inline at::Tensor quantized_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const std::optional<at::Tensor>& mask, bool is_causal,
                                      double scale, const at::Tensor& out_scale,
                                      const at::Tensor& out_zero_point) {
  std::optional<at::Tensor> out;
  if (is_number(out_scale, at::kFloat) && out_zero_point.numel() == 1) {
    const auto to = [&](auto like) {
      return attention_to<decltype(like)>(q, k, v, mask, is_causal, scale,
                                          quantizer(out_scale, out_zero_point));
    };
    if (out_zero_point.scalar_type() == at::kByte) out = to(uint8_t());
    if (out_zero_point.scalar_type() == at::kChar) out = to(int8_t());
  }
  if (out) return *out;
  static const auto by_library =
      library_of(quantized_attention, "fxopt::quantized_attention_by_library");
  return by_library.call(q, k, v, mask, is_causal, scale, out_scale, out_zero_point);
}

}  // namespace fxopt
