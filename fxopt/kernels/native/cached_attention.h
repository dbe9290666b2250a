// Attention of new positions to a prefix that is read where it lies, and to themselves.
//
//     cached_attention(q, k, v, K, V)  =  softmax(s q [K; k]ᵀ + mask) [V; v]
//
// A task is up to 32 queries of the heads that share one key head, so that a key is read once for
// all of them, and a run of slots. The scores for 64 slots stay in the first cache between the two
// products; the output so far is scaled down whenever a larger score comes up. Where there are more
// threads than heads, or many slots, a head's slots are cut into runs, whose outputs are then added
// up by the sums of their weights.
// Source: Dao et al., "FlashAttention" (2022); Dao et al., "Flash-Decoding for long-context
// inference" (2023).

namespace fxopt {
namespace {

constexpr int kRows = 32;
constexpr int kSlots = 64;
// As many sums as the registers hold beside the operands: 24 of 32, or 12 of 16.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
// From here on in rows, turning the keys over costs less than adding up along them.
constexpr int kManyRows = 8;
// Keys that are fetched before they are needed: a processor's own prefetching stops at each page.
constexpr int64_t kAhead = 16;
constexpr int64_t kLeastRun = 256;
// Tasks of fewer multiply-adds than this together are not worth a second thread.
constexpr int64_t kWorthThreads = 1 << 17;

struct Sizes {
  int64_t batch, heads, groups, queries, past, size, value_size;
  int64_t each() const { return heads / groups; }
  int64_t rows() const { return queries * each(); }
  int64_t slots() const { return past + queries; }
  int64_t pitch() const { return (value_size + kLanes - 1) / kLanes * kLanes; }
};

struct Options {
  float scale;
  int64_t window;
  float softcap;
  const float* sinks;
};

// C [rows, vectors] (+)= A [rows, steps] B [steps, vectors]; of the last vector only `count` lanes.
template <int rows, int vectors, bool whole, class T>
inline void tile(const float* a, int64_t a_row, const T* b, int64_t b_row, int64_t steps, float* c,
                 int64_t c_row, bool adds, int64_t count) {
  Vec sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      sums[i][j] = adds ? load(c + i * c_row + j * kLanes) : zero();
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    Vec column[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const T* from = b + step * b_row + j * kLanes;
      column[j] = whole ? load(from) : load_first(from, count);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec row = all(a[i * a_row + step]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] = fmadd(row, column[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * kLanes, sums[i][j]);
  }
}

template <int rows, class T>
void columns(const float* a, int64_t a_row, const T* b, int64_t b_row, int64_t steps, float* c,
             int64_t c_row, bool adds, int64_t wide) {
  int64_t j = 0;
  for (; j + kTileVectors * kLanes <= wide; j += kTileVectors * kLanes) {
    tile<rows, kTileVectors, true>(a, a_row, b + j, b_row, steps, c + j, c_row, adds, kLanes);
  }
  for (; j + kLanes <= wide; j += kLanes) {
    tile<rows, 1, true>(a, a_row, b + j, b_row, steps, c + j, c_row, adds, kLanes);
  }
  if (j < wide) tile<rows, 1, false>(a, a_row, b + j, b_row, steps, c + j, c_row, adds, wide - j);
}

// C [rows, wide] (+)= A [rows, steps] B [steps, wide], C and A in float32, C up to whole vectors.
template <class T>
void product(int64_t rows, const float* a, int64_t a_row, const T* b, int64_t b_row, int64_t steps,
             float* c, int64_t c_row, bool adds, int64_t wide) {
  for (; rows > 0; rows -= kTileRows, a += kTileRows * a_row, c += kTileRows * c_row) {
    switch (std::min<int64_t>(rows, kTileRows)) {
      case 6:
        columns<6>(a, a_row, b, b_row, steps, c, c_row, adds, wide);
        break;
      case 5:
        columns<5>(a, a_row, b, b_row, steps, c, c_row, adds, wide);
        break;
      case 4:
        columns<4>(a, a_row, b, b_row, steps, c, c_row, adds, wide);
        break;
      case 3:
        columns<3>(a, a_row, b, b_row, steps, c, c_row, adds, wide);
        break;
      case 2:
        columns<2>(a, a_row, b, b_row, steps, c, c_row, adds, wide);
        break;
      default:
        columns<1>(a, a_row, b, b_row, steps, c, c_row, adds, wide);
    }
  }
}

// The dot products of `keys` neighbouring keys with one query.
template <int keys, class T>
inline void dots(const float* query, const T* from, int64_t stride, int64_t size, float* to) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    const Vec q = load(query + d);
#pragma GCC unroll 4
    for (int j = 0; j < keys; ++j) sums[j] = fmadd(q, load(from + j * stride + d), sums[j]);
  }
  if (d < size) {
    const Vec q = load_first(query + d, size - d);
#pragma GCC unroll 4
    for (int j = 0; j < keys; ++j) {
      sums[j] = fmadd(q, load_first(from + j * stride + d, size - d), sums[j]);
    }
  }
  if constexpr (keys == 4) {
    _mm_storeu_ps(to, sums_of(sums));
  } else {
    to[0] = sum(sums[0]);
  }
}

template <class T>
inline void fetch(const T* row, int64_t size) {
  const auto* from = reinterpret_cast<const char*>(row);
  const int64_t bytes = size * int64_t(sizeof(T));
  for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(from + at, _MM_HINT_T0);
}

// Scores [count, kSlots] of a few queries for the keys of a block; what is read next is fetched
// meanwhile, keys some rows ahead, and the block's values.
template <class T>
void score_few(int64_t count, const float* queries, const T* keys, int64_t stride, const T* values,
               int64_t value_row, int64_t slots, int64_t size, int64_t value_size, float* to) {
  int64_t key = 0;
  for (; key + 4 <= slots; key += 4) {
    for (int j = 0; j < 4; ++j) {
      fetch(keys + (key + kAhead + j) * stride, size);
      fetch(values + (key + j) * value_row, value_size);
    }
    for (int64_t i = 0; i < count; ++i) {
      dots<4>(queries + i * size, keys + key * stride, stride, size, to + i * kSlots + key);
    }
  }
  for (; key < slots; ++key) {
    for (int64_t i = 0; i < count; ++i) {
      dots<1>(queries + i * size, keys + key * stride, stride, size, to + i * kSlots + key);
    }
  }
}

// Keys [count, size] as [size, kSlots]; what lies beyond `count` is finite.
template <class T>
void turn_over(const T* keys, int64_t stride, int64_t count, int64_t size, float* to) {
  int64_t d = 0;
  for (; d + 4 <= size; d += 4) {
    for (int64_t key = 0; key < count; key += 4) {
      __m128 rows[4];
      for (int j = 0; j < 4; ++j) {
        rows[j] = four_of(keys + std::min(key + j, count - 1) * stride + d);
      }
      _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      for (int j = 0; j < 4; ++j) _mm_storeu_ps(to + (d + j) * kSlots + key, rows[j]);
    }
  }
  for (; d < size; ++d) {
    for (int64_t key = 0; key < count; ++key) to[d * kSlots + key] = float(keys[key * stride + d]);
  }
}

// The rows of a task: their queries, and what is known of their softmax after some of the slots.
struct Rows {
  int64_t first, count;
  Floats queries, turned, output;
  alignas(64) float scores[kRows * kSlots];
  alignas(64) float hidden[kSlots] = {};
  float largest[kRows], total[kRows];

  // Room for a task; what one leaves in it the next one has.
  static Rows& of(const Sizes& sizes) {
    thread_local const auto kept = std::make_unique<Rows>();
    const int64_t most = std::min<int64_t>(kRows, sizes.rows());
    kept->queries.grow(most * sizes.size);
    kept->turned.grow(most < kManyRows ? 0 : sizes.size * kSlots);
    kept->output.grow(most * sizes.pitch());
    return *kept;
  }

  void start(int64_t pitch) {
    std::fill_n(largest, count, -kInfinity);
    std::fill_n(total, count, 0.0f);
    std::fill_n(output.data(), count * pitch, 0.0f);
  }
};

// What is taken off scores before their powers: the largest, where there is one.
inline float shift_by(float largest) { return largest == -kInfinity ? 0.0f : largest; }

// Which of the slots from `slot` on hold tokens, as what is added to scores; false where none does.
inline bool tokens(const bool* seen, int64_t count, float* hidden, bool* any_hidden) {
  int64_t held = 0;
  for (int64_t j = 0; j < count; ++j) held += seen[j];
  *any_hidden = held < count;
  for (int64_t j = 0; *any_hidden && j < count; ++j) hidden[j] = seen[j] ? 0.0f : -kInfinity;
  return held > 0;
}

// Scores in base 2 of `count` slots from `slot` on become weights; their sums and the output so far
// follow.
inline void weigh(const Sizes& sizes, const Options& options, Rows& rows, int64_t slot,
                  int64_t count, bool any_hidden) {
  const int64_t filled = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < rows.count; ++i) {
    float* scores = rows.scores + i * kSlots;
    if (options.softcap > 0) {
      const Vec inverse = all(1.0f / options.softcap), cap = all(options.softcap * kLog2E);
      for (int64_t j = 0; j < count; j += kLanes) {
        store(scores + j, mul(cap, tanh(mul(load(scores + j), inverse))));
      }
    }
    const int64_t position = sizes.past + (rows.first + i) / sizes.each();
    const int64_t from = std::max<int64_t>(0, position - options.window + 1 - slot);
    const int64_t until = std::min(count, position + 1 - slot);
    for (int64_t j = 0; j < std::min(from, count); ++j) scores[j] = -kInfinity;
    for (int64_t j = std::max<int64_t>(0, until); j < filled; ++j) scores[j] = -kInfinity;
    Vec top = all(-kInfinity);
    for (int64_t j = 0; j < filled; j += kLanes) {
      Vec x = load(scores + j);
      if (any_hidden) {
        x = add(x, load(rows.hidden + j));
        store(scores + j, x);
      }
      top = larger(x, top);
    }
    const float before = rows.largest[i], now = std::max(before, largest(top));
    const Vec shift = all(shift_by(now));
    Vec total = zero();
    for (int64_t j = 0; j < filled; j += kLanes) {
      const Vec weight = power_of_two(sub(load(scores + j), shift));
      store(scores + j, weight);
      total = add(total, weight);
    }
    const float factor = std::exp2(before - shift_by(now));
    rows.total[i] = rows.total[i] * factor + sum(total);
    rows.largest[i] = now;
    if (factor != 1.0f) {
      float* output = rows.output.data() + i * sizes.pitch();
      for (int64_t j = 0; j < sizes.pitch(); j += kLanes) {
        store(output + j, mul(load(output + j), all(factor)));
      }
    }
  }
}

// A scale for each slot where keys or values are stored in int8, else none.
struct Scales {
  const float* data = nullptr;
  int64_t slot = 0;

  void times(int64_t rows, int64_t first, int64_t count, float* scores) const {
    if (!data) return;
    alignas(64) float scales[kSlots];
    for (int64_t j = 0; j < kSlots; ++j) scales[j] = j < count ? data[(first + j) * slot] : 0.0f;
    for (int64_t i = 0; i < rows; ++i, scores += kSlots) {
      for (int64_t j = 0; j < count; j += kLanes) {
        store(scores + j, mul(load(scores + j), load(scales + j)));
      }
    }
  }
};

// The slots of one tensor of keys and one of values, whose first one is `offset`.
template <class T>
struct Slots {
  const T *keys, *values;
  int64_t key_row, value_row;
  const bool* seen;
  int64_t offset;
  Scales key_scales, value_scales;
};

template <class T>
void attend(const Sizes& sizes, const Options& options, Rows& rows, const Slots<T>& slots,
            int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; slot += kSlots) {
    const int64_t count = std::min<int64_t>(kSlots, end - slot), at = slot - slots.offset;
    bool any_hidden;
    if (!tokens(slots.seen + at, count, rows.hidden, &any_hidden)) continue;
    const T* keys = slots.keys + at * slots.key_row;
    const T* values = slots.values + at * slots.value_row;
    if (rows.count < kManyRows) {
      score_few(rows.count, rows.queries.data(), keys, slots.key_row, values, slots.value_row,
                count, sizes.size, sizes.value_size, rows.scores);
    } else {
      turn_over(keys, slots.key_row, count, sizes.size, rows.turned.data());
      product(rows.count, rows.queries.data(), sizes.size, rows.turned.data(), kSlots, sizes.size,
              rows.scores, kSlots, false, kSlots);
    }
    slots.key_scales.times(rows.count, at, count, rows.scores);
    weigh(sizes, options, rows, slot, count, any_hidden);
    slots.value_scales.times(rows.count, at, count, rows.scores);
    product(rows.count, rows.scores, kSlots, values, slots.value_row, count, rows.output.data(),
            sizes.pitch(), true, sizes.value_size);
  }
}

// What a run of slots leaves of each row: [output, largest, total].
inline void keep(const Sizes& sizes, const Rows& rows, float* to) {
  const int64_t pitch = sizes.pitch();
  for (int64_t i = 0; i < rows.count; ++i, to += pitch + 2) {
    std::copy_n(rows.output.data() + i * pitch, pitch, to);
    to[pitch] = rows.largest[i];
    to[pitch + 1] = rows.total[i];
  }
}

// Add what another run of slots left.
inline void merge(const Sizes& sizes, Rows& rows, const float* from) {
  const int64_t pitch = sizes.pitch();
  for (int64_t i = 0; i < rows.count; ++i, from += pitch + 2) {
    const float now = std::max(rows.largest[i], from[pitch]), shift = shift_by(now);
    const float mine = std::exp2(rows.largest[i] - shift), other = std::exp2(from[pitch] - shift);
    float* output = rows.output.data() + i * pitch;
    for (int64_t j = 0; j < pitch; j += kLanes) {
      const Vec added = mul(load(from + j), all(other));
      store(output + j, fmadd(load(output + j), all(mine), added));
    }
    rows.total[i] = rows.total[i] * mine + from[pitch + 1] * other;
    rows.largest[i] = now;
  }
}

// The weighted sums divided by the sums of the weights, the sinks' among them.
template <class T>
void finish(const Sizes& sizes, const Options& options, const Rows& rows, int64_t batch,
            int64_t group, T* out) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.first + i, query = row / sizes.each();
    const int64_t head = group * sizes.each() + row % sizes.each();
    T* to = out + ((batch * sizes.queries + query) * sizes.heads + head) * sizes.value_size;
    float total = rows.total[i], factor = 1.0f;
    if (options.sinks && total > 0) {
      const float sink = options.sinks[head] * kLog2E, now = std::max(rows.largest[i], sink);
      factor = std::exp2(rows.largest[i] - now);
      total = total * factor + std::exp2(sink - now);
    }
    // A row that sees nothing has a sum of 0; NaN is no sum of 0.
    const float share = total == 0 ? 0.0f : factor / total;
    const float* from = rows.output.data() + i * sizes.pitch();
    for (int64_t j = 0; j < sizes.value_size; ++j) to[j] = T(from[j] * share);
  }
}

inline int64_t runs_of(const Sizes& sizes, int64_t tasks, int64_t threads) {
  if (threads == 1 || tasks >= 4 * threads) return 1;
  const int64_t most = (sizes.slots() + kLeastRun - 1) / kLeastRun;
  return std::max<int64_t>(1, std::min(most, (4 * threads + tasks - 1) / tasks));
}

// Where the rows of a tensor [batch, head, slot, size] begin; a row is contiguous.
template <class T>
struct Heads {
  const T* data;
  int64_t batch, head, slot;
  const T* row(int64_t b, int64_t h, int64_t s) const {
    return data + b * batch + h * head + s * slot;
  }
};

template <class T>
Heads<T> heads_of(const at::Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

// Which slots [batch, slot] hold tokens; a row is contiguous.
struct Held {
  const bool* data;
  int64_t batch;
};

inline Held held_of(const at::Tensor& t) { return {t.const_data_ptr<bool>(), t.stride(0)}; }

// The keys and values that an attention reads: they lie alike, in int8 with scales
// [batch, head, slot].
template <class T>
struct Keyed {
  Heads<T> keys, values;
  Held seen;
  Heads<float> key_scales = {}, value_scales = {};

  Slots<T> slots(int64_t batch, int64_t group, int64_t offset) const {
    const auto scales = [&](const Heads<float>& of) {
      return of.data ? Scales{of.row(batch, group, 0), of.slot} : Scales{};
    };
    return {keys.row(batch, group, 0), values.row(batch, group, 0), keys.slot,
            values.slot,               seen.data + batch * seen.batch, offset,
            scales(key_scales),        scales(value_scales)};
  }
};

template <class T, class Stored = T>
struct Attention {
  Sizes sizes;
  Options options;
  Heads<T> q;
  Keyed<T> own;
  Keyed<Stored> past;
  T* out;

  void run() const;

 private:
  void gather(Rows& rows, int64_t batch, int64_t group) const;
};

// The queries of a task, scaled.
template <class T, class Stored>
void Attention<T, Stored>::gather(Rows& rows, int64_t batch, int64_t group) const {
  const float unit = options.softcap > 0 ? options.scale : options.scale * kLog2E;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.first + i, head = group * sizes.each() + row % sizes.each();
    const T* from = q.row(batch, head, row / sizes.each());
    float* query = rows.queries.data() + i * sizes.size;
    for (int64_t d = 0; d < sizes.size; ++d) query[d] = float(from[d]) * unit;
  }
}

template <class T, class Stored>
void Attention<T, Stored>::run() const {
  const int64_t blocks = (sizes.rows() + kRows - 1) / kRows;
  const int64_t heads = sizes.batch * sizes.groups * blocks;
  const int64_t work =
      sizes.batch * sizes.groups * sizes.rows() * sizes.slots() * (sizes.size + sizes.value_size);
  const int64_t threads =
      work < kWorthThreads || (!Team::present() && at::in_parallel_region())
          ? 1
          : at::get_num_threads();
  const int64_t runs = runs_of(sizes, heads, threads);
  const int64_t kept = kRows * (sizes.pitch() + 2);
  Floats partial(runs > 1 ? heads * runs * kept : 0);

  const auto take = [&](Rows& rows, int64_t head) {
    const int64_t batch = head / blocks / sizes.groups, group = head / blocks % sizes.groups;
    rows.first = head % blocks * kRows;
    rows.count = std::min<int64_t>(kRows, sizes.rows() - rows.first);
    rows.start(sizes.pitch());
    return std::pair(batch, group);
  };
  const auto part_of = [&](int64_t begin, int64_t end) {
    Rows& rows = Rows::of(sizes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / runs, part = task % runs;
      const auto [batch, group] = take(rows, head);
      gather(rows, batch, group);
      const int64_t first = sizes.past + rows.first / sizes.each();
      const int64_t last = sizes.past + (rows.first + rows.count - 1) / sizes.each();
      const int64_t low = std::max<int64_t>(0, first - options.window + 1), many = last + 1 - low;
      const int64_t from = low + many * part / runs, until = low + many * (part + 1) / runs;
      const int64_t edge = std::clamp(sizes.past, from, until);
      attend(sizes, options, rows, past.slots(batch, group, 0), from, edge);
      attend(sizes, options, rows, own.slots(batch, group, sizes.past), edge, until);
      if (runs > 1) {
        keep(sizes, rows, partial.data() + task * kept);
      } else {
        finish(sizes, options, rows, batch, group, out);
      }
    }
  };
  if (threads == 1) return part_of(0, heads);
  parallel(0, heads * runs, 1, part_of);
  if (runs == 1) return;
  parallel(0, heads, 8, [&](int64_t begin, int64_t end) {
    Rows& rows = Rows::of(sizes);
    for (int64_t head = begin; head < end; ++head) {
      const auto [batch, group] = take(rows, head);
      for (int64_t part = 0; part < runs; ++part) {
        merge(sizes, rows, partial.data() + (head * runs + part) * kept);
      }
      finish(sizes, options, rows, batch, group, out);
    }
  });
}

inline at::Tensor rows_apart(const at::Tensor& t) {
  return t.stride(-1) == 1 ? t : t.contiguous();
}

inline bool is_cached_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const at::Tensor& past_k, const at::Tensor& past_v,
                                const at::Tensor& past_seen, const at::Tensor& seen,
                                const std::optional<at::Tensor>& sinks, at::ScalarType stored) {
  const auto is = [](const at::Tensor& t, at::ScalarType dtype) {
    return t.dim() == 4 && t.scalar_type() == dtype && t.is_cpu();
  };
  for (const auto* t : {&q, &k, &v}) {
    if (!is(*t, q.scalar_type())) return false;
  }
  if (!is(past_k, stored) || !is(past_v, stored)) return false;
  const auto has = [](const at::Tensor& t, std::initializer_list<int64_t> sizes) {
    return t.sizes() == at::IntArrayRef(sizes.begin(), sizes.size());
  };
  const int64_t batch = q.size(0), groups = k.size(1), past = past_k.size(2);
  return q.numel() > 0 && v.numel() > 0 && groups > 0 && q.size(1) % groups == 0 &&
         has(k, {batch, groups, q.size(2), q.size(3)}) &&
         has(v, {batch, groups, q.size(2), v.size(3)}) &&
         has(past_k, {batch, groups, past, q.size(3)}) &&
         has(past_v, {batch, groups, past, v.size(3)}) && has(past_seen, {batch, past}) &&
         has(seen, {batch, q.size(2)}) && past_seen.scalar_type() == at::kBool &&
         seen.scalar_type() == at::kBool &&
         (!sinks || (has(*sinks, {q.size(1)}) && at::isFloatingType(sinks->scalar_type())));
}

inline Options options_of(double scale, std::optional<int64_t> window,
                          std::optional<double> softcap, const at::Tensor& sinks) {
  return {static_cast<float>(scale), window.value_or(std::numeric_limits<int64_t>::max() / 2),
          static_cast<float>(softcap.value_or(0.0)),
          sinks.defined() ? sinks.const_data_ptr<float>() : nullptr};
}

inline at::Tensor cached_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& past_k, const at::Tensor& past_v,
                                   const at::Tensor& past_seen, const at::Tensor& seen,
                                   double scale, std::optional<int64_t> window,
                                   std::optional<double> softcap,
                                   const std::optional<at::Tensor>& sinks) {
  const bool fits = is_cached_attention(q, k, v, past_k, past_v, past_seen, seen, sinks,
                                        q.scalar_type()) &&
                    window.value_or(1) > 0 && softcap.value_or(1.0) > 0;
  const auto dtype = q.scalar_type();
  if (!fits || (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf)) {
    static const auto by_library =
        library_of(cached_attention, "fxopt::cached_attention_by_library");
    return by_library.call(q, k, v, past_k, past_v, past_seen, seen, scale, window, softcap, sinks);
  }
  const Sizes sizes{q.size(0),      q.size(1), k.size(1), q.size(2),
                    past_k.size(2), q.size(3), v.size(3)};
  const at::Tensor logits = sinks ? sinks->to(at::kFloat).contiguous() : at::Tensor();
  const Options options = options_of(scale, window, softcap, logits);
  const auto of = [&](auto like) {
    using T = decltype(like);
    at::Tensor out =
        at::empty({sizes.batch, sizes.queries, sizes.heads, sizes.value_size}, q.options());
    const at::Tensor queries = rows_apart(q), keys = rows_apart(k), values = rows_apart(v),
                     past_keys = rows_apart(past_k), past_values = rows_apart(past_v),
                     past_held = rows_apart(past_seen), held = rows_apart(seen);
    Attention<T>{sizes,
                 options,
                 heads_of<T>(queries),
                 {heads_of<T>(keys), heads_of<T>(values), held_of(held)},
                 {heads_of<T>(past_keys), heads_of<T>(past_values), held_of(past_held)},
                 out.mutable_data_ptr<T>()}
        .run();
    return out;
  };
  if (dtype == at::kBFloat16) return of(at::BFloat16());
  return dtype == at::kHalf ? of(at::Half()) : of(float());
}

inline bool are_scales(const at::Tensor& scale, const at::Tensor& past) {
  return scale.is_cpu() && scale.scalar_type() == at::kFloat && scale.dim() == 4 &&
         past.scalar_type() == at::kChar && past.dim() == 4 && past.is_cpu() &&
         scale.sizes() ==
             at::IntArrayRef({past.size(0), past.size(1), past.size(2), int64_t(1)});
}

inline at::Tensor int8_cached_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& past_k,
    const at::Tensor& past_v, const at::Tensor& past_k_scale, const at::Tensor& past_v_scale,
    const at::Tensor& past_seen, const at::Tensor& seen, double scale,
    std::optional<int64_t> window, std::optional<double> softcap,
    const std::optional<at::Tensor>& sinks) {
  const bool fits = q.scalar_type() == at::kFloat && are_scales(past_k_scale, past_k) &&
                    are_scales(past_v_scale, past_v) && window.value_or(1) > 0 &&
                    softcap.value_or(1.0) > 0 &&
                    is_cached_attention(q, k, v, past_k, past_v, past_seen, seen, sinks, at::kChar);
  if (!fits) {
    static const auto by_library =
        library_of(int8_cached_attention, "fxopt::int8_cached_attention_by_library");
    return by_library.call(q, k, v, past_k, past_v, past_k_scale, past_v_scale, past_seen, seen,
                           scale, window, softcap, sinks);
  }
  const Sizes sizes{q.size(0),      q.size(1), k.size(1), q.size(2),
                    past_k.size(2), q.size(3), v.size(3)};
  const at::Tensor logits = sinks ? sinks->to(at::kFloat).contiguous() : at::Tensor();
  at::Tensor out =
      at::empty({sizes.batch, sizes.queries, sizes.heads, sizes.value_size}, q.options());
  const at::Tensor queries = rows_apart(q), keys = rows_apart(k), values = rows_apart(v),
                   past_keys = rows_apart(past_k), past_values = rows_apart(past_v),
                   past_held = rows_apart(past_seen), held = rows_apart(seen);
  Attention<float, int8_t>{sizes,
                           options_of(scale, window, softcap, logits),
                           heads_of<float>(queries),
                           {heads_of<float>(keys), heads_of<float>(values), held_of(held)},
                           {heads_of<int8_t>(past_keys), heads_of<int8_t>(past_values),
                            held_of(past_held), heads_of<float>(past_k_scale),
                            heads_of<float>(past_v_scale)},
                           out.mutable_data_ptr<float>()}
      .run();
  return out;
}

}  // namespace
}  // namespace fxopt
