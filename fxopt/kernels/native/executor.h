// A program as a list of instructions over memory that was laid out ahead, in one call.
//
// Between the kernels of a small step Python takes longer than they do. An instruction is a few
// words: what it is, the sizes, and for each tensor where its memory begins and how it is strided.
// fxopt/executor writes them; nothing here looks at a tensor's sizes but those of the prefix, which
// is another one at each call. Products of many rows are calls of the operators that are registered
// for them.

#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/from_blob.h>

namespace fxopt {
namespace {

using Lanes = at::vec::Vectorized<float>;

// What the words of an instruction begin with, as in fxopt/executor/instructions.py.
enum class Kind : int64_t {
  map,
  whole_map,
  mean,
  layer_norm,
  rms_norm,
  rotate,
  gather,
  widen,
  product,
  operator_call,
  attention,
  clear,
  count,
};
enum class Function : int64_t {
  copy,
  add,
  sub,
  mul,
  div,
  negative,
  reciprocal,
  square_root,
  reciprocal_root,
  exponential,
  tanh,
  sigmoid,
  silu,
  gelu,
  gelu_tanh,
  relu,
  cosine,
  sine,
  maximum,
  minimum,
  real,
  silu_times,
  gelu_times,
  gelu_tanh_times,
};
constexpr const char* kPostOps[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "add"};
enum class Stored : int64_t { float32, bfloat16, float16, int8, int4 };

constexpr int64_t kDimensions = 6;
// Entries from which on a second thread pays, and how many one takes at least.
constexpr int64_t kManyEntries = 1 << 15;
constexpr int64_t kChunk = 1 << 12;
// Memory that is kept for the next call: 8 MB.
constexpr int64_t kKeptFloats = 1 << 21;

class Words {
  const int64_t* at_;

 public:
  explicit Words(const int64_t* at) : at_(at) {}
  const int64_t* at() const { return at_; }
  int64_t next() { return *at_++; }
  float real() {
    double value;
    std::memcpy(&value, at_++, sizeof(value));
    return static_cast<float>(value);
  }
};

// Where the memory of one call begins: that of its own, the words, inputs, what is held, outputs,
// results of operators.
struct Memory {
  std::vector<char*> bases;
  std::vector<at::Tensor> results;

  template <class T>
  T* pointer(Words& words) const {
    const int64_t base = words.next(), offset = words.next();
    return base < 0 ? nullptr : reinterpret_cast<T*>(bases[base] + offset);
  }
};

template <class T, int operands>
struct Loop {
  int64_t dimensions, sizes[kDimensions];
  T* data[operands];
  int64_t strides[operands][kDimensions];

  Loop(Words& words, const Memory& memory) : dimensions(words.next()) {
    for (int64_t d = 0; d < dimensions; ++d) sizes[d] = words.next();
    for (int i = 0; i < operands; ++i) {
      data[i] = memory.pointer<T>(words);
      for (int64_t d = 0; d < dimensions; ++d) strides[i][d] = words.next();
    }
  }

  // body(pointers, count) for runs along the last dimension.
  template <class Body>
  void each(const Body& body) const {
    const int64_t inner = sizes[dimensions - 1], pieces = (inner + kChunk - 1) / kChunk;
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < dimensions; ++d) rows *= sizes[d];
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % pieces * kChunk;
        int64_t row = task / pieces;
        T* from[operands];
        for (int i = 0; i < operands; ++i) from[i] = data[i] + first * strides[i][dimensions - 1];
        for (int64_t d = dimensions - 2; d >= 0; --d) {
          const int64_t index = row % sizes[d];
          row /= sizes[d];
          for (int i = 0; i < operands; ++i) from[i] += index * strides[i][d];
        }
        body(from, std::min(kChunk, inner - first));
      }
    };
    if (rows * inner < kManyEntries) return run(0, rows * pieces);
    const int64_t grain = std::max<int64_t>(1, kChunk / std::min(inner, kChunk));
    parallel(0, rows * pieces, grain, run);
  }
};

inline Lanes strided(const float* from, int64_t stride, int64_t count) {
  if (stride == 1) return count < Lanes::size() ? Lanes::loadu(from, count) : Lanes::loadu(from);
  if (stride == 0) return Lanes(*from);
  float lanes[Lanes::size()] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i * stride];
  return Lanes::loadu(lanes);
}

inline void put(Lanes x, float* to, int64_t stride, int64_t count) {
  if (stride == 1) {
    if (count < Lanes::size()) return x.store(to, static_cast<int>(count));
    return x.store(to);
  }
  float lanes[Lanes::size()];
  x.store(lanes);
  for (int64_t i = 0; i < count; ++i) to[i * stride] = lanes[i];
}

// The first operand is the result.
template <int inputs, class F>
void map(Words& words, const Memory& memory, const F& f) {
  const Loop<float, inputs + 1> loop(words, memory);
  int64_t strides[inputs + 1];
  for (int i = 0; i <= inputs; ++i) strides[i] = loop.strides[i][loop.dimensions - 1];
  loop.each([&](float* const* from, int64_t count) {
    for (int64_t i = 0; i < count; i += Lanes::size()) {
      const int64_t some = std::min<int64_t>(Lanes::size(), count - i);
      Lanes x[inputs];
#pragma GCC unroll 2
      for (int j = 0; j < inputs; ++j) {
        x[j] = strided(from[j + 1] + i * strides[j + 1], strides[j + 1], some);
      }
      put(f(x), from[0] + i * strides[0], strides[0], some);
    }
  });
}

inline Lanes sigmoid(Lanes x) { return Lanes(1.0f) / (Lanes(1.0f) + x.neg().exp()); }

inline Lanes silu(Lanes x) { return x / (Lanes(1.0f) + x.neg().exp()); }

inline Lanes gelu(Lanes x) {
  return x * Lanes(0.5f) * (Lanes(1.0f) + (x * Lanes(0.70710678f)).erf());
}

inline Lanes gelu_tanh(Lanes x) {
  const Lanes inner = Lanes(0.79788456f) * (x + Lanes(0.044715f) * x * x * x);
  return Lanes(0.5f) * x * (Lanes(1.0f) + inner.tanh());
}

inline void map(Words& words, const Memory& memory) {
  const auto of = [&](auto f) {
    map<1>(words, memory, [&](const Lanes(&x)[1]) { return f(x[0]); });
  };
  const auto of_two = [&](auto f) {
    map<2>(words, memory, [&](const Lanes(&x)[2]) { return f(x[0], x[1]); });
  };
  switch (static_cast<Function>(words.next())) {
    case Function::copy:
      return of([](Lanes x) { return x; });
    case Function::add:
      return of_two([](Lanes x, Lanes y) { return x + y; });
    case Function::sub:
      return of_two([](Lanes x, Lanes y) { return x - y; });
    case Function::mul:
      return of_two([](Lanes x, Lanes y) { return x * y; });
    case Function::div:
      return of_two([](Lanes x, Lanes y) { return x / y; });
    case Function::negative:
      return of([](Lanes x) { return x.neg(); });
    case Function::reciprocal:
      return of([](Lanes x) { return x.reciprocal(); });
    case Function::square_root:
      return of([](Lanes x) { return x.sqrt(); });
    case Function::reciprocal_root:
      return of([](Lanes x) { return x.rsqrt(); });
    case Function::exponential:
      return of([](Lanes x) { return x.exp(); });
    case Function::tanh:
      return of([](Lanes x) { return x.tanh(); });
    case Function::sigmoid:
      return of(sigmoid);
    case Function::silu:
      return of(silu);
    case Function::gelu:
      return of(gelu);
    case Function::gelu_tanh:
      return of(gelu_tanh);
    case Function::relu:
      return of([](Lanes x) { return at::vec::maximum(x, Lanes(0.0f)); });
    case Function::cosine:
      return of([](Lanes x) { return x.cos(); });
    case Function::sine:
      return of([](Lanes x) { return x.sin(); });
    case Function::maximum:
      return of_two([](Lanes x, Lanes y) { return at::vec::maximum(x, y); });
    case Function::minimum:
      return of_two([](Lanes x, Lanes y) { return at::vec::minimum(x, y); });
    case Function::silu_times:
      return of_two([](Lanes x, Lanes y) { return silu(x) * y; });
    case Function::gelu_times:
      return of_two([](Lanes x, Lanes y) { return gelu(x) * y; });
    case Function::gelu_tanh_times:
      return of_two([](Lanes x, Lanes y) { return gelu_tanh(x) * y; });
    default:
      TORCH_CHECK(false, "fxopt::execute: no such function of float32");
  }
}

// The same of int64; `real` gives float32.
inline void whole_map(Words& words, const Memory& memory) {
  const auto of_two = [&](auto f) {
    const Loop<int64_t, 3> loop(words, memory);
    const int64_t last = loop.dimensions - 1;
    loop.each([&](int64_t* const* from, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        from[0][i * loop.strides[0][last]] =
            f(from[1][i * loop.strides[1][last]], from[2][i * loop.strides[2][last]]);
      }
    });
  };
  switch (static_cast<Function>(words.next())) {
    case Function::add:
      return of_two([](int64_t x, int64_t y) { return x + y; });
    case Function::sub:
      return of_two([](int64_t x, int64_t y) { return x - y; });
    case Function::mul:
      return of_two([](int64_t x, int64_t y) { return x * y; });
    case Function::real: {
      // The result is contiguous.
      float* to = memory.pointer<float>(words);
      const Loop<int64_t, 1> loop(words, memory);
      const int64_t inner = loop.sizes[loop.dimensions - 1];
      TORCH_CHECK(inner <= kChunk, "fxopt::execute: too many int64 in a row");
      const int64_t stride = loop.strides[0][loop.dimensions - 1];
      loop.each([&](int64_t* const* from, int64_t count) {
        for (int64_t i = 0; i < count; ++i) *to++ = static_cast<float>(from[0][i * stride]);
      });
      return;
    }
    default:
      TORCH_CHECK(false, "fxopt::execute: no such function of int64");
  }
}

// Rows [rows, size] of a tensor whose rows are contiguous.
template <class T>
struct Table {
  T* data;
  int64_t pitch;
  Table(Words& words, const Memory& memory)
      : data(memory.pointer<T>(words)), pitch(words.next()) {}
  T* row(int64_t index) const { return data + index * pitch; }
};

// f(x) added up over a row.
template <class F>
float sum_of(const float* row, int64_t size, const F& f) {
  Lanes sums[4] = {Lanes(0.0f), Lanes(0.0f), Lanes(0.0f), Lanes(0.0f)};
  int64_t i = 0;
  for (; i + 4 * Lanes::size() <= size; i += 4 * Lanes::size()) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + f(Lanes::loadu(row + i + j * Lanes::size()));
  }
  for (; i + Lanes::size() <= size; i += Lanes::size()) sums[0] = sums[0] + f(Lanes::loadu(row + i));
  float lanes[Lanes::size()];
  ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(lanes);
  float total = 0.0f;
  for (float lane : lanes) total += lane;
  if (i < size) {
    f(Lanes::loadu(row + i, size - i)).store(lanes);
    for (int64_t j = 0; j < size - i; ++j) total += lanes[j];
  }
  return total;
}

// body(row) for each of `rows` rows of `size`.
template <class Body>
void each_row(int64_t rows, int64_t size, const Body& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  };
  if (rows * size < kManyEntries) return run(0, rows);
  parallel(0, rows, std::max<int64_t>(1, kChunk / size), run);
}

inline void mean(Words& words, const Memory& memory) {
  const int64_t rows = words.next(), size = words.next();
  float* to = memory.pointer<float>(words);
  const Table<const float> x(words, memory);
  each_row(rows, size, [&](int64_t row) {
    to[row] = sum_of(x.row(row), size, [](Lanes v) { return v; }) / static_cast<float>(size);
  });
}

// y = (x - middle) unit weight + bias
inline void scale_row(const float* x, Lanes middle, Lanes unit, const float* weight,
                      const float* bias, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += Lanes::size()) {
    const int64_t some = std::min<int64_t>(Lanes::size(), size - i);
    Lanes y = (strided(x + i, 1, some) - middle) * unit;
    if (weight) y = y * strided(weight + i, 1, some);
    if (bias) y = y + strided(bias + i, 1, some);
    put(y, to + i, 1, some);
  }
}

inline void layer_norm(Words& words, const Memory& memory) {
  const int64_t rows = words.next(), size = words.next();
  const float epsilon = words.real();
  float* to = memory.pointer<float>(words);
  const Table<const float> x(words, memory);
  const float* weight = memory.pointer<const float>(words);
  const float* bias = memory.pointer<const float>(words);
  each_row(rows, size, [&](int64_t row) {
    const float* from = x.row(row);
    const float count = static_cast<float>(size);
    const Lanes middle(sum_of(from, size, [](Lanes v) { return v; }) / count);
    const auto squares = [&](Lanes v) { return (v - middle) * (v - middle); };
    const float unit = 1.0f / std::sqrt(sum_of(from, size, squares) / count + epsilon);
    scale_row(from, middle, Lanes(unit), weight, bias, size, to + row * size);
  });
}

// y = x / sqrt(mean(x^2) + epsilon) weight
inline void rms_norm(Words& words, const Memory& memory) {
  const int64_t rows = words.next(), size = words.next();
  const float epsilon = words.real();
  float* to = memory.pointer<float>(words);
  const Table<const float> x(words, memory);
  const float* weight = memory.pointer<const float>(words);
  each_row(rows, size, [&](int64_t row) {
    const float* from = x.row(row);
    const float squares = sum_of(from, size, [](Lanes v) { return v * v; });
    const float unit = 1.0f / std::sqrt(squares / static_cast<float>(size) + epsilon);
    scale_row(from, Lanes(0.0f), Lanes(unit), weight, nullptr, size, to + row * size);
  });
}

// The two halves of each row of x turned by angles: y = x cos + [-right, left] sin.
inline void rotate(Words& words, const Memory& memory) {
  const Loop<float, 4> loop(words, memory);
  TORCH_CHECK(loop.sizes[loop.dimensions - 1] <= kChunk, "fxopt::execute: too long a row to turn");
  loop.each([&](float* const* from, int64_t size) {
    const int64_t half = size / 2;
    float* to = from[0];
    const float *x = from[1], *cosine = from[2], *sine = from[3];
    for (int64_t i = 0; i < half; i += Lanes::size()) {
      const int64_t some = std::min<int64_t>(Lanes::size(), half - i);
      const Lanes left = strided(x + i, 1, some), right = strided(x + half + i, 1, some);
      const auto turned = [&](int64_t at, Lanes straight, Lanes across) {
        put(straight * strided(cosine + at, 1, some) + across * strided(sine + at, 1, some),
            to + at, 1, some);
      };
      turned(i, left, right.neg());
      turned(half + i, right, left);
    }
  });
}

// out[o, i, :] = x[o, index[i], :], rows of so many bytes.
inline void gather(Words& words, const Memory& memory) {
  const int64_t outer = words.next(), count = words.next(), length = words.next();
  const int64_t bytes = words.next();
  const bool wraps = words.next();
  char* to = memory.pointer<char>(words);
  const char* from = memory.pointer<const char>(words);
  const int64_t* indices = memory.pointer<const int64_t>(words);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < count; ++i, to += bytes) {
      const int64_t given = indices[i], index = wraps && given < 0 ? given + length : given;
      TORCH_CHECK_INDEX(index >= 0 && index < length, "index ", given, " is out of range for ",
                        length, " rows");
      std::memcpy(to, from + (o * length + index) * bytes, bytes);
    }
  }
}

// What is stored narrower as float32.
inline void widen(Words& words, const Memory& memory) {
  const auto stored = static_cast<Stored>(words.next());
  const int64_t count = words.next();
  float* to = memory.pointer<float>(words);
  const char* given = memory.pointer<const char>(words);
  const auto of = [&](auto like) {
    const auto* from = reinterpret_cast<const decltype(like)*>(given);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
  };
  switch (stored) {
    case Stored::bfloat16:
      return of(at::BFloat16());
    case Stored::float16:
      return of(at::Half());
    case Stored::int8:
      return of(int8_t());
    default:
      TORCH_CHECK(false, "fxopt::execute: nothing to widen");
  }
}

inline void product(Words& words, const Memory& memory) {
  const auto stored = static_cast<Stored>(words.next());
  const int64_t rows = words.next(), inner = words.next(), outputs = words.next();
  float* to = memory.pointer<float>(words);
  const float* x = memory.pointer<const float>(words);
  const char* weight = memory.pointer<const char>(words);
  const float* bias = memory.pointer<const float>(words);
  const char *scale = memory.pointer<const char>(words), *zero = memory.pointer<const char>(words);
  const bool half = words.next();
  const int64_t group = words.next();
  const bool rounds = words.next();
  const auto times = [&](const auto& of, const float* scales) {
    const Results results{to, rows, outputs, scales, bias};
    rows > kFewRows ? many_rows(of, x, results) : multiply(x, rows, of, results);
  };
  const auto plain = [&](auto like, const float* scales) {
    using T = decltype(like);
    times(Plain<T>{reinterpret_cast<const T*>(weight), inner}, scales);
  };
  const auto grouped = [&](auto like) {
    using S = decltype(like);
    const S *scales = reinterpret_cast<const S*>(scale), *zeros = reinterpret_cast<const S*>(zero);
    const auto with = [&](const auto& groups) {
      using Weight = std::decay_t<decltype(groups)>;
      rounds ? times(Rounded<Weight>{groups, outputs}, nullptr) : times(groups, nullptr);
    };
    if (stored == Stored::int4) {
      return with(Int4<S>{reinterpret_cast<const uint8_t*>(weight), inner, scales, zeros, group});
    }
    with(Int8Groups<S>{reinterpret_cast<const int8_t*>(weight), inner, scales, group});
  };
  switch (stored) {
    case Stored::float32:
      return plain(float(), nullptr);
    case Stored::bfloat16:
      return plain(at::BFloat16(), nullptr);
    case Stored::float16:
      return plain(at::Half(), nullptr);
    default:
      if (!group) return plain(int8_t(), reinterpret_cast<const float*>(scale));
      return half ? grouped(at::Half()) : grouped(0.0f);
  }
}

// A linear layer of many rows by its operator, for weights of float32.
inline void operator_call(Words& words, Memory& memory, at::TensorList held) {
  using Maybe = std::optional<at::Tensor>;
  const bool packed = words.next();
  const int64_t base = words.next(), result = words.next();
  const int64_t rows = words.next(), inner = words.next(), outputs = words.next();
  const auto rows_at = [&](float* data, int64_t size) {
    return at::from_blob(data, {rows, size}, at::TensorOptions(at::kFloat));
  };
  const at::Tensor x = rows_at(memory.pointer<float>(words), inner);
  const at::Tensor& weight = held[words.next()];
  const int64_t index = words.next(), post_op = words.next();
  const Maybe bias = index < 0 ? Maybe() : Maybe(held[index]);
  float* other = memory.pointer<float>(words);
  const auto named = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  };
  using Tensor = at::Tensor;
  using Linear = Tensor(const Tensor&, const Tensor&, const Maybe&);
  using Packed =
      Tensor(const Tensor&, const Tensor&, const Maybe&, c10::string_view, const Maybe&);
  static const auto linear = named("aten::linear").typed<Linear>();
  static const auto packed_linear = named("fxopt::packed_linear").typed<Packed>();
  at::Tensor y = packed ? packed_linear.call(x, weight, bias, kPostOps[post_op],
                                             other ? Maybe(rows_at(other, outputs)) : Maybe())
                        : linear.call(x, weight, bias);
  y = y.contiguous();
  memory.bases[base + result] = static_cast<char*>(y.mutable_data_ptr());
  memory.results[result] = std::move(y);
}

template <class T>
Heads<T> heads_of(Words& words, const Memory& memory) {
  const T* data = memory.pointer<const T>(words);
  const int64_t batch = words.next(), head = words.next(), slot = words.next();
  return {data, batch, head, slot};
}

// Keys or values of the prefix: which input they are, and which of its axes is batch, head, slot.
template <class T>
Heads<T> prefix_of(Words& words, at::TensorList inputs, const std::array<int64_t, 4>& sizes) {
  const at::Tensor& given = inputs[words.next()];
  const std::array<int64_t, 3> axes{words.next(), words.next(), words.next()};
  bool fits = given.is_cpu() && given.scalar_type() == c10::CppTypeToScalarType<T>::value;
  for (int i = 0; i < 3; ++i) fits = fits && given.size(axes[i]) == sizes[i];
  // A last axis of size 1 need not be there.
  const bool rows = given.dim() == 4;
  fits = fits && (rows ? given.size(3) == sizes[3] && (given.stride(3) == 1 || sizes[3] == 1)
                       : sizes[3] == 1);
  TORCH_CHECK(fits, "fxopt::execute: the prefix has other sizes than the step was laid out for");
  return {given.const_data_ptr<T>(), given.stride(axes[0]), given.stride(axes[1]),
          given.stride(axes[2])};
}

inline void attention(Words& words, const Memory& memory, at::TensorList inputs) {
  const at::Tensor& past_seen = inputs[words.next()];
  const bool int8 = words.next();
  const int64_t batch = words.next(), heads = words.next(), groups = words.next();
  const int64_t queries = words.next(), size = words.next(), value_size = words.next();
  const float scale = words.real();
  const int64_t window = words.next();
  const float softcap = words.real();
  float* to = memory.pointer<float>(words);
  const Heads<float> q = heads_of<float>(words, memory), k = heads_of<float>(words, memory),
                     v = heads_of<float>(words, memory);
  const Held seen{memory.pointer<const bool>(words), queries};
  const float* sinks = memory.pointer<const float>(words);
  TORCH_CHECK(past_seen.scalar_type() == at::kBool && past_seen.is_contiguous() &&
                  past_seen.size(0) == batch,
              "fxopt::execute: the prefix has other sizes than the step was laid out for");
  const int64_t past = past_seen.size(1);
  const Sizes sizes{batch, heads, groups, queries, past, size, value_size};
  const Options options{scale, window, softcap, sinks};
  const Held held = held_of(past_seen);
  const std::array<int64_t, 4> of_keys{batch, groups, past, size};
  const std::array<int64_t, 4> of_values{batch, groups, past, value_size};
  if (!int8) {
    const Heads<float> keys = prefix_of<float>(words, inputs, of_keys);
    const Heads<float> values = prefix_of<float>(words, inputs, of_values);
    return Attention<float>{sizes, options, q, {k, v, seen}, {keys, values, held}, to}.run();
  }
  const std::array<int64_t, 4> of_scales{batch, groups, past, 1};
  const Heads<int8_t> keys = prefix_of<int8_t>(words, inputs, of_keys);
  const Heads<int8_t> values = prefix_of<int8_t>(words, inputs, of_values);
  const Heads<float> key_scales = prefix_of<float>(words, inputs, of_scales);
  const Heads<float> value_scales = prefix_of<float>(words, inputs, of_scales);
  const Keyed<int8_t> prefix{keys, values, held, key_scales, value_scales};
  Attention<float, int8_t>{sizes, options, q, {k, v, seen}, prefix, to}.run();
}

// Zeros, so many bytes.
inline void clear(Words& words, const Memory& memory) {
  const int64_t bytes = words.next();
  std::memset(memory.pointer<char>(words), 0, bytes);
}

// start, start + step, ... as int64.
inline void count(Words& words, const Memory& memory) {
  const int64_t entries = words.next(), start = words.next(), step = words.next();
  int64_t* to = memory.pointer<int64_t>(words);
  for (int64_t i = 0; i < entries; ++i) to[i] = start + i * step;
}

// All instructions up to `end`.
inline void instructions(Words words, const int64_t* end, Memory& memory, at::TensorList inputs,
                         at::TensorList held) {
  while (words.at() != end) {
    switch (static_cast<Kind>(words.next())) {
      case Kind::map:
        map(words, memory);
        break;
      case Kind::whole_map:
        whole_map(words, memory);
        break;
      case Kind::mean:
        mean(words, memory);
        break;
      case Kind::layer_norm:
        layer_norm(words, memory);
        break;
      case Kind::rms_norm:
        rms_norm(words, memory);
        break;
      case Kind::rotate:
        rotate(words, memory);
        break;
      case Kind::gather:
        gather(words, memory);
        break;
      case Kind::widen:
        widen(words, memory);
        break;
      case Kind::product:
        product(words, memory);
        break;
      case Kind::operator_call:
        operator_call(words, memory, held);
        break;
      case Kind::attention:
        attention(words, memory, inputs);
        break;
      case Kind::clear:
        clear(words, memory);
        break;
      case Kind::count:
        count(words, memory);
        break;
      default:
        TORCH_CHECK(false, "fxopt::execute: no such instruction");
    }
  }
}

// The outputs of a program. `code` int64 begins with the bytes of memory that the call needs, how
// many results of operators it keeps at a time, and the sizes and strides of its outputs; tensors
// are contiguous but for those of the prefix.
inline std::vector<at::Tensor> execute(const at::Tensor& code, at::TensorList inputs,
                                       at::TensorList held) {
  const int64_t* begin = code.const_data_ptr<int64_t>();
  Words words(begin);
  const int64_t bytes = words.next(), results = words.next();
  // A small call takes the memory that the one before it had.
  thread_local Floats kept;
  const int64_t floats = bytes / int64_t(sizeof(float));
  const at::Tensor room = floats > kKeptFloats ? at::empty({floats}, at::TensorOptions(at::kFloat))
                                               : at::Tensor();
  if (!room.defined()) kept.grow(floats);
  Memory memory;
  memory.bases.reserve(2 + inputs.size() + held.size() + 256);
  memory.results.resize(results);
  const auto add = [&](const void* data) {
    memory.bases.push_back(static_cast<char*>(const_cast<void*>(data)));
  };
  add(room.defined() ? room.mutable_data_ptr() : kept.data());
  add(begin);
  for (const at::Tensor& input : inputs) add(input.const_data_ptr());
  for (const at::Tensor& one : held) {
    TORCH_CHECK(one.is_contiguous(), "fxopt::execute: a tensor that is held isn't contiguous");
    add(one.const_data_ptr());
  }
  std::vector<at::Tensor> outputs(words.next());
  for (at::Tensor& output : outputs) {
    const int64_t dimensions = words.next();
    const at::IntArrayRef sizes(words.at(), dimensions), strides(words.at() + dimensions, dimensions);
    output = at::empty_strided(sizes, strides, at::TensorOptions(at::kFloat));
    words = Words(strides.end());
    add(output.mutable_data_ptr());
  }
  for (int64_t i = 0; i < results; ++i) add(nullptr);
  const int64_t* end = begin + code.numel();
  const auto run = [&] { instructions(words, end, memory, inputs, held); };
  // Operators that many rows go to have threads of their own.
  with_team(results ? 1 : at::get_num_threads(), run);
  return outputs;
}

}  // namespace
}  // namespace fxopt
