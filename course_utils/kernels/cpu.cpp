// Products of inputs with packed weights, on a CPU. Built at first use and called from compiled.py.
//
// A weight [rows, columns] is a bit stream for each row (packing.py). It is read in tiles of TILE codes, and
// a tile in words. One shift and one mask cut a code out of each word of the tile, for all words at once:
// that is what vector units do well. The codes come out in another order than they are stored in: first those
// at bit 0 of their words, then those at the next place, and so on. The inputs are put into the same order,
// once a call, and so no code has to move.
//
// A code q stands for (q - zero) * scale, both of its group, or for codebook[q] * scale. With x_sum the sum of
// a tile's inputs, what the tile adds to an output is
//
//     sum (q - zero) * scale * x = scale * (sum q * x - zero * x_sum)
//
// GCC's vector types, which Clang has too, become AVX2, AVX-512 or NEON. Intrinsics stand only where the
// compiler does not find the instruction, under __AVX2__ and beside portable code. Left out for readability:
// blocking over rows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct Weight {
  const uint8_t* codes;   // [rows, columns * BITS / 8]
  const float* scale;     // [rows, groups]
  const float* zero;      // [rows, groups]; not read with a codebook
  const float* codebook;  // [16], with 4 bits; or null
  int64_t rows, columns, groups;
};

// A number as a type.
template <int N>
struct Number {
  static constexpr int value = N;
};

// N elements that are handled at once.
template <typename Element, int N>
struct Vector {
  typedef Element type __attribute__((vector_size(N * sizeof(Element))));
};

template <typename V, typename Element>
inline V& load(V&& v, const Element* from) {
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Calls f(tile, bytes, group) for all tiles of a row.
template <int BITS, int TILE, typename F>
inline void for_tiles(const Weight& W, int64_t row, F f) {
  const int64_t tiles_of_group = W.columns / TILE / W.groups;
  const uint8_t* bytes = W.codes + row * W.columns * BITS / 8;
  const int64_t first = row * W.groups, end = first + W.groups;
  int64_t tile = 0;
  for (int64_t group = first; group < end; group++)
    for (int64_t i = 0; i < tiles_of_group; i++, tile++, bytes += TILE * BITS / 8)
      f(tile, bytes, group);
}

// The words of a tile for float inputs: of 32 bits, or of the 24 that eight codes of 3 bits take, or of fewer
// where a tile would make less than eight.
constexpr int codes_of_word(int bits, int tile) {
  if (bits == 3) return 8;
  return 32 / bits < tile / 8 ? 32 / bits : tile / 8;
}

template <int BITS, int TILE>
struct Words {
  static constexpr int CODES = codes_of_word(BITS, TILE);
  static constexpr int COUNT = TILE / CODES;
  typedef typename Vector<uint32_t, COUNT>::type Bits;
  typedef typename Vector<int32_t, COUNT>::type Codes;
  typedef typename Vector<float, COUNT>::type Floats;
  Bits words;

  explicit Words(const uint8_t* bytes) {
    constexpr int WIDTH = CODES * BITS;  // bits of a word
    if constexpr (WIDTH == 32)
      std::memcpy(&words, bytes, sizeof words);
    else if constexpr (WIDTH == 16)
      words = __builtin_convertvector(load(typename Vector<uint16_t, COUNT>::type(), bytes), Bits);
    else if constexpr (WIDTH == 8)
      words = __builtin_convertvector(load(typename Vector<uint8_t, COUNT>::type(), bytes), Bits);
    else
      for (int w = 0; w < COUNT; w++, bytes += 3)
        words[w] = bytes[0] | bytes[1] << 8 | bytes[2] << 16;
  }

  // The codes at place c of all words.
  Codes at(int c) const { return Codes(words >> (BITS * c) & ((1u << BITS) - 1)); }
};

// What the codes at a place of all words stand for, but for scale and zero.
template <bool CODEBOOK, typename Tile>
inline typename Tile::Floats values(const Tile& tile, int place, const float* codebook) {
  const typename Tile::Codes codes = tile.at(place);
  typename Tile::Floats found;
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (CODEBOOK && Tile::COUNT == 8) {  // sixteen values in two registers
    typename Tile::Floats low, high;
    low = __builtin_shuffle(load(low, codebook), codes & 7);
    high = __builtin_shuffle(load(high, codebook + 8), codes & 7);
    return codes > 7 ? high : low;
  }
#endif
  if constexpr (!CODEBOOK) return __builtin_convertvector(codes, typename Tile::Floats);
  for (int w = 0; w < Tile::COUNT; w++) found[w] = codebook[codes[w]];
  return found;
}

// y[i, row] for M inputs x [M, columns]: each tile is decoded once for all of them.
template <int BITS, int TILE, bool CODEBOOK, int M>
inline void float_row(const Weight& W, int64_t row, const float* x, const float* x_sum, float* y) {
  typedef Words<BITS, TILE> Tile;
  typedef typename Tile::Floats Floats;
  Floats sums[M] = {};
  float less[M] = {};
  const int64_t tiles = W.columns / TILE;
  for_tiles<BITS, TILE>(W, row, [&](int64_t tile, const uint8_t* bytes, int64_t group) {
    const Tile words(bytes);
    Floats products[M] = {};
    for (int c = 0; c < Tile::CODES; c++) {
      const Floats w = values<CODEBOOK>(words, c, W.codebook);
      for (int i = 0; i < M; i++)
        products[i] += w * load(Floats(), x + i * W.columns + tile * TILE + c * Tile::COUNT);
    }
    for (int i = 0; i < M; i++) {
      sums[i] += W.scale[group] * products[i];
      if (!CODEBOOK) less[i] += W.scale[group] * W.zero[group] * x_sum[i * tiles + tile];
    }
  });
  for (int i = 0; i < M; i++) {
    float sum = 0;
    for (int l = 0; l < Tile::COUNT; l++) sum += sums[i][l];
    y[i * W.rows + row] = sum - less[i];
  }
}

// A tile of inputs in the order of its codes. Where two codes share a byte, the first is the low half of it, or
// with `high_first` the high one.
inline void order(const float* x, float* ordered, int tile, int codes_of_word, bool high_first) {
  const int count = tile / codes_of_word;
  for (int c = 0; c < codes_of_word; c++)
    for (int w = 0; w < count; w++)
      ordered[c * count + w] = x[w * codes_of_word + (high_first ? c ^ 1 : c)];
}

// Inputs in int8: each tile has a scale, its largest magnitude / 127, or 1 where the inputs are codes already.
// Codes are rounded to even at ties.
struct Inputs {
  const int8_t* codes;  // [m, columns], -127 to 127
  const float* scale;   // [m, tiles]
  const float* sum;     // [m, tiles]: of the codes
};

// Whether it could: false for NaN and infinity, which have no code, and for codes beyond 127.
inline bool to_int8(const float* x, bool are_codes, int8_t* codes, float* scale, float* sum, int tile) {
  float largest = 0, total = 0;
  for (int j = 0; j < tile; j++) {
    if (!std::isfinite(x[j])) return false;
    largest = std::fmax(largest, std::fabs(x[j]));
  }
  if (are_codes && largest > 127) return false;
  const float inverse = are_codes ? 1 : largest > 0 ? 127 / largest : 0;
  for (int j = 0; j < tile; j++) {
    const float code = std::nearbyint(x[j] * inverse);
    codes[j] = int8_t(code);
    total += code;
  }
  *scale = are_codes ? 1 : largest / 127;
  *sum = total;
  return true;
}

// COUNT bytes of codes, and of inputs. A product adds neighbours, and so its sums are twice as wide.
template <int COUNT>
struct Bytes {
  typedef typename Vector<uint16_t, COUNT / 2>::type Words;  // two codes each
  typedef typename Vector<int16_t, COUNT / 2>::type Shorts;
  typedef typename Vector<int32_t, COUNT / 4>::type Ints;

  // Codes from 0 to 127 times inputs.
  static Shorts products(const Words& q, const Shorts& x) {
#ifdef __AVX2__  // one instruction
    if constexpr (COUNT == 32) return Shorts(_mm256_maddubs_epi16(__m256i(q), __m256i(x)));
    if constexpr (COUNT == 16) return Shorts(_mm_maddubs_epi16(__m128i(q), __m128i(x)));
#endif
    return Shorts(q & 255) * ((x << 8) >> 8) + Shorts(q >> 8) * (x >> 8);
  }

  static Ints products(const Shorts& a, const Shorts& b) {
#ifdef __AVX2__
    if constexpr (COUNT == 32) return Ints(_mm256_madd_epi16(__m256i(a), __m256i(b)));
    if constexpr (COUNT == 16) return Ints(_mm_madd_epi16(__m128i(a), __m128i(b)));
#endif
    const Ints c = Ints(a), d = Ints(b);
    return ((c << 16) >> 16) * ((d << 16) >> 16) + (c >> 16) * (d >> 16);
  }
};

// A tile of codes of 2 or 4 bits times M inputs. Codes are cut out of all bytes at once. A sum of 16 bits
// holds 4 * 2 * 15 * 127 at most.
template <int BITS, int TILE, int M>
struct IntegerTile {
  static constexpr int BYTES = TILE * BITS / 8, COUNT = BYTES < 32 ? BYTES : 32;
  typedef Bytes<COUNT> B;
  typedef typename B::Ints Ints;

  static void products(const uint8_t* bytes, const int8_t* x, int64_t columns, Ints (&sums)[M]) {
    typename B::Shorts pairs[M] = {};
    for (int at = 0; at < BYTES; at += COUNT) {
      const auto words = load(typename B::Words(), bytes + at);
      for (int c = 0; c < 8 / BITS; c++) {
        const typename B::Words q = words >> (BITS * c) & (0x101 * ((1 << BITS) - 1));
        for (int i = 0; i < M; i++)
          pairs[i] += B::products(q, load(typename B::Shorts(), x + i * columns + c * BYTES + at));
      }
    }
    for (int i = 0; i < M; i++) sums[i] = B::products(pairs[i], typename B::Shorts() + 1);
  }
};

// Of 8 bits, which 16 bits do not hold the products of: both are widened first.
template <int TILE, int M>
struct IntegerTile<8, TILE, M> {
  typedef Bytes<32> B;
  typedef B::Ints Ints;
  typedef Vector<uint8_t, 16>::type Codes;
  typedef Vector<int8_t, 16>::type Inputs;

  static void products(const uint8_t* bytes, const int8_t* x, int64_t columns, Ints (&sums)[M]) {
    for (int i = 0; i < M; i++) sums[i] = Ints();
    for (int at = 0; at < TILE; at += 16) {
      const B::Shorts q = __builtin_convertvector(load(Codes(), bytes + at), B::Shorts);
      for (int i = 0; i < M; i++)
        sums[i] += B::products(
            q, __builtin_convertvector(load(Inputs(), x + i * columns + at), B::Shorts));
    }
  }
};

// y[i, row] for M inputs in int8. What the zero points take off: `offset` [M, groups], the sums of inputs.
template <int BITS, int TILE, int M>
inline void int8_row(const Weight& W, int64_t row, const Inputs& x, const float* offset, float* y) {
  typedef IntegerTile<BITS, TILE, M> Tile;
  constexpr int LANES = sizeof(typename Tile::Ints) / 4;
  typedef typename Vector<float, LANES>::type Floats;
  Floats sums[M] = {};
  const int64_t tiles = W.columns / TILE, columns = W.columns;
  const float *of_group = W.scale, *of_tile = x.scale;
  const int8_t* inputs = x.codes;
  for_tiles<BITS, TILE>(W, row, [&](int64_t tile, const uint8_t* bytes, int64_t group) {
    typename Tile::Ints products[M];
    Tile::products(bytes, inputs + tile * TILE, columns, products);
    for (int i = 0; i < M; i++)
      sums[i] += of_group[group] * of_tile[i * tiles + tile] * __builtin_convertvector(products[i], Floats);
  });
  for (int i = 0; i < M; i++) {
    float sum = 0, less = 0;
    for (int l = 0; l < LANES; l++) sum += sums[i][l];
    const float *scale = W.scale + row * W.groups, *zero = W.zero + row * W.groups;
#pragma omp simd reduction(+ : less)
    for (int64_t group = 0; group < W.groups; group++)
      less += scale[group] * zero[group] * offset[i * W.groups + group];
    y[i * W.rows + row] = sum - less;
  }
}

// Calls f(Number<M>, first) with M = 8, 4, 2 and 1 inputs at a time, until all m are done.
template <typename F>
inline void in_parts(int64_t m, F f) {
  int64_t i = 0;
  for (; i + 8 <= m; i += 8) f(Number<8>(), i);
  if (m - i >= 4) f(Number<4>(), i), i += 4;
  if (m - i >= 2) f(Number<2>(), i), i += 2;
  if (m - i >= 1) f(Number<1>(), i);
}

template <int BITS, int TILE, bool CODEBOOK>
void float_rows(const Weight& W, const float* x, const float* x_sum, float* y, int64_t m, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < W.rows; row++)
    in_parts(m, [&](auto some, int64_t i) {
      float_row<BITS, TILE, CODEBOOK, some.value>(W, row, x + i * W.columns,
                                                  x_sum + i * (W.columns / TILE), y + i * W.rows);
    });
}

template <int BITS, int TILE>
void int8_rows(const Weight& W, const Inputs& x, float* y, int64_t m, int threads) {
  const int64_t tiles = W.columns / TILE, of_group = tiles / W.groups;
  std::vector<float> offset(m * W.groups);  // what one step of the zero point takes from an output
  for (int64_t t = 0; t < m * tiles; t++) offset[t / of_group] += x.scale[t] * x.sum[t];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < W.rows; row++)
    in_parts(m, [&](auto some, int64_t i) {
      const Inputs part = {x.codes + i * W.columns, x.scale + i * tiles, x.sum + i * tiles};
      int8_row<BITS, TILE, some.value>(W, row, part, offset.data() + i * W.groups, y + i * W.rows);
    });
}

template <int BITS, int TILE, bool CODEBOOK>
void decode_rows(const Weight& W, float* out, int64_t first, int64_t count, int threads) {
  typedef Words<BITS, TILE> Tile;
  typedef typename Tile::Floats Floats;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < count; row++)
    for_tiles<BITS, TILE>(W, first + row, [&](int64_t tile, const uint8_t* bytes, int64_t group) {
      const Tile words(bytes);
      const float zero = CODEBOOK ? 0 : W.zero[group];
      for (int c = 0; c < Tile::CODES; c++) {
        const Floats w = (values<CODEBOOK>(words, c, W.codebook) - zero) * W.scale[group];
        std::memcpy(out + row * W.columns + tile * TILE + c * Tile::COUNT, &w, sizeof w);
      }
    });
}

// Five trits in a byte of "base3" (ternary.py) times five inputs: one sum for each of the 243 that a byte can
// stand for, made by additions, from the last trit to the first; then one for each byte.
void sums_of_bytes(const int8_t* x, int16_t* of_byte) {
  int16_t sums[243] = {0};
  for (int trit = 4, known = 1; trit >= 0; trit--, known *= 3)
    for (int j = 0; j < known; j++) {
      const int16_t sum = sums[j];
      sums[j] = sum - x[trit];
      sums[known + j] = sum;
      sums[2 * known + j] = sum + x[trit];
    }
  for (int byte = 0; byte < 256; byte++) of_byte[byte] = sums[byte * 243 >> 8];
}

// f(Number<TILE>), and 0; 1 for a tile that there is no code for.
template <typename F>
int with_tile(int tile, F f) {
  if (tile == 128) return f(Number<128>()), 0;
  if (tile == 64) return f(Number<64>()), 0;
  if (tile == 32) return f(Number<32>()), 0;
  return 1;
}

// f(Number<BITS>), or 1.
template <typename F>
int with_bits(int bits, F f) {
  if (bits == 2) return f(Number<2>());
  if (bits == 3) return f(Number<3>());
  if (bits == 4) return f(Number<4>());
  if (bits == 8) return f(Number<8>());
  return 1;
}

}  // namespace

// What is int returns 0; 1 for bits or a tile that there is no code for; 2 for inputs that have no int8 code.
extern "C" {

// y [m, rows] = x [m, columns] times the weight's transpose.
int float_product(const uint8_t* codes, const float* scale, const float* zero, const float* codebook,
                  int64_t rows, int64_t columns, int64_t groups, int bits, int tile, int high_first,
                  const float* x, float* y, int64_t m, int threads) {
  const Weight W = {codes, scale, zero, codebook, rows, columns, groups};
  const int64_t tiles = m * columns / tile;
  std::vector<float> ordered(m * columns), sums(tiles);
  for (int64_t t = 0; t < tiles; t++) {
    float* own = ordered.data() + t * tile;
    order(x + t * tile, own, tile, codes_of_word(bits, tile), high_first);
    for (int j = 0; j < tile; j++) sums[t] += own[j];
  }
  return with_bits(bits, [&](auto b) {
    return with_tile(tile, [&](auto t) {
      if constexpr (b.value == 4)
        if (codebook) return float_rows<4, t.value, true>(W, ordered.data(), sums.data(), y, m, threads);
      float_rows<b.value, t.value, false>(W, ordered.data(), sums.data(), y, m, threads);
    });
  });
}

// The same with inputs in int8, which `are_codes` already or get them here; not for 3 bits, nor with a codebook.
int int8_product(const uint8_t* codes, const float* scale, const float* zero, const float* codebook,
                 int64_t rows, int64_t columns, int64_t groups, int bits, int tile, int high_first,
                 const float* x, int are_codes, float* y, int64_t m, int threads) {
  const Weight W = {codes, scale, zero, codebook, rows, columns, groups};
  const int64_t tiles = m * columns / tile;
  std::vector<float> ordered(tile), x_scale(tiles), x_sum(tiles);
  std::vector<int8_t> x_codes(m * columns);
  for (int64_t t = 0; t < tiles; t++) {
    order(x + t * tile, ordered.data(), tile, 8 / bits, high_first);
    int8_t* own = x_codes.data() + t * tile;
    if (!to_int8(ordered.data(), are_codes, own, &x_scale[t], &x_sum[t], tile)) return 2;
  }
  const Inputs inputs = {x_codes.data(), x_scale.data(), x_sum.data()};
  return with_bits(bits, [&](auto b) {
    if constexpr (b.value == 3)
      return 1;
    else
      return with_tile(tile, [&](auto t) { int8_rows<b.value, t.value>(W, inputs, y, m, threads); });
  });
}

// Rows first .. first + count of the weight as floats [count, columns], in the order of the codes.
int decode(const uint8_t* codes, const float* scale, const float* zero, const float* codebook,
           int64_t rows, int64_t columns, int64_t groups, int bits, int tile, int /* high_first */,
           float* out, int64_t first, int64_t count, int threads) {
  const Weight W = {codes, scale, zero, codebook, rows, columns, groups};
  return with_bits(bits, [&](auto b) {
    return with_tile(tile, [&](auto t) {
      if constexpr (b.value == 4)
        if (codebook) return decode_rows<4, t.value, true>(W, out, first, count, threads);
      decode_rows<b.value, t.value, false>(W, out, first, count, threads);
    });
  });
}

// y [m, rows] = x [m, 5 * bytes] times trits [rows, 5 * bytes] transposed, by table look-up: nothing is
// multiplied. The tables of SOME bytes (16 KB) stay in the first cache while all rows look up in them.
void base3_product(const uint8_t* trits, const int8_t* x, int32_t* y, int64_t m, int64_t rows, int64_t bytes,
                   int threads) {
  constexpr int64_t SOME = 32, ROWS = 256, AHEAD = 8;
  std::vector<int16_t> tables(bytes * 256);
  for (int64_t i = 0; i < m; i++) {
    int32_t* sums = y + i * rows;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < bytes; b++) sums_of_bytes(x + (i * bytes + b) * 5, &tables[b * 256]);
#pragma omp for schedule(static)
      for (int64_t first = 0; first < rows; first += ROWS)
        for (int64_t b = 0; b < bytes; b += SOME)
          for (int64_t row = first; row < std::min(first + ROWS, rows); row++) {
            const int16_t* table = &tables[b * 256];
            const uint8_t* byte = trits + row * bytes + b;
            const int64_t some = std::min(SOME, bytes - b);
            // The rows lie far apart, and the processor does not guess the next one.
            __builtin_prefetch(byte + AHEAD * bytes);
            int32_t sum = b ? sums[row] : 0;
            for (int64_t k = 0; k < some; k++, table += 256) sum += table[byte[k]];
            sums[row] = sum;
          }
    }
  }
}

// Each row of x [rows, n], n a power of 2, becomes its sums and differences (hadamard.py), in place.
void hadamard(float* x, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t half = 1; half < n; half *= 2)
      for (float* pair = x + row * n; pair < x + (row + 1) * n; pair += 2 * half)
        for (int64_t j = 0; j < half; j++) {
          const float a = pair[j], b = pair[half + j];
          pair[j] = a + b;
          pair[half + j] = a - b;
        }
}

// c [m, n] = a [m, k] times b [n, k] transposed, in int32.
void int8_matmul(const int8_t* a, const int8_t* b, int32_t* c, int64_t m, int64_t n, int64_t k,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t column = 0; column < n; column++)
    for (int64_t row = 0; row < m; row++) {
      int32_t sum = 0;
      for (int64_t j = 0; j < k; j++)
        sum += int32_t(a[row * k + j]) * int32_t(b[column * k + j]);
      c[row * n + column] = sum;
    }
}
}
